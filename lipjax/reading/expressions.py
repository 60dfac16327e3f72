"""Expressions: what a function does entry by entry to one value, and which activation that is.

An expression is ``"x"``, the value itself, a constant that broadcasts to it, or an operation on expressions: a tuple of
the name of the operation, its parameters and its operands. An activation is known by its expression: those of all that
are supported are traced once, with holes where their parameters stand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.activations import Activation, ClipActivation, ReLUActivation
from lipjax.networks.leaky import LeakyReLUActivation
from lipjax.networks.smooth import SigmoidActivation
from lipjax.reading import activations, tracing

COMMUTING = {"add", "mul", "max", "min"}
LINEAR = {"add", "sub", "mul", "div", "neg"}
Expression = Any  # "x", a Constant, or a tuple
CLOSE = 2.0**-22  # of constants that a pattern computes, such as sqrt(2 / pi): a few roundings of float32


class UnsupportedError(TypeError):
    """What cannot be read, named: an operation with its place, or an activation with its parameters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that broadcasts to one example."""

    array: Any


class Name(str):
    """The name of an operation, which also knows where it stands."""

    equation: tracing.Equation

    def __new__(cls, name: str, equation: tracing.Equation) -> Name:
        """Of an equation."""
        self = super().__new__(cls, name)
        self.equation = equation
        return self


@dataclasses.dataclass(frozen=True)
class Hole:
    """Where a parameter of an activation stands."""

    name: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    """An activation's expression, and what it is for given parameters; None where it is none for those."""

    expression: Expression
    activation: Callable[..., Activation | None]


def affine(expression: Expression) -> tuple[Any, Any] | None:
    """Scale and shift of ``scale x + shift``, or None where an expression is not of that form."""
    if isinstance(expression, str):
        return 1.0, 0.0
    if isinstance(expression, Constant):
        return 0.0, expression.array
    name, _, *operands = expression
    if name not in LINEAR:
        return None
    parts = [part for part in map(affine, operands) if part is not None]
    if len(parts) < len(operands):
        return None
    (scale, shift), *rest = parts
    if name == "neg":
        return -scale, -shift
    ((other_scale, other_shift),) = rest
    if name in ("add", "sub"):
        sign = 1.0 if name == "add" else -1.0
        return scale + sign * other_scale, shift + sign * other_shift
    constant = isinstance(operands[1], Constant)
    if name == "div":
        return (scale / other_shift, shift / other_shift) if constant else None
    if constant:
        return scale * other_shift, shift * other_shift
    return (shift * other_scale, shift * other_shift) if isinstance(operands[0], Constant) else None


def match(expression: Expression) -> tuple[Expression, Activation] | None:
    """The argument of an activation, an expression, and the activation that an expression is; or None.

    Raises:
        UnsupportedError: it is one with parameters that are not supported.
    """
    for pattern in _patterns():
        found: dict[str, Any] = {}
        if _unify(pattern.expression, expression, found):
            parameters = {name: value.array for name, value in found.items() if name != "x"}
            activation = pattern.activation(**parameters)
            if activation is not None:
                return found["x"], activation
    return None


def _unify(pattern: Expression, expression: Expression, found: dict[str, Any]) -> bool:
    """Whether an expression is a pattern, and what stands for its argument and its holes."""
    if isinstance(pattern, str):
        return _bind("x", expression, found) and not isinstance(expression, Constant)
    if isinstance(pattern, Hole):
        return isinstance(expression, Constant) and _bind(pattern.name, expression, found)
    if isinstance(pattern, Constant):
        return isinstance(expression, Constant) and _close(pattern.array, expression.array)
    if not isinstance(expression, tuple) or expression[:2] != pattern[:2] or len(expression) != len(pattern):
        return False
    orders = [expression[2:]]
    if pattern[0] in COMMUTING:
        orders.append(expression[:1:-1])
    for operands in orders:
        trial = dict(found)
        if all(_unify(p, e, trial) for p, e in zip(pattern[2:], operands, strict=True)):
            found.update(trial)
            return True
    return False


def _bind(name: str, expression: Expression, found: dict[str, Any]) -> bool:
    if name not in found:
        found[name] = expression
        return True
    return equal(found[name], expression)


def equal(a: Expression, b: Expression) -> bool:
    """Whether two expressions are the same."""
    if a is b:
        return True
    if isinstance(a, Constant) and isinstance(b, Constant):
        return a.array is b.array or (tracing.known(a.array, b.array) and np.array_equal(a.array, b.array))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[:2] == b[:2] and len(a) == len(b) and all(map(equal, a[2:], b[2:]))
    return isinstance(a, str) and isinstance(b, str) and a == b


def _close(a: Any, b: Any) -> bool:
    """Whether a constant is that of a pattern, ``a``, as far as that is known while tracing."""
    if not tracing.known(a, b):
        return False
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    exact = np.all(2 * a == np.round(2 * a))  # 0, 0.5, 1, 6: nobody computes those
    near = a == b if exact else np.isclose(a, b, rtol=CLOSE, atol=0)
    return a.size > 0 and b.size > 0 and bool(np.all(near))


def operation(equation: tracing.Equation, operands: list[Expression]) -> Expression:
    """The expression of an operation entry by entry, and what it is in simpler words."""
    params = tuple(sorted((key, value) for key, value in equation.params.items() if key == "y"))  # of integer_pow
    name = {"square": "integer_pow", "lt": "gt", "le": "ge"}.get(equation.name, equation.name)
    if equation.name == "square":
        params = (("y", 2),)
    if equation.name in ("lt", "le"):
        operands = operands[::-1]
    if equation.name == "stop_gradient":
        return operands[0]
    return (Name(name, equation), params, *operands)


@functools.cache
def _patterns() -> tuple[Pattern, ...]:
    """All activations, those with fewer parameters first."""
    forms: list[tuple[Callable[..., Any], Callable[..., Activation | None]]] = [
        (lambda x: jax.nn.relu(x), ReLUActivation),
        (lambda x: jnp.where(x > 0, x, 0.0), ReLUActivation),
        (lambda x: jnp.where(x >= 0, x, 0.0), ReLUActivation),
        *(
            (function, factory)
            for function, factory in activations.FUNCTIONS.items()
            if function is not jax.nn.leaky_relu
        ),
        (functools.partial(jax.nn.gelu, approximate=False), functools.partial(activations.gelu, False)),
        (lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))), functools.partial(activations.gelu, False)),
        (lambda x: x * 0.5 * (1 + jax.lax.erf(x / np.sqrt(2))), functools.partial(activations.gelu, False)),
        (lambda x: x * jax.scipy.stats.norm.cdf(x), functools.partial(activations.gelu, False)),
        (lambda x: 1 / (1 + jnp.exp(-x)), SigmoidActivation),
        (lambda x, a: jnp.where(x >= 0, x, a * x), _leaky),
        (lambda x, a: jnp.where(x > 0, x, a * x), _leaky),
        (lambda x, a: jax.nn.elu(x, a), _elu),
        (lambda x, a: jnp.maximum(x, a * x), lambda a: _leaky(a) if _within(a, 0, 1) else None),
        (lambda x, a, b: jnp.minimum(jnp.maximum(x, a), b), lambda a, b: ClipActivation(*map(_float, (a, b)))),
        (lambda x, a, b: jnp.maximum(jnp.minimum(x, b), a), _other_clip),
        (
            lambda x, a, b: jax.lax.clamp(a, x, b),  # whatever the order, the same as jnp.clip
            lambda a, b: ClipActivation(*map(_float, (a, b))),
        ),
        (lambda x, a: jnp.maximum(x, a), lambda a: ClipActivation(_float(a), jnp.float32(jnp.inf))),
        (lambda x, b: jnp.minimum(x, b), lambda b: ClipActivation(jnp.float32(-jnp.inf), _float(b))),
    ]
    return tuple(Pattern(_traced(function), factory) for function, factory in forms)


def _traced(function: Callable[..., Any]) -> Expression:
    """The expression of a function of ``x`` and of parameters with names of one letter."""
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount] if hasattr(function, "__code__") else ()
    names = tuple(name for name in names if len(name) == 1)
    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct((2,), jnp.float32) for _ in range(1 + len(names))))
    found = tracing.Trace([], {}, [])
    inputs = [found.new(variable) for variable in closed.jaxpr.invars]
    (output,) = tracing.inline(closed.jaxpr, closed.consts, inputs, found)
    values: dict[int, Expression] = {
        inputs[0]: "x",
        **{k: Hole(name) for k, name in zip(inputs[1:], names, strict=True)},
    }
    values |= {number: Constant(value) for number, value in found.constants.items()}
    for equation in found.equations:
        operands = [values[each] if isinstance(each, int) else Constant(each) for each in equation.inputs]
        if is_identity(equation):
            values[equation.outputs[0]] = operands[0]
        elif all(isinstance(each, Constant) for each in operands):
            with jax.ensure_compile_time_eval():  # what is kept may not be traced, wherever it is asked for first
                known = equation.compute(*(jnp.asarray(each.array) for each in operands))
            values[equation.outputs[0]] = Constant(known[0])
        else:
            values[equation.outputs[0]] = operation(equation, operands)
    return values[output]


def is_identity(equation: tracing.Equation) -> bool:
    """Whether an equation changes at most the type or the shape of a scalar, which an expression does not know."""
    return equation.name in ("convert_element_type", "broadcast_in_dim", "copy", "copy_p")


def _float(value: Any) -> Array:
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _leaky(a: Any) -> LeakyReLUActivation:
    return LeakyReLUActivation(_float(a))


def _elu(a: Any) -> Activation | None:
    """Where the parameter is known, so that a message can name it; None elsewhere."""
    try:
        return activations.elu(np.asarray(a).item()) if tracing.known(a) and np.size(a) == 1 else None
    except TypeError as error:
        raise UnsupportedError(str(error)) from error


def _other_clip(a: Any, b: Any) -> Activation | None:
    """``max(min(x, b), a)``, which is the same as ``min(max(x, a), b)`` where a <= b."""
    return (
        ClipActivation(_float(a), _float(b)) if tracing.known(a, b) and np.all(np.asarray(a) <= np.asarray(b)) else None
    )


def _within(value: Any, low: float, high: float) -> bool:
    return tracing.known(value) and bool(np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)))

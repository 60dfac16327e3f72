"""Tracing: a function of a batch as flat equations, the same for batches of several sizes.

What a function does to each example shows in its jaxpr: two batches are traced side by side, of two and of three
examples, and whatever tells them apart is the axis of the batch. Others only have to do the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core, source_info_util

BATCHES = (2, 3, 7, 1024)  # of the first two, constants are computed; JAX has short cuts for one
CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat",
    "remat2",
}


@dataclasses.dataclass(frozen=True)
class Equation:
    """One primitive operation.

    Attributes:
        primitive: of JAX.
        params: its parameters.
        inputs: numbers of variables, or literals.
        outputs: numbers of variables.
        source: what JAX knows about where it is from.
    """

    primitive: core.Primitive
    params: dict[str, Any]
    inputs: tuple[int | np.ndarray, ...]
    outputs: tuple[int, ...]
    source: Any

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.primitive.name

    @property
    def place(self) -> str:
        """Where it stands: the innermost line outside of Flax, which is the user's, and the innermost one."""
        frames = [line.strip() for line in source_info_util.summarize(self.source, 30).splitlines()][::-1] or [""]
        own = next((frame for frame in frames if f"{os.sep}flax{os.sep}" not in frame), frames[0])
        return frames[0] if own == frames[0] else f"{own}, by {frames[0]}"

    @property
    def label(self) -> str:
        """For messages: what it is, and where."""
        return f"{self.name} at {self.place}" if self.place else self.name

    def compute(self, *values: Any) -> list[Any]:
        """The results for given operands."""
        results = self.primitive.bind(*values, **self.params)
        return list(results) if self.primitive.multiple_results else [results]


@dataclasses.dataclass
class Trace:
    """What a function does to a batch of one size.

    Attributes:
        equations: in order, calls of other functions inlined.
        constants: by variable: parameters and whatever else it closes over.
        types: shape and dtype by variable.
        input: its variable.
        output: its variable.
    """

    equations: list[Equation]
    constants: dict[int, Array]
    types: list[Any]
    input: int = 0
    output: int | np.ndarray = 0

    def new(self, variable: Any) -> int:
        """A number for a variable of a jaxpr."""
        self.types.append(variable.aval)
        return len(self.types) - 1


def trace(function: Callable[[Array], Array], shape: tuple[int, ...], batch: int, dtype: Any) -> Trace:
    """A function of a batch (batch, *shape), traced.

    Raises:
        TypeError: it takes or gives something else than one array.
    """
    with jax.numpy_dtype_promotion("standard"):  # Flax's average pooling divides by an integer
        closed = jax.make_jaxpr(lambda x: function(x))(jax.ShapeDtypeStruct((batch, *shape), dtype))
    if len(closed.jaxpr.invars) != 1 or len(closed.jaxpr.outvars) != 1:
        raise TypeError(f"it gives {len(closed.jaxpr.outvars)} arrays; expected one")
    found = Trace([], {}, [])
    found.input = found.new(closed.jaxpr.invars[0])
    (found.output,) = inline(closed.jaxpr, closed.consts, [found.input], found)
    return found


def same_structure(one: Trace, other: Trace) -> bool:
    """Whether two traces do the same, apart from the size of the batch."""
    if len(one.types) != len(other.types) or one.constants.keys() != other.constants.keys():
        return False
    if not all(_agree(value, other.constants[number]) for number, value in one.constants.items()):
        return False
    return len(one.equations) == len(other.equations) and all(
        a.name == b.name
        and a.outputs == b.outputs
        and len(a.inputs) == len(b.inputs)
        and all(map(_same, a.inputs, b.inputs))
        for a, b in zip(one.equations, other.equations, strict=True)
    )


def _agree(a: Any, b: Any) -> bool:
    """Whether two constants may be the same: they have other shapes, are not known yet, or are equal."""
    return np.shape(a) != np.shape(b) or not known(a, b) or equal(a, b)


def known(*arrays: Any) -> bool:
    """Whether arrays are numbers, and not traced by somebody else."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def equal(a: Any, b: Any) -> bool:
    """Whether two known arrays are the same, or one and the same."""
    return a is b or bool(np.array_equal(a, b, equal_nan=jnp.issubdtype(jnp.result_type(a), jnp.floating)))


def unchanged(one: Trace, other: Trace) -> set[int]:
    """The variables that are the same numbers for both batches, whatever they are: by how they are computed."""
    pairs = {number: (value, other.constants[number]) for number, value in one.constants.items()}
    same = {number for number, (a, b) in pairs.items() if a is b or (known(a, b) and equal(a, b))}
    for a, b in zip(one.equations, other.equations, strict=True):
        settled = all(not isinstance(each, int) or each in same for each in a.inputs)
        shapes = all(one.types[k].shape == other.types[k].shape for k in a.outputs)
        if settled and shapes and str(a.params) == str(b.params):
            same |= set(a.outputs)
    return same


def _same(a: int | np.ndarray, b: int | np.ndarray) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def inline(jaxpr: Any, consts: list, arguments: list, found: Trace) -> list:
    """Add the equations of a jaxpr for given arguments, and give its outputs."""
    numbers: dict[Any, int | np.ndarray] = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        number = next((k for k, known in found.constants.items() if known is value), None)
        if number is None:
            number = found.new(variable)
            found.constants[number] = value
        numbers[variable] = number

    def operand(variable: Any) -> int | np.ndarray:
        return np.asarray(variable.val) if isinstance(variable, core.Literal) else numbers[variable]

    for each in jaxpr.eqns:
        inputs = [operand(variable) for variable in each.invars]
        inner = _called(each)
        if inner is not None and len(inner[0].invars) == len(inputs):
            outputs = inline(*inner, inputs, found)
        else:
            outputs = [found.new(variable) for variable in each.outvars]
            of = each.primitive, each.params, tuple(inputs), tuple(outputs), each.source_info
            found.equations.append(Equation(*of))
        numbers.update(zip(each.outvars, outputs, strict=True))
    return [operand(variable) for variable in jaxpr.outvars]


def _called(equation: Any) -> tuple[Any, list] | None:
    """The jaxpr that an equation calls, and its constants; None for an operation."""
    if equation.primitive.name not in CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            return (inner.jaxpr, list(inner.consts)) if hasattr(inner, "consts") else (inner, [])  # closed, or open
    return None


def constants_of(trace: Trace) -> dict[int, Any]:
    """The values of all variables that do not depend on the input."""
    values: dict[int, Any] = dict(trace.constants)
    for equation in trace.equations:
        operands = [values.get(each) if isinstance(each, int) else each for each in equation.inputs]
        if any(operand is None for operand in operands):
            continue
        with jax.ensure_compile_time_eval():
            results = equation.compute(*map(jnp.asarray, operands))
        values.update(zip(equation.outputs, results, strict=True))
    return values

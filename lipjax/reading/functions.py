"""Functions in a model, known by what they do: reshapes, shifts and scales, and pooling, read off their jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.convolutions import Padding, Pair

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Each example takes another shape, in C order."""

    shape: Shape


@dataclasses.dataclass(frozen=True)
class Rescale:
    """``scale * x + shift`` entry by entry, for arrays that broadcast to one example."""

    scale: Array
    shift: Array


@dataclasses.dataclass(frozen=True)
class Pool:
    """Maximum or sum over windows of an image."""

    kind: str
    window: Pair
    stride: Pair
    padding: Padding


Step = Reshape | Rescale | Pool
BATCHES = (1, 2, 7, 1024)


class UnknownError(Exception):
    """A function does something that is not known here."""


def read(function: Callable[[Array], Array], shape: Shape) -> list[Step] | None:
    """What a function of a batch does to each example, or None where that is not known.

    The function is traced with batches of several sizes; one that mixes examples, treats them differently, or
    depends on their number is not known.

    Args:
        function: takes an array (B, *shape).
        shape: of one example.
    """
    found = []
    for batch in BATCHES:
        try:
            with jax.numpy_dtype_promotion("standard"):  # Flax's average pooling divides by an integer
                closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
            found.append(_read_jaxpr(closed.jaxpr, closed.consts, batch))
        except Exception:  # whatever a function of the user raises, it is not known
            return None
    one = found[0]
    same = all(len(one) == len(other) and all(map(_same, one, other)) for other in found[1:])
    return one if same else None


def _same(a: Step, b: Step) -> bool:
    if isinstance(a, Rescale) and isinstance(b, Rescale):
        return _equal(a.scale, b.scale) and _equal(a.shift, b.shift)
    return a == b


def _equal(a: Array, b: Array) -> bool:
    """Whether two arrays are the same, as far as that is known while tracing."""
    if jnp.shape(a) != jnp.shape(b) or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return jnp.shape(a) == jnp.shape(b)
    return np.array_equal(a, b)


def _read_jaxpr(jaxpr: Any, consts: list, batch: int) -> list[Step]:
    """The steps along the one variable that depends on the input; everything else is computed right away."""
    if len(jaxpr.invars) != 1 or len(jaxpr.outvars) != 1:
        raise UnknownError
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    current, steps = jaxpr.invars[0], []

    def value(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        depends = [variable is current for variable in equation.invars]
        if not any(depends):
            results = _compute(equation, [value(variable) for variable in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
            continue
        if sum(depends) != 1 or len(equation.outvars) != 1:
            raise UnknownError
        known = [None if mine else value(v) for mine, v in zip(depends, equation.invars, strict=True)]
        new = _operation(equation, known, current.aval.shape, equation.outvars[0].aval, batch)
        if steps and new and isinstance(steps[-1], Reshape) and isinstance(new[0], Reshape):
            steps.pop()
        steps += new
        current = equation.outvars[0]
    if jaxpr.outvars[0] is not current or current.aval.shape[:1] != (batch,):
        raise UnknownError
    return steps


def _compute(equation: Any, values: list) -> list:
    """The results of an equation of constants."""
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*values, **equation.params)
    return results if equation.primitive.multiple_results else [results]


def _operation(equation: Any, known: list, shape: Shape, out: Any, batch: int) -> list[Step]:
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit") and len(known) == 1:
        inner = params["jaxpr"]
        return _read_jaxpr(inner.jaxpr, inner.consts, batch)
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        # One that does not keep the batch axis counts only together with a next one that brings it back.
        return [Reshape(tuple(out.shape[1:]))]
    if shape[0] != batch:
        raise UnknownError
    if name == "convert_element_type" and out.dtype == equation.invars[0].aval.dtype:
        return []
    if name in ("add", "sub", "mul", "div"):
        return [_rescale(name, known, tuple(out.shape))]
    if name in ("reduce_window_max", "reduce_window_sum"):
        return [_pool(name.removeprefix("reduce_window_"), params)]
    raise UnknownError


def _rescale(name: str, known: list, out: Shape) -> Rescale:
    first = known[0] is None  # whether the variable is the first operand
    constant = jnp.asarray(known[1] if first else known[0])
    if constant.ndim == len(out) and constant.shape[0] != 1:
        if not isinstance(constant, jax.core.Tracer) and not np.all(np.asarray(constant) == np.asarray(constant)[:1]):
            raise UnknownError
        constant = constant[:1]
    elif constant.ndim not in (0, len(out)):
        raise UnknownError
    constant = constant.reshape(constant.shape[1:]) if constant.ndim else constant
    one, zero = jnp.ones_like(constant), jnp.zeros_like(constant)
    if name == "add":
        return Rescale(one, constant)
    if name == "sub":
        return Rescale(one, -constant) if first else Rescale(-one, constant)
    if name == "mul":
        return Rescale(constant, zero)
    if not first:
        raise UnknownError  # a constant divided by the input
    return Rescale(one / constant, zero)


def _pool(kind: str, params: dict) -> Pool:
    window, stride, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    plain = all(d == 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    if (
        len(window) != 4
        or not plain
        or any((a, b) != (1, 1) for a, b in ((window[0], window[3]), (stride[0], stride[3])))
    ):
        raise UnknownError
    if any(tuple(padding[axis]) != (0, 0) for axis in (0, 3)):
        raise UnknownError
    return Pool(kind, tuple(window[1:3]), tuple(stride[1:3]), (tuple(padding[1]), tuple(padding[2])))

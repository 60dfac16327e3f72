"""Folding: affine layers with scales before or after them, and sums of affine layers, are affine layers again.

One behind another: :mod:`lipjax.networks.composing`.

Folding is exact but for the rounding of the parameters. A bound of one folded layer is better than the product of
bounds of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.layers import Affine, Conv, Dense, Scale, layer

SMALL = 2**20  # entries of a matrix that may be made where there is another way


@functools.singledispatch
def rescaled(layer: Affine, before: Array | None = None, after: Array | None = None) -> Affine:
    """The layer with the matrix ``diag(after) W diag(before)``; its bias stays.

    A class of layers that can take scales into its parameters registers how: ``rescaled.register(MyLayer)``.

    Args:
        layer: with the matrix W.
        before: broadcasts to its input.
        after: broadcasts to its output.

    Raises:
        ValueError: a layer that is left alone.
    """
    _check_folds(layer)
    ones = jnp.ones(layer.in_shape, layer.dtype), jnp.ones(layer.out_shape, layer.dtype)
    scales = (one if given is None else one * given for one, given in zip(ones, (before, after), strict=True))
    before, after = scales
    shapes = {"in_shape": layer.in_shape, "out_shape": layer.out_shape}
    return Rescaled(bias=layer.bias, **shapes, inner=layer, before=before, after=after)


@functools.singledispatch
def added(layer: Affine, other: Affine) -> Affine:
    """The layer with the sum of the matrices of both; its bias stays.

    Args:
        layer: one of them.
        other: with an output of the same size, in the same order.

    Raises:
        ValueError: a layer that is left alone.
    """
    for each in (layer, other):
        _check_folds(each)
    return Added(bias=layer.bias, in_shape=layer.in_shape, out_shape=layer.out_shape, first=layer, second=other)


@jax.tree_util.register_dataclass
@layer
class Rescaled(Affine):
    """``diag(after) W diag(before)`` for the W of another layer.

    Attributes:
        inner: the other layer.
        before: shaped like the input.
        after: shaped like the output.
    """

    inner: Affine
    before: Array
    after: Array

    def linear(self, a: Array) -> Array:
        return self.after * self.inner.linear(self.before * a)

    @property
    def terms(self) -> int:
        return self.inner.terms + 2  # each product has two more factors

    @property
    def adjoint_terms(self) -> int:
        return self.inner.adjoint_terms + 2

    def adjoint(self) -> Callable[[Array], Array]:
        inner = self.inner.adjoint()
        return lambda z: self.before * inner(self.after * z)

    def row(self, index: Array | int) -> Array:
        return self.after.ravel()[index] * self.inner.row(index) * self.before.ravel()

    def absolute(self, r: Array) -> Array:
        return jnp.abs(self.after) * self.inner.absolute(jnp.abs(self.before) * r)

    def absolute_adjoint(self, s: Array) -> Array:
        return jnp.abs(self.before) * self.inner.absolute_adjoint(jnp.abs(self.after) * s)

    def row_norms(self, columns: Array) -> Array:
        return jnp.abs(self.after) * self.inner.row_norms(jnp.abs(self.before) * columns.astype(self.dtype))

    def magnitude_row_norms(self, columns: Array) -> Array:
        inner = self.inner.magnitude_row_norms(jnp.abs(self.before) * columns.astype(self.dtype))
        return jnp.abs(self.after) * inner

    def partial(self, r: Array) -> Array:
        scaled = jnp.abs(self.before) * r
        inner = self.inner.partial(scaled)
        return jnp.maximum(jnp.maximum(self.absolute(r), inner), jnp.max(scaled))

    def flushed(self, r: Array) -> Array:
        # The scaled inputs and their scales, what the other layer loses, its outputs and their scales.
        scaled, after = jnp.abs(self.before) * r, jnp.abs(self.after)
        inputs = after * (self.inner.absolute(1 + r) + self.inner.flushed(scaled))
        return inputs + self.inner.partial(scaled) + Affine.flushed(self, r)

    def frozen(self) -> Affine:
        return dataclasses.replace(self, inner=self.inner.frozen())


@layer
class OfTwo(Affine):
    """A layer that is made of two others."""

    first: Affine
    second: Affine

    @property
    def terms(self) -> int:
        return self.first.terms + self.second.terms

    @property
    def adjoint_terms(self) -> int:
        return self.first.adjoint_terms + self.second.adjoint_terms

    def row_norms(self, columns: Array) -> Array:
        return Affine.row_norms(self, columns) if self.is_small else self.magnitude_row_norms(columns)

    def frozen(self) -> Affine:
        return dataclasses.replace(self, first=self.first.frozen(), second=self.second.frozen())

    @property
    def is_small(self) -> bool:
        """Whether its matrix may be made where there is another way."""
        return math.prod(self.in_shape) * math.prod(self.out_shape) <= SMALL


@jax.tree_util.register_dataclass
@layer
class Added(OfTwo):
    """The sum of the matrices of two layers.

    Its ``|W|`` is that of both, added: what is rounded is so relative to both, though they may cancel. So are its row
    norms, unless it is small.

    Attributes:
        first: one layer.
        second: the other.
    """

    def linear(self, a: Array) -> Array:
        return self.first.linear(a) + self.second.linear(a.reshape(self.second.in_shape)).reshape(self.out_shape)

    def adjoint(self) -> Callable[[Array], Array]:
        first, second = self.first.adjoint(), self.second.adjoint()
        return lambda z: first(z) + second(z.reshape(self.second.out_shape)).reshape(self.in_shape)

    def absolute(self, r: Array) -> Array:
        return self.first.absolute(r) + self.second.absolute(r.reshape(self.second.in_shape)).reshape(self.out_shape)

    def absolute_adjoint(self, s: Array) -> Array:
        of_second = self.second.absolute_adjoint(s.reshape(self.second.out_shape))
        return self.first.absolute_adjoint(s) + of_second.reshape(self.in_shape)

    def partial(self, r: Array) -> Array:
        return self.first.partial(r) + self.second.partial(r.reshape(self.second.in_shape)).reshape(self.out_shape)

    def flushed(self, r: Array) -> Array:
        of_second = self.second.flushed(r.reshape(self.second.in_shape))
        return self.first.flushed(r) + of_second.reshape(self.out_shape) + 1

    def magnitude_row_norms(self, columns: Array) -> Array:
        of_second = self.second.magnitude_row_norms(columns.reshape(self.second.in_shape))
        return self.first.magnitude_row_norms(columns) + of_second.reshape(self.out_shape)


@rescaled.register
def _(layer: Dense, before: Array | None = None, after: Array | None = None) -> Affine:
    kernel = layer.kernel
    if before is not None:
        kernel = kernel * jnp.broadcast_to(before, layer.in_shape).reshape(-1, 1)
    if after is not None:
        kernel = kernel * jnp.broadcast_to(after, layer.out_shape).reshape(1, -1)
    return dataclasses.replace(layer, kernel=kernel)


@rescaled.register
def _(layer: Conv, before: Array | None = None, after: Array | None = None) -> Affine:
    """Scales of whole channels go into the kernel; others differ over the image, as a kernel does not."""
    kernel = layer.kernel
    if before is not None and _per_channel(before):
        kernel, before = kernel * before.reshape(1, 1, -1, 1), None
    if after is not None and _per_channel(after):
        kernel, after = kernel * after.reshape(1, 1, 1, -1), None
    folded = dataclasses.replace(layer, kernel=kernel)
    if before is None and after is None:
        return folded
    return rescaled.dispatch(Affine)(folded, before, after)


@rescaled.register
def _(layer: Scale, before: Array | None = None, after: Array | None = None) -> Affine:
    kernel = layer.kernel
    for scale in (before, after):
        kernel = kernel if scale is None else kernel * scale
    return dataclasses.replace(layer, kernel=kernel)


@rescaled.register
def _(layer: Rescaled, before: Array | None = None, after: Array | None = None) -> Affine:
    scales = {"before": (layer.before, before), "after": (layer.after, after)}
    return dataclasses.replace(layer, **{name: a * b for name, (a, b) in scales.items() if b is not None})


@added.register
def _(layer: Dense, other: Affine) -> Affine:
    return dataclasses.replace(layer, kernel=layer.kernel + other.matrix().T)


@added.register
def _(layer: Conv, other: Affine) -> Affine:
    """Two convolutions with the same stride are one, whose kernel has room for the taps of both."""
    shapes = layer.in_shape, layer.out_shape, layer.stride
    if not isinstance(other, Conv) or (other.in_shape, other.out_shape, other.stride) != shapes:
        return added.dispatch(Affine)(layer, other)
    if min(pad for one in (layer, other) for axis in one.padding for pad in axis) < 0:  # it crops
        return added.dispatch(Affine)(layer, other)
    both, axes = (layer, other), range(2)
    low = [max(one.padding[axis][0] for one in both) for axis in axes]
    size = [low[axis] + max(one.kernel.shape[axis] - one.padding[axis][0] for one in both) for axis in axes]
    high = [
        max(0, (layer.out_shape[axis] - 1) * layer.stride[axis] + size[axis] - layer.in_shape[axis] - low[axis])
        for axis in axes
    ]
    kernel = jnp.zeros((*size, *layer.kernel.shape[2:]), layer.kernel.dtype)
    for one in both:
        top, left = (low[axis] - one.padding[axis][0] for axis in axes)
        height, width = one.kernel.shape[:2]
        kernel = kernel.at[top : top + height, left : left + width].add(one.kernel)
    return dataclasses.replace(layer, kernel=kernel, padding=tuple(zip(low, high, strict=True)))


def diagonal(scale: Array | None, like: Affine) -> Affine:
    """The layer that multiplies entry by entry, of the kind that :func:`added` can join with another layer.

    Args:
        scale: broadcasts to the input, or None for the identity.
        like: the other layer, with an input and an output of the same size.
    """
    dtype = like.dtype
    scale = jnp.ones((), dtype) if scale is None else scale
    bias = jnp.zeros(like.out_shape, dtype)
    if isinstance(like, Conv) and like.stride == (1, 1) and like.in_shape == like.out_shape and _per_channel(scale):
        channels = like.in_shape[-1]
        kernel = jnp.diag(jnp.broadcast_to(scale.reshape(-1), (channels,)))[None, None]
        return Conv(kernel=kernel, bias=bias, in_shape=like.in_shape, out_shape=like.out_shape)
    kernel = jnp.broadcast_to(scale, like.in_shape)
    return Scale(kernel=kernel, bias=jnp.zeros(like.in_shape, dtype), in_shape=like.in_shape, out_shape=like.in_shape)


def _check_folds(layer: Affine) -> None:
    if layer.alone:
        raise ValueError(f"{type(layer).__name__} does not fold with other layers: it is left alone")


def _per_channel(scale: Array) -> bool:
    return math.prod(scale.shape[:-1]) == 1

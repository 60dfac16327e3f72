"""Composing: one affine layer behind another as one, where the facts of the product are as exact as those of its parts.

The norm of a product is at most the product of the norms, and as a rule well below it. So what is linear between two
activations becomes one layer, unless its matrix is large and has no kernel: then row norms of the product could only be
bounded, and more would be lost in the boxes than is won in the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.folding import SMALL, OfTwo, Rescaled
from lipjax.networks.layers import HIGHEST, Affine, Conv, Dense, layer
from lipjax.networks.rearranging import Gather, SumOver, composed_places

MORE_WORK = 4  # times that of both convolutions, which one kernel in place of theirs may take
AT_ONCE = 64  # rows or columns of a product that are computed together


@jax.tree_util.register_dataclass
@layer
class Composed(OfTwo):
    """One layer behind another: the product of their matrices.

    Its ``|W|`` is the product of theirs, as what is rounded is relative to it. Its row norms are exact where the matrix
    is small, or where the first layer copies no entry and adds none; else they are bounds.

    Attributes:
        first: that takes the input.
        second: that takes what the first gives, in C order.
    """

    def linear(self, a: Array) -> Array:
        return self.second.linear(self.first.linear(a).reshape(self.second.in_shape))

    def adjoint(self) -> Callable[[Array], Array]:
        first, second = self.first.adjoint(), self.second.adjoint()
        return lambda z: first(second(z).reshape(self.first.out_shape))

    def absolute(self, r: Array) -> Array:
        return self.second.absolute(self.first.absolute(r).reshape(self.second.in_shape))

    def absolute_adjoint(self, s: Array) -> Array:
        return self.first.absolute_adjoint(self.second.absolute_adjoint(s).reshape(self.first.out_shape))

    def partial(self, r: Array) -> Array:
        middle = self.first.absolute(r).reshape(self.second.in_shape)
        return jnp.maximum(self.second.partial(middle), jnp.max(self.first.partial(r)))

    def flushed(self, r: Array) -> Array:
        middle, lost = self.first.absolute(r), self.first.flushed(r)
        passed_on = self.second.absolute(lost.reshape(self.second.in_shape))
        return passed_on + self.second.flushed((middle + lost).reshape(self.second.in_shape))

    def magnitude_row_norms(self, columns: Array) -> Array:
        inner = self.first.magnitude_row_norms(columns).reshape(self.second.in_shape)
        if isinstance(self.first, Gather):
            # Each row of the first has one entry; copies of one that meet in a row of the product add up.
            return math.sqrt(max(1, self.first.copies)) * self.second.magnitude_row_norms(inner)
        return self.second.absolute(inner)


def composed(first: Affine, second: Affine) -> Affine | None:
    """The layer with the product of two matrices, and the bias of the second; None where both are better left alone.

    Args:
        first: that takes the input.
        second: that takes what the first gives, in C order.
    """
    if first.alone or second.alone:
        return None
    if isinstance(first, Gather) and isinstance(second, Gather):
        return composed_places(first, second)
    size = math.prod(first.in_shape) * math.prod(second.out_shape)
    if isinstance(second, Dense) and (_is_rearrangement(first) or size <= max(SMALL, second.kernel.size)):
        return _dense(first, second)
    if isinstance(first, Dense) and isinstance(second, Gather):
        return _dense(first, second)
    if _is_rearrangement(first) or _is_rearrangement(second):
        bias = second.bias if second.dtype == first.dtype else second.bias.astype(first.dtype)
        return Composed(bias=bias, in_shape=first.in_shape, out_shape=second.out_shape, first=first, second=second)
    if isinstance(first, Conv) and isinstance(second, Conv):
        one = _convolution(first, second)
        if one is not None:
            return one
    return _dense(first, second) if size <= SMALL else None


def _is_rearrangement(layer: Affine) -> bool:
    """Whether a layer only moves, adds and scales entries: what it is folded with costs no more than before."""
    return isinstance(layer, Gather | SumOver) or (isinstance(layer, Rescaled) and _is_rearrangement(layer.inner))


def _dense(first: Affine, second: Affine) -> Dense:
    """The product as a matrix, by its rows or by its columns."""

    def row(z: Array) -> Array:
        return of_first(of_second(z).reshape(first.out_shape)).ravel()

    def column(a: Array) -> Array:
        return second.linear(first.linear(a).reshape(second.in_shape)).ravel()

    if isinstance(second, Dense):
        of_first = first.adjoint()
        images = second.kernel.T.reshape(-1, *first.out_shape)
        kernel = _images(lambda z: of_first(z).ravel(), images).T
    elif isinstance(first, Dense):
        kernel = _images(lambda z: second.linear(z).ravel(), first.kernel.reshape(-1, *second.in_shape))
    elif math.prod(second.out_shape) < math.prod(first.in_shape):
        of_first, of_second = first.adjoint(), second.adjoint()
        kernel = _images(row, _units(second.out_shape, first.dtype)).T
    else:
        kernel = _images(column, _units(first.in_shape, first.dtype))
    bias = jnp.broadcast_to(second.shift, second.out_shape).astype(kernel.dtype)
    return Dense(kernel=kernel, bias=bias, in_shape=first.in_shape, out_shape=second.out_shape)


def _images(function: Callable[[Array], Array], points: Array) -> Array:
    return jax.lax.map(function, points, batch_size=AT_ONCE)


def _units(shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.eye(math.prod(shape), dtype=dtype).reshape(-1, *shape)


def _convolution(first: Conv, second: Conv) -> Conv | None:
    """Two convolutions as one, where the second pads and crops nothing and one kernel does not take much more work.

    Every tap of the second is a shifted copy of the first kernel, ``stride`` pixels of the input further on.
    """
    if first.out_shape != second.in_shape or any(pad != 0 for axis in second.padding for pad in axis):
        return None
    (kh, kw, c_in, _), (sh, sw), (height, width, _, c_out) = first.kernel.shape, first.stride, second.kernel.shape
    size = (kh + (height - 1) * sh, kw + (width - 1) * sw)
    places = [math.prod(shape[:2]) for shape in (first.out_shape, second.out_shape)]
    work = [math.prod(first.kernel.shape) * places[0], math.prod(second.kernel.shape) * places[1]]
    if math.prod(size) * c_in * c_out * places[1] > MORE_WORK * sum(work):
        return None
    kernel = jnp.zeros((*size, c_in, c_out), first.kernel.dtype)
    for row in range(height):
        for column in range(width):
            tap = jnp.einsum("hwim,mo->hwio", first.kernel, second.kernel[row, column], precision=HIGHEST)
            kernel = kernel.at[row * sh : row * sh + kh, column * sw : column * sw + kw].add(tap)
    stride = (sh * second.stride[0], sw * second.stride[1])
    return Conv(
        kernel=kernel,
        bias=second.bias.astype(kernel.dtype),
        in_shape=first.in_shape,
        out_shape=second.out_shape,
        stride=stride,
        padding=first.padding,
    )

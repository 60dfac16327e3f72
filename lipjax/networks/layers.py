"""Layers: affine maps with their matrix facts.

A layer sees one example; callers ``vmap``. Layers are frozen pytrees whose arrays are leaves and whose shapes are
static. A new affine layer is one method, the bilinear :meth:`Affine.form`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.convolutions import Padding, Pair, conv, conv_transpose, transpose_kernel
from lipjax.networks.linear_maps import LinearMap

Shape = tuple[int, ...]
layer = functools.partial(dataclasses.dataclass, frozen=True)
static = functools.partial(dataclasses.field, metadata={"static": True})


@layer
class Affine:
    """``z = W a + b``, given by a bilinear ``form(kernel, a) = W a``.

    The methods below hold where every entry of W is at most one entry of the kernel (dense layers and zero-padded
    convolutions); any other linear layer must bring its own :meth:`absolute` and :meth:`row_norms`.
    """

    kernel: Array
    bias: Array
    in_shape: Shape = static()
    out_shape: Shape = static()

    def form(self, kernel: Array, a: Array) -> Array:
        """``W a`` for the matrix W that ``kernel`` stands for; bilinear. Shapes: ``in_shape`` to ``out_shape``."""
        raise NotImplementedError

    def __call__(self, a: Array) -> Array:
        """``W a + b``."""
        return self.linear(a) + self.shift

    @property
    def shift(self) -> Array:
        """The bias in a shape that broadcasts to the output: it is per entry of the last axis, or per output."""
        if self.bias.shape == self.out_shape:
            return self.bias
        return self.bias.reshape((1,) * (len(self.out_shape) - 1) + (-1,))

    @property
    def terms(self) -> int:
        """The most products that are summed up in one output, without the bias."""
        return math.prod(self.kernel.shape[:-1])

    @property
    def adjoint_terms(self) -> int:
        """The most products that are summed up in one entry of ``W^T z``."""
        return math.prod(self.out_shape)

    def linear(self, a: Array) -> Array:
        """``W a``."""
        return self.form(self.kernel, a)

    def absolute(self, r: Array) -> Array:
        """``|W| r``: how far a box with half widths ``r`` >= 0 spreads each output."""
        return self.form(jnp.abs(self.kernel), r)

    def row_norms(self, live: Array) -> Array:
        """l2 norms of the rows of W over the live columns, shaped like the output (zero padding counts as zeros)."""
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(self.kernel)))
        scale = jnp.where(largest == 0, 1, largest)  # squares of tiny and huge weights leave the range of float32
        squares = self.form((self.kernel / scale) ** 2, live.astype(self.kernel.dtype))
        positive = squares > 0
        return scale * jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), squares)

    def linear_map(self) -> LinearMap:
        """W as products with a vector."""
        return LinearMap(self.linear, self.adjoint(), self.in_shape, self.out_shape, self.kernel.dtype)

    def adjoint(self) -> Callable[[Array], Array]:
        """``W^T`` as a function, with whatever it needs prepared now, so that it can be called in a loop."""
        transpose = jax.linear_transpose(self.linear, jax.ShapeDtypeStruct(self.in_shape, self.kernel.dtype))
        return lambda z: transpose(z)[0]


@jax.tree_util.register_dataclass
@layer
class Dense(Affine):
    """Dense layer: kernel (inputs, outputs), bias (outputs,). It ravels its input in C order."""

    def form(self, kernel: Array, a: Array) -> Array:
        return jnp.matmul(a.ravel(), kernel, precision=jax.lax.Precision.HIGHEST)

    @property
    def adjoint_terms(self) -> int:
        return self.kernel.shape[1]

    def adjoint(self) -> Callable[[Array], Array]:
        product = functools.partial(jnp.matmul, self.kernel, precision=jax.lax.Precision.HIGHEST)
        return lambda z: product(z).reshape(self.in_shape)


@jax.tree_util.register_dataclass
@layer
class Conv(Affine):
    """Zero-padded convolution: kernel (kh, kw, C, channels), bias (channels,), image (H, W, C)."""

    stride: Pair = static(default=(1, 1))
    padding: Padding = static(default=((0, 0), (0, 0)))

    def form(self, kernel: Array, a: Array) -> Array:
        return conv(a, kernel, self.stride, self.padding)

    @property
    def adjoint_terms(self) -> int:
        kh, kw, _, channels = self.kernel.shape
        return kh * kw * channels

    def adjoint(self) -> Callable[[Array], Array]:
        transposed = transpose_kernel(self.kernel, self.stride)
        return lambda z: conv_transpose(z, transposed, self.stride, self.padding, self.in_shape)


@jax.tree_util.register_dataclass
@layer
class Scale(Affine):
    """Entry by entry: kernel (the diagonal of W) and bias, each shaped like the input."""

    def form(self, kernel: Array, a: Array) -> Array:
        return kernel * a

    @property
    def terms(self) -> int:
        return 1

    @property
    def adjoint_terms(self) -> int:
        return 1

    def adjoint(self) -> Callable[[Array], Array]:
        return lambda z: self.kernel * z


def identity(shape: Shape, dtype: Any = jnp.float32) -> Scale:
    """The layer that changes nothing: it carries an activation that follows no other affine layer."""
    return Scale(jnp.ones(shape, dtype), jnp.zeros(shape, dtype), shape, shape)


def dense(kernel: Array, bias: Array, in_shape: Shape) -> Dense:
    """A dense layer on inputs of the given shape.

    Args:
        kernel: shape (inputs, outputs).
        bias: shape (outputs,).
        in_shape: shape of one input; its entries are raveled in C order.

    Raises:
        ValueError: the kernel does not have one row per input entry.
    """
    if kernel.shape[0] != math.prod(in_shape):
        raise ValueError(
            f"a dense kernel of shape {kernel.shape} takes {kernel.shape[0]} inputs, but its input has shape "
            f"{in_shape}, which is {math.prod(in_shape)} entries"
        )
    return Dense(kernel, bias, in_shape, (kernel.shape[1],))


def convolution(kernel: Array, bias: Array, in_shape: Shape, stride: Pair, padding: Padding) -> Conv:
    """A convolution on images of the given shape.

    Args:
        kernel: shape (kh, kw, C, channels).
        bias: shape (channels,).
        in_shape: (H, W, C).
        stride: per axis.
        padding: zeros before and after, per axis.

    Raises:
        ValueError: the input is not an image with as many channels as the kernel takes.
    """
    if len(in_shape) != 3 or kernel.shape[2] != in_shape[2]:
        raise ValueError(
            f"a convolution with a kernel of shape {kernel.shape} needs images (H, W, {kernel.shape[2]}), "
            f"but its input has shape {in_shape}"
        )
    size = tuple(
        (n + low + high - k) // s + 1
        for n, (low, high), k, s in zip(in_shape[:2], padding, kernel.shape[:2], stride, strict=True)
    )
    if min(size) < 1:
        raise ValueError(f"a kernel of shape {kernel.shape} does not fit into a padded input of shape {in_shape}")
    return Conv(kernel, bias, in_shape, (*size, kernel.shape[3]), stride, padding)

"""Layers: affine maps with their matrix facts, and activations with their rules for boxes and masks.

A layer sees one example; callers ``vmap``. Layers are frozen pytrees whose arrays are leaves and whose shapes are
static. A new affine layer is one method, the bilinear :meth:`Affine.form`, and a new activation is three.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.convolutions import Padding, Pair, conv, conv_transpose, transpose_kernel

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


@layer
class Activation:
    """An activation that is monotone in each coordinate, so that a box maps corner to corner, and Lipschitz."""

    @property
    def lipschitz(self) -> float:
        """Its Lipschitz constant in the l2 norm, rounded up."""
        return 1.0

    def __call__(self, z: Array) -> Array:
        raise NotImplementedError

    def live_rows(self, lower: Array, upper: Array) -> Array:
        """The rows of the layer before that matter, all unless an activation knows better.

        All others can be dropped without changing any output.
        """
        return jnp.ones(lower.shape, bool)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        """The outputs that vary over the box, all unless an activation knows better, shaped like the output.

        Every other one is exactly constant on the box.
        """
        return jnp.ones(lower.shape, bool)


# The masks below define DEAD and negate it: a comparison with NaN is false, so a NaN bound comes out live.


@jax.tree_util.register_dataclass
@layer
class Identity(Activation):
    """No activation."""

    def __call__(self, z: Array) -> Array:
        return z


@jax.tree_util.register_dataclass
@layer
class ReLU(Activation):
    """``max(z, 0)``: constant where ``upper <= 0``."""

    def __call__(self, z: Array) -> Array:
        return jnp.maximum(z, 0)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~(upper <= 0)

    live_outputs = live_rows


@jax.tree_util.register_dataclass
@layer
class ClippedReLU(Activation):
    """``min(max(z, 0), theta)``, the paper's ReLU-theta: constant where ``upper <= 0`` or ``lower >= theta``.

    A neuron with ``theta <= 0`` is constant everywhere (it outputs theta).

    Attributes:
        theta: the upper clip, one per neuron, shaped like the activation.
    """

    theta: Array

    def __call__(self, z: Array) -> Array:
        return jnp.minimum(jnp.maximum(z, 0), self.theta)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~((upper <= 0) | (lower >= self.theta) | (self.theta <= 0))

    live_outputs = live_rows


@jax.tree_util.register_dataclass
@layer
class MaxMin(Activation):
    """``max(z1, z2)`` then ``min(z1, z2)``, where channel i (z1) is paired with channel i + C / 2 (z2).

    Every row is needed and every output varies: the larger of a pair is in one output, the smaller in the other.
    """

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


@jax.tree_util.register_dataclass
@layer
class ClippedMaxMin(Activation):
    """``min(max(z1, z2), upper_clip)`` then ``max(min(z1, z2), lower_clip)``, for the pairs of :class:`MaxMin`.

    The max of a pair is constant where ``max(lower1, lower2) >= upper_clip``, its min where
    ``min(upper1, upper2) <= lower_clip``. A row is needed where it can be the one that an output which varies takes;
    rows and outputs that matter are not the same here.

    Attributes:
        upper_clip: of the max, one per pair, shaped like half of the activation.
        lower_clip: of the min, likewise.
    """

    upper_clip: Array
    lower_clip: Array

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        larger = jnp.minimum(jnp.maximum(first, second), self.upper_clip)
        smaller = jnp.maximum(jnp.minimum(first, second), self.lower_clip)
        return jnp.concatenate([larger, smaller], axis=-1)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        max_dead, min_dead = self._dead(lower, upper)
        (lower1, lower2), (upper1, upper2) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        first_dead = (max_dead | (upper1 < lower2)) & (min_dead | (lower1 > upper2))
        second_dead = (max_dead | (upper2 < lower1)) & (min_dead | (lower2 > upper1))
        return ~jnp.concatenate([first_dead, second_dead], axis=-1)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        return ~jnp.concatenate(self._dead(lower, upper), axis=-1)

    def _dead(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """Where the max and the min of a pair are constant."""
        (lower1, lower2), (upper1, upper2) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        max_dead = (lower1 >= self.upper_clip) | (lower2 >= self.upper_clip)
        min_dead = (upper1 <= self.lower_clip) | (upper2 <= self.lower_clip)
        return max_dead, min_dead


@jax.tree_util.register_dataclass
@layer
class MaxPool(Activation):
    """Maximum over windows of an image, with padding that never wins.

    Its l2 constant is sqrt(the largest number of windows that hold one input): a change of one input can show in all
    of them. Windows that do not overlap give 1.

    Attributes:
        in_shape: (H, W, C).
        window: (kh, kw).
        stride: per axis.
        padding: before and after, per axis.
    """

    in_shape: Shape = static()
    window: Pair = static()
    stride: Pair = static()
    padding: Padding = static()

    def __call__(self, z: Array) -> Array:
        if z.shape != self.in_shape:
            raise ValueError(f"max pooling was made for an image {self.in_shape}, not for {z.shape}")
        padding = ((low, high) for low, high in (*self.padding, (0, 0)))
        lowest = np.array(-np.inf, z.dtype)  # a traced one would have no gradient
        return jax.lax.reduce_window(z, lowest, jax.lax.max, (*self.window, 1), (*self.stride, 1), tuple(padding))

    @property
    def lipschitz(self) -> float:
        overlap = 1
        axes = zip(self.in_shape[:2], self.window, self.stride, self.padding, strict=True)
        for size, window, stride, (low, high) in axes:
            starts = range(-low, size + high - window + 1, stride)
            overlap *= max(sum(start <= i < start + window for start in starts) for i in range(size))
        root = math.isqrt(overlap)
        return float(root) if root * root == overlap else math.nextafter(math.sqrt(overlap), math.inf)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        return ~(self(upper) <= self(lower))

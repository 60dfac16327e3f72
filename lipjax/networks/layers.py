"""Layers: affine maps with their matrix facts.

A layer sees one example; callers ``vmap``. Layers are frozen pytrees whose arrays are leaves and whose shapes are
static. Nothing outside of a layer's class knows what it is made of. A new affine layer is one method,
:meth:`Affine.linear`; everything else then comes from its matrix. One that is bilinear in a kernel and its input, as
dense layers and convolutions are, is a :class:`Bilinear` and never makes a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import highest
from lipjax.networks.convolutions import Padding, Pair, conv, conv_transpose, transpose_kernel
from lipjax.networks.linear_maps import LinearMap, lengths
from lipjax.networks.masks import weighted

Shape = tuple[int, ...]
layer = functools.partial(dataclasses.dataclass, frozen=True, kw_only=True)
static = functools.partial(dataclasses.field, metadata={"static": True})
HIGHEST = jax.lax.Precision.HIGHEST  # TF32 has no place in a bound
FFT_ROUNDING = 1e-9  # relative; Fourier transforms and singular values of blocks are off by less than 1e-12


@layer
class Affine:
    """``z = W a + b``, for one example.

    A subclass defines :meth:`linear`. What it inherits is right for any W, but makes the whole matrix: a layer that is
    large brings its own :meth:`absolute`, :meth:`absolute_adjoint`, :meth:`row_norms` and :meth:`row`.

    Attributes:
        bias: per entry of the last axis of the output, or per output.
        in_shape: shape of one input.
        out_shape: shape of one output.
        alone: whether what is known of it is lost where it is folded with other layers; it is then left as it is.
    """

    alone: ClassVar[bool] = False

    bias: Array
    in_shape: Shape = static()
    out_shape: Shape = static()

    def linear(self, a: Array) -> Array:
        """``W a``. Shapes: ``in_shape`` to ``out_shape``."""
        raise NotImplementedError

    def __call__(self, a: Array) -> Array:
        """``W a + b``."""
        return self.linear(a) + self.shift

    @property
    def dtype(self) -> Any:
        """Of inputs and outputs."""
        return self.bias.dtype

    @property
    def shift(self) -> Array:
        """The bias in a shape that broadcasts to the output."""
        if self.bias.shape == self.out_shape:
            return self.bias
        return self.bias.reshape((1,) * (len(self.out_shape) - 1) + (-1,))

    @property
    def terms(self) -> int:
        """The most products that are summed up in one output, without the bias."""
        return math.prod(self.in_shape)

    @property
    def adjoint_terms(self) -> int:
        """The most products that are summed up in one entry of ``W^T z``."""
        return math.prod(self.out_shape)

    def adjoint(self) -> Callable[[Array], Array]:
        """``W^T`` as a function, with whatever it needs prepared now, so that it can be called in a loop."""
        transpose = jax.linear_transpose(self.linear, jax.ShapeDtypeStruct(self.in_shape, self.dtype))
        return lambda z: transpose(z)[0]

    def linear_map(self) -> LinearMap:
        """W as products with a vector."""
        return LinearMap(self.linear, self.adjoint(), self.in_shape, self.out_shape, self.dtype)

    def matrix(self) -> Array:
        """W (outputs, inputs), both sides in C order."""
        units = jnp.eye(math.prod(self.in_shape), dtype=self.dtype)
        return jax.vmap(lambda a: self.linear(a.reshape(self.in_shape)).ravel(), out_axes=1)(units)

    def row(self, index: Array | int) -> Array:
        """One row of W, raveled, by its place in the raveled output."""
        one_hot = jnp.zeros(math.prod(self.out_shape), self.dtype).at[index].set(1)
        return self.adjoint()(one_hot.reshape(self.out_shape)).ravel()

    def absolute(self, r: Array) -> Array:
        """``|W| r``, or more: how far a box with half widths ``r`` >= 0 spreads each output."""
        return jnp.matmul(jnp.abs(self.matrix()), r.ravel(), precision=HIGHEST).reshape(self.out_shape)

    def absolute_adjoint(self, s: Array) -> Array:
        """``|W|^T s``, or more, for ``s`` >= 0."""
        return jnp.matmul(s.ravel(), jnp.abs(self.matrix()), precision=HIGHEST).reshape(self.in_shape)

    def absolute_norm(self) -> Array:
        """Upper bound of ``|| |W| ||``, by the Schur test: sqrt(largest row sum * largest column sum)."""
        rows = highest(self.absolute(jnp.ones(self.in_shape, self.dtype)))
        columns = highest(self.absolute_adjoint(jnp.ones(self.out_shape, self.dtype)))
        return jnp.sqrt(rows * columns) * (1 + 1e-9)

    def row_norms(self, columns: Array) -> Array:
        """l2 norms, or more, of the rows of W over some columns, shaped like the output (padding counts as zeros).

        Args:
            columns: those that count, boolean; or weights of all of them, at least 0. Shaped like the input.
        """
        weighted = self.matrix() * columns.astype(self.dtype).reshape(1, -1)
        return lengths(weighted, lambda squares: jnp.sum(squares, axis=1)).reshape(self.out_shape)

    def magnitude_row_norms(self, columns: Array) -> Array:
        """l2 norms, or more, of the rows of the matrix of :meth:`absolute`, which may be larger than ``|W|``.

        What is rounded is relative to them: in a matrix that is computed as a product or a sum, much may cancel.
        """
        return self.row_norms(columns)

    def transform_error(self, unit: float) -> Array | None:
        """How far ``W a`` may be off in the l2 norm, relative to that of a, where it is computed by transforms, scalar.

        So far off may ``W^T z`` be as well. None: by dot products, whose errors are bounded entry by entry.

        Args:
            unit: unit roundoff.
        """
        return None

    def partial(self, r: Array) -> Array:
        """For inputs of magnitudes up to ``r``: nothing on the way to an output, without its bias, is larger."""
        return self.absolute(r)

    def flushed(self, r: Array) -> Array:
        """How far outputs may be off where numbers below a smallest normal one count as zero, in units of that number.

        Args:
            r: magnitudes of the inputs, at most.
        """
        return self.absolute(jnp.ones(self.in_shape, self.dtype)) + self.terms * (1 + jnp.max(r)) + 1

    def known_norm(self, rows: Array, columns: Array) -> Array | None:
        """An upper bound of ``||I_rows W I_columns||`` that is known by construction, scalar; None where there is none.

        Training and estimates use it in place of an iterated norm. A certificate does not rest on it, but what a layer
        says of all its rows and columns is compared with a lower bound of its norm there.
        """
        return None

    def whole_norm(self) -> float:
        """An upper bound of ``||W||`` without chance, found on the host in float64; infinite where none is known."""
        return math.inf

    def frozen(self) -> Affine:
        """The layer as inference computes it: with a matrix of numbers in its own precision.

        What W was computed from is forgotten: a certificate is about the numbers that inference multiplies.
        """
        bias = jnp.broadcast_to(self.shift, self.out_shape)
        return Dense(kernel=self.matrix().T, bias=bias, in_shape=self.in_shape, out_shape=self.out_shape)

    def biased(self, bias: Array) -> Affine:
        """The layer with another bias: per entry of the last axis of the output, or per output."""
        return dataclasses.replace(self, bias=bias)


@layer
class Bilinear(Affine):
    """``form(kernel, a) = W a``, where every entry of W is at most one entry of the kernel."""

    kernel: Array

    def form(self, kernel: Array, a: Array) -> Array:
        """``W a`` for the matrix W that ``kernel`` stands for; bilinear. Shapes: ``in_shape`` to ``out_shape``."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        return math.prod(self.kernel.shape[:-1])

    def linear(self, a: Array) -> Array:
        return self.form(self.kernel, a)

    def absolute(self, r: Array) -> Array:
        return self.form(jnp.abs(self.kernel), r)

    def absolute_adjoint(self, s: Array) -> Array:
        return dataclasses.replace(self, kernel=jnp.abs(self.kernel)).adjoint()(s)

    def row_norms(self, columns: Array) -> Array:
        squares_of = columns.astype(self.dtype) ** 2
        return lengths(self.kernel, lambda squares: self.form(squares, squares_of))

    def frozen(self) -> Affine:
        return self


@jax.tree_util.register_dataclass
@layer
class Dense(Bilinear):
    """Dense layer: kernel (inputs, outputs). It ravels its input in C order."""

    def form(self, kernel: Array, a: Array) -> Array:
        return jnp.matmul(a.ravel(), kernel, precision=HIGHEST).reshape(self.out_shape)

    @property
    def adjoint_terms(self) -> int:
        return self.kernel.shape[1]

    def adjoint(self) -> Callable[[Array], Array]:
        product = functools.partial(jnp.matmul, self.kernel, precision=HIGHEST)
        return lambda z: product(z.ravel()).reshape(self.in_shape)

    def matrix(self) -> Array:
        return self.kernel.T

    def row(self, index: Array | int) -> Array:
        return self.kernel[:, index]


@jax.tree_util.register_dataclass
@layer
class Conv(Bilinear):
    """Zero-padded convolution of an image (H, W, C): kernel (kh, kw, C, channels)."""

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

    def whole_norm(self) -> float:
        """The norm of a circular convolution on a larger grid, of which a zero-padded one is a part.

        The grid has room for the image and the kernel, rounded up to a multiple of the stride. There the convolution is
        block diagonal: its norm is the largest of the Fourier symbol, with the frequencies that the stride folds onto
        each other stacked along the input channels over sqrt(s_h s_w).

        Reference:
            Sedghi, Gupta, Long, The Singular Values of Convolutional Layers, ICLR 2019 (stride 1).
        """
        kernel = np.asarray(self.kernel, np.float64)
        if not np.isfinite(kernel).all():
            return math.inf
        (sh, sw), (kh, kw) = self.stride, kernel.shape[:2]
        sizes = zip(self.in_shape[:2], (kh, kw), (sh, sw), strict=True)
        height, width = (-(-(n + k - 1) // s) * s for n, k, s in sizes)
        largest = np.abs(kernel).max(initial=0) or 1.0  # their squares may leave float64
        symbol = np.fft.fft2(kernel / largest, (height, width), axes=(0, 1))
        c_in, c_out = kernel.shape[2:]
        folded = symbol.reshape(sh, height // sh, sw, width // sw, c_in, c_out).transpose(1, 3, 0, 2, 4, 5)
        blocks = folded.reshape(-1, sh * sw * c_in, c_out) / math.sqrt(sh * sw)
        return float(np.linalg.norm(blocks, ord=2, axis=(1, 2)).max()) * largest * (1 + FFT_ROUNDING)


@jax.tree_util.register_dataclass
@layer
class Scale(Bilinear):
    """Entry by entry: kernel (the diagonal of W), shaped like the input."""

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

    def known_norm(self, rows: Array, columns: Array) -> Array:
        return highest(weighted(rows, weighted(columns, jnp.abs(self.kernel))).ravel())


def identity(shape: Shape, dtype: Any = jnp.float32) -> Scale:
    """The layer that changes nothing."""
    return Scale(kernel=jnp.ones(shape, dtype), bias=jnp.zeros(shape, dtype), in_shape=shape, out_shape=shape)


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
    return Dense(kernel=kernel, bias=bias, in_shape=in_shape, out_shape=(kernel.shape[1],))


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
    out_shape = (*size, kernel.shape[3])
    return Conv(kernel=kernel, bias=bias, in_shape=in_shape, out_shape=out_shape, stride=stride, padding=padding)

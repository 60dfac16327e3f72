"""One convolution and its transpose, both written as NHWC x HWIO -> NHWC.

XLA's CPU backend runs a convolution inside a loop 40 to 140 times slower unless it has exactly this form, and the
transposed and gradient convolutions that JAX derives have not. The transpose here is itself a convolution of that
form (of stride 1, followed by depth-to-space for strided layers), so power iteration and attacks may loop over both.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

FEW_CHANNELS = 4  # up to which a float64 convolution is computed tap by tap


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv(x: Array, kernel: Array, stride: Pair, padding: Padding) -> Array:
    """Convolution (cross-correlation) of one image; bilinear in ``x`` and ``kernel``.

    Its derivative towards ``x`` is :func:`conv_transpose`, so gradients may be taken inside a loop as well.

    Args:
        x: one image, shape (H, W, C).
        kernel: shape (kh, kw, C, channels).
        stride: per axis.
        padding: zeros before and after, per axis.

    Returns:
        Shape (H', W', channels).
    """
    return _lax_conv(x, kernel, stride, padding)


@functools.partial(conv.defjvp, symbolic_zeros=True)
def _(stride: Pair, padding: Padding, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    out = conv(x, kernel, stride, padding)
    tangent = jnp.zeros_like(out)
    if not isinstance(x_dot, SymbolicZero):
        # Written as the transpose of the transposed convolution: JAX transposes it back into the fast form.
        transposed = transpose_kernel(kernel, stride)
        back = jax.linear_transpose(lambda z: _transpose(z, transposed, stride, padding, x.shape), out)
        tangent = tangent + back(x_dot)[0]
    if not isinstance(kernel_dot, SymbolicZero):
        tangent = tangent + _lax_conv(x, kernel_dot, stride, padding)
    return out, tangent


def transpose_kernel(kernel: Array, stride: Pair) -> Array:
    """The kernel of the transposed convolution: prepare it once, outside a loop.

    With i + p = q s + r, output o meets input i through tap k = r + s m exactly when o = q - m, so the transpose is a
    convolution over q with ceil(kh / s) flipped taps and one group of channels per phase r.

    Args:
        kernel: shape (kh, kw, C, channels) of the forward convolution.
        stride: (sh, sw) of the forward convolution.

    Returns:
        Shape (ceil(kh / sh), ceil(kw / sw), channels, sh * sw * C).
    """
    kh, kw, c_in, c_out = kernel.shape
    sh, sw = stride
    mh, mw = -(-kh // sh), -(-kw // sw)
    padded = jnp.pad(kernel, ((0, mh * sh - kh), (0, mw * sw - kw), (0, 0), (0, 0)))
    phases = padded.reshape(mh, sh, mw, sw, c_in, c_out)
    taps = jnp.flip(phases, (0, 2)).transpose(0, 2, 5, 1, 3, 4)
    return taps.reshape(mh, mw, c_out, sh * sw * c_in)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def conv_transpose(y: Array, transposed: Array, stride: Pair, padding: Padding, shape: tuple[int, int, int]) -> Array:
    """The transpose of ``x -> conv(x, kernel, stride, padding)`` for inputs of the given shape; bilinear.

    Its gradients are those of :func:`conv` with the cotangent as the image: towards y the convolution itself, and
    towards the kernel that of the convolution (the gradient that JAX derives from the phases takes 100 times as long).

    Args:
        y: shape (H', W', channels), a vector on the output side.
        transposed: ``transpose_kernel(kernel, stride)``.
        stride: of the forward convolution.
        padding: of the forward convolution.
        shape: (H, W, C) of the input side.

    Returns:
        Shape (H, W, C).
    """
    return _transpose(y, transposed, stride, padding, shape)


@functools.partial(conv_transpose.defjvp, symbolic_zeros=True)
def _(stride: Pair, padding: Padding, shape: tuple, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (y, transposed), (y_dot, transposed_dot) = primals, tangents
    out = conv_transpose(y, transposed, stride, padding, shape)
    taps = transposed.shape[0] * stride[0], transposed.shape[1] * stride[1]
    # The kernel with zero taps up to a multiple of the stride, and zeros of padding for them to meet.
    lows, sizes = (low for low, _ in padding), zip(shape[:2], y.shape[:2], stride, taps, strict=True)
    reach = tuple((low, (rows - 1) * s + k - low - n) for low, (n, rows, s, k) in zip(lows, sizes, strict=True))

    def forward(x: Array, kernel: Array) -> Array:
        return _lax_conv(x, kernel, stride, reach)

    # Both are written as transposes of what they shall be transposed to.
    tangent = jnp.zeros_like(out)
    if not isinstance(y_dot, SymbolicZero):
        kernel = _kernel_of(transposed, stride)
        tangent = tangent + jax.linear_transpose(lambda x: forward(x, kernel), out)(y_dot)[0]
    if not isinstance(transposed_dot, SymbolicZero):
        kernel_dot = _kernel_of(transposed_dot, stride)

        def gradient(x: Array) -> Array:
            return jax.linear_transpose(lambda kernel: forward(x, kernel), kernel_dot)(y)[0]

        tangent = tangent + jax.linear_transpose(gradient, out)(kernel_dot)[0]
    return out, tangent


def _kernel_of(transposed: Array, stride: Pair) -> Array:
    """The inverse of :func:`transpose_kernel`, but for zero taps up to a multiple of the stride."""
    mh, mw, c_out, phases = transposed.shape
    sh, sw = stride
    taps = transposed.reshape(mh, mw, c_out, sh, sw, phases // (sh * sw)).transpose(0, 3, 1, 4, 5, 2)
    return jnp.flip(taps, (0, 2)).reshape(mh * sh, mw * sw, -1, c_out)


def _transpose(y: Array, transposed: Array, stride: Pair, padding: Padding, shape: tuple) -> Array:
    firsts = [low // s for (low, _), s in zip(padding, stride, strict=True)]
    lasts = [(n - 1 + low) // s for n, (low, _), s in zip(shape[:2], padding, stride, strict=True)]
    taps = transposed.shape[:2]
    pads = tuple(
        (m - 1 - first, last - (size - 1))
        for m, first, last, size in zip(taps, firsts, lasts, y.shape[:2], strict=True)
    )
    if y.dtype == jnp.float64 and transposed.dtype == jnp.float64:
        # XLA's CPU backend runs a float64 convolution 20 times slower where its padding reaches the kernel's size, so
        # the zeros are added first, and the barrier keeps them from being merged into the convolution again.
        y = lax.optimization_barrier(lax.pad(y, jnp.zeros((), y.dtype), [(*pad, 0) for pad in (*pads, (0, 0))]))
        pads = ((0, 0), (0, 0))
        if transposed.shape[3] <= FEW_CHANNELS:
            return _depth_to_space(_by_taps(y, transposed), stride, firsts, padding, shape)
    phases = _lax_conv(y, transposed, (1, 1), pads)
    return _depth_to_space(phases, stride, firsts, padding, shape)


def _by_taps(y: Array, kernel: Array) -> Array:
    """An unpadded convolution as one product of pixels with all taps, whose results are then shifted and added.

    XLA's CPU backend gathers a window per output first, which costs more than the products where there are few
    channels to compute from it.
    """
    kh, kw, c_in, c_out = kernel.shape
    rows, columns = y.shape[0] - kh + 1, y.shape[1] - kw + 1
    products = _lax_conv(y, kernel.transpose(2, 0, 1, 3).reshape(1, 1, c_in, -1), (1, 1), ((0, 0), (0, 0)))
    taps = products.reshape(*y.shape[:2], kh, kw, c_out)
    return sum(taps[a : a + rows, b : b + columns, a, b] for a in range(kh) for b in range(kw))


def _depth_to_space(phases: Array, stride: Pair, firsts: list[int], padding: Padding, shape: tuple) -> Array:
    if stride == (1, 1):
        return phases  # q runs over exactly the input's rows and columns
    (sh, sw), (height, width, channels) = stride, shape
    rows, columns = phases.shape[:2]
    grid = phases.reshape(rows, columns, sh, sw, channels).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * sh, columns * sw, channels)
    top, left = (low - first * s for (low, _), first, s in zip(padding, firsts, stride, strict=True))
    return grid[top : top + height, left : left + width]


def _lax_conv(x: Array, kernel: Array, stride: Pair, padding: Padding) -> Array:
    # The highest precision: TF32 has no place in a bound.
    dimensions, precision = ("NHWC", "HWIO", "NHWC"), lax.Precision.HIGHEST
    return lax.conv_general_dilated(
        x[None], kernel, stride, padding, dimension_numbers=dimensions, precision=precision
    )[0]

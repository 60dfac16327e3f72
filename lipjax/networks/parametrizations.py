"""Parametrizations: kernels whose matrix has a norm of at most 1, computed from kernels of any size.

Each is exact in exact arithmetic; what rounding leaves is no concern of training, and is bounded in certificates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.layers import HIGHEST


def cayley(kernel: Array) -> Array:
    """Matrices with orthonormal rows, or columns if there are fewer of them: the Cayley transform.

    Of a matrix with the square part U on top and the rest V below, ``A = U - U^H + V^H V`` gives ``[(I + A)^-1 (I - A);
    -2 V (I + A)^-1]``. I + A is never singular.

    Args:
        kernel: real or complex matrices (..., inputs, outputs).

    Returns:
        Matrices Q of the same shape: Q^H Q or Q Q^H is the identity.

    Reference:
        Trockman, Kolter, Orthogonalizing Convolutional Layers with the Cayley Transform, ICLR 2021, section 4.
    """
    inputs, outputs = kernel.shape[-2:]
    if inputs < outputs:
        return _adjoint(cayley(_adjoint(kernel)))
    square, rest = kernel[..., :outputs, :], kernel[..., outputs:, :]
    product = jnp.matmul(_adjoint(rest), rest, precision=HIGHEST)
    skew = square - _adjoint(square) + product
    identity = jnp.broadcast_to(jnp.eye(outputs, dtype=kernel.dtype), skew.shape)
    inverse = jnp.linalg.inv(identity + skew)
    top = jnp.matmul(inverse, identity - skew, precision=HIGHEST)
    return jnp.concatenate([top, -2 * jnp.matmul(rest, inverse, precision=HIGHEST)], axis=-2)


def _adjoint(matrices: Array) -> Array:
    return jnp.conj(jnp.swapaxes(matrices, -1, -2))


def row_sums(kernel: Array, weights: Array | None = None) -> Array:
    """For each input channel i, ``T_i = sum over j |W^T W|_ij q_j / q_i`` of a convolution or a dense layer W.

    ``W diag(T)^(-1/2)`` has a norm of at most 1: the sums of ``|T^(-1/2) W^T W T^(-1/2)|`` with the weights ``q
    T^(1/2)`` are. A convolution that is zero-padded, or has a stride, is a part of the one on the whole plane.

    Args:
        kernel: (kh, kw, channels in, channels out) of a convolution, or (inputs, outputs).
        weights: q > 0, one per input channel; default 1.

    Returns:
        Shape (channels in,).

    Reference:
        Prach, Lampert, Almost-Orthogonal Layers, ECCV 2022 (q = 1); Araujo et al., A Unified Algebraic Perspective on
        Lipschitz Neural Networks, ICLR 2023, Theorem 3.
    """
    if kernel.ndim == 2:
        products = jnp.abs(jnp.matmul(kernel, kernel.T, precision=HIGHEST))
    else:
        images = kernel.transpose(2, 0, 1, 3)  # each input channel's kernel as an image of output channels
        height, width = kernel.shape[:2]
        padding = ((height - 1, height - 1), (width - 1, width - 1))
        taps = images.transpose(1, 2, 3, 0)
        layout = ("NHWC", "HWIO", "NHWC")
        correlations = lax.conv_general_dilated(
            images, taps, (1, 1), padding, dimension_numbers=layout, precision=HIGHEST
        )
        products = jnp.sum(jnp.abs(correlations), axis=(1, 2))
    if weights is not None:
        products = products * weights[None, :] / weights[:, None]
    return jnp.sum(products, axis=1)


def almost_orthogonal(kernel: Array, weights: Array | None = None) -> Array:
    """The kernel with each input channel divided by the root of its :func:`row_sums`; the norm is at most 1.

    A channel of zeros stays one.
    """
    sums = row_sums(kernel, weights)
    positive = sums > 0
    scale = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, sums, 1)), 0)
    return kernel * scale.reshape((1,) * (kernel.ndim - 2) + (-1, 1))

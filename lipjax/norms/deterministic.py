"""Upper bounds of spectral norms without chance: Gram matrices, the Schur test, and circulant embedding.

Everything is in float64, and every bound is raised by what its own rounding can amount to.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import UNIT64, gamma, highest
from lipjax.networks.layers import Affine, Conv
from lipjax.networks.linear_maps import LinearMap

FFT_ROUNDING = 1e-9  # relative; Fourier transforms and singular values of blocks are off by less than 1e-12


def gram_norm(linear_map: LinearMap, terms: int) -> Array:
    """The norm from the Gram matrix of the input side and its largest eigenvalue.

    Args:
        linear_map: W; its input side should be the smaller one.
        terms: the most products that are summed up in one entry of a product with W or its transpose.

    Returns:
        sqrt(lambda_max(W^T W) + (gamma_m + 10 n 2^-53) ||W||_F^2), at least the norm.
    """
    n = math.prod(linear_map.in_shape)

    def column(unit: Array) -> Array:
        return linear_map.rmatvec(linear_map.matvec(unit.reshape(linear_map.in_shape))).ravel()

    gram = jax.vmap(column)(jnp.eye(n, dtype=linear_map.dtype))
    square = jnp.trace(gram) * (1 + n * 2 * UNIT64)
    slack = (gamma(2 * terms + n + 8, UNIT64) + 10 * n * UNIT64) * square
    largest = jnp.linalg.eigvalsh((gram + gram.T) / 2)[-1]
    return jnp.sqrt(jnp.maximum(largest, 0) + slack) * (1 + 4 * UNIT64)


def schur_norm(layer: Affine, rows: Array, columns: Array) -> Array:
    """The Schur test: sqrt(largest row sum * largest column sum) of |W| over the rows and columns that are kept."""
    positive = dataclasses.replace(layer, kernel=jnp.abs(layer.kernel))
    row_sums = jnp.where(rows, positive.linear(columns.astype(layer.kernel.dtype)), 0)
    column_sums = jnp.where(columns, positive.adjoint()(rows.astype(layer.kernel.dtype)), 0)
    terms = max(layer.terms, math.prod(layer.out_shape)) + 8
    return jnp.sqrt(highest(row_sums) * highest(column_sums)) * (1 + gamma(terms, UNIT64))


def circulant_norm(layer: Conv) -> float:
    """The norm of a zero-padded convolution is at most that of a circular one on a larger grid.

    The grid has room for the image and the kernel, rounded up to a multiple of the stride. There the convolution is
    block diagonal: its norm is the largest of the Fourier symbol, with the frequencies that the stride folds onto each
    other stacked along the input channels over sqrt(s_h s_w).

    Reference:
        Sedghi, Gupta, Long, The Singular Values of Convolutional Layers, ICLR 2019 (stride 1).
    """
    kernel = np.asarray(layer.kernel, np.float64)
    if not np.isfinite(kernel).all():
        return math.inf
    (sh, sw), (kh, kw) = layer.stride, kernel.shape[:2]
    height, width = (-(-(n + k - 1) // s) * s for n, k, s in zip(layer.in_shape[:2], (kh, kw), (sh, sw), strict=True))
    symbol = np.fft.fft2(kernel, (height, width), axes=(0, 1))
    c_in, c_out = kernel.shape[2:]
    folded = symbol.reshape(sh, height // sh, sw, width // sw, c_in, c_out).transpose(1, 3, 0, 2, 4, 5)
    blocks = folded.reshape(-1, sh * sw * c_in, c_out) / math.sqrt(sh * sw)
    return float(np.linalg.norm(blocks, ord=2, axis=(1, 2)).max()) * (1 + FFT_ROUNDING)

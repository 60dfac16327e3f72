"""Upper bounds of spectral norms without chance: Gram matrices and the Schur test.

Everything is in float64, and every bound is raised by what its own rounding can amount to.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.floating_point import UNIT64, gamma, highest
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.masks import weighted


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
    slack = (gamma(2 * terms + n + 10, UNIT64) + 10 * n * UNIT64) * square
    largest = jnp.linalg.eigvalsh((gram + gram.T) / 2)[-1]
    return jnp.sqrt(jnp.maximum(largest, 0) + slack) * (1 + 4 * UNIT64)


def schur_norm(layer: Affine, scale: Array | float, rows: Array, columns: Array) -> Array:
    """The Schur test: sqrt(largest row sum * largest column sum) of |W| / scale over the rows and columns kept.

    Args:
        layer: with the matrix W.
        scale: a power of two.
        rows: that are kept, boolean, or their weights (out_shape).
        columns: likewise (in_shape).
    """
    row_sums = weighted(rows, layer.absolute(columns.astype(layer.dtype)) / scale)
    column_sums = weighted(columns, layer.absolute_adjoint(rows.astype(layer.dtype)) / scale)
    terms = max(layer.terms, layer.adjoint_terms) + 8
    return jnp.sqrt(highest(row_sums) * highest(column_sums)) * (1 + gamma(terms, UNIT64))

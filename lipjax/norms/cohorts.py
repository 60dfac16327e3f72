"""Cohorts: steps of many iterations at once, each for the examples of one layer that have not converged yet."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import UNIT64, gamma, highest
from lipjax.networks.layers import Affine, Bilinear
from lipjax.networks.linear_maps import LinearMap, unit
from lipjax.norms import deterministic, lanczos, spectral

CHUNK_ITERS = 32  # power iterations between two looks at who has converged


def parts(places: np.ndarray, size: int, count: int) -> Iterator[np.ndarray]:
    """Batches of one size of places below ``count``; the last one is filled up with ``count``, which lies outside.

    What is gathered there is clipped, and what is scattered there is dropped. A place that stood in a batch twice would
    be written twice, in an order that accelerators do not define.
    """
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield np.pad(part, (0, size - len(part)), constant_values=count)


def masked_places(rows: Array, columns: Array, ceiling: Any, among: np.ndarray | None) -> np.ndarray:
    """The places, among some or all, where something is masked, or no ceiling is known."""
    axes = tuple(range(1, rows.ndim)), tuple(range(1, columns.ndim))
    whole = np.asarray(jnp.all(rows, axis=axes[0]) & jnp.all(columns, axis=axes[1]))
    places = np.flatnonzero(~(whole & np.isfinite(np.broadcast_to(ceiling, whole.shape))))
    return places if among is None else np.intersect1d(places, among)


def is_among(places: np.ndarray, count: int) -> np.ndarray:
    """For each of ``count`` places whether it is one of those given (count,)."""
    return np.isin(np.arange(count), places)


def scale_of(layer: Affine) -> float:
    """A power of two near the largest sum of a row of ``|W|``: divided by it, squares stay within float64."""
    largest = float(_largest_row_sum(layer))
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < np.inf else 1.0


@jax.jit
def _largest_row_sum(layer: Affine) -> Array:
    return highest(layer.absolute(jnp.ones(layer.in_shape, layer.dtype)))


@jax.jit
def product_rounding(layer: Affine, rows: Array, columns: Array) -> Array:
    """What float64 products with a folded W may round, as norms (N,): relative to ``|W|``, parts of which may cancel.

    Nothing where no row or no column is left. In a bilinear layer nothing cancels.
    """
    count = len(rows)
    if isinstance(layer, Bilinear):
        return jnp.zeros(count, layer.dtype)
    row_left, column_left = (jnp.any(mask.reshape(count, -1), axis=1) for mask in (rows, columns))
    share = gamma(2 * (layer.terms + layer.adjoint_terms), UNIT64)
    return jnp.where(row_left & column_left, share * layer.absolute_norm(), 0)


def oriented(layer: Affine, scale: Array | float, rows: Array, columns: Array) -> LinearMap:
    """A masked layer over a scale, from its smaller side."""
    return layer.linear_map().divided(scale).masked(rows, columns).from_smaller_side()


def start_vector(key: Array, place: Array | int, linear_map: LinearMap) -> Array:
    """A unit vector of uniform direction on the live coordinates of the start's side."""
    start = jax.random.normal(jax.random.fold_in(key, place), linear_map.in_shape, linear_map.dtype)
    kept = start if linear_map.in_mask is None else jnp.where(linear_map.in_mask, start, 0)
    return unit(kept)


@jax.jit
def power_start(layer: Affine, rows: Array, columns: Array, keys: Array, place: int) -> tuple[Array, ...]:
    """Starts of power iterations, and what is known before the first one: sigmas, changes and counts."""

    def one(rows: Array, columns: Array, key: Array) -> Array:
        return start_vector(key, place, oriented(layer, 1.0, rows, columns))

    vectors = jax.vmap(one)(rows, columns, keys)
    count = rows.shape[0]
    zeros = jnp.zeros((count,), vectors.dtype)
    return vectors, zeros, jnp.full_like(zeros, jnp.inf), jnp.zeros((count,), jnp.int32)


@functools.partial(jax.jit, donate_argnums=4)
def power_advance(
    layer: Affine, rows: Array, columns: Array, part: Array, state: tuple[Array, ...], tol: float
) -> tuple[Array, ...]:
    """Some iterations more for the examples ``part`` of the cohort: the vectors, sigmas, changes and counts of all."""

    def one(rows: Array, columns: Array, u: Array) -> tuple[Array, ...]:
        return spectral.iterate_until(oriented(layer, 1.0, rows, columns), u, tol=tol, max_iters=CHUNK_ITERS)

    vectors, sigmas, changes, counts = state
    u, sigma, change, count = jax.vmap(one)(rows[part], columns[part], vectors[part])
    return (
        vectors.at[part].set(u, mode="drop"),
        sigmas.at[part].set(sigma, mode="drop"),
        changes.at[part].set(change, mode="drop"),
        counts.at[part].add(count, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames=("count", "length", "max_steps"))
def lanczos_not_begun(count: int, length: int, max_steps: int) -> lanczos.Process:
    """Room for the processes of a cohort; their starts are drawn with their first steps."""
    return lanczos.begin(jnp.zeros((count, length), jnp.float64), max_steps=max_steps)


@functools.partial(jax.jit, static_argnames="first", donate_argnames="process")
def lanczos_advance(
    layer: Affine,
    scale: float,
    rows: Array,
    columns: Array,
    keys: Array,
    place: int,
    part: Array,
    process: lanczos.Process,
    step: int,
    *,
    first: bool,
) -> tuple[lanczos.Process, lanczos.Tridiagonal]:
    """Some steps more for the examples ``part`` of the cohort, from their starts if they are the first.

    Returns:
        ``(process, matrix)``: the processes of all, and what those of ``part`` have found.
    """
    rows, columns = rows[part], columns[part]

    def one(rows: Array, columns: Array, u: Array) -> Array:
        map_ = oriented(layer, scale, rows, columns)
        return map_.rmatvec(map_.matvec(u.reshape(map_.in_shape))).ravel()

    def start(rows: Array, columns: Array, key: Array) -> Array:
        return start_vector(key, place, oriented(layer, scale, rows, columns)).ravel()

    def gram(u: Array) -> Array:
        return jax.vmap(one)(rows, columns, u)

    if first:
        starts = jax.vmap(start)(rows, columns, keys[part])
        begun = lanczos.begin(starts, max_steps=process.matrix.diagonal.shape[1])
        advanced = lanczos.first_steps(gram, begun)
    else:
        advanced = lanczos.more_steps(gram, jax.tree.map(lambda leaf: leaf[part], process), step)
    return jax.tree.map(lambda leaf, new: leaf.at[part].set(new, mode="drop"), process, advanced), advanced.matrix


# Apart from the steps, because it is the same program for every layer.
enclosures = jax.jit(lanczos.enclosures)


@jax.jit
def gram_norms(layer: Affine, scale: float, rows: Array, columns: Array) -> Array:
    """Bounds of the norms over a scale, from Gram matrices."""

    def one(masks: tuple[Array, Array]) -> Array:
        return deterministic.gram_norm(oriented(layer, scale, *masks), max(layer.terms, layer.adjoint_terms))

    return jax.lax.map(one, (rows, columns))  # one Gram matrix at a time: they are large


@jax.jit
def schur_norms(layer: Affine, scale: float, rows: Array, columns: Array) -> Array:
    """Bounds of the norms over a scale, by the Schur test."""

    def one(rows: Array, columns: Array) -> Array:
        return deterministic.schur_norm(layer, scale, rows, columns)

    return jax.vmap(one)(rows, columns)

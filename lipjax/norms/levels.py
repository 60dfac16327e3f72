"""Norms of a cohort: spectral norms of many masked copies of one layer; examples leave the batch as they converge.

The three levels differ in what their norms are worth, and in nothing else; see docs/soundness.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks import linear_maps
from lipjax.networks.layers import Affine, Conv
from lipjax.norms import deterministic, lanczos, spectral

LEVELS = ("probabilistic", "deterministic", "estimate")
CHUNK_ITERS = 32  # power iterations between two looks at who has converged


@dataclasses.dataclass(frozen=True)
class Norms:
    """Spectral norms of one layer under the masks of N examples, on the host.

    Attributes:
        sigma: the norms (N,).
        products: products with W or its transpose that each took (N,).
        gap: upper / lower - 1 (N,), not a number where there is no such pair of bounds.
        drawn: whether a random start was drawn (N,).
    """

    sigma: np.ndarray
    products: np.ndarray
    gap: np.ndarray
    drawn: np.ndarray


def known(sigma: float, count: int) -> Norms:
    """A norm that ``count`` examples share, at no cost."""
    zeros = np.zeros(count)
    return Norms(zeros + sigma, zeros.astype(int), zeros + np.nan, zeros.astype(bool))


class Level(Protocol):
    """How the norms of a certificate are found, and what they are worth."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def is_bound(self) -> bool: ...

    def __call__(
        self,
        place: int,
        layer: Affine,
        rows: Array,
        columns: Array,
        keys: Array,
        ceiling: Any,
        among: np.ndarray | None = None,
    ) -> Norms:
        """Norms of ``I_rows W I_columns`` for masks (N, ...); each example's start is drawn from its own key (N,).

        ``ceiling`` (scalar or (N,)) are upper bounds known already, infinite where there is none; no sigma is larger.
        Where nothing is masked and a ceiling is known, that is the norm: no start is drawn. So it is for examples that
        are not ``among`` some of the N, where those are given.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PowerIteration:
    """Level ``estimate``: power iteration from a random start until the vector moves by at most ``tol``, float32.

    Attributes:
        tol: when to stop.
        max_iters: cap on the iterations.
        batch_size: examples that are iterated together.
    """

    tol: float = 1e-3
    max_iters: int = 2000
    batch_size: int = 128
    name = "estimate"
    dtype = np.float32
    is_bound = False

    def __call__(self, place, layer, rows, columns, keys, ceiling, among=None):
        count = rows.shape[0]
        state = _power_start(layer, rows, columns, keys, place)
        asked = unfinished = _masked(rows, columns, ceiling, among)
        while unfinished.size:
            for part in parts(unfinished, min(self.batch_size, count), count):
                state = _power_advance(layer, rows, columns, part, state, self.tol)
            change, iterations = np.asarray(state[2]), np.asarray(state[3])
            unfinished = asked[(change[asked] > self.tol) & (iterations[asked] < self.max_iters)]
        sigma = np.array(np.broadcast_to(ceiling, count), np.float64)
        sigma[asked] = np.minimum(sigma[asked], np.asarray(state[1])[asked])
        return Norms(sigma, 2 * np.asarray(state[3]), np.full(count, np.nan), _among(asked, count))


@dataclasses.dataclass(frozen=True)
class Lanczos:
    """Level ``probabilistic``: upper bounds by the Lanczos process, float64; see :mod:`lipjax.norms.lanczos`.

    Attributes:
        delta: probability of failure of ONE start.
        rtol: stop where upper / lower - 1 is at most this.
        max_steps: cap on the steps; a bound that is not tight by then is a bound all the same.
        batch_size: the most examples that are iterated together.
    """

    delta: float
    rtol: float = 1e-3
    max_steps: int = 512
    batch_size: int = 128
    name = "probabilistic"
    dtype = np.float64
    is_bound = True

    def __call__(self, place, layer, rows, columns, keys, ceiling, among=None):
        count, length = rows.shape[0], min(math.prod(layer.in_shape), math.prod(layer.out_shape))
        # Half of what a start has along the top direction is left to the rounding of the process.
        t_delta = lanczos.smallest_start(self.delta, length) / 2
        layer, scale = _scaled(layer)
        lower, upper = np.zeros(count), np.broadcast_to(ceiling, count) / scale
        gap, products, step = np.full(count, np.nan), np.zeros(count, int), 0
        asked = unfinished = _masked(rows, columns, ceiling, among)
        if asked.size:
            process = _lanczos_not_begun(count, length, self.max_steps)
        while unfinished.size and step < self.max_steps:
            end = min(step + (lanczos.MORE_STEPS if step else lanczos.FIRST_STEPS), self.max_steps)
            for part in parts(unfinished, min(self.batch_size, count), count):
                process, found = _lanczos_advance(
                    layer, rows, columns, keys, place, part, process, step, first=step == 0
                )
                real = part[part < count]
                below, above = (np.asarray(bound)[: len(real)] for bound in _enclosures(found, end, t_delta))
                lower[real], upper[real] = np.maximum(lower[real], below), np.minimum(upper[real], above)
            products[unfinished], step = 2 * end, end
            unfinished = asked[upper[asked] > lower[asked] * (1 + self.rtol)]
        if asked.size:
            with np.errstate(invalid="ignore", divide="ignore"):
                gap[asked] = np.where(upper[asked] == 0, 0.0, upper[asked] / lower[asked] - 1)
        return Norms(upper * scale, products, gap, _among(asked, count))


@dataclasses.dataclass(frozen=True)
class Deterministic:
    """Level ``deterministic``: upper bounds without chance, float64; see :mod:`lipjax.norms.deterministic`.

    Layers whose smaller side has at most ``small`` entries get the eigenvalues of their Gram matrix. Of larger ones
    the least of the Schur test of what is left and of the circulant bound of the whole convolution is taken.

    Attributes:
        small: the largest side that a Gram matrix is made of.
    """

    small: int = 2048
    name = "deterministic"
    dtype = np.float64
    is_bound = True

    def __call__(self, place, layer, rows, columns, keys, ceiling, among=None):
        length = min(math.prod(layer.in_shape), math.prod(layer.out_shape))
        bound = _gram_norms if length <= self.small else _schur_norms
        asked = _masked(rows, columns, ceiling, among)
        layer, scale = _scaled(layer)
        if length > self.small and isinstance(layer, Conv) and np.isinf(ceiling).all():
            ceiling = deterministic.circulant_norm(layer) * scale
        sigma, products = np.array(np.broadcast_to(ceiling, len(rows)), np.float64), np.zeros(len(rows), int)
        if asked.size:
            found = np.asarray(bound(layer, rows[asked], columns[asked]))
            # Infinite where anything was not finite: a comparison with NaN would hide it.
            sigma[asked] = np.where(np.isfinite(found), np.minimum(found * scale, sigma[asked]), np.inf)
            products[asked] = 2 * length if length <= self.small else 2
        return Norms(sigma, products, np.full(len(rows), np.nan), np.zeros(len(rows), bool))


def level_of(name: str, starts: int, delta: float, rtol: float) -> Level:
    """The level of a name.

    Args:
        name: one of ``LEVELS``.
        starts: that will be drawn at most.
        delta: probability that any of them fails.
        rtol: relative gap at which a norm is tight enough.

    Raises:
        ValueError: an option that cannot be used, named with its value.
    """
    if name == "estimate":
        return PowerIteration()
    if name == "deterministic":
        return Deterministic()
    if name != "probabilistic":
        raise ValueError(f"level={name!r} is not known; give one of {', '.join(LEVELS)}")
    if isinstance(delta, str) or not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} is no probability of failure; give a number between 0 and 1, such as 1e-6")
    if isinstance(rtol, str) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r} cannot be reached; give a relative gap more than 0, such as 1e-3")
    return Lanczos(delta / max(1, starts), rtol)


def parts(places: np.ndarray, size: int, count: int) -> Iterator[np.ndarray]:
    """Batches of one size of places below ``count``; the last one is filled up with ``count``, which lies outside.

    What is gathered there is clipped, and what is scattered there is dropped. A place that stood in a batch twice would
    be written twice, in an order that accelerators do not define.
    """
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield np.pad(part, (0, size - len(part)), constant_values=count)


def _masked(rows: Array, columns: Array, ceiling: Any, among: np.ndarray | None) -> np.ndarray:
    """The places, among some or all, where something is masked, or no ceiling is known."""
    axes = tuple(range(1, rows.ndim)), tuple(range(1, columns.ndim))
    whole = np.asarray(jnp.all(rows, axis=axes[0]) & jnp.all(columns, axis=axes[1]))
    places = np.flatnonzero(~(whole & np.isfinite(np.broadcast_to(ceiling, whole.shape))))
    return places if among is None else np.intersect1d(places, among)


def _among(places: np.ndarray, count: int) -> np.ndarray:
    return np.isin(np.arange(count), places)


def _scaled(layer: Affine) -> tuple[Affine, float]:
    """The layer divided by a power of two near its largest weight, and that power: squares stay within float64."""
    largest = float(np.max(np.abs(np.asarray(layer.kernel)), initial=0))
    if not 0 < largest < np.inf:
        return layer, 1.0
    scale = 2.0 ** math.frexp(largest)[1]
    return dataclasses.replace(layer, kernel=layer.kernel / scale), scale


def _oriented(layer: Affine, rows: Array, columns: Array) -> linear_maps.LinearMap:
    return layer.linear_map().masked(rows, columns).from_smaller_side()


def _start(key: Array, place: Array | int, oriented: linear_maps.LinearMap) -> Array:
    """A unit vector of uniform direction on the live coordinates of the start's side."""
    start = jax.random.normal(jax.random.fold_in(key, place), oriented.in_shape, oriented.dtype)
    kept = start if oriented.in_mask is None else jnp.where(oriented.in_mask, start, 0)
    return linear_maps.unit(kept)


@jax.jit
def _power_start(layer: Affine, rows: Array, columns: Array, keys: Array, place: int) -> tuple[Array, ...]:
    def one(rows: Array, columns: Array, key: Array) -> Array:
        return _start(key, place, _oriented(layer, rows, columns))

    vectors = jax.vmap(one)(rows, columns, keys)
    count = rows.shape[0]
    zeros = jnp.zeros((count,), vectors.dtype)
    return vectors, zeros, jnp.full_like(zeros, jnp.inf), jnp.zeros((count,), jnp.int32)


@functools.partial(jax.jit, donate_argnums=4)
def _power_advance(
    layer: Affine, rows: Array, columns: Array, part: Array, state: tuple[Array, ...], tol: float
) -> tuple[Array, ...]:
    """Some iterations more for the examples ``part`` of the cohort: the vectors, sigmas, changes and counts of all."""

    def one(rows: Array, columns: Array, u: Array) -> tuple[Array, ...]:
        return spectral.iterate_until(_oriented(layer, rows, columns), u, tol=tol, max_iters=CHUNK_ITERS)

    vectors, sigmas, changes, counts = state
    u, sigma, change, count = jax.vmap(one)(rows[part], columns[part], vectors[part])
    return (
        vectors.at[part].set(u, mode="drop"),
        sigmas.at[part].set(sigma, mode="drop"),
        changes.at[part].set(change, mode="drop"),
        counts.at[part].add(count, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames=("count", "length", "max_steps"))
def _lanczos_not_begun(count: int, length: int, max_steps: int) -> lanczos.Process:
    """Room for the processes of a cohort; their starts are drawn with their first steps."""
    return lanczos.begin(jnp.zeros((count, length), jnp.float64), max_steps=max_steps)


@functools.partial(jax.jit, static_argnames="first", donate_argnames="process")
def _lanczos_advance(
    layer: Affine,
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
        oriented = _oriented(layer, rows, columns)
        return oriented.rmatvec(oriented.matvec(u.reshape(oriented.in_shape))).ravel()

    def start(rows: Array, columns: Array, key: Array) -> Array:
        return _start(key, place, _oriented(layer, rows, columns)).ravel()

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
_enclosures = jax.jit(lanczos.enclosures)


@jax.jit
def _gram_norms(layer: Affine, rows: Array, columns: Array) -> Array:
    def one(masks: tuple[Array, Array]) -> Array:
        return deterministic.gram_norm(_oriented(layer, *masks), max(layer.terms, math.prod(layer.out_shape)))

    return jax.lax.map(one, (rows, columns))  # one Gram matrix at a time: they are large


@jax.jit
def _schur_norms(layer: Affine, rows: Array, columns: Array) -> Array:
    return jax.vmap(functools.partial(deterministic.schur_norm, layer))(rows, columns)

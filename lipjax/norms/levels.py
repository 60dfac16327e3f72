"""Norms of a cohort: spectral norms of many masked copies of one layer; examples leave the batch as they converge.

The three levels differ in what their norms are worth, and in nothing else; see docs/soundness.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from lipjax.networks.layers import Affine
from lipjax.norms import cohorts, lanczos

LEVELS = ("probabilistic", "deterministic", "estimate")


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


def known(sigma: np.ndarray | float, count: int) -> Norms:
    """Norms of ``count`` examples, or one that they share, at no cost."""
    zeros = np.zeros(count)
    return Norms(zeros + sigma, zeros.astype(int), zeros + np.nan, zeros.astype(bool))


def by_construction(layer: Affine, rows: Array, columns: Array) -> Norms | None:
    """Norms that a layer knows, at no cost, or None where it does not."""
    found = _known_norms(layer, rows, columns)
    return None if found is None else known(np.asarray(found, np.float64), len(rows))


@jax.jit
def _known_norms(layer: Affine, rows: Array, columns: Array) -> Array | None:
    return jax.vmap(layer.known_norm)(rows, columns)


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
        state = cohorts.power_start(layer, rows, columns, keys, place)
        asked = unfinished = cohorts.masked_places(rows, columns, ceiling, among)
        while unfinished.size:
            for part in cohorts.parts(unfinished, min(self.batch_size, count), count):
                state = cohorts.power_advance(layer, rows, columns, part, state, self.tol)
            change, iterations = np.asarray(state[2]), np.asarray(state[3])
            unfinished = asked[(change[asked] > self.tol) & (iterations[asked] < self.max_iters)]
        sigma = np.array(np.broadcast_to(ceiling, count), np.float64)
        sigma[asked] = np.minimum(sigma[asked], np.asarray(state[1])[asked])
        return Norms(sigma, 2 * np.asarray(state[3]), np.full(count, np.nan), cohorts.is_among(asked, count))


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
        scale = cohorts.scale_of(layer)
        lower, upper = np.zeros(count), np.broadcast_to(ceiling, count) / scale
        gap, products, step = np.full(count, np.nan), np.zeros(count, int), 0
        asked = unfinished = cohorts.masked_places(rows, columns, ceiling, among)
        if asked.size:
            process = cohorts.lanczos_not_begun(count, length, self.max_steps)
        while unfinished.size and step < self.max_steps:
            end = min(step + (lanczos.MORE_STEPS if step else lanczos.FIRST_STEPS), self.max_steps)
            for part in cohorts.parts(unfinished, min(self.batch_size, count), count):
                process, found = cohorts.lanczos_advance(
                    layer, scale, rows, columns, keys, place, part, process, step, first=step == 0
                )
                real = part[part < count]
                below, above = (np.asarray(bound)[: len(real)] for bound in cohorts.enclosures(found, end, t_delta))
                lower[real], upper[real] = np.maximum(lower[real], below), np.minimum(upper[real], above)
            products[unfinished], step = 2 * end, end
            unfinished = asked[upper[asked] > lower[asked] * (1 + self.rtol)]
        if asked.size:
            with np.errstate(invalid="ignore", divide="ignore"):
                gap[asked] = np.where(upper[asked] == 0, 0.0, upper[asked] / lower[asked] - 1)
        sigma = np.minimum(upper * scale + np.asarray(cohorts.product_rounding(layer, rows, columns)), ceiling)
        return Norms(sigma, products, gap, cohorts.is_among(asked, count))


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
        bound = cohorts.gram_norms if length <= self.small else cohorts.schur_norms
        asked = cohorts.masked_places(rows, columns, ceiling, among)
        scale = cohorts.scale_of(layer)
        if length > self.small and np.isinf(ceiling).all():
            ceiling = layer.whole_norm()
        sigma, products = np.array(np.broadcast_to(ceiling, len(rows)), np.float64), np.zeros(len(rows), int)
        if asked.size:
            found = np.asarray(bound(layer, scale, rows[asked], columns[asked]))
            # Infinite where anything was not finite: a comparison with NaN would hide it.
            found = found * scale + np.asarray(cohorts.product_rounding(layer, rows[asked], columns[asked]))
            sigma[asked] = np.where(np.isfinite(found), np.minimum(found, sigma[asked]), np.inf)
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

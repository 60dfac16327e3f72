"""Solvers: how the norms of a certificate are found, and what they are worth; see docs/soundness.md.

The three levels are three solvers. A solver of a user's own has the methods of :class:`lipjax.norms.cohorts.Solver`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lipjax.floating_point import UNIT64, gamma, highest
from lipjax.networks.layers import Affine, Bilinear
from lipjax.networks.masks import kept
from lipjax.norms import deterministic, lanczos, power_iteration
from lipjax.norms.cohorts import Claim, Enclosure, MaskedLayer, Solver

CHUNK_ITERS = 32  # power iterations between two looks at who has converged


@dataclasses.dataclass(frozen=True)
class PowerIteration:
    """Level ``estimate``: power iteration from a random start until the vector moves by at most ``tol``, float32.

    The procedure of :class:`lipjax.Estimate`, of which it is the form for the host: converged examples leave.

    Attributes:
        tol: when to stop.
        max_iters: cap on the iterations.
        batch_size: examples that are iterated together.
    """

    tol: float = power_iteration.TOL
    max_iters: int = power_iteration.MAX_ITERS
    batch_size: int = 128
    claim = Claim("estimate", is_bound=False, draws_starts=True)

    def init(self, masked: MaskedLayer, ceiling: np.ndarray) -> tuple[Array, ...]:
        return _power_start(masked)

    def advance(self, masked: MaskedLayer, part: np.ndarray, state: tuple[Array, ...]) -> tuple[Array, ...]:
        return _power_advance(masked, part, state, self.tol)

    def enclose(self, masked: MaskedLayer, state: tuple[Array, ...]) -> Enclosure:
        _, sigma, change, iterations = map(np.asarray, state)
        finished = ~((change > self.tol) & (iterations < self.max_iters))
        return Enclosure(np.full(len(sigma), np.nan), np.float64(sigma), 2 * iterations, finished)

    def tightened(self, factor: float) -> PowerIteration:
        return self


@dataclasses.dataclass
class LanczosState:
    """Of N examples; the arrays of the host are changed in place.

    Attributes:
        process: the Lanczos processes.
        scale: a power of two that the layer is divided by.
        smallest_start: what a start has along the top direction at least.
        lower: bounds of the norms over the scale (N,).
        upper: likewise (N,).
        steps: made by each (N,).
        rounding: what is added to the bounds for the rounding of products (N,).
    """

    process: lanczos.Process
    scale: float
    smallest_start: float
    lower: np.ndarray
    upper: np.ndarray
    steps: np.ndarray
    rounding: np.ndarray


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
    claim = Claim("probabilistic", is_bound=True, draws_starts=True)

    def init(self, masked: MaskedLayer, ceiling: np.ndarray) -> LanczosState:
        count, length = len(masked), _smaller_side(masked.layer)
        scale = _scale_of(masked.layer)
        process = _lanczos_not_begun(count, length, self.max_steps)
        # Half of what a start has along the top direction is left to the rounding of the process.
        smallest_start = lanczos.smallest_start(self.delta, length) / 2
        bounds, rounding = (np.zeros(count), ceiling / scale), np.asarray(_product_rounding(masked))
        return LanczosState(process, scale, smallest_start, *bounds, np.zeros(count, int), rounding)

    def advance(self, masked: MaskedLayer, part: np.ndarray, state: LanczosState) -> LanczosState:
        real = part[part < len(masked)]
        step = int(state.steps[real[0]])
        end = min(step + (lanczos.MORE_STEPS if step else lanczos.FIRST_STEPS), self.max_steps)
        state.process, found = _lanczos_advance(masked, state.scale, part, state.process, step, first=step == 0)
        below, above = (np.asarray(b)[: len(real)] for b in _enclosures(found, end, state.smallest_start))
        state.lower[real] = np.maximum(state.lower[real], below)
        state.upper[real] = np.minimum(state.upper[real], above)
        state.steps[real] = end
        return state

    def enclose(self, masked: MaskedLayer, state: LanczosState) -> Enclosure:
        tight = ~(state.upper > state.lower * (1 + self.rtol))
        lower, upper = state.lower * state.scale, state.upper * state.scale + state.rounding
        return Enclosure(lower, upper, 2 * state.steps, tight | (state.steps >= self.max_steps))

    def tightened(self, factor: float) -> Lanczos:
        return dataclasses.replace(self, rtol=self.rtol / factor)


@dataclasses.dataclass(frozen=True)
class Deterministic:
    """Level ``deterministic``: upper bounds without chance, float64; see :mod:`lipjax.norms.deterministic`.

    Layers whose smaller side has at most ``small`` entries get the eigenvalues of their Gram matrix. Of larger ones
    the least of the Schur test of what is left and of the circulant bound of the whole convolution is taken.

    Attributes:
        small: the largest side that a Gram matrix is made of.
        batch_size: examples that are bounded by one call.
    """

    small: int = 2048
    batch_size: int = 16
    claim = Claim("deterministic", is_bound=True, draws_starts=False)

    def init(self, masked: MaskedLayer, ceiling: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        known = float(masked.layer.whole_norm()) if not self._has_gram(masked) and np.isinf(ceiling).any() else np.inf
        return _scale_of(masked.layer), np.full(len(masked), known), np.zeros(len(masked), int)

    def advance(self, masked, part, state):
        scale, upper, products = state
        bound = _gram_norms if self._has_gram(masked) else _schur_norms
        real = part[part < len(masked)]
        found = np.asarray(bound(masked, scale, part))[: len(real)]
        # Infinite where anything was not finite: a comparison with NaN would hide it.
        upper[real] = np.where(np.isfinite(found), np.minimum(found, upper[real]), np.inf)
        products[real] = 2 * _smaller_side(masked.layer) if self._has_gram(masked) else 2
        return scale, upper, products

    def enclose(self, masked, state):
        _, upper, products = state
        return Enclosure(np.full(len(masked), np.nan), upper, products, np.ones(len(masked), bool))

    def tightened(self, factor: float) -> Deterministic:
        return self

    def _has_gram(self, masked: MaskedLayer) -> bool:
        return _smaller_side(masked.layer) <= self.small


# A solver from the probability of failure of ONE start, and the relative gap at which a norm is tight enough.
Level = Callable[[float, float], Solver]
LEVELS: dict[str, Level] = {
    "probabilistic": Lanczos,
    "deterministic": lambda delta, rtol: Deterministic(),
    "estimate": lambda delta, rtol: PowerIteration(),
}


def solver_of(level: str | Level, starts: int, delta: float, rtol: float) -> Solver:
    """The solver of a level.

    Args:
        level: one of ``LEVELS``, or a function of a user that makes a solver.
        starts: that will be drawn at most.
        delta: probability that any of them fails.
        rtol: relative gap at which a norm is tight enough.

    Raises:
        ValueError: an option that cannot be used, named with its value.
    """
    if not callable(level) and level not in LEVELS:
        raise ValueError(
            f"level={level!r} is not known; give one of {', '.join(LEVELS)}, or a function (delta, rtol) -> solver"
        )
    if isinstance(delta, str) or not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} is no probability of failure; give a number between 0 and 1, such as 1e-6")
    if isinstance(rtol, str) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r} cannot be reached; give a relative gap more than 0, such as 1e-3")
    solver = (level if callable(level) else LEVELS[level])(delta / max(1, starts), rtol)
    for ours in (Lanczos.claim, Deterministic.claim, PowerIteration.claim):
        if solver.claim.name == ours.name and solver.claim != ours:
            raise ValueError(f"level {ours.name!r} has another claim than this solver; give it a name of its own")
    return solver


def _smaller_side(layer: Affine) -> int:
    return min(math.prod(layer.in_shape), math.prod(layer.out_shape))


def _scale_of(layer: Affine) -> float:
    """A power of two near the largest sum of a row of ``|W|``: divided by it, squares stay within float64.

    Its inverse is a normal number as well.
    """
    largest = float(_largest_row_sum(layer))
    return 2.0 ** min(max(math.frexp(largest)[1], -1000), 1000) if 0 < largest < np.inf else 1.0


@jax.jit
def _largest_row_sum(layer: Affine) -> Array:
    return highest(layer.absolute(jnp.ones(layer.in_shape, layer.dtype)))


@jax.jit
def _product_rounding(masked: MaskedLayer) -> Array:
    """What float64 products with a folded W may round, as norms (N,): relative to ``|W|``, parts of which may cancel.

    Nothing where no row or no column is left. In a bilinear layer nothing cancels.
    """
    layer, count = masked.layer, len(masked)
    if isinstance(layer, Bilinear):
        return jnp.zeros(count, layer.dtype)
    row_left, column_left = (jnp.any(kept(mask).reshape(count, -1), axis=1) for mask in (masked.rows, masked.columns))
    share = gamma(2 * (layer.terms + layer.adjoint_terms), UNIT64)
    return jnp.where(row_left & column_left, share * layer.absolute_norm(), 0)


@jax.jit
def _power_start(masked: MaskedLayer) -> tuple[Array, ...]:
    """Starts of power iterations, and what is known before the first one: sigmas, changes and counts."""
    vectors = masked.starts(1.0, jnp.arange(len(masked)))
    zeros = jnp.zeros(len(masked), vectors.dtype)
    return vectors, zeros, jnp.full_like(zeros, jnp.inf), jnp.zeros(len(masked), jnp.int32)


@functools.partial(jax.jit, donate_argnames="state")
def _power_advance(masked: MaskedLayer, part: Array, state: tuple[Array, ...], tol: float) -> tuple[Array, ...]:
    """Some iterations more for the examples ``part``: the vectors, sigmas, changes and counts of all."""
    map_of, rows, columns = masked.maps(1.0, part)

    def one(rows: Array, columns: Array, u: Array) -> tuple[Array, ...]:
        return power_iteration.iterate_until(map_of(rows, columns), u, tol=tol, max_iters=CHUNK_ITERS)

    vectors, sigmas, changes, counts = state
    u, sigma, change, count = jax.vmap(one)(rows, columns, vectors[part])
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
    masked: MaskedLayer, scale: float, part: Array, process: lanczos.Process, step: int, *, first: bool
) -> tuple[lanczos.Process, lanczos.Tridiagonal]:
    """Some steps more for the examples ``part``, from their starts if they are the first.

    Returns:
        ``(process, matrix)``: the processes of all, and what those of ``part`` have found.
    """
    map_of, rows, columns = masked.maps(scale, part)

    def one(rows: Array, columns: Array, u: Array) -> Array:
        map_ = map_of(rows, columns)
        return map_.rmatvec(map_.matvec(u.reshape(map_.in_shape))).ravel()

    def gram(u: Array) -> Array:
        return jax.vmap(one)(rows, columns, u)

    if first:
        starts = masked.starts(scale, part).reshape(len(part), -1)
        begun = lanczos.begin(starts, max_steps=process.matrix.diagonal.shape[1])
        advanced = lanczos.first_steps(gram, begun)
    else:
        advanced = lanczos.more_steps(gram, jax.tree.map(lambda leaf: leaf[part], process), step)
    return jax.tree.map(lambda leaf, new: leaf.at[part].set(new, mode="drop"), process, advanced), advanced.matrix


# Apart from the steps, because it is the same program for every layer.
_enclosures = jax.jit(lanczos.enclosures)


@jax.jit
def _gram_norms(masked: MaskedLayer, scale: float, part: Array) -> Array:
    """Bounds of the norms of some examples, from Gram matrices."""
    map_of, rows, columns = masked.maps(scale, part)
    terms = max(masked.layer.terms, masked.layer.adjoint_terms)

    def one(example: tuple[Array, Array, Array]) -> Array:
        place, *masks = example
        asked = place < len(masked)  # what fills up a part costs nothing
        norm = functools.partial(deterministic.gram_norm, terms=terms)
        return lax.cond(asked, lambda: norm(map_of(*masks)), lambda: jnp.zeros((), masked.layer.dtype))

    norms = lax.map(one, (part, rows, columns))  # one Gram matrix at a time: they are large
    return norms * scale + _product_rounding(dataclasses.replace(masked, rows=rows, columns=columns))


@jax.jit
def _schur_norms(masked: MaskedLayer, scale: float, part: Array) -> Array:
    """Bounds of the norms of some examples, by the Schur test."""
    rows, columns = masked.rows[part], masked.columns[part]
    norms = jax.vmap(functools.partial(deterministic.schur_norm, masked.layer, scale))(rows, columns)
    return norms * scale + _product_rounding(dataclasses.replace(masked, rows=rows, columns=columns))

"""Upper bounds of spectral norms by the Lanczos process, with a stated probability of failure.

Lanczos on W^T W from a random unit vector gives a tridiagonal matrix T_k: its largest eigenvalue is a lower bound of
sigma^2. With theta_j its eigenvalues and b_j its off-diagonals (the k-th is the residual that lies outside it),

    p_k(t) = prod_j (t - theta_j) / prod_j b_j

is the Lanczos polynomial: p_k(W^T W) u_1 = u_{k+1} is a unit vector, so its part along the top singular vector,
p_k(sigma^2) times that of the start, is at most 1. A random start has at least t_delta there but for a probability of
delta, and p_k grows beyond its largest root, so sigma^2 <= t for the t at which p_k(t) = 1 / t_delta. The bad event is
a property of the start alone: one start serves every k.

The identity is that of the three-term recurrence alone. It does not ask for orthogonal vectors, so none are kept: a
process is two vectors and its T_k. (What rounding takes from orthogonality comes back as copies of eigenvalues that
were found already, and costs a few steps.) Only the first steps are orthogonalised against each other, so that a map of
few dimensions ends in an exact T_k. This is Golub-Kahan bidiagonalisation, T_k = B_k^T B_k, with the vectors of one
side. Everything here is in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.floating_point import highest
from lipjax.networks.linear_maps import length

FIRST_STEPS = 16  # steps whose vectors are orthogonalised against each other
MORE_STEPS = 16  # steps between two looks at the bounds after that
HALVINGS = 32  # of the logarithm of a root's bracket
BREAKDOWN = 1e-13  # an off-diagonal below this share of the largest diagonal entry ends the process
NOISE = 1e-15  # share of the largest diagonal entry that rounding leaves in an off-diagonal that should be zero
ROUNDING = 1e-12  # added to t for the rounding of products and recurrence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tridiagonal:
    """The matrices T_k of a batch of Lanczos processes.

    Attributes:
        diagonal: (B, max_steps).
        off: off-diagonals and, last, the residual (B, max_steps).
        size: size of T_k where the process has broken down, more than max_steps where it goes on (B,).
        exact: whether the largest eigenvalue of T_k is sigma^2 itself (B,).
    """

    diagonal: Array
    off: Array
    size: Array
    exact: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Process:
    """Lanczos processes of a batch after some steps.

    Attributes:
        u: the next vectors (B, n), of length 1; zero where the process has broken down.
        last: the vectors before them (B, n).
        matrix: what they have found.
    """

    u: Array
    last: Array
    matrix: Tridiagonal


def smallest_start(delta: float, entries: int) -> float:
    """t_delta = delta sqrt(pi / (2 n)): a random unit vector of length n has a smaller part along a given direction
    with a probability of at most delta.

    Args:
        delta: probability of failure of one start.
        entries: n, of the start.

    Raises:
        ValueError: t_delta would be below what float64 can resolve.
    """
    t_delta = delta * math.sqrt(math.pi / (2 * entries))
    if t_delta < 1e-15:
        smallest = 1e-15 / math.sqrt(math.pi / (2 * entries))
        raise ValueError(
            f"delta leaves {delta:.3g} for one start of {entries} entries, which float64 cannot resolve; the smallest "
            f"share that works is {smallest:.3g}: give a delta {smallest / delta:.3g} times as large, or fewer examples"
        )
    return t_delta


def begin(start: Array, *, max_steps: int) -> Process:
    """Processes that have made no step.

    Args:
        start: random unit vectors (B, n), uniform over directions, independent of the maps; zero for a map that is 0.
        max_steps: the most steps that will be made.
    """
    table = jnp.zeros((len(start), max_steps), start.dtype)
    going_on = jnp.full(len(start), max_steps + 1, jnp.int32)
    return Process(start, jnp.zeros_like(start), Tridiagonal(table, table, going_on, jnp.zeros(len(start), bool)))


def first_steps(gram: Callable[[Array], Array], process: Process) -> Process:
    """The first ``FIRST_STEPS`` steps, or as many as there may be.

    Args:
        gram: ``u -> W^T W u`` for vectors (B, n), each with the map of its own example.
        process: see :func:`begin`.
    """
    start, steps = process.u, min(FIRST_STEPS, process.matrix.diagonal.shape[1])
    dimension = jnp.sum(start != 0, axis=1)

    def advance(step: Array, carry: tuple[Process, Array]) -> tuple[Process, Array]:
        process, basis = carry
        basis = basis.at[:, step].set(process.u)
        process = _step(gram, step, process, lambda vector: _orthogonal(vector, basis))
        # Where the basis spans everything, nothing is left out.
        spanned = (process.matrix.size == step + 1) & (step + 1 >= dimension)
        matrix = dataclasses.replace(process.matrix, exact=process.matrix.exact | spanned)
        return dataclasses.replace(process, matrix=matrix), basis

    basis = jnp.zeros((len(start), steps, start.shape[1]), start.dtype)
    process, _ = lax.fori_loop(0, steps, advance, (process, basis))
    return process


def more_steps(gram: Callable[[Array], Array], process: Process, step: Array | int) -> Process:
    """``MORE_STEPS`` steps of processes that have made ``step``, or as many as are left; see :func:`first_steps`."""
    end = jnp.minimum(step + MORE_STEPS, process.matrix.diagonal.shape[1])
    return lax.fori_loop(step, end, lambda step, process: _step(gram, step, process, lambda image: image), process)


def _step(
    gram: Callable[[Array], Array], step: Array, process: Process, orthogonal: Callable[[Array], Array]
) -> Process:
    u, matrix = process.u, process.matrix
    image = gram(u)
    along = jnp.sum(u * image, axis=1)
    diagonal = matrix.diagonal.at[:, step].set(along)
    before = jnp.where(step > 0, matrix.off[:, step - 1], 0)
    image = orthogonal(image - along[:, None] * u - before[:, None] * process.last)
    residual = jax.vmap(length)(image)
    largest = highest(diagonal, axis=1)
    # The start may have had so small a part outside of the invariant space that rounding hides it: the residual counts
    # with its noise.
    broken = residual <= BREAKDOWN * largest
    matrix = Tridiagonal(
        diagonal=diagonal,
        off=matrix.off.at[:, step].set(jnp.where(broken, residual + NOISE * largest, residual)),
        size=jnp.where(broken, jnp.minimum(matrix.size, step + 1), matrix.size),
        exact=matrix.exact | (broken & (largest == 0)),
    )
    return Process(jnp.where(broken[:, None], 0, image / jnp.where(broken, 1, residual)[:, None]), u, matrix)


def _orthogonal(vector: Array, basis: Array) -> Array:
    """The vectors (B, n) without their parts along the basis vectors (B, k, n), taken out twice."""
    for _ in range(2):
        vector = vector - jnp.einsum("bj,bjn->bn", jnp.einsum("bjn,bn->bj", basis, vector), basis)
    return vector


def enclosures(matrix: Tridiagonal, steps: Array | int, t_delta: Array | float) -> tuple[Array, Array]:
    """Bounds of the spectral norms after ``steps`` steps.

    They are the square roots of the largest eigenvalue of T_k and of the root of p_k(t) = 1 / t_delta. p_k(t) is the
    product of the pivots d_j of t I - T_k over that of the off-diagonals, and t is above the largest eigenvalue exactly
    where all pivots are positive. Both roots are found by halving the logarithm of a bracket, and its outer end is what
    counts. Where T_k is ``exact``, its largest eigenvalue is sigma^2.

    Args:
        matrix: T_k of each process.
        steps: that were made, k.
        t_delta: see :func:`smallest_start`.

    Returns:
        ``(lower, upper)``, of sigma (B,): 0 and infinity where anything was not finite.

    Soundness:
        Lower bounds without chance; upper bounds, each with a probability of at least 1 - delta over its start, after
        any number of steps.

    Reference:
        van Dorsselaer, Hochstenbach, van der Vorst, SIAM J. Matrix Anal. Appl. 22(3), 2000; Hochstenbach, J. Sci.
        Comput. 57, 2013.
    """
    diagonal, off, exact = matrix.diagonal.T, matrix.off.T, matrix.exact
    count = jnp.minimum(matrix.size, steps)
    place = jnp.arange(diagonal.shape[0], dtype=count.dtype)[:, None]
    used = place < count[None]
    target = -jnp.log(t_delta) + jnp.sum(jnp.where(used, jnp.log(jnp.where(used & (off > 0), off, 1)), 0), axis=0)
    # Where t >= a_j + b_{j-1} / c + b_j c for every j, all p_j / p_{j-1} are at least c; and c^k has to be 1 / t_delta.
    growth = (1 + ROUNDING) * t_delta ** (-1 / jnp.maximum(count, 1).astype(diagonal.dtype))
    inner = jnp.where(place < count[None] - 1, off, 0)
    residual = jnp.where((place == count[None] - 1) & ~exact[None], off, 0)
    before = jnp.concatenate([jnp.zeros_like(off[:1]), inner[:-1]])
    top = highest(jnp.where(used, diagonal + before / growth[None] + (inner + residual) * growth[None], 0), axis=0)
    least = highest(jnp.where(used, diagonal, 0), axis=0)

    def log_pivots(t: Array) -> tuple[Array, Array]:
        def pivot(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, last, positive = carry
            d = t - diagonal[j][None] - before[j][None] * (before[j][None] / jnp.where(last > 0, last, 1))
            counts = (j < count)[None]
            positive = jnp.where(counts, positive & (d > 0), positive)
            return jnp.where(counts, total + jnp.log(jnp.where(d > 0, d, 1)), total), d, positive

        start = (jnp.zeros_like(t), jnp.ones_like(t), jnp.ones(t.shape, bool))
        total, _, positive = lax.fori_loop(0, steps, pivot, start)
        return total, positive

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        total, positive = log_pivots(middle)
        above = positive & jnp.stack([jnp.ones_like(exact), exact | (total[1] >= target)])
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    pair = (jnp.stack([least, least]), jnp.stack([top, top]))
    low, high = lax.fori_loop(0, HALVINGS, halve, pair)
    finite = jnp.isfinite(jnp.sum(jnp.where(used, diagonal + off, 0), axis=0)) & jnp.isfinite(high[1])
    upper = jnp.where(finite, jnp.sqrt(high[1] * (1 + ROUNDING)), jnp.inf)
    return jnp.where(finite, jnp.sqrt(low[0]), 0), upper

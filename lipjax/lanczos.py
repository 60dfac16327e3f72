"""Upper bounds of spectral norms by the Lanczos process, with a stated probability of failure.

Lanczos on W^T W from a random unit vector gives a tridiagonal matrix T_k: its largest eigenvalue is a lower bound of
sigma^2. With theta_j its eigenvalues and b_j its off-diagonals (the k-th is the residual that lies outside it),

    p_k(t) = prod_j (t - theta_j) / prod_j b_j

is the Lanczos polynomial: p_k(W^T W) u_1 = u_{k+1} is a unit vector, so its part along the top singular vector,
p_k(sigma^2) times that of the start, is at most 1. A random start has at least t_delta there but for a probability of
delta, and p_k grows beyond its largest root, so sigma^2 <= t for the t at which p_k(t) = 1 / t_delta. The bad event is
a property of the start alone: one start serves every k.

This is Golub-Kahan bidiagonalisation, T_k = B_k^T B_k, with the vectors of one side alone: half of the memory and half
of the orthogonalisation. Everything here is in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.spectral import length

CHUNK = 8  # vectors that are orthogonalised against at a time
CHECK_EVERY = 8  # steps between two looks at the gap
HALVINGS = 40  # of the logarithm of the root's bracket
BREAKDOWN = 1e-13  # an off-diagonal below this share of the largest diagonal entry ends the process
NOISE = 1e-15  # share of the largest diagonal entry that rounding leaves in an off-diagonal that should be zero
ROUNDING = 1e-12  # added to t for the rounding of products and recurrence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Enclosure:
    """What the process knows about the spectral norms of a batch.

    Attributes:
        lower: lower bounds (B,), certain.
        upper: upper bounds (B,), each but for the probability that belongs to its start; infinite where anything was
            not finite.
        steps: Lanczos steps, two products each; scalar.
    """

    lower: Array
    upper: Array
    steps: Array


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


def enclose(
    gram: Callable[[Array], Array],
    start: Array,
    t_delta: Array | float,
    ceiling: Array | float = jnp.inf,
    *,
    rtol: Array | float,
    max_steps: int,
    leave: float = 0.0,
) -> Enclosure:
    """Enclose the largest singular values of a batch of linear maps.

    Args:
        gram: ``u -> W^T W u`` for vectors (B, n), each with the map of its own example.
        start: random unit vectors (B, n), uniform over directions, independent of the maps; zero for a map that is 0.
        t_delta: see :func:`smallest_start`.
        ceiling: upper bound of all norms that is known already, such as the norm of the whole layer.
        rtol: stop when upper / lower - 1 is at most this for all but the share ``leave`` of the batch.
        max_steps: cap on the steps.
        leave: share of the batch that may be left unfinished.

    Returns:
        The enclosure of each example, whether finished or not.

    Soundness:
        Upper bounds, each with a probability of at least 1 - delta over its start.

    Reference:
        [DHV00], [Hoc13].
    """
    batch, entries = start.shape
    capacity = -(-min(max_steps, entries) // CHUNK) * CHUNK
    zeros = jnp.zeros((batch,), start.dtype)
    dimension = jnp.sum(start != 0, axis=1)
    initial = (
        jnp.int32(0),
        jnp.zeros((capacity // CHUNK, batch, CHUNK, entries), start.dtype),
        start,
        jnp.zeros_like(start),
        jnp.zeros((capacity, batch), start.dtype),
        jnp.zeros((capacity, batch), start.dtype),
        jnp.full((batch,), capacity + 1, jnp.int32),
        jnp.zeros((batch,), bool),
        zeros,
        jnp.full_like(zeros, ceiling),
    )

    def unfinished(carry: tuple) -> Array:
        step, *_, lower, upper = carry
        return (step < capacity) & (jnp.mean(upper > lower * (1 + rtol)) > leave)

    def advance(carry: tuple) -> tuple:
        step, basis, u, last, diagonal, off, size, exact, lower, upper = carry
        zero = jnp.zeros_like(step)
        basis = lax.dynamic_update_slice(basis, u[None, :, None], (step // CHUNK, zero, step % CHUNK, zero))
        image = gram(u)
        along = jnp.sum(u * image, axis=1)
        diagonal = diagonal.at[step].set(along)
        image = image - along[:, None] * u - jnp.where(step > 0, off[step - 1], 0)[:, None] * last
        image = _orthogonal(image, basis, step)
        residual = _lengths(image)
        largest = jnp.max(diagonal, axis=0)
        broken = residual <= BREAKDOWN * largest
        # Where the basis spans everything, nothing is left out. Else the start may have had so small a part outside of
        # the invariant space that rounding hides it, and the residual counts with its noise.
        ends = broken & (size > capacity)
        exact = exact | (ends & ((step + 1 >= dimension) | (largest == 0)))
        off = off.at[step].set(jnp.where(broken, residual + NOISE * largest, residual))
        size = jnp.where(broken, jnp.minimum(size, step + 1), size)
        u, last = jnp.where(broken[:, None], 0, image / jnp.where(broken, 1, residual)[:, None]), u
        look = ((step + 1) % CHECK_EVERY == 0) | (step + 1 == capacity)
        lower, upper = lax.cond(
            look,
            lambda: _bounds(diagonal, off, size, exact, step + 1, t_delta, lower, upper),
            lambda: (lower, upper),
        )
        return step + 1, basis, u, last, diagonal, off, size, exact, lower, upper

    step, *_, lower, upper = lax.while_loop(unfinished, advance, initial)
    return Enclosure(lower, upper, step)


def _orthogonal(vector: Array, basis: Array, step: Array) -> Array:
    """The vectors (B, n) without their parts along the basis vectors so far.

    The three-term recurrence has taken out the two large parts before; a second pass is only needed where the first
    one takes out much again ("twice is enough").
    """

    def subtract(chunk: Array, vector: Array) -> Array:
        rows = basis[chunk]
        return vector - jnp.einsum("bj,bjn->bn", jnp.einsum("bjn,bn->bj", rows, vector), rows)

    def pass_over(vector: Array) -> Array:
        return lax.fori_loop(0, step // CHUNK + 1, subtract, vector)

    once = pass_over(vector)
    return lax.cond(jnp.any(_lengths(once) < 0.7 * _lengths(vector)), pass_over, lambda once: once, once)


def _lengths(vectors: Array) -> Array:
    return jax.vmap(length)(vectors)


def _bounds(
    diagonal: Array,
    off: Array,
    size: Array,
    exact: Array,
    steps: Array,
    t_delta: Array | float,
    lower: Array,
    upper: Array,
) -> tuple[Array, Array]:
    """Square roots of the largest eigenvalue of T_k and of the root of p_k(t) = 1 / t_delta, for each example.

    p_k(t) is the product of the pivots d_j of t I - T_k over that of the off-diagonals, and t is above the largest
    eigenvalue exactly where all pivots are positive. Both roots are found by halving the logarithm of a bracket, and
    its outer end is what counts. Where T_k is ``exact``, its largest eigenvalue is sigma^2.
    """
    capacity = diagonal.shape[0]
    count = jnp.minimum(size, steps)
    place = jnp.arange(capacity)[:, None]
    used = place < count[None]
    target = -jnp.log(t_delta) + jnp.sum(jnp.where(used, jnp.log(jnp.where(used & (off > 0), off, 1)), 0), axis=0)
    # Where t >= a_j + b_{j-1} / c + b_j c for every j, all p_j / p_{j-1} are at least c.
    growth = t_delta ** (-1 / jnp.maximum(count, 1))
    inner = jnp.where(place < count[None] - 1, off, 0)
    residual = jnp.where((place == count[None] - 1) & ~exact[None], off, 0)
    before = jnp.concatenate([jnp.zeros_like(off[:1]), inner[:-1]])
    top = jnp.max(jnp.where(used, diagonal + before / growth[None] + (inner + residual) * growth[None], 0), axis=0)
    least = jnp.max(jnp.where(used, diagonal, 0), axis=0)

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
    found = jnp.where(finite, jnp.sqrt(high[1] * (1 + ROUNDING)), jnp.inf)
    return jnp.maximum(lower, jnp.where(finite, jnp.sqrt(low[0]), 0)), jnp.minimum(upper, found)

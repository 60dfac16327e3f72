"""Attacks: gradient steps inside the l2 ball that look for a wrong prediction, the paper's and a stronger one.

Both are pure. Jit them where they are called more than once; values that are traced are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lipjax.certification.checks import check_key, check_labels
from lipjax.networks import linear_maps
from lipjax.networks.regions import (
    check_domain,
    check_pixels,
)

Classifier = Callable[[Array], Array]

# Measured on seven networks: which rival is ascended and where it starts matter, steps beyond 30 hardly do.
ROUNDS_PER_RESTART, STEPS_PER_ROUND = 5, 30
CANDIDATES = 9  # rivals with the smallest margins, which are ranked by a gradient each
FIRST_STEP, LAST_STEP = 100.0, 0.02  # of eps
SWEEPS = 2  # of the projection onto the ball and [0, 1]; more find nothing more


def pgd(
    network: Classifier,
    x: Array,
    label: Array,
    eps: Array | float,
    key: Array,
    *,
    num_steps: int = 100,
    step_size: Array | float | None = None,
    start: Array | None = None,
    objective: Callable[[Array], Array] | None = None,
    domain: str = "pixels",
) -> Array:
    """l2 PGD on the cross entropy from one random start, every iterate inside the ball and in [0, 1].

    Steps are along the normalised gradient of log sum exp of the rivals' logits minus the label's: the direction of
    the cross entropy, which is a monotone function of it, but one that does not vanish where the loss saturates.
    It overstates robustness: where the rival that it goes for cannot be reached, it does not try another.

    Args:
        network: inputs (B, ...) to logits (B, classes); any function of JAX.
        x: clean inputs (B, ...) in [0, 1].
        label: integers (B,).
        eps: radius, in pixels: scalar, or one per example (B,).
        key: draws the starts: one key for the batch, or one per example (B,).
        num_steps: steps of normalised gradient ascent.
        step_size: default eps / 4; scalar, or one per example (B,).
        start: points (B, ...) in the ball to go on from; default random ones. The key is not used then.
        objective: what is ascended, from logits (B, classes) to values (B,); default the cross entropy.
        domain: ``"pixels"``, the ball cut to [0, 1], as in the paper; or ``"ball"``, the whole ball around any input.

    Returns:
        Perturbed inputs (B, ...), the last iterate. Attacks of a NaN gradient stay where they are.

    Raises:
        TypeError: x is not float32 or float64.
        ValueError: x, label or eps is not what is said above, as far as it is known.

    Reference:
        [H21] section 5 (100 steps of eps / 4).
    """
    _, radius = _check(network, x, label, eps, domain)
    if start is None:
        check_key(key, (len(x),))
    step = radius / 4 if step_size is None else jnp.broadcast_to(jnp.asarray(step_size, x.dtype), len(x))

    def total(points: Array) -> Array:
        logits = network(points)
        each = jax.nn.logsumexp(-_margins(logits, label), axis=1) if objective is None else objective(logits)
        return jnp.sum(each)

    def ascend(_: int, points: Array) -> Array:
        return _step(points, jax.grad(total)(points), step, x, radius, domain)

    if start is None:
        start = _random_points(jax.random.split(key, x.shape[0]) if key.ndim == 0 else key, x, radius, domain)
    return lax.fori_loop(0, num_steps, ascend, start)


def attack(
    network: Classifier,
    x: Array,
    label: Array,
    eps: Array | float,
    key: Array,
    *,
    domain: str = "ball",
    num_steps: int = STEPS_PER_ROUND,
    restarts: int = 2,
) -> Array:
    """The point of the smallest margin that some rounds of :func:`attack_round` find: much stronger than :func:`pgd`.

    The margin is the logit of the label minus the largest other one. At the defaults it takes 310 gradients per
    example, and 45 of single logits to rank the rivals.

    Args:
        network, x, label, eps, key: as of :func:`pgd`, and so is what is raised.
        domain: ``"ball"``, the whole ball around any input, or ``"pixels"``, the ball cut to [0, 1].
        num_steps: steps per round.
        restarts: five rounds each.

    Returns:
        Points (B, ...). Rounding included, none is farther than eps from its example. A point does not depend on the
        other examples, but by rounding; with one key for the batch it depends on the place in it.
    """
    logits, _ = _check(network, x, label, eps, domain)
    check_key(key, (len(x),))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x))) if key.ndim == 0 else key

    def attack_again(round_: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        return _smaller(*attack_round(network, x, label, eps, keys, round_, domain=domain, num_steps=num_steps), *best)

    none = jnp.asarray(x), jnp.full(len(x), jnp.inf, logits.dtype)
    return lax.fori_loop(0, attack_rounds(restarts), attack_again, none)[0]


def attack_rounds(restarts: int = 2) -> int:
    """How many rounds of :func:`attack_round` an :func:`attack` with so many restarts makes: 0, 1, ..."""
    return ROUNDS_PER_RESTART * restarts


def attack_round(
    network: Classifier,
    x: Array,
    label: Array,
    eps: Array | float,
    keys: Array,
    round_: Array | int,
    *,
    domain: str = "ball",
    num_steps: int = STEPS_PER_ROUND,
) -> tuple[Array, Array]:
    """One round of :func:`attack`, for callers that let broken examples leave between the rounds.

    Each round descends one margin along its normalised gradient, with steps that shrink geometrically: the first leap
    to where the gradient points on the sphere, the last are small beside eps. In even rounds it is the margin to one
    rival, the likeliest in round 0, the next in round 2, and so on; in odd rounds the one to whichever rival is
    strongest at the moment. Rivals are likely where the clean margin is small beside the length of its gradient.
    Round 0 starts at the example, the others at random points of the ball.

    Args:
        network, x, label, eps, domain: as of :func:`attack`, and so is what is raised.
        keys: one per example (B,), the same in every round.
        round_: its number; may be traced, so that one program serves all rounds.
        num_steps: steps; one more gradient than that is taken.

    Returns:
        ``(points, margins)``: for each example the iterate with the smallest margin, the start included (B, ...), and
        that margin (B,), negative where the prediction is wrong. Iterates whose margin is NaN do not count; where all
        are, the point is the example and the margin infinite.
    """
    logits, radius = _check(network, x, label, eps, domain)
    x, label, radius = jnp.asarray(x), jnp.asarray(label, jnp.int32), _reached(x, radius)
    classes, number = jnp.arange(logits.shape[1], dtype=jnp.int32), jnp.asarray(round_)
    rivals = lax.cond(
        number % 2 == 0,
        lambda: _likely_rival(network, x, label, number // 2)[:, None] == classes[None],
        lambda: label[:, None] != classes[None],
    )

    def descended(points: Array) -> tuple[Array, Array]:
        margins = _margins(network(points), label)
        return jnp.sum(jnp.min(jnp.where(rivals, margins, jnp.inf), axis=1)), jnp.min(margins, axis=1)

    def descend(step: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        points, best, least, slope, level = state
        gradient, margins = jax.grad(descended, has_aux=True)(points)
        best, least = _smaller(points, margins, best, least)
        # Where a leap ended without a gradient: halfway back to the best point that had one.
        moves = jax.vmap(linear_maps.length)(gradient) > 0
        slope, level = _smaller(points, jnp.where(moves, margins, jnp.inf), slope, level)
        direction = jax.vmap(jnp.where)(moves, -gradient, slope - points)
        size = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / jnp.maximum(num_steps, 1)) * radius
        size = jnp.where(moves, size, jax.vmap(linear_maps.length)(direction) / 2)
        return _step(points, direction, size, x, radius, domain, SWEEPS), best, least, slope, level

    round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    start = jnp.where(number == 0, x, _random_points(round_keys, x, radius, domain, SWEEPS))
    none = x, jnp.full(len(x), jnp.inf, logits.dtype)
    _, best, least, *_ = lax.fori_loop(0, num_steps + 1, descend, (start, *none, *none))
    return best, least


def _likely_rival(network: Classifier, x: Array, label: Array, rank: Array) -> Array:
    """For each example the rival (B,) that comes at some place by clean margin over length of its gradient."""
    logits, pull_back = jax.vjp(network, x)
    margins = _margins(logits, label)
    count = max(1, min(CANDIDATES, logits.shape[1] - 1))
    least, candidates = (found.T for found in lax.top_k(-margins, count))

    def length(candidate: Array) -> Array:
        one_hot = jax.nn.one_hot(jnp.stack([label, candidate]), logits.shape[1], dtype=logits.dtype)
        return jax.vmap(linear_maps.length)(pull_back(one_hot[0] - one_hot[1])[0])

    lengths = lax.map(length, candidates)
    order = jnp.argsort(jnp.where(lengths > 0, -least / jnp.where(lengths > 0, lengths, 1), jnp.inf), axis=0)
    return jnp.take_along_axis(candidates, order, axis=0)[rank % count]


def _margins(logits: Array, label: Array) -> Array:
    """The label's logit minus each (B, classes); infinite for the label itself."""
    own = jnp.arange(logits.shape[1])[None] == jnp.asarray(label, int)[:, None]
    return jnp.where(own, jnp.inf, jnp.sum(jnp.where(own, logits, 0), axis=1, keepdims=True) - logits)


def _smaller(points: Array, margins: Array, best: Array, least: Array) -> tuple[Array, Array]:
    """Of two points for each example the one with the smaller margin, and that margin. NaN is not smaller."""
    smaller = margins < least
    return jax.vmap(jnp.where)(smaller, points, best), jnp.where(smaller, margins, least)


def _random_points(keys: Array, x: Array, radius: Array, domain: str, sweeps: int = 0) -> Array:
    """Uniform in each ball; for ``"pixels"`` moved into [0, 1]."""
    halves = jax.vmap(jax.random.split)(keys)
    directions = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(halves[:, 0])
    shares = jax.vmap(lambda key: jax.random.uniform(key, (), x.dtype))(halves[:, 1]) ** (1 / x[0].size)
    return _step(x, directions, shares * radius, x, radius, domain, sweeps)


def _step(points: Array, direction: Array, size: Array, x: Array, radius: Array, domain: str, sweeps: int = 0) -> Array:
    """Steps of given lengths (B,) along directions of any length, none where one is NaN; then back into the domain.

    That is the ball around x, and for ``"pixels"`` then [0, 1], which never leaves the ball, because x is in [0, 1].
    The cut shortens offsets that have been scaled to the radius. Each sweep scales them anew, up to their whole length:
    the cut grows no faster than the scale, so that it stays in the ball and tends to the nearest point of both.
    """

    def one(point: Array, direction: Array, size: Array, x: Array, radius: Array) -> Array:
        direction = linear_maps.unit(direction)
        offset = point + size * jnp.where(jnp.isfinite(direction), direction, 0) - x
        length, tiny = linear_maps.length(offset), jnp.finfo(x.dtype).tiny
        inside = jnp.where(length > radius, radius * linear_maps.unit(offset), offset)
        if domain == "ball":
            return x + inside
        scale, whole = jnp.ones_like(radius), jnp.maximum(1, length / jnp.maximum(radius, tiny))
        for _ in range(sweeps):
            taken = linear_maps.length(jnp.clip(x + scale * inside, 0, 1) - x)
            scale = jnp.minimum(whole, scale * radius / jnp.maximum(taken, tiny))
        return jnp.clip(x + scale * inside, 0, 1)

    return jax.vmap(one)(points, direction, size, x, radius)


def _reached(x: Array, radius: Array) -> Array:
    """A smaller radius (B,): what is computed to be within it is within the given one, to the last digit."""
    rounding = jnp.finfo(x.dtype).eps / 2  # of each pixel of a sum; lengths come out with a few times that
    lost = rounding * (jax.vmap(linear_maps.length)(x) + radius)
    return jnp.maximum(radius * (1 - 32 * rounding) - lost, 0)


def _check(network: Classifier, x: Array, label: Array, eps: Array | float, domain: str) -> tuple[Any, Array]:
    """Shape and type of the logits, and radii (B,). Raises TypeError or ValueError for what is known to be wrong."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"x is a {type(x).__name__}; expected a batch (B, ...), an array")
    check_pixels(x)
    if not x.ndim or not len(x):
        raise ValueError(f"x has shape {x.shape}; expected a batch (B, ...) of at least one input")
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(x).all():
        raise ValueError(f"x[{np.argwhere(~np.isfinite(x))[0, 0]}] holds NaN or infinity; expected finite pixels")
    check_domain(x, domain)
    logits = jax.eval_shape(network, x)
    if len(getattr(logits, "shape", ())) != 2 or len(logits) != len(x):
        raise ValueError(f"the network gives {logits}; expected logits ({len(x)}, classes)")
    known = np.zeros(label.shape, label.dtype) if isinstance(label, jax.core.Tracer) else label
    check_labels(logits.shape[1], x, known)
    if np.shape(eps) not in ((), (len(x),)):
        raise ValueError(f"eps has shape {np.shape(eps)}; expected one radius, or one for each of {len(x)} examples")
    values = np.asarray(0 if isinstance(eps, jax.core.Tracer) else eps)
    if not jnp.issubdtype(values.dtype, jnp.number) or not ((values >= 0) & (values < np.inf)).all():
        raise ValueError(f"eps is {eps!r}; expected a finite radius of at least 0, in [0, 1] pixels")
    return logits, jnp.broadcast_to(jnp.asarray(eps, x.dtype), len(x))

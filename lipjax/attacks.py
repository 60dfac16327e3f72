"""Attacks: projected gradient ascent inside the l2 ball."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax import spectral
from lipjax.regions import check_pixels


def pgd(
    network: Callable[[Array], Array],
    x: Array,
    label: Array,
    eps: Array | float,
    key: Array,
    *,
    num_steps: int = 100,
    step_size: Array | float | None = None,
    start: Array | None = None,
    objective: Callable[[Array], Array] | None = None,
) -> Array:
    """l2 PGD on the cross entropy from one random start, every iterate inside the ball and in [0, 1].

    Steps are along the normalised gradient of log sum exp of the rivals' logits minus the label's: the direction of
    the cross entropy, which is a monotone function of it, but one that does not vanish where the loss saturates.

    Args:
        network: inputs (B, ...) to logits (B, classes); any function of JAX.
        x: clean inputs (B, ...) in [0, 1].
        label: integers (B,).
        eps: radius, scalar.
        key: draws the starts: one key for the batch, or one per example (B,).
        num_steps: steps of normalised gradient ascent.
        step_size: default eps / 4.
        start: points (B, ...) in the ball to go on from; default random ones. The key is not used then.
        objective: what is ascended, from logits (B, classes) to values (B,); default the cross entropy.

    Returns:
        Perturbed inputs (B, ...), the last iterate. Attacks of a NaN gradient stay where they are.

    Raises:
        TypeError: x is not float32 or float64.

    Reference:
        [H21] section 5 (100 steps of eps / 4).
    """
    check_pixels(x)
    eps = jnp.asarray(eps, x.dtype)
    step = eps / 4 if step_size is None else jnp.asarray(step_size, x.dtype)

    def cross_entropy(logits: Array) -> Array:
        own = jnp.arange(logits.shape[1])[None] == label[:, None]
        rivals = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=1)
        return rivals - jnp.sum(jnp.where(own, logits, 0), axis=1)

    ascended = cross_entropy if objective is None else objective

    def total_loss(points: Array) -> Array:
        return jnp.sum(ascended(network(points)))

    def ascend(_: int, points: Array) -> Array:
        direction = jax.vmap(spectral.unit)(jax.grad(total_loss)(points))
        direction = jnp.where(jnp.isfinite(direction), direction, 0)
        return _project(points + step * direction, x, eps)

    if start is None:
        keys = jax.random.split(key, x.shape[0]) if key.ndim == 0 else key
        start = _project(x + eps * jax.vmap(_random_in_unit_ball, (0, None))(keys, x[0]), x, eps)
    return lax.fori_loop(0, num_steps, ascend, start)


def _random_in_unit_ball(key: Array, like: Array) -> Array:
    """Uniform in the unit l2 ball, shaped like one example."""
    direction_key, length_key = jax.random.split(key)
    direction = jax.random.normal(direction_key, like.shape, like.dtype)
    length = jax.random.uniform(length_key, (), like.dtype) ** (1 / like.size)
    return length * spectral.unit(direction)


def _project(points: Array, x: Array, eps: Array) -> Array:
    """Onto the ball, then onto [0, 1]: the second step never leaves the ball, because x is in [0, 1]."""

    def one(point: Array, x: Array) -> Array:
        offset = point - x
        inside = jnp.where(spectral.length(offset) > eps, eps * spectral.unit(offset), offset)
        return jnp.clip(x + inside, 0, 1)

    return jax.vmap(one)(points, x)

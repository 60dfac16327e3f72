"""Ascent: better multipliers of the dual, by Adam.

For each row the multiplier is a sum of free slopes times the coefficients of the outputs that it feeds, and mu r is a
free positive number times ||c||: one step changes all of them, however large their coefficients are. What is found is a
bound whatever the steps did; see :mod:`lipjax.bounds.dual`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lipjax.bounds.dual import Choose, Multipliers, best_weight, boxed, forward_margins, given, pull, value
from lipjax.bounds.propagation import Bounds
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Network
from lipjax.networks.linear_maps import length
from lipjax.networks.masks import kept, weighted
from lipjax.networks.regions import Preactivation

SLOPE_RATE, WEIGHT_RATE, LAST_RATE = 0.1, 0.05, 0.05  # of Adam; the last is the share that is left at the end
NOISE = 1e-5  # of a derivative; of smaller ones Adam would make whole steps, though they may be rounding alone
LEAST_WEIGHT = 1e-3  # mu r / ||c|| from which a resumed ascent may still grow
MEMORY = 2**31  # bytes that the pairs of one batch may take
ARRAYS_PER_PAIR = 24  # held at once, each of the size of all activations


def ascend(
    network: Network,
    bounds: Bounds,
    label: Array,
    multipliers: Multipliers | None = None,
    *,
    rivals: Array,
    num_steps: int = 60,
) -> tuple[Array, Multipliers]:
    """Margins of a batch by the dual, ascended in the multipliers.

    Args:
        network: the classifier.
        bounds: of the batch, with leading axis B.
        label: integers (B,).
        multipliers: to begin with; default: CROWN's slopes, with the best weights of the balls for them.
        rivals: classes (B, R) that are asked for.
        num_steps: steps of Adam, at least 0.

    Returns:
        ``(margins, multipliers)``: (B, classes), never worse than those of the start and of the forward pass; and
        where those of the dual were attained. A pair's result does not depend on the others, beyond what rounding
        decides at kinks. Pairs are ascended in batches that take at most 2 GB.

    Soundness:
        As of :func:`dual_margins`.
    """
    count, asked = rivals.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(count * asked, *leaf.shape[2:]), multipliers)

    def one(pair: tuple[Array, Array, Multipliers | None]) -> tuple[Array, Multipliers]:
        example, rival, given = pair
        own, chosen = jax.tree.map(lambda leaf: leaf[example], (bounds, label))
        state = start(network, own, chosen, rival) if given is None else resume(network, own, chosen, rival, given)
        begun = finish(network, own, chosen, rival, state)
        state = take_steps(network, own, chosen, rival, state, num_steps, num_steps)
        ended = finish(network, own, chosen, rival, state)
        return jax.tree.map(lambda before, after: jnp.where(ended[0] > begun[0], after, before), begun, ended)

    pairs, at_once = (jnp.repeat(jnp.arange(count), asked), rivals.reshape(-1), flat), pairs_at_once(network)
    found, reached = jax.vmap(one)(pairs) if count * asked <= at_once else lax.map(one, pairs, batch_size=at_once)
    forward = jax.vmap(functools.partial(forward_margins, network))(bounds, label)
    better = jnp.where(jnp.asarray(rivals, int) == jnp.asarray(label, int)[:, None], 0, found.reshape(count, asked))
    all_margins = jax.vmap(lambda forward, rivals, better: forward.at[rivals].max(better))(forward, rivals, better)
    return all_margins, jax.tree.map(lambda leaf: leaf.reshape(count, asked, *leaf.shape[1:]), reached)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AscentState:
    """An ascent on its way, of one pair.

    Attributes:
        slopes: one array (k, *shape of the pre-activations) per activation.
        log_weights: logarithms of mu r / ||c|| (activations,).
        adam: state of the optimiser.
        offsets: what is added to the multipliers, in units of the largest coefficient, shaped like the pre-activations;
            or empty. Branching needs them: a row that was cut may have a multiplier though nothing passes it on.
    """

    slopes: tuple[Array, ...]
    log_weights: Array
    adam: Any
    offsets: tuple[Array, ...] = ()

    @property
    def moved(self) -> tuple:
        """What is ascended."""
        return (self.slopes, self.log_weights, *((self.offsets,) if self.offsets else ()))


def crown(place: int, activation: Activation, c: Array, before: Preactivation) -> tuple[Array, Array]:
    """CROWN's multipliers: the chord's slope where a lower bound takes the upper side, else that of the nearer side.

    For activations that are neither convex nor concave, the chord and the slope at the middle of the box are our
    choice.

    Reference:
        Zhang, Weng, Chen, Hsieh, Daniel, NeurIPS 2018 (CROWN, with its adaptive slopes).
    """
    lower, upper = before.box
    middle = activation.slopes(dataclasses.replace(before, center=(lower + upper) / 2))
    fed, width = activation.feeding(c), upper - lower
    if len(fed) == 1 and fed.shape[1:] == c.shape:
        chord = (activation(upper) - activation(lower)) / jnp.where(width > 0, width, 1)
        middle = jnp.where((c < 0) & (width > 0), chord, middle[0])[None]
    return jnp.sum(middle * fed, axis=0), jnp.zeros((), c.dtype)


def with_best_weights(choose: Choose) -> Choose:
    """A walk with the multipliers of another, and for those the best weight of each ball."""

    def best(place: int, activation: Activation, c: Array, before: Preactivation) -> tuple[Array, Array]:
        g, _ = choose(place, activation, c, before)
        g = weighted(kept(before.rows), g)
        return g, best_weight(activation, c, g, before)

    return best


def start(network: Network, bounds: Bounds, label: Array, rival: Array) -> AscentState:
    """The start of one pair: CROWN's slopes, with the best weights of the balls for them."""
    trace = pull(network, bounds, label, rival, with_best_weights(crown))
    return resume(network, bounds, label, rival, Multipliers(trace.g, trace.weight))


def free(slopes: tuple[Array, ...], log_weights: Array, offsets: tuple[Array, ...] = ()) -> Choose:
    """A walk with multipliers of some slopes and weights; what those are relative to, ||c|| / r, has no gradient."""

    def choose(place: int, activation: Activation, c: Array, before: Preactivation) -> tuple[Array, Array]:
        g = jnp.sum(slopes[place] * activation.feeding(c), axis=0)
        if offsets:
            g = g + offsets[place] * lax.stop_gradient(jnp.max(jnp.abs(c)))
        if before.radius is None:
            return g, jnp.zeros((), c.dtype)
        unit = length(c) / jnp.where(before.ball > 0, before.ball, 1)
        return g, jnp.exp(log_weights[place]) * lax.stop_gradient(unit)

    return choose


def begin(slopes: tuple[Array, ...], log_weights: Array | None = None, offsets: tuple[Array, ...] = ()) -> AscentState:
    """The ascent of one pair from some slopes, and from mu r = ||c|| unless other weights are given."""
    if log_weights is None:
        log_weights = jnp.zeros(len(slopes), slopes[0].dtype if slopes else None)
    state = AscentState(slopes, log_weights, None, offsets)
    return dataclasses.replace(state, adam=_adam(1, state.moved).init(state.moved))


def resume(network: Network, bounds: Bounds, label: Array, rival: Array, multipliers: Multipliers) -> AscentState:
    """The ascent of one pair from multipliers: from the slopes nearest to those at the center that give them."""
    trace = pull(network, bounds, label, rival, given(multipliers))
    slopes, log_weights = [], []
    for activation, before, coefficients, g, weight in zip(
        network.activations, bounds.before, trace.c, trace.g, trace.weight, strict=True
    ):
        known, c = boxed(before), coefficients.sum
        fed = activation.feeding(c)
        on = activation.slopes(known)
        squares = jnp.sum(fed**2, axis=0)
        missing = (g - jnp.sum(on * fed, axis=0)) / jnp.where(squares > 0, squares, 1)
        slopes.append(on + jnp.where(squares > 0, missing, 0)[None] * fed)
        share = 0 if known.radius is None else weight * known.ball / jnp.maximum(length(c), 1e-30)
        log_weights.append(jnp.log(jnp.clip(share, LEAST_WEIGHT, 1 / LEAST_WEIGHT)))
    return begin(tuple(slopes), jnp.stack(log_weights) if log_weights else None)


def take_steps(
    network: Network,
    bounds: Bounds,
    label: Array,
    rival: Array,
    state: AscentState,
    num_steps: int,
    of: int,
    share: float = 1,
) -> AscentState:
    """Some of the steps of an ascent of one pair.

    Args:
        network: the classifier.
        bounds: of one example.
        label: integer scalar.
        rival: integer scalar.
        state: before them.
        num_steps: how many.
        of: the number of all, by which the rates fall.
        share: of the rates with which an ascent begins, for one that is nearly there.
    """
    adam = _adam(of, state.moved, share)

    def loss(moved: tuple) -> Array:
        return -value(network, bounds, pull(network, bounds, label, rival, free(*moved)))

    def step(_: int, state: AscentState) -> AscentState:
        gradient = jax.grad(loss)(state.moved)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of its counts
            updates, moments = adam.update(gradient, state.adam)
        moved: Any = optax.apply_updates(state.moved, updates)
        slopes, log_weights, *offsets = moved
        return AscentState(slopes, log_weights, moments, *offsets)

    return lax.fori_loop(0, num_steps, step, state)


def finish(
    network: Network, bounds: Bounds, label: Array, rival: Array, state: AscentState
) -> tuple[Array, Multipliers]:
    """The margin of one pair after an ascent, with the best weights for its multipliers, and both of them."""

    trace = pull(network, bounds, label, rival, with_best_weights(free(*state.moved)))
    return value(network, bounds, trace), Multipliers(trace.g, trace.weight)


def pairs_at_once(network: Network, itemsize: int = 4) -> int:
    """How many pairs of example and rival may be ascended together."""
    neurons = sum(2 * math.prod(node.shape) for node in network.nodes)
    return max(1, MEMORY // max(1, neurons * itemsize * ARRAYS_PER_PAIR))


def _adam(num_steps: int, moved: tuple, share: float = 1) -> optax.GradientTransformation:
    slopes, weights = (
        optax.adam(optax.cosine_decay_schedule(share * rate, max(1, num_steps), LAST_RATE), eps=NOISE)
        for rate in (SLOPE_RATE, WEIGHT_RATE)
    )
    kinds = ("slopes", "weights", "slopes")[: len(moved)]
    return optax.partition({"slopes": slopes, "weights": weights}, kinds)

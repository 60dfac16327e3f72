"""The dual: lower bounds of margins, backward through the box and the ball of every layer.

The forward pass ends in ``margin - radius ||c||`` and forgets which directions of each layer's ball are possible
together. The dual keeps them. For a label y and a rival j let ``c = w_y - w_j`` on the features and ``total = b_y -
b_j``. A block has ``z = W a + b`` and outputs ``s(z)``; its region has a center zc, a box, the rows M that matter, and
a radius r around zc over those rows. For ANY multipliers g on the rows, zero outside of M, and any weight mu >= 0,

    min over z in the region of <c, s(z)> - <g, z>
      >=  min over the box of { <c, s(z)> - <g, z> + mu / 2 ||z - zc||^2 } - mu / 2 r^2,             (1)
    total <- total + (1) + <g, b>,     c <- W^T g,     and at the input  total + <c, x> - eps ||c||.

The minimum is a sum over neurons (over pairs for MaxMin), each in closed form: see ``Activation.minimum``. Proof of
(1): let z' be z on M and zc elsewhere. Rows outside of M change no output over the box and have no multiplier, so both
sides see the same values at z' as at z; z' is in the box; and ``||z' - zc|| <= r``. So every (g, mu) is a proof and
ascent only makes it better.

It is the Lagrangian dual of the verification problem, the layers' equations relaxed with the multipliers g (Dvijotham
et al., UAI 2018; Bunel et al., UAI 2020), with the ball of every layer in it. With mu = 0 and the slopes of CROWN it
is CROWN (Zhang et al., NeurIPS 2018); for ReLU without the box and with those slopes SDP-CROWN (Chiu et al., ICML
2025).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.bounds import margins
from lipjax.bounds.propagation import Bounds
from lipjax.floating_point import SMALLEST64, UNIT64, gamma
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Block, Network
from lipjax.networks.linear_maps import length
from lipjax.networks.regions import Region

SEARCH_STEPS, SEARCH_OCTAVES = 10, 20  # of a weight: halvings of an interval of so many powers of two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multipliers:
    """What the dual is evaluated at; any values give a bound.

    Attributes:
        g: one array per block, (B, rivals, *shape of the pre-activations).
        weight: one array (B, rivals) per block, mu >= 0 of its ball.
    """

    g: tuple[Array, ...]
    weight: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """One backward walk, for one pair of label and rival. Tuples have one entry per block, in forward order.

    Attributes:
        constant: difference of the biases of the last layer.
        c: coefficients of the outputs.
        g: coefficients of the pre-activations, zero outside of the rows that matter.
        weight: mu of each ball.
        sums: coefficients of the sums over skip connections, where they are summed up, in forward order.
        input: coefficients of the input.
    """

    constant: Array
    c: tuple[Array, ...]
    g: tuple[Array, ...]
    weight: tuple[Array, ...]
    sums: tuple[Array, ...]
    input: Array


# How a walk gets the multipliers of a block: from its place, its activation, c and its region to g and mu.
Choose = Callable[[int, Activation, Array, Region], tuple[Array, Array]]


def dual_margins(network: Network, bounds: Bounds, label: Array, multipliers: Multipliers, rivals: Array) -> Array:
    """Margins of a batch by the dual at given multipliers.

    Args:
        network: the classifier.
        bounds: of the batch, as ``jax.vmap`` of :func:`lipjax.propagate` gives them, with leading axis B.
        label: integers (B,).
        multipliers: with leading axes (B, R).
        rivals: classes (B, R) that are asked for.

    Returns:
        Shape (B, classes): the dual's margins against the rivals, those of the forward pass (:func:`forward_margins`)
        against classes that are not asked for, and 0 for the label itself. Differentiable in the multipliers and in
        the network.

    Soundness:
        Lower bounds for all multipliers, if the bounds are; up to rounding. Multipliers of rows that do not matter are
        taken for zero, and weights below 0 too.
    """

    def one(bounds: Bounds, label: Array, rivals: Array, multipliers: Multipliers) -> Array:
        def against(rival: Array, multipliers: Multipliers) -> Array:
            return value(network, bounds, pull(network, bounds, label, rival, given(multipliers)))

        found = jax.vmap(against)(rivals, multipliers)
        forward = forward_margins(network, bounds, label)
        return forward.at[rivals].set(jnp.where(rivals == label, 0, found))

    return jax.vmap(one)(bounds, label, rivals, multipliers)


def forward_margins(network: Network, bounds: Bounds, label: Array) -> Array:
    """Margins (classes,) of the forward pass alone, for one example: by box and ball, or by what there is of them."""
    if bounds.features.lower is None:
        return margins.pairwise_lipschitz(network.head, bounds.features, label)
    return margins.box_and_ball(network.head, bounds.features, label)


# One pair


def pull(network: Network, bounds: Bounds, label: Array, rival: Array, choose: Choose) -> Trace:
    """Pull the coefficients of a margin back to the input, for one example and one rival.

    Args:
        network: the classifier.
        bounds: of one example.
        label: integer scalar.
        rival: integer scalar.
        choose: gives the multipliers of each block.
    """
    kernel, bias = network.head.kernel, network.head.bias
    c, g, weight, sums = ({} for _ in range(4))
    ends = list(network.joins)  # the last fork is the first to come

    def block(place: int, step: Block, coefficients: Array) -> Array:
        region = boxed(bounds.preactivations[place])
        c[place] = coefficients.reshape(step.activation(region.center).shape)
        chosen, weight[place] = choose(place, step.activation, c[place], region)
        g[place] = jnp.where(region.live, chosen, 0)  # a row that does not matter may have no multiplier
        return step.affine.adjoint()(g[place])

    def join(kept: Array, coefficients: Array) -> Array:
        sums[ends.pop()] = kept
        return kept + coefficients.reshape(kept.shape)

    features = (kernel[:, label] - kernel[:, rival]).reshape(bounds.features.center.shape)
    last = network.walk(features, block, join, backward=True).reshape(bounds.input.center.shape)
    places = range(len(network.blocks))
    in_order = (tuple(found[place] for place in places) for found in (c, g, weight))
    of_sums = tuple(sums[place] for place in range(len(sums)))
    return Trace(bias[label] - bias[rival], *in_order, of_sums, last)


def value(network: Network, bounds: Bounds, trace: Trace) -> Array:
    """The margin that a walk proves, scalar."""
    total = trace.constant
    for block, before, c, g, weight in zip(
        network.blocks, bounds.preactivations, trace.c, trace.g, trace.weight, strict=True
    ):
        least, _ = block.activation.minimum(c, g, weight, boxed(before))
        total = total + least + jnp.sum(g * block.affine.shift)
        if before.radius is not None:
            total = total - weight / 2 * before.radius**2
    region = bounds.input
    if region.domain == "ball" and region.radius is not None:
        region = region.without_box()  # which is that of the ball, and says no more
    return total + jnp.sum(trace.input * region.center) + margins.least_product(trace.input, region)


class Errors(NamedTuple):
    """What a computed value may be above the margin of the float32 network, term by term; see :func:`errors`."""

    logits: Array
    layers: Array
    sums: Array
    products: Array
    minimisers: Array


def errors(
    network: Network,
    bounds: Bounds,
    trace: Trace,
    layers: tuple[Array, ...],
    sums: tuple[Array, ...],
    logits: Array,
    unit: float = UNIT64,
) -> Errors:
    """What :func:`value` may be above the margin that float32 inference has anywhere in the region.

    Args:
        network: the classifier.
        bounds: of one example; its regions contain the activations of float32.
        trace: of the walk that was evaluated.
        layers: how far each pre-activation may be off ``W a + b`` in float32, and this walk's products with W and b for
            each unit of a multiplier; one array per block.
        sums: how far each entry of a sum over a skip connection may be off, in the order of the pass.
        logits: how far the two logits may be off together, scalar.
        unit: unit roundoff of the evaluation.

    Returns:
        - ``logits``: those;
        - ``layers``: with a pre-activation off by e, ``<g, z>`` is off by ``<g, e>``;
        - ``sums``: likewise ``<c, e>``, with the coefficients of the sum, not those of what it began with;
        - ``products``: 2 gamma_N T, for the sums of this evaluation, with T the sum of the magnitudes of the N products
          that are added. Minima are smaller than the products inside of them, which cancel;
        - ``minimisers``: a value at a point near the minimiser is above the minimum. A minimiser is off by at most a
          few roundings of the largest magnitude A in its box, and the value grows by mu / 2 times the square of it.
    """
    of_layers = sum(jnp.sum(jnp.abs(g) * slack) for g, slack in zip(trace.g, layers, strict=True))
    pairs = zip(trace.sums, sums, strict=True)
    of_sums = sum(jnp.sum(jnp.abs(c) * slack.reshape(c.shape)) for c, slack in pairs)
    total, minimisers, addends = jnp.abs(trace.constant), jnp.zeros_like(trace.constant), 64 + 4 * trace.input.size
    for block, before, c, g, weight in zip(
        network.blocks, bounds.preactivations, trace.c, trace.g, trace.weight, strict=True
    ):
        region = boxed(before)
        lower, upper = region.box
        outputs = (jnp.abs(block.activation(bound)) for bound in (lower, upper))
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        width = jnp.maximum(upper - region.center, region.center - lower)
        total += jnp.sum(jnp.abs(c) * jnp.maximum(*outputs)) + jnp.sum(jnp.abs(g) * largest)
        total += jnp.sum(jnp.abs(g * block.affine.shift)) + weight / 2 * (jnp.sum(width**2) + region.ball**2)
        minimisers += 256 * unit**2 * weight * jnp.sum(largest**2)
        addends += 4 * (c.size + g.size)
    lower, upper = bounds.input.box
    reach = jnp.abs(lower) + jnp.abs(upper)
    total += 2 * jnp.sum(jnp.abs(trace.input) * reach) + 2 * bounds.input.ball * length(trace.input)
    products = 2 * gamma(addends, unit) * total + addends * SMALLEST64
    return Errors(logits, of_layers, of_sums, products, minimisers)


def boxed(region: Region) -> Region:
    """The region of a pre-activation with a box that contains its center; that of its ball where it has none.

    A radius of 0 leaves nothing but the center.
    """
    center, radius = region.center, region.radius
    if region.lower is None or region.upper is None:
        lower, upper = center - region.ball, center + region.ball
    else:
        lower, upper = jnp.minimum(region.lower, center), jnp.maximum(region.upper, center)
    if radius is not None:
        lower, upper = (jnp.where(radius == 0, center, bound) for bound in (lower, upper))
    return dataclasses.replace(region, lower=lower, upper=upper)


def best_weight(activation: Activation, c: Array, g: Array, region: Region, num_steps: int = SEARCH_STEPS) -> Array:
    """The mu of one ball that proves the most, at fixed multipliers: (1) is concave in it.

    Its slope is ``(||z - zc||^2 - r^2) / 2`` at the minimiser z. Found by halving the logarithm, without gradient; 0
    where the box lies in the ball.

    Args:
        activation: of the block.
        c: coefficients of its outputs.
        g: coefficients of its pre-activations.
        region: of those, with a box.
        num_steps: halvings.
    """
    if region.radius is None:
        return jnp.zeros((), c.dtype)
    c, g, region = lax.stop_gradient((c, g, region))

    def outside(log_weight: Array) -> Array:
        _, z = activation.minimum(c, g, jnp.exp2(log_weight), region)
        return length(z - region.center) > region.ball

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        far = outside(middle)
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    # The minimiser is no farther than 2 / mu times the largest slope of each unit.
    steepest = 2 * length(jnp.abs(g) + jnp.max(jnp.abs(activation.feeding(c)), axis=0))
    radius = jnp.where(region.ball > 0, region.ball, 1)
    high = jnp.log2(jnp.where(steepest > 0, steepest, 1) / radius)
    low = high - SEARCH_OCTAVES
    reached, _ = lax.fori_loop(0, num_steps, halve, (low, high))
    needed = (steepest > 0) & (region.ball > 0) & (reached > low)
    return lax.stop_gradient(jnp.where(needed, jnp.exp2(reached), 0))


def given(multipliers: Multipliers) -> Choose:
    """A walk with these multipliers."""

    def choose(place: int, activation: Activation, c: Array, region: Region) -> tuple[Array, Array]:
        return multipliers.g[place], jnp.maximum(multipliers.weight[place], 0)

    return choose

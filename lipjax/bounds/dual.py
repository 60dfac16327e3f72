"""The dual: lower bounds of margins, backward through the box and the ball of every layer.

The forward pass ends in ``margin - radius ||c||`` and forgets which directions of each layer's ball are possible
together. The dual keeps them. For a label y and a rival j let ``c = w_y - w_j`` on the features and ``total = b_y -
b_j``. An activation takes z and gives ``s(z)``; known are a center zc, a box, the rows M that matter, and a radius r
around zc over those rows. For ANY multipliers g on the rows, zero outside of M, and any weight mu >= 0,

    min over z in the region of <c, s(z)> - <g, z>
      >=  min over the box of { <c, s(z)> - <g, z> + mu / 2 ||z - zc||^2 } - mu / 2 r^2.             (1)

So ``total <- total + (1)``, and g are the coefficients of z. Through a layer ``z = W a + b`` they become ``W^T g``,
with ``total <- total + <g, b>``; a sum hands them to both of its values, a concatenation to each its part, and what
comes to one value from several is added up. At the input the margin is at least ``total + <c, x> - eps ||c||``.

The minimum is a sum over neurons (over pairs for MaxMin), each in closed form: see ``Activation.minimum``. Proof of
(1): let z' be z on M and zc elsewhere. Rows outside of M change no output over the box and have no multiplier, so both
sides see the same values at z' as at z; z' is in the box; and ``||z' - zc|| <= r``. So every (g, mu) is a proof and
ascent only makes it better. With weights w of the rows, ``||w (z' - zc)|| <= r``: mu w^2 stands in place of mu.

It is the Lagrangian dual of the verification problem, the layers' equations relaxed with the multipliers g (Dvijotham
et al., UAI 2018; Bunel et al., UAI 2020), with every layer's ball; special cases: ``lipjax.bounds.crown``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.bounds import margins
from lipjax.bounds.propagation import Bounds
from lipjax.floating_point import SMALLEST64, UNIT32, UNIT64, gamma
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Network, Node, Sum
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import length
from lipjax.networks.masks import kept, reached, weighted
from lipjax.networks.regions import Preactivation

SEARCH_STEPS, SEARCH_OCTAVES = 10, 20  # of a weight: halvings of an interval of so many powers of two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multipliers:
    """What the dual is evaluated at; any values give a bound.

    Attributes:
        g: one array per activation, (B, rivals, *shape of the pre-activations).
        weight: one array (B, rivals) per activation, mu >= 0 of its ball.
    """

    g: tuple[Array, ...]
    weight: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Coefficients of a value that several nodes may take.

    Attributes:
        sum: of what has come from them.
        size: sum of the magnitudes of what has come, where some of it may have cancelled.
    """

    sum: Array
    size: Array

    @classmethod
    def of(cls, values: Array) -> Coefficients:
        """Of one node."""
        return cls(values, jnp.abs(values))

    def __add__(self, other: Coefficients) -> Coefficients:
        return jax.tree.map(lambda mine, theirs: mine + theirs.reshape(mine.shape), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """One backward walk, for one pair of label and rival. Tuples are in forward order.

    Attributes:
        constant: difference of the biases of the last layer.
        c: coefficients of the outputs of each activation.
        g: coefficients of its pre-activations, zero outside of the rows that matter.
        weight: mu of its ball.
        layers: coefficients of the outputs of each affine layer.
        sums: coefficients of each sum.
        input: coefficients of the input.
    """

    constant: Array
    c: tuple[Coefficients, ...]
    g: tuple[Array, ...]
    weight: tuple[Array, ...]
    layers: tuple[Coefficients, ...]
    sums: tuple[Coefficients, ...]
    input: Coefficients


# How a walk gets multipliers: from the place of the activation, it, c and what is known before it to g and mu.
Choose = Callable[[int, Activation, Array, Preactivation], tuple[Array, Array]]


def dual_margins(network: Network, bounds: Bounds, label: Array, multipliers: Multipliers, rivals: Array) -> Array:
    """Margins of a batch by the dual at given multipliers.

    Args:
        network: the classifier.
        bounds: of the batch, as :func:`lipjax.propagate` gives them.
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
        return forward.at[rivals].set(jnp.where(jnp.asarray(rivals, int) == jnp.asarray(label, int), 0, found))

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
        choose: gives the multipliers of each activation.
    """
    head = network.head
    c, g, weight, layers, sums = ([] for _ in range(5))
    known = list(enumerate(bounds.before))  # the last activation is the first to come

    def visit(place: int, node: Node, coefficients: Coefficients) -> Sequence[Coefficients]:
        coefficients = jax.tree.map(lambda each: each.reshape(node.shape), coefficients)
        if isinstance(node.operation, Activation):
            number, before = known.pop()
            before = boxed(before)
            chosen, mu = choose(number, node.operation, coefficients.sum, before)
            chosen = weighted(kept(before.rows), chosen)  # a row that does not matter may have no multiplier
            c.append(coefficients)
            g.append(chosen)
            weight.append(mu)
            return (Coefficients.of(chosen),)
        if isinstance(node.operation, Affine):
            layers.append(coefficients)
            return (Coefficients.of(node.operation.adjoint()(coefficients.sum)),)
        if isinstance(node.operation, Sum):
            sums.append(coefficients)
            return coefficients, coefficients
        parts = (node.operation.split(each, node.arranged) for each in (coefficients.sum, coefficients.size))
        return tuple(map(Coefficients, *parts))

    of_input = network.backward(Coefficients.of(head.row(label) - head.row(rival)), visit)
    of_input = jax.tree.map(lambda each: each.reshape(bounds.input.center.shape), of_input)
    bias = jnp.broadcast_to(head.shift, head.out_shape).ravel()
    in_order = (tuple(found[::-1]) for found in (c, g, weight, layers, sums))
    return Trace(bias[label] - bias[rival], *in_order, of_input)


def value(network: Network, bounds: Bounds, trace: Trace) -> Array:
    """The margin that a walk proves, scalar."""
    total = trace.constant
    for activation, before, c, g, weight in zip(
        network.activations, bounds.before, trace.c, trace.g, trace.weight, strict=True
    ):
        mu = jnp.zeros_like(weight) if before.radius is None else weight  # without a ball there is nothing to weigh
        least, _ = activation.minimum(c.sum, g, per_row(mu, before), boxed(before))
        total += least if before.radius is None else least - mu / 2 * before.radius**2
    for layer, coefficients in zip(network.layers, trace.layers, strict=True):
        total = total + jnp.sum(coefficients.sum * layer.shift)
    region = bounds.input
    if region.domain == "ball" and region.radius is not None:
        region = region.without_box()  # which is that of the ball, and says no more
    return total + jnp.sum(trace.input.sum * region.center) + margins.least_product(trace.input.sum, region)


def per_row(weight: Array, before: Preactivation) -> Array:
    """The mu of a ball as it meets each row: times the square of its weight, where rows have weights."""
    return weight if before.rows.dtype == bool else weight * before.rows**2


class Errors(NamedTuple):
    """What a computed value may be above the margin of the float32 network, term by term; see :func:`errors`."""

    logits: Array
    layers: Array
    activations: Array
    sums: Array
    products: Array
    minimisers: Array


def errors(
    network: Network,
    bounds: Bounds,
    trace: Trace,
    logits: Array,
    unit: float = UNIT64,
) -> Errors:
    """What :func:`value` may be above the margin that float32 inference has anywhere in the region.

    Args:
        network: the classifier.
        bounds: of one example; its regions contain the activations of float32, and its slack says what may be off.
        trace: of the walk that was evaluated.
        logits: how far the two logits may be off together, scalar.
        unit: unit roundoff of the evaluation.

    Returns:
        - ``logits``: those;
        - ``layers``: with an output of a layer off by e, ``<k, z>`` with its coefficients k is off by ``<k, e>``;
        - ``activations``: likewise, with the coefficients of their outputs, for those that round something;
        - ``sums``: likewise, with the coefficients of the sum, not those of what it adds;
        - ``products``: 2 gamma_N T, for the sums of this evaluation, T the sum of the magnitudes of the N products;
        - ``minimisers``: a value at a point near the minimiser is above the minimum. A minimiser is off by at most a
          few roundings of the largest magnitude A in its box or at the center: the value grows by mu / 2 of its square.
    """
    # Where coefficients have cancelled, each of them was rounded relative to itself, in this evaluation; what is off in
    # float32 is at least its unit roundoff times the value that they meet.
    cancelled = len(network.nodes) * unit / UNIT32

    def off(coefficients: Sequence[Coefficients], slack: Sequence[Array]) -> Array:
        pairs = zip(coefficients, slack, strict=True)
        return sum(jnp.sum((abs(k.sum) + cancelled * (k.size - abs(k.sum))) * each) for k, each in pairs)

    of_layers, of_sums = off(trace.layers, bounds.slack.layers), off(trace.sums, bounds.slack.sums)
    input_size, zero = trace.input.size, jnp.zeros_like(trace.constant)
    rounding = [(c, slack) for c, slack in zip(trace.c, bounds.slack.activations, strict=True) if slack is not None]
    of_activations = off(*zip(*rounding, strict=True)) if rounding else zero
    total, minimisers, addends = jnp.abs(trace.constant), zero, 64 + 4 * input_size.size + len(network.nodes)
    for activation, before, c, g, weight in zip(
        network.activations, bounds.before, trace.c, trace.g, trace.weight, strict=True
    ):
        known = boxed(before)
        lower, upper = known.box
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        width = jnp.maximum(jnp.abs(upper - known.center), jnp.abs(known.center - lower))
        total += jnp.sum(c.size * activation.largest(lower, upper)) + jnp.sum(jnp.abs(g) * largest)
        total += weight / 2 * (jnp.sum(width**2) + known.ball**2)
        minimisers += 256 * unit**2 * weight * jnp.sum(jnp.maximum(largest, jnp.abs(known.center)) ** 2)
        addends += 4 * (c.size.size + g.size)
    for layer, k in zip(network.layers, trace.layers, strict=True):
        total += jnp.sum(k.size * jnp.abs(layer.shift))
        addends += 2 * k.size.size
    lower, upper = bounds.input.box
    reach = jnp.abs(lower) + jnp.abs(upper)
    total += 2 * jnp.sum(input_size * reach) + 2 * bounds.input.ball * length(input_size)
    products = 2 * gamma(addends, unit) * total + addends * SMALLEST64
    return Errors(logits, of_layers, of_activations, of_sums, products, minimisers)


def boxed(before: Preactivation) -> Preactivation:
    """What is known before an activation, with a box; that of its ball where it has none.

    It contains the center where a row does not matter, as (1) takes it there; a radius of 0 leaves nothing else.
    """
    center, radius = before.center, before.radius
    if before.lower is None or before.upper is None:
        reach = reached(before.rows, before.ball)
        lower, upper = center - reach, center + reach
    else:
        matters = kept(before.rows)
        lower = jnp.where(matters, before.lower, jnp.minimum(before.lower, center))
        upper = jnp.where(matters, before.upper, jnp.maximum(before.upper, center))
    if radius is not None:
        lower, upper = (jnp.where(radius == 0, center, bound) for bound in (lower, upper))
    return dataclasses.replace(before, lower=lower, upper=upper)


def best_weight(
    activation: Activation, c: Array, g: Array, before: Preactivation, num_steps: int = SEARCH_STEPS
) -> Array:
    """The mu of one ball that proves the most, at fixed multipliers: (1) is concave in it.

    Its slope is ``(||z - zc||^2 - r^2) / 2`` at the minimiser z. Found by halving the logarithm, without gradient; 0
    where the box lies in the ball.

    Args:
        activation: behind it.
        c: coefficients of its outputs.
        g: coefficients of its pre-activations.
        before: what is known of those, with a box.
        num_steps: halvings.
    """
    if before.radius is None:
        return jnp.zeros((), c.dtype)
    c, g, before = lax.stop_gradient((c, g, before))

    def outside(log_weight: Array) -> Array:
        _, z = activation.minimum(c, g, per_row(jnp.exp2(log_weight), before), before)
        moved = z - before.center
        return length(moved if before.rows.dtype == bool else weighted(before.rows, moved)) > before.ball

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        far = outside(middle)
        return jnp.where(far, middle, low), jnp.where(far, high, middle)

    # The minimiser is no farther than 2 / mu times the largest slope of each unit.
    steepest = 2 * length(jnp.abs(g) + jnp.max(jnp.abs(activation.feeding(c)), axis=0))
    radius = jnp.where(before.ball > 0, before.ball, 1)
    high = jnp.log2(jnp.where(steepest > 0, steepest, 1) / radius)
    low = high - SEARCH_OCTAVES
    reached, _ = lax.fori_loop(0, num_steps, halve, (low, high))
    needed = (steepest > 0) & (before.ball > 0) & (reached > low)
    return lax.stop_gradient(jnp.where(needed, jnp.exp2(reached), 0))


def given(multipliers: Multipliers) -> Choose:
    """A walk with these multipliers."""

    def choose(place: int, activation: Activation, c: Array, before: Preactivation) -> tuple[Array, Array]:
        return multipliers.g[place], jnp.maximum(multipliers.weight[place], 0)

    return choose

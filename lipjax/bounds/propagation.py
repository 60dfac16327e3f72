"""The pass: regions of a batch are carried through a network, and give boxes, masks, norms and Lipschitz constants.

It is the only code that carries a region forward. Every method of the paper is this pass with parts absent: drop the
box from the input region and it is GloRo or LMT, drop the ball and it is IBP, give norms and row norms of the whole
layers and it is BCP; with everything it is Local-Lip. Training and certification differ in how the pass gets its
norms, the ``ask``, and in what is rounded, the ``arithmetic``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.bounds.arithmetic import EXACT, Arithmetic
from lipjax.networks import masks
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Concatenation, Network, Node, Sum, check_network
from lipjax.networks.layers import Affine, Shape
from lipjax.networks.linear_maps import length
from lipjax.networks.regions import Preactivation, Region, all_finite, cut_by_ball


class Ask(Protocol):
    """How a pass gets its norms: the one seam between bounds and norms.

    Called with the place of a layer among those of the network, the layer, and which of its rows and columns matter (B,
    ...), it gives sigma (B,) and whatever it wants to hand back (the next starts of power iterations, say). Outside of
    a traced function it may be a loop on the host. Where sigma is None, there is no ball behind the layer.
    """

    def __call__(self, place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array | None, Any]: ...


# How a pass gets its row norms: the layer and the live columns, of one example, to one norm per output.
RowNorms = Callable[[Affine, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slack:
    """What finite precision may be off, in absolute numbers; zero in exact arithmetic.

    Attributes:
        layers: per layer, how far each output may be off, and the dual's products with it per unit of a multiplier.
        activations: per activation, how far each output may be off; None where it rounds nothing.
        sums: per sum, how far each entry may be off.
        logits: how far each logit may be off (classes,).
    """

    layers: tuple[Array, ...]
    activations: tuple[Array | None, ...]
    sums: tuple[Array, ...]
    logits: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one pass finds out. Of a batch every array has a leading axis (B,).

    Attributes:
        input: the first region.
        features: the region that contains the features of every input of the first region.
        before: what is known before each activation.
        live: per activation, boolean masks of its outputs that vary.
        rows: per layer, the rows whose norms were asked for: those that matter to what comes behind, or their weights.
        sigmas: norms of the masked layers (layers,).
        lipschitz: the constant of the feature map that follows: a bound of its local Lipschitz constant over the
            region, as good as the norms are. Ones where the pass had no ball, infinite where it lost it.
        slack: what finite precision may be off.
        handed_back: what ``ask`` handed back for each layer.
    """

    input: Region
    features: Region
    before: tuple[Preactivation, ...]
    live: tuple[Array, ...]
    rows: tuple[Array, ...]
    sigmas: Array
    lipschitz: Array
    slack: Slack
    handed_back: tuple[Any, ...]


def masked_row_norms(layer: Affine, live: Array) -> Array:
    """Row norms over the live columns: what certification uses."""
    return layer.row_norms(live)


def full_row_norms(layer: Affine, live: Array) -> Array:
    """Row norms over all columns: larger, but shared by all examples of a batch, which saves training a product."""
    return layer.row_norms(jnp.ones_like(live))


def propagate(
    network: Network,
    region: Region,
    ask: Ask,
    arithmetic: Arithmetic = EXACT,
    *,
    row_norms: RowNorms = masked_row_norms,
    rows: Sequence[Array] | None = None,
) -> Bounds:
    """Carry the regions of a batch through the feature map of a network.

    For each layer and the activation behind it, with I the live coordinates that come in:

    - center <- W center + b;
    - box <- [mid - r, mid + r] with mid = W (upper + lower) / 2 + b, r = |W| (upper - lower) / 2, cut to
      center +- radius ||W_i I|| [H21 Eq 21-23];
    - sigma = ||I_out W I||, radius <- radius sigma [H21 Eq 6], then the activation; where that has weights of its rows,
      they stand in place of I_out.

    Boxes and balls of sums add up; the ball of a concatenation has the root of the sum of the squared radii.

    Args:
        network: the classifier.
        region: where the inputs lie (B, ...); see :func:`lipjax.l2_ball`.
        ask: gives the norms of the masked layers.
        arithmetic: what is rounded.
        row_norms: gives the row norms of each layer.
        rows: the rows of each layer that matter (B, ...), as an earlier pass over the same regions has found them. A
            norm is one of the very rows that it was computed for; which rows matter is only repeated up to rounding.

    Returns:
        The bounds of the batch.

    Soundness:
        Box and ball contain every reachable activation, if the norms are upper bounds: up to rounding in exact
        arithmetic, else with what is rounded. With norms estimated from below (power iteration) all of it is an
        estimate.

    Raises:
        TypeError: network is no :class:`lipjax.Network`.
        ValueError: the region is not one of a batch of its inputs.

    Reference:
        [H21] sections 3.1 and 3.2.
    """
    check_network(network)
    if region.center.shape[1:] != network.input_shape:
        expected = ", ".join(map(str, ("B", *network.input_shape)))
        raise ValueError(f"the region has shape {region.center.shape}; expected that of a batch ({expected})")
    before, live, asked, sigmas, handed_back, of_layers, of_activations, of_sums = ([] for _ in range(8))
    readers, has_ball = network.readers, region.radius is not None

    def affine(place: int, node: Node, value: Region) -> Preactivation:
        behind = tuple((network.nodes[k].operation, network.nodes[k].arranged[0]) for k in readers[place])
        only = bool(behind) and all(isinstance(each, Activation) for each, _ in behind)
        consumers, shapes = tuple(zip(*behind, strict=True)) if only else ((), ())
        found, entering, slack = _boxed(node.operation, value, consumers, shapes, arithmetic, row_norms)
        number = len(sigmas)
        if rows is not None:
            found = dataclasses.replace(found, rows=jnp.asarray(rows[number]))
        sigma, aux = None, None
        if entering.radius is not None:
            sigma, aux = ask(number, node.operation, found.rows, entering.live)
        if sigma is not None:
            found = _balled(node.operation, found, entering, jnp.asarray(sigma, found.center.dtype), arithmetic)
        asked.append(found.rows)
        unknown = jnp.full_like(found.finite, jnp.inf if has_ball else 1, dtype=found.center.dtype)
        sigmas.append(unknown if sigma is None else sigma)
        handed_back.append(aux)
        of_layers.append(slack)
        return found

    def visit(place: int, node: Node, *values: Region | Preactivation) -> Region | Preactivation:
        if isinstance(node.operation, Affine):
            return affine(place, node, _region(values[0]))
        if isinstance(node.operation, Activation):
            found, after, slack = _activated(node.operation, values[0], node.arranged[0], arithmetic)
            of_activations.append(slack)
            before.append(found)
            live.append(after.live)
            return after
        regions = tuple(map(_region, values))
        if isinstance(node.operation, Sum):
            joined, slack = _summed(*regions, node.arranged[0], arithmetic)
            of_sums.append(slack)
            return joined
        return _concatenated(node.operation, regions, node.arranged, arithmetic)

    last = _region(network.forward(region, visit))
    features, logits = _features(network.head, last, arithmetic)
    stacked = [jnp.asarray(sigma, features.center.dtype) for sigma in sigmas]
    table = jnp.stack(stacked, axis=-1) if sigmas else jnp.ones((*features.finite.shape, 0), features.center.dtype)
    lipschitz = jnp.broadcast_to(jnp.asarray(arithmetic.constant(network, stacked), table.dtype), features.finite.shape)
    slack = Slack(tuple(of_layers), tuple(of_activations), tuple(of_sums), logits)
    masks = tuple(before), tuple(live), tuple(asked)
    return Bounds(region, features, *masks, table, lipschitz, slack, tuple(handed_back))


# Each operation, a program of its own: inside of a traced function it is part of that one.


@functools.partial(jax.jit, static_argnames=("shapes", "arithmetic", "row_norms"))
def _boxed(
    layer: Affine,
    region: Region,
    behind: tuple[Activation, ...],
    shapes: tuple[Shape, ...],
    arithmetic: Arithmetic,
    row_norms: RowNorms,
) -> tuple[Preactivation, Region, Array]:
    """What is known behind a layer without its ball, the regions that enter it, and what may be off.

    The rows that matter are those that do to one of the activations behind; all, where something else comes behind.
    """

    def one(region: Region) -> tuple[Preactivation, Region, Array]:
        entering = region.reshape(layer.in_shape)
        found, slack = arithmetic.outputs(layer, _box_behind(layer, entering, row_norms), entering)
        if behind and found.lower is not None:
            each = (_rows(each, found.reshape(shape), arithmetic) for each, shape in zip(behind, shapes, strict=True))
            rows = functools.reduce(masks.either, (rows.reshape(layer.out_shape) for rows in each))
            found = dataclasses.replace(found, rows=rows)
        return found, entering, slack

    return jax.vmap(one)(region)


def _box_behind(layer: Affine, region: Region, row_norms: RowNorms) -> Preactivation:
    center = layer(region.center)
    lower, upper = None, None
    if region.lower is not None and region.upper is not None:
        mid = layer((region.upper + region.lower) / 2)
        half = layer.absolute((region.upper - region.lower) / 2)
        lower, upper = mid - half, mid + half
        if region.radius is not None:
            lower, upper = cut_by_ball(lower, upper, center, region.radius * row_norms(layer, region.live))
    finite = region.finite & all_finite(lower, upper, center)
    return Preactivation(lower, upper, center, jnp.ones(center.shape, bool), None, finite)


def _rows(activation: Activation, before: Preactivation, arithmetic: Arithmetic) -> Array:
    """The rows that matter to an activation, or their weights; all of them where there is no box."""
    if before.lower is None:
        return before.rows
    rows = activation.row_weights(*before.box)
    return arithmetic.weights(rows) if activation.weighs else rows


@functools.partial(jax.jit, static_argnames="arithmetic")
def _balled(
    layer: Affine, before: Preactivation, entering: Region, sigma: Array, arithmetic: Arithmetic
) -> Preactivation:
    """The same with the ball of the rows that matter."""

    def one(before: Preactivation, entering: Region, sigma: Array) -> Preactivation:
        return dataclasses.replace(before, radius=arithmetic.ball(layer, entering, before.rows, entering.ball * sigma))

    return jax.vmap(one)(before, entering, sigma)


@functools.partial(jax.jit, static_argnames=("shape", "arithmetic"))
def _activated(
    activation: Activation, value: Region | Preactivation, shape: Shape, arithmetic: Arithmetic
) -> tuple[Preactivation, Region, Array | None]:
    """What is known before an activation, the regions after it, and how far their entries may be off."""

    def one(value: Region | Preactivation) -> tuple[Preactivation, Region, Array | None]:
        if isinstance(value, Region):
            every = jnp.ones(value.center.shape, bool)
            value = Preactivation(value.lower, value.upper, value.center, every, value.radius, value.finite)
        before = value.reshape(shape)
        # The ball is one of the rows, or weights, that all activations behind the layer asked for; of less it is true.
        rows = masks.both(before.rows, _rows(activation, before, arithmetic))
        before = dataclasses.replace(before, rows=rows if activation.weighs else masks.whole(rows))
        return before, *_after(activation, before, arithmetic)

    return jax.vmap(one)(value)


def _after(activation: Activation, before: Preactivation, arithmetic: Arithmetic) -> tuple[Region, Array | None]:
    """The region after an activation, of one example, and how far its entries may be off."""
    center, lower, upper = activation(before.center), None, None
    radius = None if before.radius is None else before.radius * activation.lipschitz
    finite = before.finite & all_finite(center, radius)
    live = jnp.ones(center.shape, bool)
    if before.lower is not None:
        lower, upper = activation.box(*before.box)
        if activation.mixes and radius is not None:
            lower, upper = cut_by_ball(lower, upper, center, radius)
        live = activation.live_outputs(*before.box)
    region = Region(lower, upper, center, radius, live, finite)
    return arithmetic.activated(activation, before, region if radius is None else arithmetic.moved(region))


@functools.partial(jax.jit, static_argnames=("shape", "arithmetic"))
def _summed(first: Region, second: Region, shape: Shape, arithmetic: Arithmetic) -> tuple[Region, Array]:
    def one(first: Region, second: Region) -> tuple[Region, Array]:
        first, second = first.reshape(shape), second.reshape(shape)
        return arithmetic.sum(_sum(first, second), first, second)

    return jax.vmap(one)(first, second)


def _sum(first: Region, second: Region) -> Region:
    """Boxes and balls add up. Each box is cut to its ball, so that the sum of the boxes is within that of the balls."""
    radius = None if first.radius is None or second.radius is None else first.radius + second.radius
    lower, upper = None, None
    if first.lower is not None and second.lower is not None:
        boxes = [_box_within_ball(first), _box_within_ball(second)]
        lower, upper = (a + b for a, b in zip(*boxes, strict=True))
    center = first.center + second.center
    finite = first.finite & second.finite & all_finite(lower, upper, center, radius)
    return Region(lower, upper, center, radius, first.live | second.live, finite)


def _box_within_ball(region: Region) -> tuple[Array, Array]:
    if region.radius is None:
        return region.box
    return cut_by_ball(*region.box, region.center, jnp.where(region.live, region.radius, 0))


@functools.partial(jax.jit, static_argnames=("shapes", "arithmetic"))
def _concatenated(
    concatenation: Concatenation, regions: tuple[Region, ...], shapes: tuple[Shape, ...], arithmetic: Arithmetic
) -> Region:
    def one(*regions: Region) -> Region:
        parts = [region.reshape(shape) for region, shape in zip(regions, shapes, strict=True)]
        has_box, has_ball = (all(getattr(part, name) is not None for part in parts) for name in ("lower", "radius"))
        lower, upper = (
            concatenation(*(getattr(part, name) for part in parts)) if has_box else None for name in ("lower", "upper")
        )
        center, live = (concatenation(*(getattr(part, name) for part in parts)) for name in ("center", "live"))
        radius = length(jnp.stack([part.ball for part in parts])) if has_ball else None
        finite = functools.reduce(jnp.logical_and, (part.finite for part in parts)) & all_finite(radius)
        joined = Region(lower, upper, center, radius, live, finite)
        return arithmetic.moved(joined) if has_ball else joined

    return jax.vmap(one)(*regions)


@functools.partial(jax.jit, static_argnames="arithmetic")
def _features(head: Affine, region: Region, arithmetic: Arithmetic) -> tuple[Region, Array]:
    return jax.vmap(lambda region: arithmetic.logits(head, region.reshape(head.in_shape)))(region)


def _region(value: Region | Preactivation) -> Region:
    """The region of a value that all of its readers take whole: every row of its layer matters, and can vary."""
    if isinstance(value, Region):
        return value
    return Region(value.lower, value.upper, value.center, value.radius, masks.kept(value.rows), value.finite)

"""Enclosures: the region pass of a certificate, batched, whose regions also contain what is rounded.

The steps are those of :mod:`lipjax.bounds.propagation`, each a program of its own, so that norms may be found between
them by a loop on the host. What finite precision adds is one value, an :class:`Arithmetic`: the only difference between
an estimate and a proof.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import propagation, rounding
from lipjax.bounds.propagation import Bounds
from lipjax.networks.graph import Block, Network
from lipjax.networks.layers import Affine, Dense
from lipjax.networks.regions import (
    Region,
    l2_ball,
)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Exact arithmetic: nothing is rounded. Level ``"estimate"`` passes for it."""

    def outputs(self, layer: Affine, before: Region, entering: Region) -> tuple[Region, Array]:
        """The region before an activation, and how far each entry may be off ``W a + b`` of the same input a."""
        return before, jnp.zeros_like(before.center)

    def ball(self, layer: Affine, entering: Region, rows: Array, radius: Array) -> Array:
        """The radius over some rows, from that of exact arithmetic."""
        return radius

    def after(self, region: Region) -> Region:
        """The region after an activation."""
        return region

    def sum(self, joined: Region, kept: Region) -> tuple[Region, Array]:
        """The region of x + f(x), and how far each entry may be off the sum; ``kept`` is the region of x."""
        return joined, jnp.zeros_like(joined.center)

    def logits(self, head: Dense, features: Region) -> tuple[Region, Array]:
        """The region of the features, and how far each logit may be off (classes,)."""
        return features, jnp.zeros(head.out_shape, features.center.dtype)


@dataclasses.dataclass(frozen=True)
class Float32Inference(Arithmetic):
    """A float32 network, bounded in float64, and exact arithmetic with it: see :mod:`lipjax.bounds.rounding`."""

    def outputs(self, layer: Affine, before: Region, entering: Region) -> tuple[Region, Array]:
        widened = rounding.widen(before, layer, entering)
        fits = rounding.without_overflow(widened, rounding.magnitude(layer, entering))
        return fits, rounding.output_errors(layer, entering) + rounding.adjoint_errors(layer, entering)

    def ball(self, layer: Affine, entering: Region, rows: Array, radius: Array) -> Array:
        return rounding.UP * (radius + rounding.error_norm(layer, entering, rows))

    def after(self, region: Region) -> Region:
        return dataclasses.replace(region, radius=rounding.UP * region.ball)

    def sum(self, joined: Region, kept: Region) -> tuple[Region, Array]:
        slack = rounding.sum_errors(joined, kept)
        widened = rounding.widen_sum(joined, slack)
        return rounding.without_overflow(widened, jnp.abs(jnp.stack(widened.box))), slack

    def logits(self, head: Dense, features: Region) -> tuple[Region, Array]:
        fits = rounding.without_overflow(features, rounding.magnitude(head, features))
        return fits, rounding.logit_errors(head, features)


EXACT, FLOAT32 = Arithmetic(), Float32Inference()
# How a pass gets its norms: place, layer, rows and columns that matter (B, ...) to upper bounds (B,), on the host.
Solve = Callable[[int, Affine, Array, Array], np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Enclosure:
    """What one pass finds out about a batch; every array has a leading axis (B,).

    Attributes:
        bounds: the regions, with what is rounded.
        layers: per block, how far each pre-activation may be off, and the dual's products with it.
        sums: per skip connection, in the order of the pass, how far each entry may be off.
        logits: how far each logit may be off (B, classes).
    """

    bounds: Bounds
    layers: tuple[Array, ...]
    sums: tuple[Array, ...]
    logits: Array


def enclose(
    network: Network, region: Region, solve: Solve, arithmetic: Arithmetic, rows: tuple[Array, ...] | None = None
) -> Enclosure:
    """Carry a batch of regions through a network.

    Args:
        network: the classifier, of the type that the pass computes in.
        region: of the inputs (B, ...); see :func:`enter`.
        solve: gives the norms of the masked layers.
        arithmetic: :data:`EXACT` or :data:`FLOAT32`.
        rows: the rows of each block that matter (B, ...), as an earlier pass has found them. A norm is one of the very
            rows that it was computed for; which rows matter is only repeated up to rounding.
    """
    preactivations, live, sigmas, layers, sums = [], [], [], [], []

    def block(place: int, step: Block, region: Region) -> Region:
        before, entering, slack = _before(step, region, arithmetic)
        if rows is not None:
            before = dataclasses.replace(before, live=rows[place])
        sigma = jnp.asarray(solve(place, step.affine, before.live, entering.live), before.center.dtype)
        before, after = _after(step, before, entering, sigma, arithmetic)
        preactivations.append(before)
        live.append(after.live)
        sigmas.append(sigma)
        layers.append(slack)
        return after

    def join(kept: Region, region: Region) -> Region:
        joined, slack = _join(kept, region, arithmetic)
        sums.append(slack)
        return joined

    features, logits = _features(network.head, network.walk(region, block, join), arithmetic)
    count, dtype = len(logits), region.center.dtype
    stacked = jnp.stack(sigmas, axis=1) if sigmas else jnp.ones((count, 0), dtype)
    lipschitz = jnp.broadcast_to(jnp.asarray(network.lipschitz(sigmas), dtype), (count,))
    found = Bounds(region, features, tuple(preactivations), tuple(live), stacked, lipschitz, (None,) * len(live))
    return Enclosure(found, tuple(layers), tuple(sums), logits)


@functools.partial(jax.jit, static_argnames="domain")
def enter(x: Array, eps: Array, domain: str) -> Region:
    """The regions of inputs (B, ...) for radii (B,)."""
    return jax.vmap(lambda x, eps: l2_ball(x, eps, domain))(x, eps)


@functools.partial(jax.jit, static_argnames="arithmetic")
def _before(block: Block, region: Region, arithmetic: Arithmetic) -> tuple[Region, Region, Array]:
    """The regions before the activation, without their balls, those that enter the layer, and what may be off."""

    def one(region: Region) -> tuple[Region, Region, Array]:
        entering = region.reshape(block.affine.in_shape)
        before, slack = arithmetic.outputs(block.affine, propagation.preactivation(block.affine, entering), entering)
        return dataclasses.replace(before, live=propagation.live_rows(block.activation, before)), entering, slack

    return jax.vmap(one)(region)


@functools.partial(jax.jit, static_argnames="arithmetic")
def _after(
    block: Block, before: Region, entering: Region, sigma: Array, arithmetic: Arithmetic
) -> tuple[Region, Region]:
    """The regions before the activation, with their balls, and those after it."""

    def one(before: Region, entering: Region, sigma: Array) -> tuple[Region, Region]:
        radius = arithmetic.ball(block.affine, entering, before.live, entering.ball * sigma)
        before = dataclasses.replace(before, radius=radius)
        return before, arithmetic.after(propagation.activate(block.activation, before))

    return jax.vmap(one)(before, entering, sigma)


@functools.partial(jax.jit, static_argnames="arithmetic")
def _join(kept: Region, region: Region, arithmetic: Arithmetic) -> tuple[Region, Array]:
    return jax.vmap(lambda kept, region: arithmetic.sum(propagation.join(kept, region), kept))(kept, region)


@functools.partial(jax.jit, static_argnames="arithmetic")
def _features(head: Dense, region: Region, arithmetic: Arithmetic) -> tuple[Region, Array]:
    return jax.vmap(lambda region: arithmetic.logits(head, region.reshape(head.in_shape)))(region)

"""Arithmetics: which computations a region holds, the only difference between an estimate and a proof.

In exact arithmetic nothing is rounded. A proof is about a network in float32, and is itself computed in float64: what
both may round widens each box and is added to each radius; see :mod:`lipjax.bounds.rounding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from lipjax.bounds import rounding
from lipjax.floating_point import SMALLEST64, UNIT64
from lipjax.networks import masks
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import length
from lipjax.networks.regions import Preactivation, Region


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Exact arithmetic. Every method sees one example."""

    def outputs(self, layer: Affine, before: Preactivation, entering: Region) -> tuple[Preactivation, Array]:
        """The box behind a layer, and how far each entry may be off ``W a + b`` of the same input a."""
        return before, jnp.zeros_like(before.center)

    def ball(self, layer: Affine, entering: Region, rows: Array, radius: Array) -> Array:
        """The radius over some rows, from that of exact arithmetic."""
        return radius

    def moved(self, region: Region) -> Region:
        """A region whose radius was computed from others."""
        return region

    def weights(self, rows: Array) -> Array:
        """The weights of rows that norms are asked for, not less than they are."""
        return rows

    def activated(self, activation: Activation, before: Preactivation, after: Region) -> tuple[Region, Array | None]:
        """The region behind an activation, and how far each output may be off; None where it rounds nothing."""
        return after, None

    def sum(self, joined: Region, first: Region, second: Region) -> tuple[Region, Array]:
        """The region of a sum, and how far each entry may be off it."""
        return joined, jnp.zeros_like(joined.center)

    def constant(self, network: Network, sigmas: Sequence[Array] | Array) -> Array:
        """The constant of the feature map from the norms of its layers; see :meth:`lipjax.Network.lipschitz`."""
        return network.lipschitz(sigmas)

    def logits(self, head: Affine, features: Region) -> tuple[Region, Array]:
        """The region of the features, and how far each logit may be off (classes,)."""
        return features, jnp.zeros(head.out_shape, features.center.dtype).ravel()


@dataclasses.dataclass(frozen=True)
class Float32Inference(Arithmetic):
    """A float32 network, bounded in float64, and exact arithmetic with it."""

    def outputs(self, layer: Affine, before: Preactivation, entering: Region) -> tuple[Preactivation, Array]:
        widened = rounding.widen(before, layer, entering)
        fits = rounding.without_overflow(widened, rounding.partial_sums(layer, entering))
        return fits, rounding.output_errors(layer, entering) + rounding.adjoint_errors(layer, entering)

    def ball(self, layer: Affine, entering: Region, rows: Array, radius: Array) -> Array:
        return rounding.UP * (radius + rounding.error_norm(layer, entering, rows))

    def moved(self, region: Region) -> Region:
        return dataclasses.replace(region, radius=rounding.UP * region.ball)

    def weights(self, rows: Array) -> Array:
        return masks.rounded_up(rows)

    def activated(self, activation: Activation, before: Preactivation, after: Region) -> tuple[Region, Array | None]:
        errors = activation.errors(before)
        if errors is None:
            return after, None
        errors = jnp.broadcast_to(errors, after.center.shape)
        together, errors = rounding.MORE * activation.error_norm(before, errors), rounding.MORE * errors
        widened = rounding.widen_by(after, errors, together)
        widened = rounding.without_overflow(widened, activation.partial(*before.box))
        return rounding.without_overflow(widened, jnp.abs(jnp.stack(widened.box))), errors

    def sum(self, joined: Region, first: Region, second: Region) -> tuple[Region, Array]:
        slack = rounding.sum_errors(joined, first, second)
        widened = rounding.widen_by(joined, slack, length(slack))
        return rounding.without_overflow(widened, jnp.abs(jnp.stack(widened.box))), slack

    def constant(self, network: Network, sigmas: Sequence[Array] | Array) -> Array:
        value = network.lipschitz(sigmas) * (1 + 2 * network.constant_operations * UNIT64)
        # A product of small norms leaves float64, but is not zero, unless one on each way is.
        varies = network.lipschitz([jnp.where(sigma == 0, jnp.zeros_like(sigma), 1) for sigma in sigmas]) > 0
        return jnp.where(varies & (value < SMALLEST64), SMALLEST64, value)

    def logits(self, head: Affine, features: Region) -> tuple[Region, Array]:
        fits = rounding.without_overflow(features, rounding.partial_sums(head, features))
        return fits, rounding.logit_errors(head, features).ravel()


EXACT, FLOAT32 = Arithmetic(), Float32Inference()

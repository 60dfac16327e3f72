"""The rule: slopes of the dual from two trained numbers per neuron, so that training keeps nothing per example.

Predictor and verifier are trained together, as in Dvijotham et al. ("Training verified learners with learned
verifiers", 2018), with the slopes ``sigmoid(offset + 4 sharpness phase)`` as the verifier.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.activations import Activation
from lipjax.bounds import Bounds
from lipjax.dual import best_weight, boxed, pull, value
from lipjax.networks import Network
from lipjax.regions import Region

OFFSET, SHARPNESS = -1.0, 1.0  # before training


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """Two numbers for each neuron, one array per block, shaped like its pre-activations.

    Attributes:
        offset: at a phase of 0.
        sharpness: how fast the slope goes from 0 to 1 with the phase.
    """

    offset: tuple[Array, ...]
    sharpness: tuple[Array, ...]

    def slopes(self, network: Network, bounds: Bounds) -> tuple[Array, ...]:
        """Slopes (k, *shape of the pre-activations) of each block, for one example; see :mod:`lipjax.ascent`.

        The phases carry no gradient.
        """
        slopes = []
        for block, before, offset, sharpness in zip(
            network.blocks, bounds.preactivations, self.offset, self.sharpness, strict=True
        ):
            phase = lax.stop_gradient(block.activation.phase(boxed(before)))
            slopes.append(jax.nn.sigmoid(offset[None] + 4 * sharpness[None] * phase))
        return tuple(slopes)

    def margins(self, network: Network, bounds: Bounds, label: Array, rivals: Array, num_steps: int) -> Array:
        """Dual margins against some rivals (R,), for one example, with the weights searched in so many steps.

        Differentiable in the rule and in the network; the weights carry no gradient (envelope theorem).

        Soundness:
            Lower bounds, if the bounds are; up to rounding.
        """
        slopes = self.slopes(network, bounds)

        def choose(place: int, activation: Activation, c: Array, region: Region) -> tuple[Array, Array]:
            g = jnp.sum(slopes[place] * activation.feeding(c), axis=0)
            masked = jnp.where(region.live, g, 0)
            return masked, best_weight(activation, c, masked, region, num_steps)

        return jax.vmap(lambda rival: value(network, bounds, pull(network, bounds, label, rival, choose)))(rivals)


def initial_rule(network: Network) -> Rule:
    """The rule before training."""
    shapes = [block.affine.out_shape for block in network.blocks]
    values = (tuple(jnp.full(shape, value, jnp.float32) for shape in shapes) for value in (OFFSET, SHARPNESS))
    return Rule(*values)

"""The rule: multipliers of the dual from a few trained numbers, so that training keeps nothing per example.

Predictor and verifier are trained together, as in Dvijotham et al. ("Training verified learners with learned
verifiers", 2018). The verifier is two numbers per neuron, for the slopes ``sigmoid(offset + 4 sharpness phase)``, and
one per activation, for the weight of its ball.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.bounds import ascent
from lipjax.bounds.dual import boxed, pull, value
from lipjax.bounds.propagation import Bounds
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Network
from lipjax.networks.regions import Preactivation

OFFSET, SHARPNESS = -1.0, 1.0  # before training


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """Two numbers for each neuron, in arrays shaped like what comes before each activation, and one for each of those.

    Attributes:
        offset: at a phase of 0.
        sharpness: how fast the slope goes from 0 to 1 with the phase.
        log_weights: logarithms of mu r / ||c|| (activations,), as of :class:`lipjax.bounds.ascent.AscentState`.
    """

    offset: tuple[Array, ...]
    sharpness: tuple[Array, ...]
    log_weights: Array

    def slopes(self, network: Network, bounds: Bounds) -> tuple[Array, ...]:
        """Slopes (k, *shape of the pre-activations) of each activation, of one example; see ``lipjax.bounds.ascent``.

        The phases carry no gradient.
        """
        slopes = []
        for activation, before, offset, sharpness in zip(
            network.activations, bounds.before, self.offset, self.sharpness, strict=True
        ):
            phase = lax.stop_gradient(activation.phase(boxed(before)))
            slopes.append(jax.nn.sigmoid(offset[None] + 4 * sharpness[None] * phase))
        return tuple(slopes)

    def margins(self, network: Network, bounds: Bounds, label: Array, rivals: Array) -> Array:
        """Dual margins against some rivals (R,), for one example.

        Differentiable in the rule and in the network, except that the boxes carry no gradient: it would make steps
        longer, and certifies no more (``results/dual``).

        Soundness:
            Lower bounds, if the bounds are; up to rounding.
        """
        bounds = dataclasses.replace(bounds, before=tuple(map(_fixed_box, bounds.before)))
        choose = ascent.free(self.slopes(network, bounds), self.log_weights)
        return jax.vmap(lambda rival: value(network, bounds, pull(network, bounds, label, rival, choose)))(rivals)


def initial_rule(network: Network) -> Rule:
    """The rule before training."""
    shapes = [node.arranged[0] for node in network.nodes if isinstance(node.operation, Activation)]
    values = (tuple(jnp.full(shape, value, jnp.float32) for shape in shapes) for value in (OFFSET, SHARPNESS))
    return Rule(*values, jnp.zeros(len(shapes), jnp.float32))


def _fixed_box(before: Preactivation) -> Preactivation:
    """The same, with a box that carries no gradient."""
    return dataclasses.replace(before, lower=lax.stop_gradient(before.lower), upper=lax.stop_gradient(before.upper))

"""Certificates: which predictions no perturbation of l2 norm below eps can change, as far as the norms are bounds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lipjax import margins
from lipjax.bounds import Bounds, Estimate, Norm, check_batch, propagate
from lipjax.networks import Network
from lipjax.regions import all_finite, l2_ball


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is known about each example of a batch.

    Attributes:
        prediction: class of the largest logit (B,).
        worst_margin: least logits[label] - logits[rival] over the rivals and over the eps-ball (B,).
        lipschitz: Lipschitz constant of the feature map on the eps-ball (B,).
        certified: the prediction is the label, and no perturbation below eps changes it (B,).
        level: what the norms behind it are worth: with ``"estimate"`` it is no proof.
    """

    prediction: Array
    worst_margin: Array
    lipschitz: Array
    certified: Array
    level: str = dataclasses.field(metadata={"static": True})


def certify(network: Network, x: Array, label: Array, eps: Array | float, norm: Norm | None = None) -> Certificate:
    """Bound the worst-case margins of a batch on its eps-balls.

    Args:
        network: the classifier.
        x: inputs (B, ...) in [0, 1] pixels.
        label: integers (B,).
        eps: l2 radius, in pixels.
        norm: gives the spectral norms; default :class:`lipjax.bounds.Estimate` with key 0.

    Returns:
        A certificate for each example. A tie, a wrong prediction and a NaN or infinity on the way are not certified.

    Soundness:
        As good as the norms, see ``level``; with :class:`lipjax.bounds.Estimate` the margins are estimates. Rounding
        of the float32 pass is not accounted for.

    Raises:
        ValueError: x is not a batch of inputs of the network, or the labels do not fit it.
    """
    check_batch(network, x)
    if jnp.shape(label) != jnp.shape(x)[:1] or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
        raise ValueError(
            f"label has shape {jnp.shape(label)} and type {jnp.result_type(label)}; expected {x.shape[0]} integers"
        )
    norm = Estimate(jax.random.key(0)) if norm is None else norm

    def one(x: Array, label: Array) -> Certificate:
        return certificate(network, propagate(network, l2_ball(x, eps), norm), label, norm.level)

    return jax.vmap(one)(x, label)


def certificate(network: Network, bounds: Bounds, label: Array, level: str) -> Certificate:
    """The certificate of one example from the bounds of its eps-ball; see :func:`certify`."""
    logits = network.head(bounds.features.center)
    worst = margins.worst_margin(margins.box_and_ball(network.head, bounds.features, label), label)
    prediction = jnp.argmax(logits)
    finite = bounds.features.finite & all_finite(logits, worst, bounds.lipschitz)
    # A tie has margin 0 and a NaN compares false, so neither is certified.
    certified = finite & (prediction == label) & (worst > 0)
    return Certificate(prediction, worst, bounds.lipschitz, certified, level)

"""Certificates: which predictions no perturbation of l2 norm below eps can change, from bounds of the features."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lipjax import margins
from lipjax.networks import Network
from lipjax.regions import Region, all_finite


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


def certificate(
    network: Network, features: Region, lipschitz: Array, label: Array, level: str, errors: Array | float = 0.0
) -> Certificate:
    """The certificate of one example from the region of its features.

    Args:
        network: the classifier.
        features: where the features of the eps-ball lie.
        lipschitz: constant of the feature map on the ball.
        label: integer scalar.
        level: what the norms are worth.
        errors: how far each logit may be off in the inference that the certificate is about, scalar or (classes,).
    """
    logits = network.head(features.center)
    wide = jnp.broadcast_to(errors, logits.shape)
    all_margins = margins.box_and_ball(network.head, features, label) - (wide + wide[label])
    worst = margins.worst_margin(all_margins, label)
    prediction = jnp.argmax(logits)
    finite = features.finite & all_finite(logits, worst, lipschitz)
    # A tie has margin 0 and a NaN compares false, so neither is certified.
    certified = finite & (prediction == label) & (worst > 0)
    return Certificate(prediction, worst, lipschitz, certified, level)

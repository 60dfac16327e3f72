"""Certificates: which predictions no perturbation of l2 norm below eps can change, from bounds of the features."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.bounds import margins
from lipjax.bounds.propagation import Bounds
from lipjax.networks.graph import Network
from lipjax.networks.regions import all_finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is known about each example of a batch.

    Attributes:
        prediction: class of the largest logit (B,).
        worst_margin: a lower bound of the least logits[label] - logits[rival] over the rivals and over the eps-ball
            (B,), the best that was found. Where it is not above 0 it may be far below what the dual could prove: rivals
            that no longer decide are not asked.
        lipschitz: Lipschitz constant of the feature map on the eps-ball (B,), the smallest that was computed: the
            global one where that was enough.
        certified: the prediction is the label, and no perturbation below eps changes it (B,).
        level: what the norms behind it are worth: with ``"estimate"`` it is no proof.
        domain: which inputs it is about: ``"ball"``, the whole l2 ball, or ``"pixels"``, what of it lies in [0, 1].
    """

    prediction: Array
    worst_margin: Array
    lipschitz: Array
    certified: Array
    level: str = dataclasses.field(metadata={"static": True})
    domain: str = dataclasses.field(default="ball", metadata={"static": True})


def certificate(network: Network, bounds: Bounds, all_margins: Array, label: Array, level: str) -> Certificate:
    """The certificate of one example.

    Args:
        network: the classifier.
        bounds: of the eps-ball.
        all_margins: lower bounds of the margins (classes,) for the inference that the certificate is about.
        label: integer scalar.
        level: what the norms are worth.
    """
    logits = network.head(bounds.features.center).ravel()
    worst = margins.worst_margin(all_margins, label)
    prediction = jnp.argmax(logits)
    finite = bounds.features.finite & all_finite(logits, worst, bounds.lipschitz)
    # A tie has margin 0 and a NaN compares false, so neither is certified.
    certified = finite & (prediction == jnp.asarray(label, prediction.dtype)) & (worst > 0)
    return Certificate(prediction, worst, bounds.lipschitz, certified, level, bounds.input.domain)

"""Losses of certified training, per example and unreduced: of logits. Those of a whole pass: ``worst_case``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lipjax.bounds.margins import own_class
from lipjax.floating_point import highest
from lipjax.networks.activations import Activation
from lipjax.networks.regions import Preactivation


def cross_entropy(logits: Array, label: Array) -> Array:
    """``-log softmax(logits)[label]``: the clean loss on clean logits, the worst-case loss on worst logits.

    Args:
        logits: (..., classes).
        label: integers (...).

    Returns:
        Shape (...), natural logarithm.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def gloro(logits: Array, worst: Array, label: Array) -> Array:
    """Cross entropy of the clean logits with one more class, "not certifiable": the largest worst logit of a rival.

    Args:
        logits: clean logits (..., classes).
        worst: worst logits (..., classes), see :func:`lipjax.worst_logits`.
        label: integers (...).

    Returns:
        Shape (...). Below log 2 only where the example is certified.

    Reference:
        [H21] section 4 (Local-Lip-G). [GloRo] section 3 takes the rivals of the predicted class where this takes those
        of the label, as the worst logits of [H21] do; the two are the same wherever the prediction is right.
    """
    bottom = highest(jnp.where(own_class(worst, label), -jnp.inf, worst), axis=-1)
    return cross_entropy(jnp.concatenate([logits, bottom[..., None]], axis=-1), label)


def mixed(clean: Array, worst: Array, kappa: Array | float) -> Array:
    """``kappa clean + (1 - kappa) worst`` ([H21] Eq 25; the paper's lambda is 1 - kappa)."""
    return kappa * clean + (1 - kappa) * worst


def divergence(logits: Array, other: Array) -> Array:
    """``KL(softmax(logits) || softmax(other))``, natural logarithm.

    Args:
        logits: (..., classes).
        other: (..., classes).

    Returns:
        Shape (...).
    """
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(other), jax.nn.log_softmax(logits))


def trades(clean: Array, attacked: Array, label: Array, beta: float) -> Array:
    """``cross_entropy(clean) + beta KL(softmax(clean) || softmax(attacked))``.

    Args:
        clean: logits (..., classes).
        attacked: logits (..., classes) of perturbed inputs.
        label: integers (...).
        beta: weight of the second term.

    Returns:
        Shape (...).

    Reference:
        Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, ICML 2019, Eq 5.
    """
    return cross_entropy(clean, label) + beta * divergence(clean, attacked)


def sparsity(activation: Activation, before: Preactivation, weight_theta: Array | float) -> Array:
    """How far the outputs of an activation are from being constant on the region, on average ([H21] Eq 12 and 26).

    Args:
        activation: with its own :meth:`~lipjax.networks.activations.Activation.sparsity`.
        before: what is known before it, with a box.
        weight_theta: weight of the terms about upper clips.

    Returns:
        Scalar; sum it over activations.
    """
    return activation.sparsity(*before.box, weight_theta)

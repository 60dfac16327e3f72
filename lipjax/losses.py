"""Losses of certified training, per example and unreduced."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from lipjax.regions import Region


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
        logits: clean logits (classes,) of one example.
        worst: worst logits (classes,), see :func:`lipjax.margins.worst_logits`.
        label: integer scalar.

    Returns:
        Scalar. Below log 2 only where the example is certified.

    Reference:
        [GloRo] section 3; [H21] section 4 (Local-Lip-G).
    """
    rivals = jnp.arange(logits.shape[0]) != label
    bottom = jnp.max(jnp.where(rivals, worst, -jnp.inf))
    return cross_entropy(jnp.append(logits, bottom), label)


def mixed(clean: Array, worst: Array, kappa: Array | float) -> Array:
    """``kappa clean + (1 - kappa) worst`` ([H21] Eq 25; the paper's lambda is 1 - kappa)."""
    return kappa * clean + (1 - kappa) * worst


def sparsity(preactivation: Region, theta: Array, weight_theta: Array | float) -> Array:
    """``mean max(0, upper) + weight_theta max(0, theta - lower)`` over the neurons of one layer ([H21] Eq 12).

    It pushes neurons towards being constant on the region: below zero or above theta everywhere.

    Args:
        preactivation: the region before a clipped ReLU, with its box.
        theta: its clips.
        weight_theta: weight of the second term.

    Returns:
        Scalar; sum it over layers.
    """
    lower, upper = preactivation.box
    return jnp.mean(jnp.maximum(upper, 0) + weight_theta * jnp.maximum(theta - lower, 0))

"""CROWN and what came of it, as special cases of the dual: slopes by a rule, and without balls behind the input.

The minimum of a unit over its box, at a slope times its coefficient, is the intercept of the linear relaxation with
that slope: so the dual with mu = 0 and CROWN's slopes is CROWN, with ascent of the slopes alpha-CROWN, and with balls
in place of boxes SDP-CROWN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.bounds import margins
from lipjax.bounds.ascent import ascend, crown, with_best_weights
from lipjax.bounds.dual import Multipliers, boxed, pull, value
from lipjax.bounds.propagation import Bounds
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.regions import Preactivation


def no_norms(place: int, layer: Affine, rows: Array, columns: Array) -> tuple[None, Any]:
    """The ``ask`` of a pass whose balls end behind the first layer: interval bounds of an l2 ball of inputs."""
    return None, None


def crown_margins(network: Network, bounds: Bounds, label: Array) -> Array:
    """Margins of a batch by CROWN (B, classes), 0 for the label itself.

    Args:
        network: the classifier.
        bounds: of the batch, with boxes, from any pass; balls behind the input are not used.
        label: integers (B,).

    Returns:
        Differentiable in the network, the slopes included.

    Soundness:
        Lower bounds, if the boxes are; up to rounding.

    Reference:
        Zhang, Weng, Chen, Hsieh, Daniel, NeurIPS 2018; its slopes: ``lipjax.bounds.ascent.crown``.
    """
    return jax.vmap(lambda bounds, label: margins_of_one(network, bounds, label))(bounds, label)


def margins_of_one(network: Network, bounds: Bounds, label: Array) -> Array:
    """:func:`crown_margins` (classes,) of one example."""
    return _of_all(network, bounds, label, crown)


def sdp_crown_margins(network: Network, bounds: Bounds, label: Array) -> Array:
    """Margins of a batch by SDP-CROWN (B, classes): CROWN's slopes, the ball of each layer, and no box.

    Args:
        network: the classifier.
        bounds: of the batch, with balls; boxes give the slopes alone.
        label: integers (B,).

    Returns:
        As of :func:`crown_margins`.

    Soundness:
        Lower bounds, if the balls are; up to rounding.

    Reference:
        Chiu, Chen, Zhang, Zhang, ICML 2025, Theorem 4.1, with the slopes of CROWN (theirs are optimised).
    """
    slopes = bounds.before
    without = dataclasses.replace(bounds, before=tuple(map(_without_box, bounds.before)))

    def one(bounds: Bounds, slopes: tuple[Preactivation, ...], label: Array) -> Array:
        def of_boxes(place: int, activation: Activation, c: Array, before: Preactivation) -> tuple[Array, Array]:
            return crown(place, activation, c, boxed(slopes[place]))

        return _of_all(network, bounds, label, with_best_weights(of_boxes))

    return jax.vmap(one)(without, slopes, label)


def alpha_crown_margins(network: Network, bounds: Bounds, label: Array, num_steps: int = 60) -> Array:
    """Margins of a batch by alpha-CROWN (B, classes): slopes ascended for each rival, without balls behind the input.

    Args:
        network: the classifier.
        bounds: of the batch, with boxes, which stay as they are.
        label: integers (B,).
        num_steps: of ascent.

    Returns:
        Margins of all rivals, no worse than those of CROWN and of the boxes, 0 for the label itself.

    Soundness:
        Lower bounds, if the boxes are; up to rounding.

    Reference:
        Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh, ICLR 2021; slopes are not confined to [0, 1].
    """
    features = dataclasses.replace(bounds.features, radius=None)
    without = dataclasses.replace(bounds, features=features, before=tuple(map(_without_ball, bounds.before)))
    classes = jnp.arange(network.num_classes)

    def begin(bounds: Bounds, label: Array) -> tuple[Array, Multipliers]:
        def against(rival: Array) -> tuple[Array, Multipliers]:
            trace = pull(network, bounds, label, rival, crown)
            return value(network, bounds, trace), Multipliers(trace.g, trace.weight)

        return jax.vmap(against)(classes)

    before, start = jax.vmap(begin)(without, label)
    rivals = jnp.broadcast_to(classes[None], before.shape)
    found, _ = ascend(network, without, label, start, rivals=rivals, num_steps=num_steps)
    return jnp.where(margins.own_class(found, label), 0, jnp.maximum(found, before))


def _of_all(network: Network, bounds: Bounds, label: Array, choose: Any) -> Array:
    """Margins against all classes, for one example."""
    classes = jnp.arange(network.num_classes)
    found = jax.vmap(lambda rival: value(network, bounds, pull(network, bounds, label, rival, choose)))(classes)
    return jnp.where(classes == jnp.asarray(label, int), 0, found)


def _without_ball(before: Preactivation) -> Preactivation:
    return dataclasses.replace(before, radius=None)


def _without_box(before: Preactivation) -> Preactivation:
    return dataclasses.replace(before, lower=None, upper=None)

"""Rounding: what finite precision may add to a bound, so that a certificate holds for the computed network as well.

A certificate is about three computations at once: in exact arithmetic, in the float32 of the network that is used, and
in the float64 of the certification pass, whose result at the input is the center. A region contains the activations of
all three, anywhere in the ball: what an affine layer may round widens its box and adds to the radius behind it. So a
neuron is dead only if none of them can revive it, the dead coordinates of all three are equal, and what was rounded
before a layer grows by the norm of the MASKED layer, like the perturbation itself.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import SMALLEST32, SMALLEST64, UNIT32, UNIT64, gamma
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import length
from lipjax.networks.masks import weighted
from lipjax.networks.regions import Preactivation, Region

Same = TypeVar("Same", Region, Preactivation)

MORE = 1 + 1e-3  # leaves room for the same errors in float64, which are smaller by 2^-29
UP = 1 + 2.0**-40  # what a few operations of float64 may round down
LARGEST32 = 2.0**126  # a fourth of the largest float32 number


def check_range(network: Network) -> None:
    """Raises ValueError unless all parameters are zero, not finite, or of a magnitude whose products float64 holds."""
    for leaf in jax.tree.leaves(network):
        sizes = np.abs(np.asarray(leaf, np.float64))
        odd = sizes[(sizes > 0) & np.isfinite(sizes) & ((sizes < 1e-60) | (sizes > 1e60))]
        if odd.size:
            raise ValueError(
                f"a parameter of the network is {odd[0]:g}; expected magnitudes from 1e-60 to 1e60, or zero: products "
                "of others leave float64; rescale the layers"
            )


def widen(before: Preactivation, layer: Affine, entering: Region) -> Preactivation:
    """What is known behind a layer, its box widened by what may be rounded there.

    In float32, by :func:`output_errors`. In this pass a bound is that of the box, |W mid + b| + |W| half, or that
    of the ball, |W center + b| + radius ||row||: sums of ``layer.terms`` products and a few operations. The terms
    of the first sum up to at most 2 (|W| A + |b|) with A the largest magnitudes that enter; those of the second to
    at most 3 of it where it is the tighter one, because there radius ||row|| is no more than the width of the box. A
    row that is computed may have cancelled: it is off by a share of its magnitude.
    """
    lower, upper = before.box
    of_rows = 0 if entering.radius is None else entering.radius * layer.magnitude_row_norms(entering.live)
    own = gamma(layer.terms + 8, UNIT64) * (4 * magnitude(layer, entering) + of_rows) + SMALLEST64
    transformed = layer.transform_error(UNIT64)
    if transformed is not None:  # the center and the middle of the box
        own = own + 2 * MORE * transformed * length(_largest(entering))
    slack = output_errors(layer, entering) + own
    return dataclasses.replace(before, lower=lower - slack, upper=upper + slack)


def magnitude(layer: Affine, entering: Region) -> Array:
    """``|W| A + |b|``: no output of the layer, nor any partial sum of it, is larger over the region."""
    return layer.absolute(_largest(entering)) + jnp.abs(layer.shift)


def partial_sums(layer: Affine, entering: Region) -> Array:
    """Nothing that is computed on the way to an output is larger over the region."""
    return layer.partial(_largest(entering)) + jnp.abs(layer.shift)


def _largest(region: Region) -> Array:
    lower, upper = region.box
    return jnp.maximum(jnp.abs(lower), jnp.abs(upper))


def output_errors(layer: Affine, entering: Region) -> Array:
    """How far each float32 output of a layer may be from the exact one for the same float32 input (out_shape).

    Reference:
        Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    if layer.transform_error(UNIT32) is not None:
        return _transformed(layer, entering, UNIT32) + MORE * UNIT32 * jnp.abs(layer.shift) + _flushed(layer, entering)
    # |W| |a| + |b| over the box, or over the ball, whichever is smaller.
    around = _around(layer, entering) + layer.magnitude_row_norms(entering.live) * entering.ball
    return _relative(layer) * jnp.minimum(magnitude(layer, entering), around) + _flushed(layer, entering)


def adjoint_errors(layer: Affine, entering: Region, unit: float = UNIT64) -> Array:
    """What the dual's products with a layer may round, for each unit of its multipliers (out_shape).

    ``W^T g`` and ``<g, b>`` are off by at most gamma ``|W|^T |g|`` and gamma ``<|g|, |b|>``: by ``<|g|, gamma (|W| A +
    |b|)>`` together, whatever activation of at most A meets the first.

    Args:
        layer: the affine layer.
        entering: the region before it.
        unit: unit roundoff of the evaluation.
    """
    terms = max(layer.terms, layer.adjoint_terms)
    if layer.transform_error(unit) is not None:
        return _transformed(layer, entering, unit) + 2 * gamma(terms, unit) * jnp.abs(layer.shift)
    return 2 * gamma(terms, unit) * magnitude(layer, entering)


def error_norm(layer: Affine, entering: Region, rows: Array) -> Array:
    """:func:`output_errors` of all outputs that matter, as an l2 norm: what the layer adds to the radius after it.

    Args:
        layer: the affine layer; activations after it are exact.
        entering: the region before it.
        rows: which outputs matter, boolean, or their weights, at most 1 (out_shape).
    """
    each, tiny = (length(weighted(rows, some(layer, entering))) for some in (output_errors, _flushed))
    if layer.transform_error(UNIT32) is not None:
        of_shift = MORE * UNIT32 * length(weighted(rows, jnp.broadcast_to(jnp.abs(layer.shift), layer.out_shape)))
        return jnp.minimum(each, _transformed(layer, entering, UNIT32) + of_shift + tiny)
    around = length(weighted(rows, _around(layer, entering))) + layer.absolute_norm() * entering.ball
    return jnp.minimum(each, _relative(layer) * around + tiny)


def _transformed(layer: Affine, entering: Region, unit: float) -> Array:
    """What a layer that is computed by transforms may be off in the l2 norm, so also in each entry, without its bias.

    With the addition of the bias, which rounds relative to the sum.
    """
    relative = layer.transform_error(unit)
    assert relative is not None
    size = jnp.minimum(length(_largest(entering)), length(entering.center) + entering.ball)
    norm = layer.absolute_norm() * unit  # of what the bias is added to
    return MORE * (relative + norm) * size


def _around(layer: Affine, entering: Region) -> Array:
    """``|W| |center| + |b|``."""
    return layer.absolute(jnp.abs(entering.center)) + jnp.abs(layer.shift)


def _flushed(layer: Affine, entering: Region) -> Array:
    """What is lost per output where numbers below the smallest normal one count as zero: products and their factors.

    The constant of a dead neuron may be such a factor too: it is the same in all computations until it is read here.
    Of a product and the addition behind it only one can lose as much: what is added to a flushed product is exact.
    """
    return SMALLEST32 * layer.flushed(_largest(entering))


def _relative(layer: Affine) -> float:
    """What float32 may be off, relative to |W| |a| + |b|, and float64 after it."""
    return MORE * gamma(layer.terms + 1, UNIT32)


def without_overflow(region: Same, largest: Array) -> Same:
    """The region, finite only where no float32 number that leads to it can overflow.

    Args:
        region: what is computed.
        largest: bounds of all exact partial sums, as of :func:`partial_sums`; in float32 they are at most twice that.
    """
    fits = jnp.all(largest < LARGEST32)  # false for NaN
    return dataclasses.replace(region, finite=region.finite & fits)


def sum_errors(joined: Region, *addends: Region) -> Array:
    """How far each float32 entry of a sum of two may be from the exact sum of the same two numbers.

    Args:
        joined: the region of the sum.
        *addends: the two regions; their boxes were cut to their balls in float64.
    """
    lower, upper = joined.box
    largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    cut = sum(jnp.abs(each.center) + jnp.where(each.live, each.ball, 0) for each in addends)
    slack = MORE * UNIT32 * largest + 8 * UNIT64 * cut  # the cut is center -+ ball: two operations
    return jnp.where(slack == 0, 0, slack + 2 * SMALLEST32)


def widen_by(region: Region, slack: Array, together: Array) -> Region:
    """The region behind a sum or an activation, box and ball widened by what is rounded.

    A constant is one in float32 and in exact arithmetic, but not the same: unless nothing is rounded, it counts as
    varying.

    Args:
        region: in exact arithmetic.
        slack: how far each entry may be off.
        together: how far all of them may be off in the l2 norm.
    """
    lower, upper = region.box
    radius = UP * (region.ball + together)
    live = region.live | ~(slack == 0)
    return dataclasses.replace(region, lower=lower - slack, upper=upper + slack, radius=radius, live=live)


def logit_errors(head: Affine, features: Region) -> Array:
    """How far each float32 logit may be from the exact one for the same float32 features (classes,).

    With room for the rounding of the margins, which are float64 and of the size of these sums or of the ball's part:
    up to 2^23 terms of 2^-53 each are 2^-30 of it.
    """
    ball = head.magnitude_row_norms(jnp.ones(head.in_shape, bool)) * features.ball
    return output_errors(head, features) + 2.0**-30 * ball

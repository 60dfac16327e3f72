"""Rounding: what finite precision may add to a bound, so that a certificate holds for the computed network as well.

The certification pass is float64 and widens its boxes by what float64 products may be off. The network that is used
computes in float32; :func:`inference_error` bounds how far its activations may be from the exact ones.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.layers import Affine, Dense
from lipjax.networks import Network
from lipjax.regions import Region
from lipjax.spectral import length

UNIT64, UNIT32 = 2.0**-53, 2.0**-24
WIDE_TO_NARROW = 2.0**-28  # a float64 error is smaller than a bound of the float32 error by more than this
SMALLEST64 = 2.0**-960  # far above what is flushed to zero in float64
LARGEST32 = 2.0**126  # a fourth of the largest float32 number
SMALLEST32 = 2.0**-126  # below it float32 results lose digits, or are flushed to zero


def gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of that many products, in any order, with or without fused multiply-add.

    Raises:
        ValueError: so many terms that nothing can be said.
    """
    if terms * unit >= 0.5:
        raise ValueError(f"{terms} terms are too many for a unit roundoff of {unit:g}")
    return terms * unit / (1 - terms * unit)


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


def widen(before: Region, layer: Affine, entering: Region, error: Array) -> Region:
    """The region before an activation, its box widened by what the float64 pass may have rounded.

    Mid points, half widths, centers and row norms are four sums of at most ``layer.terms + 1`` terms and a few
    operations each, all at most |W| A + |b| with A the largest magnitudes that enter. The center that enters is itself
    off by the rounding of the layers before, and the ball stands around the exact one: ``error`` bounds that of
    float32, and the same recursion holds for float64 with a unit roundoff that is 2^29 times smaller.
    """
    if before.lower is None or before.upper is None:
        return before
    inherited = WIDE_TO_NARROW * error * layer.row_norms(jnp.ones(layer.in_shape, bool))
    slack = 4 * gamma(layer.terms + 8, UNIT64) * magnitude(layer, entering) + inherited + SMALLEST64
    return dataclasses.replace(before, lower=before.lower - slack, upper=before.upper + slack)


def magnitude(layer: Affine, entering: Region) -> Array:
    """``|W| A + |b|``: no output of the layer, nor any partial sum of it, is larger over the region."""
    lower, upper = entering.box
    return layer.absolute(jnp.maximum(jnp.abs(lower), jnp.abs(upper))) + jnp.abs(layer.shift)


def inference_error(error: Array, layer: Affine, entering: Region, sigma: Array, absolute_norm: Array) -> Array:
    """How far float32 activations may be from the exact ones after a layer, as an l2 norm, anywhere in the region.

    Args:
        error: the same before the layer.
        layer: the affine layer; activations after it are 1-Lipschitz and exact.
        entering: the region before it.
        sigma: upper bound of ||W||, of the whole layer: rounding revives neurons that are dead in exact arithmetic.
        absolute_norm: upper bound of || |W| ||.

    Reference:
        Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    relative = gamma(layer.terms + 1, UNIT32)
    # || |W| |a| + |b| || over the box, or over the ball, whichever is smaller.
    around = layer.absolute(jnp.abs(entering.center)) + jnp.abs(layer.shift)
    size = jnp.minimum(length(magnitude(layer, entering)), length(around) + absolute_norm * entering.ball)
    own = relative * size + layer.terms * SMALLEST32 * math.sqrt(math.prod(layer.out_shape))
    return sigma * error + own + relative * absolute_norm * error


def without_overflow(region: Region, largest: Array, error: Array) -> Region:
    """The region, finite only where no float32 number that leads to it can overflow.

    Args:
        region: what is computed.
        largest: bounds of all exact partial sums, as of :func:`magnitude`.
        error: how far the float32 ones may be from them.
    """
    fits = jnp.max(largest) + jnp.max(error) < LARGEST32  # false for NaN
    return dataclasses.replace(region, finite=region.finite & fits)


def widen_sum(joined: Region, kept_error: Array) -> Region:
    """The region of a residual sum, its box widened by the rounding of one float64 addition and of the kept center."""
    if joined.lower is None or joined.upper is None:
        return joined
    largest = jnp.maximum(jnp.abs(joined.lower), jnp.abs(joined.upper)) + jnp.abs(joined.center)
    slack = 8 * UNIT64 * largest + WIDE_TO_NARROW * kept_error + SMALLEST64
    return dataclasses.replace(joined, lower=joined.lower - slack, upper=joined.upper + slack)


def sum_error(kept: Array, error: Array, joined: Region) -> Array:
    """How far a float32 sum x + f(x) may be from the exact one, given the same for x and for f(x)."""
    lower, upper = joined.box
    largest = length(jnp.maximum(jnp.abs(lower), jnp.abs(upper)))
    return (kept + error) * (1 + UNIT32) + UNIT32 * largest


def logit_errors(error: Array, head: Dense, features: Region) -> Array:
    """How far each float32 logit may be from the exact one over the region (classes,)."""
    relative = gamma(head.terms + 1, UNIT32)
    row_norms = head.row_norms(jnp.ones(head.in_shape, bool))
    around = head.absolute(jnp.abs(features.center)) + jnp.abs(head.shift)
    size = jnp.minimum(magnitude(head, features), around + row_norms * features.ball)
    own = relative * size + head.terms * SMALLEST32
    # The factor covers the rounding of this pass and of the margins, which is float64 and smaller by 2^-29.
    return (1 + 1e-3) * (row_norms * error * (1 + relative) + own)


def absolute_norm(layer: Affine) -> Array:
    """Upper bound of || |W| ||, by the Schur test: sqrt(largest row sum * largest column sum)."""
    positive = dataclasses.replace(layer, kernel=jnp.abs(layer.kernel))
    rows = jnp.max(positive.linear(jnp.ones(layer.in_shape, layer.kernel.dtype)))
    columns = jnp.max(positive.adjoint()(jnp.ones(layer.out_shape, layer.kernel.dtype)))
    return jnp.sqrt(rows * columns) * (1 + 1e-9)

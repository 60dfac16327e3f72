"""Floating point: unit roundoffs, what sums may round, and a maximum that keeps NaN."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

UNIT64, UNIT32 = 2.0**-53, 2.0**-24
SMALLEST64 = 2.0**-960  # far above what is flushed to zero in float64
SMALLEST32 = 2.0**-126  # below it float32 results lose digits, or are flushed to zero


def gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of that many products, in any order, with or without fused multiply-add.

    Raises:
        ValueError: so many terms that nothing can be said.
    """
    if terms * unit >= 0.5:
        raise ValueError(f"{terms} terms are too many for a unit roundoff of {unit:g}")
    return terms * unit / (1 - terms * unit)


def highest(array: Array, axis: int | None = None) -> Array:
    """The maximum, NaN where there is one. XLA's CPU backend loses NaN in the maximum of some thousand numbers."""
    return jnp.where(jnp.any(jnp.isnan(array), axis=axis), jnp.nan, jnp.max(array, axis=axis))

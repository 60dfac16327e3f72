"""Masks of rows and columns: boolean, or weights from 0 to 1 in their place, of which 0 drops and 1 keeps."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

STEPS = 128  # weights that norms were computed with are kept in bytes: multiples of 1 / STEPS


def weighted(mask: Array, vector: Array) -> Array:
    """What a mask keeps of a vector, zero elsewhere; or the vector times weights, zero where they are."""
    if mask.dtype == bool:
        return jnp.where(mask, vector, jnp.zeros_like(vector))
    return jnp.where(mask == 0, jnp.zeros_like(vector), mask * vector)


def kept(mask: Array) -> Array:
    """The boolean mask of what is not dropped; a weight that is not a number drops nothing."""
    return mask if mask.dtype == bool else ~(mask == 0)


def whole(mask: Array) -> Array:
    """The boolean mask of what counts in full; a weight that is not a number does."""
    return mask if mask.dtype == bool else ~(mask < 1)


def reached(mask: Array, radius: Array) -> Array:
    """How far each row is from its center, at most, where the weighted rows are within a radius; 0 for weight 0."""
    if mask.dtype == bool:
        return radius
    dropped = mask == 0
    return jnp.where(dropped, 0, radius / jnp.where(dropped, 1, mask))


def drops_nothing(mask: Array) -> Array:
    """For each example of a batch (B, ...): everything is kept, or has weight 1."""
    ones = mask if mask.dtype == bool else mask == 1
    return jnp.all(ones, axis=tuple(range(1, mask.ndim)))


def either(first: Array, second: Array) -> Array:
    """What one of two masks keeps, or the larger weight."""
    if first.dtype == second.dtype == bool:
        return first | second
    return jnp.maximum(*_as_weights(first, second))


def both(first: Array, second: Array) -> Array:
    """What two masks keep, or the smaller weight."""
    if first.dtype == second.dtype == bool:
        return first & second
    return jnp.minimum(*_as_weights(first, second))


def rounded_up(weights: Array) -> Array:
    """Weights as multiples of 1 / STEPS, not less than they are."""
    return jnp.ceil(weights * STEPS) / STEPS


def _as_weights(first: Array, second: Array) -> tuple[Array, Array]:
    dtype = second.dtype if first.dtype == bool else first.dtype
    return first.astype(dtype), second.astype(dtype)

"""Linear pieces of activations, and the least value of a quadratic on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Piece(NamedTuple):
    """A linear piece of a function of one variable: ``slope z + intercept`` for ``start <= z <= end``."""

    slope: float
    intercept: Array | float
    start: Array | float
    end: Array | float

    def at(self, z: Array) -> Array:
        """Its values, on the piece or beyond."""
        return self.slope * z + self.intercept


def least(pieces: Sequence[Any], least_on: Callable[[Any], tuple[Array, Any, Array]]) -> Any:
    """For each unit the piece with the least value; one with NaN, where there is one, so that it shows."""

    def value_on(piece: Any) -> Array:
        value, _, empty = least_on(piece)
        return jnp.where(empty, jnp.inf, value)

    chosen, least = pieces[0], value_on(pieces[0])
    for piece in pieces[1:]:
        value = value_on(piece)
        less = (value < least) | jnp.isnan(value)
        chosen = jax.tree.map(functools.partial(jnp.where, less), piece, chosen)
        least = jnp.where(less, value, least)
    return chosen


def lowest(q: Array, weight: Array, center: Array, low: Array, high: Array) -> Array:
    """Where ``q z + weight / 2 (z - center)^2`` is the least over [low, high]; either end where it is constant."""
    curved = weight > 0
    far = jnp.where(q > 0, -jnp.inf, jnp.inf)
    free = jnp.where(curved, center - q / jnp.where(curved, weight, 1), far)
    return jnp.clip(lax.stop_gradient(free), low, high)

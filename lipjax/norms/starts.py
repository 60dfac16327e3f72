"""Starts of iterations: random vectors of uniform direction, and the keys that they are drawn from.

One example's start depends on the key, its place, its round and the layer, not on the examples beside it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.linear_maps import LinearMap, unit
from lipjax.networks.masks import kept


def key_of_whole(key: Array) -> Array:
    """The key of the norms of whole layers."""
    return jax.random.fold_in(key, 0)


def keys_of_examples(key: Array, index: Array, round_: int = 0) -> Array:
    """The keys of examples at some places (B,), in a round."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, 1 + round_)))(index)


def random_start(key: Array, place: Array | int, linear_map: LinearMap) -> Array:
    """A unit vector of uniform direction on the live coordinates of the input side, for the layer at a place."""
    start = jax.random.normal(jax.random.fold_in(key, place), linear_map.in_shape, linear_map.dtype)
    return unit(start if linear_map.in_mask is None else jnp.where(kept(linear_map.in_mask), start, 0))

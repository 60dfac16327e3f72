"""Augmentation on the device: random crops of padded images, and horizontal flips."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def crops_and_flips(key: Array, images: Array, padding: int) -> Array:
    """Each image shifted at random and, every second time, flipped.

    Args:
        key: of this batch.
        images: (B, H, W, C).
        padding: zeros around each image that the crops (H, W) are taken from.

    Returns:
        (B, H, W, C).
    """
    shift_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, shape=(len(images),))

    def one(image: Array, corner: Array, flip: Array) -> Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(images, corners, flips)

"""Augmentation on the device: random crops of padded images and horizontal flips, and stored vectors in their frame."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """How each image of a batch was moved: shifted by (down, right) pixels, then flipped.

    Attributes:
        down: integers (B,), from -padding to padding.
        right: integers (B,).
        flipped: booleans (B,).
    """

    down: Array
    right: Array
    flipped: Array


def draw(key: Array, count: int, padding: int) -> Frame:
    """A random frame for each of ``count`` images: a crop of the image padded on all sides, flipped or not."""
    shift_key, flip_key = jax.random.split(key)
    down, right = jax.random.randint(shift_key, (2, count), -padding, padding + 1)
    return Frame(down, right, jax.random.bernoulli(flip_key, shape=(count,)))


def moved(images: Array, frame: Frame) -> Array:
    """Images (B, H, W, C) in their frames; what comes in from outside is zero."""

    def one(image: Array, frame: Frame) -> Array:
        rows = jnp.arange(image.shape[0]) - frame.down
        columns = jnp.arange(image.shape[1]) - frame.right
        shifted = jnp.take(image, rows, axis=0, mode="fill", fill_value=0)
        # Negative places count from the end in jnp.take; here they are outside.
        shifted = jnp.where((rows >= 0)[:, None, None], shifted, 0)
        shifted = jnp.take(shifted, columns, axis=1, mode="fill", fill_value=0)
        shifted = jnp.where((columns >= 0)[None, :, None], shifted, 0)
        return jnp.where(frame.flipped, shifted[:, ::-1], shifted)

    return jax.vmap(one)(images, frame)


def into_frame(vectors: Array, frame: Frame, size: int) -> Array:
    """Stored vectors (B, h, w, C), kept in the frame of the untransformed images, moved like the images were.

    The shift is rounded to places of the vector and goes round at the borders, so that :func:`out_of_frame` brings back
    every entry. Vectors of dense layers (B, n) have no frame.

    Args:
        vectors: one per example.
        frame: of each example.
        size: height of the images.
    """

    def one(vector: Array, frame: Frame) -> Array:
        down, right = _places(vector, frame, size)
        rolled = jnp.roll(vector, (down, right), axis=(0, 1))
        return jnp.where(frame.flipped, rolled[:, ::-1], rolled)

    return jax.vmap(one)(vectors, frame) if vectors.ndim == 4 else vectors


def out_of_frame(vectors: Array, frame: Frame, size: int) -> Array:
    """The inverse of :func:`into_frame`."""

    def one(vector: Array, frame: Frame) -> Array:
        down, right = _places(vector, frame, size)
        upright = jnp.where(frame.flipped, vector[:, ::-1], vector)
        return jnp.roll(upright, (-down, -right), axis=(0, 1))

    return jax.vmap(one)(vectors, frame) if vectors.ndim == 4 else vectors


def _places(vector: Array, frame: Frame, size: int) -> tuple[Array, Array]:
    """The shift in places of the vector, whose layer has strides in front of it."""
    scale = vector.shape[0] / size
    down, right = (jnp.round(shift * scale).astype(jnp.int32) for shift in (frame.down, frame.right))
    return down, right

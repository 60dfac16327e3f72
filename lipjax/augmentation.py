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


def moved(images: Array, frame: Frame, padding: int) -> Array:
    """Images (B, H, W, C) in their frames: crops of the images padded by so many zeros."""

    def one(image: Array, frame: Frame) -> Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = jax.lax.dynamic_slice(padded, (padding - frame.down, padding - frame.right, 0), image.shape)
        return jnp.where(frame.flipped, crop[:, ::-1], crop)

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

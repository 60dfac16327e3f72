"""Flax NNX modules to build models of: what the paper uses, and sums over skip connections."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array


class ClippedReLU(nnx.Module):
    """``min(max(z, 0), theta)`` with one learnable clip theta per neuron, the paper's ReLU-theta ([H21] Eq 10).

    Args:
        shape: shape of one activation, without the batch axis.
        theta: initial value of every clip.
    """

    def __init__(self, shape: tuple[int, ...], theta: float = 1.0) -> None:
        self.theta = nnx.Param(jnp.full(shape, theta, jnp.float32))

    def __call__(self, z: Array) -> Array:
        return jnp.minimum(jnp.maximum(z, 0), self.theta[...][None])


class MaxMin(nnx.Module):
    """``max(z1, z2)`` then ``min(z1, z2)``, channel i (z1) paired with channel i + C / 2 (z2) of the last axis."""

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


class ClippedMaxMin(nnx.Module):
    """``min(max(z1, z2), upper_clip)`` then ``max(min(z1, z2), lower_clip)``, for the pairs of :class:`MaxMin`.

    The clips are learnable, one of each per pair and place ([H21] appendix).

    Args:
        shape: shape of one activation, without the batch axis; its last axis is even.
        upper_clip: initial value of every clip of a max.
        lower_clip: initial value of every clip of a min.
    """

    def __init__(self, shape: tuple[int, ...], upper_clip: float = 1.0, lower_clip: float = -1.0) -> None:
        half = (*shape[:-1], shape[-1] // 2)
        self.upper_clip = nnx.Param(jnp.full(half, upper_clip, jnp.float32))
        self.lower_clip = nnx.Param(jnp.full(half, lower_clip, jnp.float32))

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        larger = jnp.minimum(jnp.maximum(first, second), self.upper_clip[...][None])
        smaller = jnp.maximum(jnp.minimum(first, second), self.lower_clip[...][None])
        return jnp.concatenate([larger, smaller], axis=-1)


class Residual(nnx.Module):
    """``x + f(x)``, for layers f that keep the shape.

    Args:
        *layers: f, layers and functions applied in order, or one ``nnx.Sequential``.
    """

    def __init__(self, *layers: Any) -> None:
        single = len(layers) == 1 and type(layers[0]) is nnx.Sequential
        self.inner = layers[0] if single else nnx.Sequential(*layers)

    @property
    def layers(self) -> Any:
        """The layers of f."""
        return self.inner.layers

    def __call__(self, x: Array) -> Array:
        return x + self.inner(x)

"""Leaky ReLU, PReLU and the absolute value: rows have weights, because both sides vary."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.floating_point import SMALLEST32, UNIT32, highest
from lipjax.networks.activations import Elementwise, activation, width_with_zero
from lipjax.networks.pieces import Piece
from lipjax.networks.regions import Known


@jax.tree_util.register_dataclass
@activation
class LeakyReLUActivation(Elementwise):
    """``z`` for z >= 0, else ``slope z``: leaky ReLU, PReLU with its slopes, and the absolute value with slope -1.

    A row whose neuron is below 0 on the whole box counts by the slope.

    Attributes:
        slope: broadcasts to the activation.
    """

    weighs: ClassVar[bool] = True

    slope: Array

    @property
    def lipschitz(self) -> Array:
        return jnp.maximum(highest(jnp.abs(self.slope).ravel()), 1)

    def __call__(self, z: Array) -> Array:
        return jnp.where(z >= 0, z, self.slope.astype(z.dtype) * z)

    def box(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        ends = [self(bound) for bound in (lower, upper, jnp.clip(jnp.zeros_like(lower), lower, upper))]
        return functools.reduce(jnp.minimum, ends), functools.reduce(jnp.maximum, ends)

    def row_weights(self, lower: Array, upper: Array) -> Array:
        below = jnp.where(lower >= 0, 0, jnp.abs(self.slope))
        return jnp.maximum(below, jnp.where(upper <= 0, jnp.zeros_like(upper), 1)) / self.lipschitz

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        return ~((upper <= 0) & (self.slope == 0))

    def errors(self, before: Known) -> Array:
        lower, _ = before.box
        rounded = jnp.where(jnp.abs(self.slope) == 1, 0, UNIT32 * jnp.abs(self.slope)) * jnp.maximum(-lower, 0)
        return jnp.where((self.slope == 0) | (lower >= 0), 0, 2 * (rounded + SMALLEST32))

    def pieces(self) -> tuple[Piece, ...]:
        return Piece(self.slope, 0, -jnp.inf, 0), Piece(jnp.ones_like(self.slope), 0, 0, jnp.inf)

    def phase(self, region: Known) -> Array:
        return (region.center / width_with_zero(region))[None]

    def slopes(self, region: Known) -> Array:
        return jnp.where(region.center > 0, jnp.ones_like(region.center), self.slope)[None]

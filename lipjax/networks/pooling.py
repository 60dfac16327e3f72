"""Max pooling, as an activation: monotone, and Lipschitz with a constant of its own."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lipjax.networks.activations import Activation, IdentityActivation, activation
from lipjax.networks.convolutions import Padding, Pair
from lipjax.networks.layers import Shape, static
from lipjax.networks.regions import Region


@jax.tree_util.register_dataclass
@activation
class MaxPoolActivation(Activation):
    """Maximum over windows of an image, with padding that never wins.

    Its l2 constant is sqrt(the largest number of windows that hold one input): a change of one input can show in all
    of them. Windows that do not overlap give 1. The dual knows its outputs by their own region alone.

    Attributes:
        in_shape: (H, W, C).
        window: (kh, kw).
        stride: per axis.
        padding: before and after, per axis.
    """

    in_shape: Shape = static()
    window: Pair = static()
    stride: Pair = static()
    padding: Padding = static()

    def __call__(self, z: Array) -> Array:
        if z.shape != self.in_shape:
            raise ValueError(f"max pooling was made for an image {self.in_shape}, not for {z.shape}")
        padding = ((low, high) for low, high in (*self.padding, (0, 0)))
        lowest = np.array(-np.inf, z.dtype)  # a traced one would have no gradient
        return lax.reduce_window(z, lowest, lax.max, (*self.window, 1), (*self.stride, 1), tuple(padding))

    @property
    def lipschitz(self) -> float:
        overlap = 1
        axes = zip(self.in_shape[:2], self.window, self.stride, self.padding, strict=True)
        for size, window, stride, (low, high) in axes:
            starts = range(-low, size + high - window + 1, stride)
            overlap *= max(sum(start <= i < start + window for start in starts) for i in range(size))
        root = math.isqrt(overlap)
        return float(root) if root * root == overlap else math.nextafter(math.sqrt(overlap), math.inf)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        return ~(self(upper) <= self(lower))

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        """A lower bound: that of the outputs over their own region, and that of ``-<g, z>`` over the box.

        ``||s(z) - s(center)|| <= lipschitz ||z - center||``, so the outputs carry ``weight / lipschitz^2``.
        """
        lower, upper = region.box
        outputs = dataclasses.replace(region, lower=self(lower), upper=self(upper), center=self(region.center))
        of_outputs, _ = IdentityActivation().minimum(c, jnp.zeros_like(c), weight / self.lipschitz**2, outputs)
        z = jnp.where(g > 0, upper, jnp.where(g < 0, lower, region.center))
        return of_outputs - jnp.sum(g * z), z

    def feeding(self, c: Array) -> Array:
        return jnp.zeros((1, *self.in_shape), c.dtype)

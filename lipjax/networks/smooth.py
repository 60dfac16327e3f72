"""Smooth activations: tanh, sigmoid, softplus, ELU, SiLU and GELU, by the critical points of each and of its slope.

A mask of the paper drops a row whose neuron is constant on the box. A smooth one is never constant, but may be nearly:
its row counts by the largest slope on the box, a weight from 0 to 1 relative to the Lipschitz constant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.activations import Activation, activation, chord_gaps, width_with_zero
from lipjax.networks.pieces import lowest
from lipjax.networks.regions import Known

PARTS = 16  # of a box, each of which has a tangent of its own in the dual
WIDE = 1e-11  # absolute and relative: what float64 may be off in values, slopes and critical points, many times over


@activation
class Smooth(Activation):
    """An activation that acts on each entry and has a Lipschitz continuous slope.

    A subclass is its call, :meth:`slope` and a few numbers. Between critical points of a function it is monotone, so
    that its extremes on a box are at the ends or at a critical point inside.

    Attributes:
        slope_limit: the largest magnitude of the slope, rounded up: the Lipschitz constant.
        curvature: the largest magnitude of the second derivative, rounded up.
        turns: critical points of the activation.
        bends: critical points of its slope.
        float32_error: what JAX's float32 may be off, relative to ``1 + |z|``: eight times what was measured
            (``tests/test_smooth.py``).
    """

    weighs: ClassVar[bool] = True
    slope_limit: ClassVar[float]
    curvature: ClassVar[float]
    turns: ClassVar[tuple[float, ...]] = ()
    bends: ClassVar[tuple[float, ...]] = ()
    float32_error: ClassVar[float] = 2.0**-19

    def slope(self, z: Array) -> Array:
        """The derivative."""
        raise NotImplementedError

    @property
    def lipschitz(self) -> float:
        return self.slope_limit

    def box(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        values = self._at(self, self.turns, lower, upper)
        least, largest = functools.reduce(jnp.minimum, values), functools.reduce(jnp.maximum, values)
        slack = WIDE * (1 + jnp.maximum(jnp.abs(least), jnp.abs(largest)))
        return least - slack, largest + slack

    def row_weights(self, lower: Array, upper: Array) -> Array:
        steepest = functools.reduce(jnp.maximum, map(jnp.abs, self._at(self.slope, self.bends, lower, upper)))
        return jnp.minimum((steepest + WIDE) / self.slope_limit, 1)

    def errors(self, before: Known) -> Array:
        lower, upper = before.box
        return self.float32_error * (1 + jnp.maximum(jnp.abs(lower), jnp.abs(upper)))

    def largest(self, lower: Array, upper: Array) -> Array:
        return super().largest(lower, upper) + 2 * self.slope_limit * jnp.maximum(jnp.abs(lower), jnp.abs(upper))

    def slopes(self, region: Known) -> Array:
        return self.slope(region.center)[None]

    def gaps(self, c: Array, lower: Array, upper: Array) -> Array:
        return chord_gaps(self, c, lower, upper)

    def phase(self, region: Known) -> Array:
        return (region.center / width_with_zero(region))[None]

    def minimum(self, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array]:
        """A lower bound: on each part of the box, that of the tangent at its middle less what the curvature allows.

        ``|s(z) - s(m) - s'(m) (z - m)| <= curvature / 2 (z - m)^2``.
        """
        fixed = lax.stop_gradient((c, g, weight, region))
        steps = jnp.arange(PARTS, dtype=c.dtype)

        def on(k: Array, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array]:
            (lower, upper), size = region.box, 1 / PARTS
            width = (upper - lower) * size
            start, end = lower + k * width, jnp.minimum(lower + (k + 1) * width, upper)
            middle = (start + end) / 2
            value, slope = self(middle), self.slope(middle)
            z = lowest(c * slope - g, weight, region.center, start, end)
            reach = jnp.maximum(end - middle, middle - start)
            slack = self.curvature / 2 * reach**2 + WIDE * (1 + jnp.abs(middle)) * (1 + reach)
            found = c * (value + slope * (z - middle)) - jnp.abs(c) * slack - g * z
            return found + weight / 2 * (z - region.center) ** 2, z

        values, _ = jax.vmap(lambda k: on(k, *fixed))(steps)
        best = jnp.argmin(values, axis=0).astype(c.dtype)  # NaN is the least
        found, z = on(best, c, g, weight, region)
        return jnp.sum(found), z

    @staticmethod
    def _at(function: Callable[[Array], Array], critical: tuple[float, ...], lower: Array, upper: Array) -> list[Array]:
        """Values at both ends of a box, and at the critical points inside of it.

        Their extremes are found two at a time: the gradient of ``jnp.max`` goes where an entry EQUALS the maximum, and
        XLA may compute the two in different fusions, which round differently, so that it goes nowhere.
        """
        inside = (jnp.clip(jnp.asarray(point, lower.dtype), lower, upper) for point in critical)
        return [function(point) for point in (lower, upper, *inside)]


@activation
class Saturating(Smooth):
    """A smooth activation with values between -1 and 1, whose float32 error does not grow."""

    float32_error = 2.0**-18

    def errors(self, before: Known) -> Array:
        return jnp.full_like(before.center, self.float32_error)

    def phase(self, region: Known) -> Array:
        return Activation.phase(self, region)  # it has no side where it passes nothing on


@jax.tree_util.register_dataclass
@activation
class TanhActivation(Saturating):
    """``tanh(z)``."""

    slope_limit = 1.0
    curvature = 0.7699  # 4 / (3 sqrt 3)
    bends = (0.0,)

    def __call__(self, z: Array) -> Array:
        return jnp.tanh(z)

    def slope(self, z: Array) -> Array:
        return 1 - jnp.tanh(z) ** 2


@jax.tree_util.register_dataclass
@activation
class SigmoidActivation(Saturating):
    """``1 / (1 + exp(-z))``."""

    slope_limit = 0.25
    curvature = 0.0963  # 1 / (6 sqrt 3)
    bends = (0.0,)

    def __call__(self, z: Array) -> Array:
        return jax.nn.sigmoid(z)

    def slope(self, z: Array) -> Array:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


@jax.tree_util.register_dataclass
@activation
class SoftplusActivation(Smooth):
    """``log(1 + exp(z))``."""

    slope_limit = 1.0
    curvature = 0.25

    def __call__(self, z: Array) -> Array:
        return jax.nn.softplus(z)

    def slope(self, z: Array) -> Array:
        return jax.nn.sigmoid(z)


@jax.tree_util.register_dataclass
@activation
class ELUActivation(Smooth):
    """``z`` for z >= 0, else ``exp(z) - 1``."""

    slope_limit = 1.0
    curvature = 1.0

    def __call__(self, z: Array) -> Array:
        return jax.nn.elu(z)

    def slope(self, z: Array) -> Array:
        return jnp.exp(jnp.minimum(z, 0))


@jax.tree_util.register_dataclass
@activation
class SiLUActivation(Smooth):
    """``z sigmoid(z)``, also called swish."""

    slope_limit = 1.0998394
    curvature = 0.5
    turns = (-1.2784645427610738,)
    bends = (-2.3993572805154676, 2.3993572805154676)

    def __call__(self, z: Array) -> Array:
        return jax.nn.silu(z)

    def slope(self, z: Array) -> Array:
        on = jax.nn.sigmoid(z)
        return on * (1 + z * jax.nn.sigmoid(-z))


@jax.tree_util.register_dataclass
@activation
class GELUActivation(Smooth):
    """``z Phi(z)`` with the distribution function Phi of the normal distribution."""

    slope_limit = 1.1289042
    curvature = 0.7979  # 2 phi(0)
    turns = (-0.7517915246935645,)
    bends = (-math.sqrt(2), math.sqrt(2))

    def __call__(self, z: Array) -> Array:
        return jax.nn.gelu(z, approximate=False)

    def slope(self, z: Array) -> Array:
        density = jnp.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return jax.scipy.special.erfc(-z / math.sqrt(2)) / 2 + z * density


@jax.tree_util.register_dataclass
@activation
class TanhGELUActivation(Smooth):
    """``z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))``, the GELU that ``jax.nn.gelu`` computes by default."""

    slope_limit = 1.1289931
    curvature = 0.7979
    turns = (-0.7524614220710161,)
    bends = (-1.4185040087908283, 1.4185040087908283)

    def __call__(self, z: Array) -> Array:
        return jax.nn.gelu(z, approximate=True)

    def slope(self, z: Array) -> Array:
        root = math.sqrt(2 / math.pi)
        bent = jnp.tanh(root * (z + 0.044715 * z**3))
        # Where tanh is 1 to the last digit, its slope times a large z is a rounding alone.
        inner = root * (1 + 3 * 0.044715 * z**2)
        return (1 + bent) / 2 + z / 2 * (1 - bent**2) * inner


SMOOTH = (
    *(TanhActivation, SigmoidActivation, SoftplusActivation, ELUActivation),
    *(SiLUActivation, GELUActivation, TanhGELUActivation),
)

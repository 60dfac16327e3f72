"""Activations: what comes after an affine layer, with the rules that each of them has for boxes, masks and the dual.

An activation sees one example; callers ``vmap``. A new one is its call, :meth:`Activation.live_rows` and
:meth:`Activation.live_outputs`, and for the dual :meth:`Activation.minimum`; one that acts on each entry and is linear
piece by piece has its minimum from :meth:`Elementwise.pieces`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lipjax.layers import layer
from lipjax.regions import Region


@layer
class Activation:
    """An activation that is monotone in each coordinate, so that a box maps corner to corner, and Lipschitz."""

    @property
    def lipschitz(self) -> float:
        """Its Lipschitz constant in the l2 norm, rounded up."""
        return 1.0

    def __call__(self, z: Array) -> Array:
        raise NotImplementedError

    def live_rows(self, lower: Array, upper: Array) -> Array:
        """The rows of the layer before that matter, all unless an activation knows better.

        All others can be dropped without changing any output.
        """
        return jnp.ones(lower.shape, bool)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        """The outputs that vary over the box, all unless an activation knows better, shaped like the output.

        Every other one is exactly constant on the box.
        """
        return jnp.ones(lower.shape, bool)

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        """The least value of ``<c, s(z)> - <g, z> + weight / 2 ||z - center||^2`` over the box of a region.

        A sum over units (neurons, or pairs of MaxMin), each of them in closed form; see :mod:`lipjax.dual`. It is
        differentiable in everything but where the minimiser would be without the box (envelope theorem).

        Args:
            c: coefficients of the outputs, shaped like them.
            g: coefficients of the pre-activations, shaped like them.
            weight: scalar, at least 0; 0 is the linear case.
            region: of the pre-activations of one example; its box must contain its center.

        Returns:
            ``(value, minimiser)``: a scalar, and where it is attained, shaped like the pre-activation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no minimum, which the dual needs: define one")

    def feeding(self, c: Array) -> Array:
        """For each row the coefficients of the outputs that it feeds (k, *rows): multipliers are ``sum alpha feeding``.

        ``k`` numbers per row are what the dual ascends, or a trained rule gives; see :meth:`phase`.
        """
        return c[None]

    def phase(self, region: Region) -> Array:
        """How clearly each row passes on to each output that it feeds, in [-1, 1], shaped like :meth:`feeding`.

        Positive where the slope at the center is 1, negative where it is 0.
        """
        return jnp.ones((1, *region.center.shape), region.center.dtype)


# The masks below define DEAD and negate it: a comparison with NaN is false, so a NaN bound comes out live.


class Piece(NamedTuple):
    """A linear piece of a function of one variable: ``slope z + intercept`` for ``start <= z <= end``."""

    slope: float
    intercept: Array | float
    start: Array | float
    end: Array | float


@layer
class Elementwise(Activation):
    """An activation that acts on each entry by itself and is linear piece by piece."""

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, which cover the line; numbers, or arrays shaped like the activation."""
        raise NotImplementedError

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        lower, upper = region.box
        best, minimiser = jnp.full_like(region.center, jnp.inf), region.center
        for slope, intercept, start, end in self.pieces():
            low, high = jnp.maximum(lower, start), jnp.minimum(upper, end)
            q = slope * c - g
            z = _lowest(q, weight, region.center, low, high)
            value = q * z + c * intercept + weight / 2 * (z - region.center) ** 2
            value = jnp.where(high < low, jnp.inf, value)  # only where the piece is empty: NaN must show
            minimiser = jnp.where(value < best, z, minimiser)
            best = jnp.minimum(best, value)
        return jnp.sum(best), minimiser


@jax.tree_util.register_dataclass
@layer
class Identity(Elementwise):
    """No activation."""

    def __call__(self, z: Array) -> Array:
        return z

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(1, 0, -jnp.inf, jnp.inf),)


@jax.tree_util.register_dataclass
@layer
class ReLU(Elementwise):
    """``max(z, 0)``: constant where ``upper <= 0``."""

    def __call__(self, z: Array) -> Array:
        return jnp.maximum(z, 0)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~(upper <= 0)

    live_outputs = live_rows

    def pieces(self) -> tuple[Piece, ...]:
        return Piece(0, 0, -jnp.inf, 0), Piece(1, 0, 0, jnp.inf)

    def phase(self, region: Region) -> Array:
        return (region.center / _width(region))[None]


@jax.tree_util.register_dataclass
@layer
class ClippedReLU(Elementwise):
    """``min(max(z, 0), theta)``, the paper's ReLU-theta: constant where ``upper <= 0`` or ``lower >= theta``.

    A neuron with ``theta <= 0`` is constant everywhere (it outputs theta).

    Attributes:
        theta: the upper clip, one per neuron, shaped like the activation.
    """

    theta: Array

    def __call__(self, z: Array) -> Array:
        return jnp.minimum(jnp.maximum(z, 0), self.theta)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~((upper <= 0) | (lower >= self.theta) | (self.theta <= 0))

    live_outputs = live_rows

    def pieces(self) -> tuple[Piece, ...]:
        clip, below = jnp.maximum(self.theta, 0), jnp.minimum(self.theta, 0)
        return Piece(0, below, -jnp.inf, 0), Piece(1, below, 0, clip), Piece(0, self.theta, clip, jnp.inf)

    def phase(self, region: Region) -> Array:
        return (jnp.minimum(region.center, self.theta - region.center) / _width(region))[None]


@layer
class Pairs(Activation):
    """An activation of pairs, channel i with channel i + C / 2, that gives a clipped max, then a clipped min.

    It is linear where the order of a pair and the sides of its clips are known.
    """

    def clips(self) -> tuple[Array | float, Array | float]:
        """Upper clip of the max and lower clip of the min, one of each per pair, or infinite."""
        raise NotImplementedError

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        upper_clip, lower_clip = self.clips()
        larger = jnp.minimum(jnp.maximum(first, second), upper_clip)
        return jnp.concatenate([larger, jnp.maximum(jnp.minimum(first, second), lower_clip)], axis=-1)

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        (c_max, c_min), rows, centers = (jnp.split(array, 2, axis=-1) for array in (c, g, region.center))
        lowers, uppers = (jnp.split(bound, 2, axis=-1) for bound in region.box)
        pieces = list(itertools.product(((0, 1), (1, 0)), *self._pieces()))  # who is the larger one, and where it is

        def each(of: Callable[..., Array | float]) -> Array:
            return jnp.stack([jnp.broadcast_to(of(*piece), c_max.shape) for piece in pieces])

        # One array for the larger of each pair and one for the smaller, with a leading axis of pieces.
        q = (
            each(lambda order, of_max, _: of_max.slope * c_max - rows[order[0]]),
            each(lambda order, _, of_min: of_min.slope * c_min - rows[order[1]]),
        )
        low = (
            each(lambda order, of_max, _: jnp.maximum(lowers[order[0]], of_max.start)),
            each(lambda order, _, of_min: jnp.maximum(lowers[order[1]], of_min.start)),
        )
        high = (
            each(lambda order, of_max, _: jnp.minimum(uppers[order[0]], of_max.end)),
            each(lambda order, _, of_min: jnp.minimum(uppers[order[1]], of_min.end)),
        )
        center = each(lambda order, *_: centers[order[0]]), each(lambda order, *_: centers[order[1]])
        constant = each(lambda _, of_max, of_min: c_max * of_max.intercept + c_min * of_min.intercept)
        larger, smaller = (_lowest(q[k], weight, center[k], low[k], high[k]) for k in (0, 1))
        # Where that breaks the order, the constrained minimum lies where both are equal (convexity).
        broken = larger < smaller
        common = jnp.maximum(*low), jnp.minimum(*high)
        equal = _lowest(sum(q) / 2, weight, sum(center) / 2, *common)
        larger, smaller = jnp.where(broken, equal, larger), jnp.where(broken, equal, smaller)
        value = q[0] * larger + q[1] * smaller + constant
        value += weight / 2 * ((larger - center[0]) ** 2 + (smaller - center[1]) ** 2)
        # A piece is left out only where it is empty: NaN must show.
        empty = (high[0] < low[0]) | (high[1] < low[1]) | (broken & (common[1] < common[0]))
        value = jnp.where(empty, jnp.inf, value)
        swapped = np.reshape([order == (1, 0) for order, *_ in pieces], (-1, *(1,) * c_max.ndim))
        both = jnp.where(swapped, smaller, larger), jnp.where(swapped, larger, smaller)
        chosen = jnp.argmin(value, axis=0)[None]
        minimiser = [jnp.take_along_axis(z, chosen, axis=0)[0] for z in both]
        return jnp.sum(jnp.min(value, axis=0)), jnp.concatenate(minimiser, axis=-1)

    def feeding(self, c: Array) -> Array:
        c_max, c_min = jnp.split(c, 2, axis=-1)
        return jnp.stack([jnp.concatenate([each, each], axis=-1) for each in (c_max, c_min)])

    def phase(self, region: Region) -> Array:
        upper_clip, lower_clip = self.clips()
        first, second = jnp.split(region.center, 2, axis=-1)
        lower, upper = (jnp.split(bound, 2, axis=-1) for bound in region.box)
        width = jnp.maximum(jnp.maximum(*upper) - jnp.minimum(*lower), 1e-12)
        of_max = jnp.minimum(first - second, upper_clip - first), jnp.minimum(second - first, upper_clip - second)
        of_min = jnp.minimum(second - first, first - lower_clip), jnp.minimum(first - second, second - lower_clip)
        return jnp.stack([jnp.concatenate([each / width for each in both], axis=-1) for both in (of_max, of_min)])

    def _pieces(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Pieces of the max as a function of the larger of a pair, and of the min as one of the smaller."""
        upper_clip, lower_clip = self.clips()
        of_max = Piece(1, 0, -jnp.inf, upper_clip), Piece(0, upper_clip, upper_clip, jnp.inf)
        of_min = Piece(1, 0, lower_clip, jnp.inf), Piece(0, lower_clip, -jnp.inf, lower_clip)
        unclipped = isinstance(upper_clip, float)
        return (of_max[:1], of_min[:1]) if unclipped else (of_max, of_min)


@jax.tree_util.register_dataclass
@layer
class MaxMin(Pairs):
    """``max(z1, z2)`` then ``min(z1, z2)``, where channel i (z1) is paired with channel i + C / 2 (z2).

    Every row is needed and every output varies: the larger of a pair is in one output, the smaller in the other.
    """

    def clips(self) -> tuple[float, float]:
        return jnp.inf, -jnp.inf


@jax.tree_util.register_dataclass
@layer
class ClippedMaxMin(Pairs):
    """``min(max(z1, z2), upper_clip)`` then ``max(min(z1, z2), lower_clip)``, for the pairs of :class:`MaxMin`.

    The max of a pair is constant where ``max(lower1, lower2) >= upper_clip``, its min where
    ``min(upper1, upper2) <= lower_clip``. A row is needed where it can be the one that an output which varies takes;
    rows and outputs that matter are not the same here.

    Attributes:
        upper_clip: of the max, one per pair, shaped like half of the activation.
        lower_clip: of the min, likewise.
    """

    upper_clip: Array
    lower_clip: Array

    def clips(self) -> tuple[Array, Array]:
        return self.upper_clip, self.lower_clip

    def live_rows(self, lower: Array, upper: Array) -> Array:
        max_dead, min_dead = self._dead(lower, upper)
        (lower1, lower2), (upper1, upper2) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        first_dead = (max_dead | (upper1 < lower2)) & (min_dead | (lower1 > upper2))
        second_dead = (max_dead | (upper2 < lower1)) & (min_dead | (lower2 > upper1))
        return ~jnp.concatenate([first_dead, second_dead], axis=-1)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        return ~jnp.concatenate(self._dead(lower, upper), axis=-1)

    def _dead(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """Where the max and the min of a pair are constant."""
        (lower1, lower2), (upper1, upper2) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        max_dead = (lower1 >= self.upper_clip) | (lower2 >= self.upper_clip)
        min_dead = (upper1 <= self.lower_clip) | (upper2 <= self.lower_clip)
        return max_dead, min_dead


def _lowest(q: Array, weight: Array, center: Array, low: Array, high: Array) -> Array:
    """Where ``q z + weight / 2 (z - center)^2`` is the least over [low, high]; either end where it is constant."""
    curved = weight > 0
    far = jnp.where(q > 0, -jnp.inf, jnp.inf)
    free = jnp.where(curved, center - q / jnp.where(curved, weight, 1), far)
    return jnp.clip(lax.stop_gradient(free), low, high)


def _width(region: Region) -> Array:
    """The width of a box that is stretched to contain 0, not less than 1e-12."""
    lower, upper = region.box
    return jnp.maximum(jnp.maximum(upper, 0) - jnp.minimum(lower, 0), 1e-12)

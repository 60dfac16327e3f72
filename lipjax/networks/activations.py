"""Activations: what comes after an affine layer, with the rules that each of them has for boxes, masks and the dual.

An activation sees one example; callers ``vmap``. A new one is its call, :meth:`Activation.live_rows` and
:meth:`Activation.live_outputs`, and for the dual :meth:`Activation.minimum`; one that acts on each entry and is linear
piece by piece has its minimum from :meth:`Elementwise.pieces`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.layers import layer
from lipjax.networks.regions import Region


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

        A sum over units (neurons, or pairs of MaxMin), each of them in closed form (``lipjax.bounds.dual``). It is
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

    def at(self, z: Array) -> Array:
        """Its values, on the piece or beyond."""
        return self.slope * z + self.intercept


class PairPiece(NamedTuple):
    """A piece of a function of two variables that is linear in the larger and in the smaller of them.

    Attributes:
        swapped: the second is the larger one.
        of_max: of the max, as a function of the larger.
        of_min: of the min, as a function of the smaller.
    """

    swapped: Array | bool
    of_max: Piece
    of_min: Piece


@layer
class Elementwise(Activation):
    """An activation that acts on each entry by itself and is linear piece by piece."""

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, which cover the line; numbers, or arrays shaped like the activation."""
        raise NotImplementedError

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        fixed = lax.stop_gradient((c, g, weight, region))
        values, minimiser, _ = self._on(
            _least(self.pieces(), lambda piece: self._on(piece, *fixed)), c, g, weight, region
        )
        return jnp.sum(values), minimiser

    @staticmethod
    def _on(piece: Piece, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array, Array]:
        """The least value of each entry on its part of a piece, where it is, and whether that part is empty."""
        lower, upper = region.box
        low, high = jnp.maximum(lower, piece.start), jnp.minimum(upper, piece.end)
        z = _lowest(piece.slope * c - g, weight, region.center, low, high)
        value = c * piece.at(z) - g * z + weight / 2 * (z - region.center) ** 2
        return value, z, high < low


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
        fixed = lax.stop_gradient((c, g, weight, region))
        chosen = _least(self._pieces(), lambda piece: self._on(piece, *fixed))
        values, (larger, smaller), _ = self._on(chosen, c, g, weight, region)
        first, second = jnp.where(chosen.swapped, smaller, larger), jnp.where(chosen.swapped, larger, smaller)
        return jnp.sum(values), jnp.concatenate([first, second], axis=-1)

    @staticmethod
    def _on(piece: PairPiece, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Any, Array]:
        """The least value of each pair on its part of a piece, where it is, and whether that part is empty."""
        c_max, c_min = jnp.split(c, 2, axis=-1)

        def ordered(rows: Array) -> tuple[Array, Array]:
            first, second = jnp.split(rows, 2, axis=-1)
            return jnp.where(piece.swapped, second, first), jnp.where(piece.swapped, first, second)

        # Each a tuple: of the larger of a pair, and of the smaller.
        sides, rows, center = (piece.of_max, piece.of_min), ordered(g), ordered(region.center)
        lowers, uppers = (ordered(bound) for bound in region.box)
        q = tuple(side.slope * outputs - row for side, outputs, row in zip(sides, (c_max, c_min), rows, strict=True))
        low = tuple(jnp.maximum(lower, side.start) for side, lower in zip(sides, lowers, strict=True))
        high = tuple(jnp.minimum(upper, side.end) for side, upper in zip(sides, uppers, strict=True))
        larger, smaller = (_lowest(q[k], weight, center[k], low[k], high[k]) for k in (0, 1))
        # Where that breaks the order, the constrained minimum lies where both are equal (convexity).
        broken = larger < smaller
        common = jnp.maximum(*low), jnp.minimum(*high)
        equal = _lowest(sum(q) / 2, weight, sum(center) / 2, *common)
        larger, smaller = jnp.where(broken, equal, larger), jnp.where(broken, equal, smaller)
        value = (
            c_max * piece.of_max.at(larger) + c_min * piece.of_min.at(smaller) - rows[0] * larger - rows[1] * smaller
        )
        value += weight / 2 * ((larger - center[0]) ** 2 + (smaller - center[1]) ** 2)
        empty = (high[0] < low[0]) | (high[1] < low[1]) | (broken & (common[1] < common[0]))
        return value, (larger, smaller), empty

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

    def _pieces(self) -> list[PairPiece]:
        upper_clip, lower_clip = self.clips()
        of_max = Piece(1, 0, -jnp.inf, upper_clip), Piece(0, upper_clip, upper_clip, jnp.inf)
        of_min = Piece(1, 0, lower_clip, jnp.inf), Piece(0, lower_clip, -jnp.inf, lower_clip)
        if isinstance(upper_clip, float):  # there are no clips
            of_max, of_min = of_max[:1], of_min[:1]
        return [PairPiece(*each) for each in itertools.product((False, True), of_max, of_min)]


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


def _least(pieces: Sequence[Any], least_on: Callable[[Any], tuple[Array, Any, Array]]) -> Any:
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

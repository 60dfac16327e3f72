"""MaxMin and its clipped form: activations of pairs of channels."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.activations import Activation, activation
from lipjax.networks.pieces import Piece, least, lowest
from lipjax.networks.regions import Known


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


@activation
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

    def minimum(self, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array]:
        fixed = lax.stop_gradient((c, g, weight, region))
        chosen = least(self._pieces(), lambda piece: self._on(piece, *fixed))
        values, (larger, smaller), _ = self._on(chosen, c, g, weight, region)
        first, second = jnp.where(chosen.swapped, smaller, larger), jnp.where(chosen.swapped, larger, smaller)
        return jnp.sum(values), jnp.concatenate([first, second], axis=-1)

    def cut(self, lower: Array, upper: Array) -> Array:
        """In the middle of what the boxes of a pair have in common, where that is inside of the row's own box."""
        other_lower, other_upper = (
            jnp.concatenate(jnp.split(bound, 2, axis=-1)[::-1], axis=-1) for bound in (lower, upper)
        )
        common = (jnp.maximum(lower, other_lower) + jnp.minimum(upper, other_upper)) / 2
        return jnp.where((lower < common) & (common < upper), common, (lower + upper) / 2)

    def gaps(self, c: Array, lower: Array, upper: Array) -> Array:
        """By the chord of ``|z1 - z2|``, whose half is added in the max and subtracted in the min."""
        (first, second), (first_up, second_up) = (jnp.split(bound, 2, axis=-1) for bound in (lower, upper))
        of_max, of_min = jnp.split(c, 2, axis=-1)
        low, high = first - second_up, first_up - second
        width = high - low
        gap = jnp.where((low < 0) & (high > 0), -low * high / jnp.where(width > 0, width, 1), 0)
        each, widths = jnp.abs(of_max - of_min) * gap, upper - lower
        # The wider of both rows is cut.
        share = jnp.split(widths, 2, axis=-1)
        total = share[0] + share[1]
        parts = (each * width / jnp.where(total > 0, total, 1) for width in share)
        return jnp.concatenate(list(parts), axis=-1)

    @staticmethod
    def _on(piece: PairPiece, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Any, Array]:
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
        larger, smaller = (lowest(q[k], weight, center[k], low[k], high[k]) for k in (0, 1))
        # Where that breaks the order, the constrained minimum lies where both are equal (convexity).
        broken = larger < smaller
        common = jnp.maximum(*low), jnp.minimum(*high)
        equal = lowest(sum(q) / 2, weight, sum(center) / 2, *common)
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

    def phase(self, region: Known) -> Array:
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
@activation
class MaxMinActivation(Pairs):
    """``max(z1, z2)`` then ``min(z1, z2)``, where channel i (z1) is paired with channel i + C / 2 (z2).

    Every row is needed and every output varies: the larger of a pair is in one output, the smaller in the other.
    """

    def clips(self) -> tuple[float, float]:
        return jnp.inf, -jnp.inf


@jax.tree_util.register_dataclass
@activation
class ClippedMaxMinActivation(Pairs):
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

    def sparsity(self, lower: Array, upper: Array, weight_theta: Array | float) -> Array:
        """``weight_theta max(0, upper_clip - lower)`` of the maxima, ``max(0, upper - lower_clip)`` of the minima.

        By the box between MaxMin and its clips.
        """
        (lower_max, _), (_, upper_min) = (jnp.split(MaxMinActivation()(bound), 2, axis=-1) for bound in (lower, upper))
        maxima = weight_theta * jnp.maximum(self.upper_clip - lower_max, 0)
        return jnp.mean(jnp.stack([maxima, jnp.maximum(upper_min - self.lower_clip, 0)]))

    def _dead(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """Where the max and the min of a pair are constant."""
        (lower1, lower2), (upper1, upper2) = jnp.split(lower, 2, axis=-1), jnp.split(upper, 2, axis=-1)
        max_dead = (lower1 >= self.upper_clip) | (lower2 >= self.upper_clip)
        min_dead = (upper1 <= self.lower_clip) | (upper2 <= self.lower_clip)
        return max_dead, min_dead

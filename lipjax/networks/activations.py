"""Activations: what comes after an affine layer, with the rules that each of them has for boxes, masks and the dual.

An activation sees one example; callers ``vmap``. A new one is its call, :meth:`Activation.live_rows` and
:meth:`Activation.live_outputs`, and for the dual :meth:`Activation.minimum`; one that acts on each entry and is linear
piece by piece has its minimum from :meth:`Elementwise.pieces`. One that is not monotone has a :meth:`Activation.box` of
its own; one whose slope is small on some boxes, but not zero, has :meth:`Activation.row_weights` in place of a mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.linear_maps import length
from lipjax.networks.pieces import Piece, least, lowest
from lipjax.networks.regions import Known

activation = functools.partial(dataclasses.dataclass, frozen=True)


@activation
class Activation:
    """An activation that is Lipschitz, and as a rule monotone in each coordinate.

    Attributes:
        weighs: whether :meth:`row_weights` gives weights, floating-point, and not a mask.
        mixes: whether an output depends on so many inputs that its box is better cut to the ball.
    """

    weighs: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    @property
    def lipschitz(self) -> Array | float:
        """Its Lipschitz constant in the l2 norm, rounded up."""
        return 1.0

    def __call__(self, z: Array) -> Array:
        raise NotImplementedError

    def frozen(self) -> Activation:
        """The activation as inference computes it; see :meth:`lipjax.networks.layers.Affine.frozen`."""
        return self

    def box(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        """A box that contains the outputs over a box: for a monotone activation, what it maps the corners to."""
        return self(lower), self(upper)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        """The rows of the layer before that matter, all unless an activation knows better.

        All others can be dropped without changing any output.
        """
        return jnp.ones(lower.shape, bool)

    def row_weights(self, lower: Array, upper: Array) -> Array:
        """How much each row of the layer before matters: the mask :meth:`live_rows`, or weights from 0 to 1.

        With weights w, ``||s(z) - s(z')|| <= lipschitz ||w (z - z')||`` for any two points of the box: for an
        activation that acts on each entry, the largest magnitude of its slope there over :attr:`lipschitz`. A row of
        weight 0 changes no output.
        """
        return self.live_rows(lower, upper)

    def errors(self, before: Known) -> Array | None:
        """How far each float32 output may be from the exact one for the same input, wherever it is; None: exact.

        Args:
            before: what is known before the activation, of one example; float32 inputs are in its box and its ball.
        """
        return None

    def error_norm(self, before: Known, errors: Array) -> Array:
        """How far all outputs together may be off in the l2 norm: that of their ``errors``, unless more is known."""
        return length(errors)

    def largest(self, lower: Array, upper: Array) -> Array:
        """For each output: nothing that :meth:`minimum` adds up to it on a box has a larger magnitude."""
        return jnp.maximum(*map(jnp.abs, self.box(lower, upper)))

    def partial(self, lower: Array, upper: Array) -> Array:
        """Nothing that inference computes on the way to an output is larger over a box, in any shape.

        As in :meth:`lipjax.networks.layers.Affine.partial`: where float32 could overflow, nothing is proven.
        """
        return self.largest(lower, upper)

    def live_outputs(self, lower: Array, upper: Array) -> Array:
        """The outputs that vary over the box, all unless an activation knows better, shaped like the output.

        Every other one is exactly constant on the box.
        """
        return jnp.ones(lower.shape, bool)

    def minimum(self, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array]:
        """The least value of ``<c, s(z)> - <g, z> + weight / 2 ||z - center||^2`` over the box of a region.

        A sum over units (neurons, or pairs of MaxMin), each of them in closed form (``lipjax.bounds.dual``). It is
        differentiable in everything but where the minimiser would be without the box (envelope theorem).

        Args:
            c: coefficients of the outputs, shaped like them.
            g: coefficients of the pre-activations, shaped like them.
            weight: at least 0, scalar; or one per row where the activation has weights of rows; 0 is the linear case.
            region: what is known before the activation, of one example; its box need not contain its center.

        Returns:
            ``(value, minimiser)``: a scalar, and where it is attained, shaped like the pre-activation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no minimum, which the dual needs: define one")

    def cut(self, lower: Array, upper: Array) -> Array:
        """Where branching cuts the box of each row in two, strictly inside of it where it has a width."""
        return (lower + upper) / 2

    def gaps(self, c: Array, lower: Array, upper: Array) -> Array:
        """For each row, how much of a margin with coefficients ``c`` of the outputs it may cost not to cut its box.

        An estimate, by which branching chooses; zero where a cut is of no use.
        """
        return jnp.zeros_like(lower)

    def sparsity(self, lower: Array, upper: Array, weight_theta: Array | float) -> Array:
        """How far the outputs are from being constant on a box, on average, scalar; 0 if they have no way to be.

        Args:
            lower: of the pre-activations.
            upper: likewise.
            weight_theta: weight of the terms about upper clips.

        Reference:
            [H21] Eq 12 and 26.
        """
        return jnp.zeros((), lower.dtype)

    def feeding(self, c: Array) -> Array:
        """For each row the coefficients of the outputs that it feeds (k, *rows): multipliers are ``sum alpha feeding``.

        ``k`` numbers per row are what the dual ascends, or a trained rule gives; see :meth:`phase`.
        """
        return c[None]

    def phase(self, region: Known) -> Array:
        """How clearly each row passes on to each output that it feeds, in [-1, 1], shaped like :meth:`feeding`.

        Positive where the slope at the center is 1, negative where it is 0.
        """
        return jnp.ones((1, *region.center.shape), region.center.dtype)

    def slopes(self, region: Known) -> Array:
        """Which share of each output that it feeds a row passes on at the center, shaped like :meth:`feeding`."""
        return (self.phase(region) > 0).astype(region.center.dtype)


# The masks below define DEAD and negate it: a comparison with NaN is false, so a NaN bound comes out live.


@activation
class Elementwise(Activation):
    """An activation that acts on each entry by itself and is linear piece by piece."""

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, which cover the line; numbers, or arrays shaped like the activation."""
        raise NotImplementedError

    def cut(self, lower: Array, upper: Array) -> Array:
        """At the end of a piece that is nearest to the middle of the box, if one is inside; else at the middle."""
        middle = (lower + upper) / 2
        best, distance = middle, jnp.full_like(middle, jnp.inf)
        for piece in self.pieces()[1:]:
            kink = jnp.broadcast_to(jnp.asarray(piece.start, lower.dtype), middle.shape)
            nearer = (lower < kink) & (kink < upper) & (jnp.abs(kink - middle) < distance)
            best, distance = jnp.where(nearer, kink, best), jnp.where(nearer, jnp.abs(kink - middle), distance)
        return best

    def gaps(self, c: Array, lower: Array, upper: Array) -> Array:
        return chord_gaps(self, c, lower, upper)

    def minimum(self, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array]:
        fixed = lax.stop_gradient((c, g, weight, region))
        values, minimiser, _ = self._on(
            least(self.pieces(), lambda piece: self._on(piece, *fixed)), c, g, weight, region
        )
        return jnp.sum(values), minimiser

    @staticmethod
    def _on(piece: Piece, c: Array, g: Array, weight: Array, region: Known) -> tuple[Array, Array, Array]:
        """The least value of each entry on its part of a piece, where it is, and whether that part is empty."""
        lower, upper = region.box
        low, high = jnp.maximum(lower, piece.start), jnp.minimum(upper, piece.end)
        z = lowest(piece.slope * c - g, weight, region.center, low, high)
        value = c * piece.at(z) - g * z + weight / 2 * (z - region.center) ** 2
        return value, z, high < low


@jax.tree_util.register_dataclass
@activation
class IdentityActivation(Elementwise):
    """No activation."""

    def __call__(self, z: Array) -> Array:
        return z

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(1, 0, -jnp.inf, jnp.inf),)


@jax.tree_util.register_dataclass
@activation
class ReLUActivation(Elementwise):
    """``max(z, 0)``: constant where ``upper <= 0``."""

    def __call__(self, z: Array) -> Array:
        return jnp.maximum(z, 0)

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~(upper <= 0)

    live_outputs = live_rows

    def pieces(self) -> tuple[Piece, ...]:
        return Piece(0, 0, -jnp.inf, 0), Piece(1, 0, 0, jnp.inf)

    def sparsity(self, lower: Array, upper: Array, weight_theta: Array | float) -> Array:
        """``max(0, upper)``."""
        return jnp.mean(jnp.maximum(upper, 0))

    def phase(self, region: Known) -> Array:
        return (region.center / width_with_zero(region))[None]


@jax.tree_util.register_dataclass
@activation
class ClippedReLUActivation(Elementwise):
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

    def sparsity(self, lower: Array, upper: Array, weight_theta: Array | float) -> Array:
        """``max(0, upper) + weight_theta max(0, theta - lower)``."""
        return jnp.mean(jnp.maximum(upper, 0) + weight_theta * jnp.maximum(self.theta - lower, 0))

    def phase(self, region: Known) -> Array:
        return (jnp.minimum(region.center, self.theta - region.center) / width_with_zero(region))[None]


@jax.tree_util.register_dataclass
@activation
class ClipActivation(Elementwise):
    """``min(max(z, low), high)``: hard tanh, ReLU6, and a maximum or a minimum with constants.

    Attributes:
        low: broadcasts to the activation; minus infinity where there is none.
        high: likewise, or infinity.
    """

    low: Array
    high: Array

    def __call__(self, z: Array) -> Array:
        return jnp.minimum(jnp.maximum(z, self.low.astype(z.dtype)), self.high.astype(z.dtype))

    def live_rows(self, lower: Array, upper: Array) -> Array:
        return ~((upper <= self.low) | (lower >= self.high) | (self.low >= self.high))

    live_outputs = live_rows

    def pieces(self) -> tuple[Piece, ...]:
        low = jnp.minimum(self.low, self.high)
        return Piece(0, low, -jnp.inf, low), Piece(1, 0, low, self.high), Piece(0, self.high, self.high, jnp.inf)

    def phase(self, region: Known) -> Array:
        lower, upper = region.box
        inside = jnp.minimum(region.center - self.low, self.high - region.center)
        return (jnp.minimum(inside, upper - lower) / jnp.maximum(upper - lower, 1e-12))[None]


def chord_gaps(activation: Activation, c: Array, lower: Array, upper: Array) -> Array:
    """How far an activation of each entry is from its chord at the cut of a box, times the coefficients."""
    at, width = activation.cut(lower, upper), upper - lower
    share = (at - lower) / jnp.where(width > 0, width, 1)
    chord = activation(lower) * (1 - share) + activation(upper) * share
    return jnp.where(width > 0, jnp.abs(c * (activation(at) - chord)), 0)


def width_with_zero(region: Known) -> Array:
    """The width of a box that is stretched to contain 0, not less than 1e-12."""
    lower, upper = region.box
    return jnp.maximum(jnp.maximum(upper, 0) - jnp.minimum(lower, 0), 1e-12)

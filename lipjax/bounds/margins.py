"""Worst-case logits over a region of features.

For a label y and a rival j let c = w_y - w_j be the difference of their rows of the last layer. The functions of a head
and a region give lower bounds of logits[y] - logits[j] over the region, one per class; the label's own entry is 0. They
take one example or a batch, with whatever leading axes the labels have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.floating_point import highest
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import length
from lipjax.networks.regions import Region


def batched(margins: Callable[..., Array]) -> Callable[..., Array]:
    """Margins of one example as a function of those and of batches: labels (...) and regions give (..., classes)."""

    @functools.wraps(margins)
    def of_any(head: Affine, region: Region, label: Array, *given: Array, **options: int) -> Array:
        if not jnp.ndim(label):
            return margins(head, region, label, *given, **options)

        def one(region: Region, label: Array, *given: Array) -> Array:
            return of_any(head, region, label, *given, **options)

        return jax.vmap(one)(region, jnp.asarray(label), *given)

    return of_any


@batched
def pairwise_lipschitz(head: Affine, region: Region, label: Array) -> Array:
    """``margin - radius ||I c||``, I the live features: the ball alone, one direction per rival (GloRo, [H21] Eq 5).

    Args:
        head: the last layer.
        region: features, with the leading axes of the labels; its ball is used.
        label: integers (...).

    Returns:
        Margins (..., classes).
    """
    margins, directions = pairs(head, region.center, label)
    masked = jnp.where(region.live.ravel()[None], directions, 0)
    return margins - region.ball * jax.vmap(length)(masked)


@batched
def lipschitz_margin(head: Affine, region: Region, label: Array, sigma: Array) -> Array:
    """``margin - sqrt(2) radius ||W I||``, I the live features: one direction-free constant for all rivals (LMT).

    Args:
        head: the last layer, W.
        region: features, with the leading axes of the labels; its ball is used.
        label: integers (...).
        sigma: norms (...) of the last layer over the live features, upper bounds if the margins are to be bounds.

    Returns:
        Margins (..., classes).

    Reference:
        [LMT] section 4.
    """
    logits = head(region.center).ravel()
    own = jnp.arange(logits.shape[0]) == jnp.asarray(label, int)
    return logits[label] - logits - jnp.where(own, 0, math.sqrt(2) * region.ball * sigma)


@batched
def box_and_ball(head: Affine, region: Region, label: Array, num_iters: int = 16) -> Array:
    """The smallest margin over the intersection of box and ball (BCP), by its dual.

    The minimiser of <c, d> over lo <= d <= hi, ||d|| <= radius is d(t) = clip(-t c, lo, hi) with ||d(t)|| = radius,
    or a corner of the box that lies in the ball. Reported is the largest of the corner's value, the ball's and

        g(t) = margin + <c, d(t)> + (||d(t)||^2 - radius^2) / (2 t),

    a lower bound for EVERY t > 0, so nothing depends on how well t has converged. Its gradient is that of g at
    constant t (envelope theorem).

    Args:
        head: the last layer.
        region: features, with the leading axes of the labels; box and ball are used, or the box alone where there is
            no ball.
        label: integers (...).
        num_iters: iterations that look for t.

    Returns:
        Margins (..., classes).

    Soundness:
        A lower bound of the margins over the region, up to rounding.

    Reference:
        [BCP] section 3.3; [H21] appendix.
    """
    _ = region.box  # raises where there is none
    margins, c = pairs(head, region.center, label)
    return margins + jax.vmap(lambda row: least_product(row, region, num_iters))(c)


def least_product(c: Array, region: Region, num_iters: int = 16) -> Array:
    """A lower bound of ``<c, a - center>`` over a region, for one direction c, raveled or shaped like it.

    See :func:`box_and_ball`; a region that is a ball alone, or all of one, gives ``-radius ||c||``.
    """
    c = c.ravel()
    if region.lower is None:
        return -region.ball * length(c)
    low, high = (bound.ravel() - region.center.ravel() for bound in region.box)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    corner = jnp.sum(jnp.minimum(c * low, c * high))
    if region.radius is None:
        return corner
    ball = -region.radius * length(c)
    # In units of the radius and of the largest entry of c: their squares may leave the range of float32.
    radius = jnp.where(region.radius == 0, 1, region.radius)
    largest = lax.stop_gradient(jnp.max(jnp.abs(c)))
    scale = jnp.where(largest == 0, 1, largest)
    c, low, high = c / scale, low / radius, high / radius
    t = lax.stop_gradient(_multiplier(c, low, high, num_iters))
    d = jnp.clip(-t * c, low, high)
    dual = radius * scale * (jnp.sum(c * d) + (jnp.sum(d**2) - 1) / (2 * t))
    return jnp.maximum(jnp.maximum(dual, ball), corner)


def _multiplier(c: Array, low: Array, high: Array, num_iters: int) -> Array:
    """The t > 0 with ||clip(-t c, low, high)|| = 1.

    With the clipped coordinates held, t^2 = (1 - sum of their squares) / (sum of c^2 over the others). From the
    unclipped t this rises to the solution and reaches it in finitely many steps, the set of clipped coordinates only
    growing.
    """

    def solve(free: Array, clipped_square: Array | float, fallback: Array | float) -> Array:
        square = jnp.sum(jnp.where(free, c**2, 0))
        rest = jnp.maximum(1 - clipped_square, 0)
        solvable = (square > 0) & (rest > 0)
        return jnp.where(solvable, jnp.sqrt(rest / jnp.where(solvable, square, 1)), fallback)

    def step(_: int, t: Array) -> Array:
        d = -t * c
        free = (d > low) & (d < high)
        clipped = jnp.where(free, 0, jnp.clip(d, low, high))
        return jnp.maximum(t, solve(free, jnp.sum(clipped**2), t))

    return lax.fori_loop(0, num_iters, step, jnp.asarray(solve(jnp.ones(c.shape, bool), 0.0, 1.0), c.dtype))


def worst_logits(logits: Array, margins: Array, label: Array) -> Array:
    """The logits with every rival raised to its worst case: logits[y] - margins[j]; the label's own is unchanged.

    Args:
        logits: (..., classes).
        margins: worst-case margins (..., classes).
        label: integers (...).
    """
    return jnp.take_along_axis(logits, jnp.asarray(label)[..., None], axis=-1) - margins


def worst_margin(margins: Array, label: Array) -> Array:
    """The least margin over the rivals of the label: from (..., classes) to (...)."""
    return -highest(jnp.where(own_class(margins, label), -jnp.inf, -margins), axis=-1)


def own_class(logits: Array, label: Array) -> Array:
    """Boolean (..., classes): which class is the label, for logits or margins (..., classes) and labels (...)."""
    classes = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    return classes == jnp.asarray(label, int)[..., None]


def pairs(head: Affine, features: Array, label: Array) -> tuple[Array, Array]:
    """Clean margins (classes,) and directions c (classes, features) of a label against each class."""
    logits = head(features).ravel()
    rows = head.matrix()
    return logits[label] - logits, rows[label][None] - rows

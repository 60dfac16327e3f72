"""Regions: sets of activations that contain everything reachable from the eps-ball around one input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
    """A set of activations of one layer, for one example: the intersection of a box and an l2 ball.

    An absent part is ``None`` and is not computed: a region without a box is the ball alone (GloRo, LMT), a region
    without a radius is the box alone (IBP).

    Attributes:
        lower: element-wise lower bounds, shaped like ``center``, or None.
        upper: element-wise upper bounds, shaped like ``center``, or None.
        center: the unperturbed activation.
        radius: scalar, l2 radius of the ball around ``center``, or None.
        live: boolean, shaped like ``center``: the coordinates that can vary over the region.
        finite: boolean scalar: every bound so far was finite. A certificate requires it.
    """

    lower: Array | None
    upper: Array | None
    center: Array
    radius: Array | None
    live: Array
    finite: Array

    def reshape(self, shape: tuple[int, ...]) -> Region:
        """The same region with its coordinates arranged in another shape, in C order."""
        arrays = {name: getattr(self, name) for name in ("lower", "upper", "center", "live")}
        return dataclasses.replace(
            self, **{name: None if array is None else array.reshape(shape) for name, array in arrays.items()}
        )

    @property
    def box(self) -> tuple[Array, Array]:
        """Lower and upper bounds. Raises ValueError where the region is a ball alone."""
        if self.lower is None or self.upper is None:
            raise ValueError("this region has no box: propagate one that was not made with without_box()")
        return self.lower, self.upper

    @property
    def ball(self) -> Array:
        """The radius. Raises ValueError where the region is a box alone."""
        if self.radius is None:
            raise ValueError("this region has no ball: propagate one that was not made with without_ball()")
        return self.radius

    def without_box(self) -> Region:
        """The ball alone."""
        return dataclasses.replace(self, lower=None, upper=None)

    def without_ball(self) -> Region:
        """The box alone."""
        return dataclasses.replace(self, radius=None)


def l2_ball(x: Array, eps: Array | float) -> Region:
    """The full l2 ball of radius ``eps`` around one input, with the smallest box that contains it.

    The ball is not cut to the pixel range [0, 1], so what is proven holds for every point of it.

    Args:
        x: one input, any shape, in [0, 1] pixels.
        eps: scalar radius, in the same pixel scale.

    Returns:
        A region in which every coordinate is live.

    Raises:
        TypeError: x is not float32 or float64; any narrower type would round eps and the box inwards.
        ValueError: eps is not a scalar, or known and negative. A traced negative eps makes the region not finite.
    """
    check_pixels(x)
    if jnp.ndim(eps):
        raise ValueError(f"eps has shape {jnp.shape(eps)}; expected one radius for the whole batch (vmap over others)")
    if not isinstance(eps, jax.core.Tracer) and eps < 0:
        raise ValueError(f"eps is {eps}; expected a radius of at least 0, in [0, 1] pixels")
    eps = jnp.where(jnp.asarray(eps, x.dtype) < 0, jnp.nan, jnp.asarray(eps, x.dtype))
    lower, upper = x - eps, x + eps
    return Region(lower, upper, x, eps, jnp.ones(x.shape, bool), all_finite(lower, upper))


def check_pixels(x: Array) -> None:
    """Raises TypeError unless x is float32 or float64."""
    if jnp.result_type(x) not in (jnp.float32, jnp.float64):
        raise TypeError(f"x has type {jnp.result_type(x)}; expected floating-point pixels in [0, 1], float32 or wider")


def all_finite(*arrays: Array | None) -> Array:
    """Boolean scalar: no entry of the arrays that are present is NaN or infinite."""
    finite = jnp.asarray(True)
    for array in arrays:
        if array is not None:
            finite = finite & jnp.all(jnp.isfinite(array))
    return finite

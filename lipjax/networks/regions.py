"""Regions: sets of activations that contain everything reachable from the eps-ball around one input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Which inputs a claim is about: the whole l2 ball, or what of it lies in the pixel range [0, 1].
DOMAINS = ("ball", "pixels")


class Known:
    """What is known of a value: a box and a ball around its center, of which one may be absent."""

    lower: Array | None
    upper: Array | None
    center: Array
    radius: Array | None

    @property
    def box(self) -> tuple[Array, Array]:
        """Lower and upper bounds. Raises ValueError where there is a ball alone."""
        if self.lower is None or self.upper is None:
            raise ValueError("this region has no box: propagate one that was not made with without_box()")
        return self.lower, self.upper

    @property
    def ball(self) -> Array:
        """The radius. Raises ValueError where there is a box alone."""
        if self.radius is None:
            raise ValueError("this region has no ball: propagate one that was not made with without_ball()")
        return self.radius


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region(Known):
    """A set of activations at one place of a network: the intersection of a box and an l2 ball.

    Of one example; with a leading axis (B,) on every array, of a batch. An absent part is ``None`` and is not computed:
    a region without a box is the ball alone (GloRo, LMT), a region without a radius is the box alone (IBP).

    Attributes:
        lower: element-wise lower bounds, shaped like ``center``, or None.
        upper: element-wise upper bounds, shaped like ``center``, or None.
        center: the unperturbed activation.
        radius: scalar, l2 radius of the ball around ``center``, or None.
        live: boolean, shaped like ``center``: the coordinates that can vary over the region.
        finite: boolean scalar: every bound so far was finite. A certificate requires it.
        domain: of a first region, which inputs it holds: one of :data:`DOMAINS`.
    """

    lower: Array | None
    upper: Array | None
    center: Array
    radius: Array | None
    live: Array
    finite: Array
    domain: str = dataclasses.field(default="ball", metadata={"static": True})

    def reshape(self, shape: tuple[int, ...]) -> Region:
        """The same region of one example with its coordinates arranged in another shape, in C order."""
        return _arranged(self, ("lower", "upper", "center", "live"), shape)

    def without_box(self) -> Region:
        """The ball alone."""
        return dataclasses.replace(self, lower=None, upper=None)

    def without_ball(self) -> Region:
        """The box alone."""
        return dataclasses.replace(self, radius=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preactivation(Known):
    """What is known before an activation: a box of all rows, and a ball of those that matter to the activation.

    Of one example; with a leading axis (B,) on every array, of a batch.

    Attributes:
        lower: element-wise lower bounds, shaped like ``center``, or None.
        upper: element-wise upper bounds, shaped like ``center``, or None.
        center: the unperturbed pre-activation.
        rows: boolean, shaped like ``center``: the rows that matter. All others change no output over the box.
        radius: scalar: the rows that matter, taken together, are no farther than this from their center; or None.
        finite: boolean scalar: every bound so far was finite.
    """

    lower: Array | None
    upper: Array | None
    center: Array
    rows: Array
    radius: Array | None
    finite: Array

    def reshape(self, shape: tuple[int, ...]) -> Preactivation:
        """The same of one example with its coordinates arranged in another shape, in C order."""
        return _arranged(self, ("lower", "upper", "center", "rows"), shape)


def cut_by_ball(lower: Array, upper: Array, center: Array, reach: Array) -> tuple[Array, Array]:
    """A box cut by a ball that no coordinate leaves by more than its reach: the tighter of both in each coordinate."""
    return jnp.maximum(lower, center - reach), jnp.minimum(upper, center + reach)


def l2_ball(x: Array, eps: Array | float, domain: str = "ball") -> Region:
    """The l2 balls of radius ``eps`` around a batch of inputs, each with the smallest box that contains it.

    Args:
        x: inputs (B, ...) in [0, 1] pixels.
        eps: radius, scalar or one per input (B,), in the same pixel scale.
        domain: ``"ball"``, the full ball, which reaches beyond the pixel range; or ``"pixels"``, what of it lies in
            [0, 1], where what is proven holds for images alone.

    Returns:
        Regions in which every coordinate is live.

    Raises:
        TypeError: x is not float32 or float64; any narrower type would round eps and the box inwards.
        ValueError: eps is neither a scalar nor (B,), or known and negative (a traced negative eps makes the region not
            finite); an unknown domain, or known inputs outside of the pixel range that it is cut to.
    """
    check_pixels(x)
    check_domain(x, domain)
    check_eps(x, eps)
    eps = jnp.broadcast_to(jnp.asarray(eps, x.dtype), x.shape[:1])
    eps = jnp.where(eps < 0, jnp.nan, eps)
    around = eps.reshape(eps.shape + (1,) * (x.ndim - 1))
    lower, upper = x - around, x + around
    axes = tuple(range(1, x.ndim))
    finite = jnp.all(jnp.isfinite(lower) & jnp.isfinite(upper), axis=axes)
    if domain == "pixels":
        lower, upper = jnp.maximum(lower, 0), jnp.minimum(upper, 1)
        finite = finite & jnp.all((x >= 0) & (x <= 1), axis=axes)  # a center outside of its box would prove anything
    return Region(lower, upper, x, eps, jnp.ones(x.shape, bool), finite, domain)


def check_eps(x: Array, eps: Array | float) -> None:
    """Raises ValueError unless eps is one radius, or one per input of a batch x (B, ...), and at least 0 if known."""
    if jnp.shape(eps) not in ((), jnp.shape(x)[:1]):
        raise ValueError(f"eps has shape {jnp.shape(eps)}; expected one radius, or one per input {jnp.shape(x)[:1]}")
    if not isinstance(eps, jax.core.Tracer):
        wrong = np.extract(~(np.asarray(eps) >= 0), eps)
        if wrong.size:
            raise ValueError(f"eps is {wrong[0]}; expected a finite radius of at least 0, in [0, 1] pixels")


def check_domain(x: Array, domain: str) -> None:
    """Raises ValueError unless the domain is known, and known inputs lie in it."""
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r} is not known; give one of {', '.join(DOMAINS)}")
    if domain == "pixels" and not isinstance(x, jax.core.Tracer):
        values = np.asarray(x)
        outside = values[~((values >= 0) & (values <= 1))]
        if outside.size:
            raise ValueError(
                f"x holds {outside[0]:g}, but domain='pixels' is about inputs in [0, 1]; give images as pixels / 255, "
                "or domain='ball'"
            )


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


def _arranged(region: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    arrays = {name: getattr(region, name) for name in names}
    changed = {name: None if array is None else array.reshape(shape) for name, array in arrays.items()}
    return dataclasses.replace(region, **changed)

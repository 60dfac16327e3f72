"""Linear maps, given by their products with a vector, and lengths of vectors of any magnitude."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.masks import kept, weighted


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear map between arrays of two shapes, given by its products with a vector.

    Attributes:
        matvec: ``a -> W a``, from ``in_shape`` to ``out_shape``.
        rmatvec: ``z -> W^T z``, from ``out_shape`` to ``in_shape``.
        in_shape: shape of the input side.
        out_shape: shape of the output side.
        dtype: type of the vectors.
        in_mask: boolean, the columns that are kept, or weights of them; or None for all.
        out_mask: boolean, the rows that are kept, or weights of them; or None for all.
    """

    matvec: Callable[[Array], Array]
    rmatvec: Callable[[Array], Array]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: Any = jnp.float32
    in_mask: Array | None = None
    out_mask: Array | None = None

    def masked(self, out_mask: Array, in_mask: Array) -> LinearMap:
        """``I_out W I_in``: the rows and the columns outside of the masks dropped, or multiplied by their weights."""
        return LinearMap(
            lambda a: weighted(out_mask, self.matvec(weighted(in_mask, a))),
            lambda z: weighted(in_mask, self.rmatvec(weighted(out_mask, z))),
            self.in_shape,
            self.out_shape,
            self.dtype,
            in_mask,
            out_mask,
        )

    def divided(self, scale: Array | float) -> LinearMap:
        """The map divided by a power of two, which rounds nothing: times its inverse, because that is faster."""
        matvec, rmatvec, inverse = self.matvec, self.rmatvec, 1 / scale
        return dataclasses.replace(self, matvec=lambda a: matvec(a) * inverse, rmatvec=lambda z: rmatvec(z) * inverse)

    def from_smaller_side(self) -> LinearMap:
        """The map or its transpose, whichever takes the shorter vectors. Both have the same singular values."""
        if math.prod(self.out_shape) < math.prod(self.in_shape):
            return LinearMap(
                self.rmatvec, self.matvec, self.out_shape, self.in_shape, self.dtype, self.out_mask, self.in_mask
            )
        return self

    def image(self, vector: Array) -> Array:
        """``W u`` for the unit vector u along the kept part of ``vector``; zero for no vector. No gradient."""
        part = vector if self.in_mask is None else weighted(kept(self.in_mask), vector)
        return lax.stop_gradient(self.matvec(unit(part)))


def length(vector: Array) -> Array:
    """l2 norm, for any finite entries; its gradient at zero is zero."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(vector)))
    scale = jnp.where(largest == 0, 1, largest)
    square = jnp.sum((vector / scale) ** 2)
    positive = square > 0
    return scale * jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), square)


def unit(vector: Array) -> Array:
    """The vector divided by its l2 norm; zero stays zero, and NaN or infinity become NaN.

    It is divided by its largest entry first: squares leave the range of float32 beyond 1e19 and below 1e-19, and a
    norm that is lost there would pass for a layer that is constant.
    """
    largest = jnp.max(jnp.abs(vector))
    scaled = vector / jnp.where(largest == 0, 1, largest)
    square = jnp.sum(scaled**2)
    return scaled * lax.rsqrt(jnp.where(largest == 0, 1, square))


def lengths(entries: Array, sums: Callable[[Array], Array]) -> Array:
    """Roots of sums of squares of entries; squares of tiny and huge ones leave the range of float32."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(entries)))
    scale = jnp.where(largest == 0, 1, largest)
    squares = sums((entries / scale) ** 2)
    positive = squares > 0
    return scale * jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), squares)

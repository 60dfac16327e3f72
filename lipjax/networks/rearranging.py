"""Layers that move and add entries: every entry of their matrix is 0 or 1, and so their facts are exact and cheap."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import highest
from lipjax.networks.layers import Affine, Shape, layer, static
from lipjax.networks.masks import weighted


@jax.tree_util.register_dataclass
@layer
class Gather(Affine):
    """Each output is one entry of the input, or zero: transposes, slices, padding, reversals, and copies side by side.

    Attributes:
        places: int32 numbers as bytes, one per output in C order: of the raveled input, or -1 for zero.
    """

    places: bytes = static()

    @property
    def index(self) -> np.ndarray:
        """The places as numbers."""
        return np.frombuffer(self.places, np.int32)

    @property
    def copies(self) -> int:
        """How many outputs take the same entry, at most."""
        taken = self.index[self.index >= 0]
        return int(np.bincount(taken).max(initial=0)) if taken.size else 0

    def linear(self, a: Array) -> Array:
        taken = jnp.take(a.ravel(), np.maximum(self.index, 0), mode="clip")
        return jnp.where(self.index < 0, jnp.zeros_like(taken), taken).reshape(self.out_shape)

    @property
    def terms(self) -> int:
        return 1

    @property
    def adjoint_terms(self) -> int:
        return max(1, self.copies)

    def adjoint(self) -> Callable[[Array], Array]:
        size = math.prod(self.in_shape)
        places = np.where(self.index < 0, size, self.index)
        return lambda z: jnp.zeros(size, z.dtype).at[places].add(z.ravel(), mode="drop").reshape(self.in_shape)

    def absolute(self, r: Array) -> Array:
        return self.linear(r)

    def absolute_adjoint(self, s: Array) -> Array:
        return self.adjoint()(s)

    def row_norms(self, columns: Array) -> Array:
        return self.linear(columns.astype(self.dtype))

    def row(self, index: Array | int) -> Array:
        place = jnp.asarray(self.index)[index]
        return jnp.where(jnp.arange(math.prod(self.in_shape)) == place, jnp.ones((), self.dtype), 0)

    def known_norm(self, rows: Array, columns: Array) -> Array:
        squares = self.adjoint()(weighted(rows, jnp.ones(self.out_shape, self.dtype)) ** 2)
        return jnp.sqrt(highest((weighted(columns, jnp.ones(self.in_shape, self.dtype)) ** 2 * squares).ravel()))

    def whole_norm(self) -> float:
        return math.nextafter(math.sqrt(self.copies), math.inf)

    def frozen(self) -> Affine:
        return self


def gather(places: np.ndarray, in_shape: Shape, dtype: object = jnp.float32) -> Gather:
    """The layer whose outputs are the entries of a raveled input at some places (-1 for zero), shaped like those."""
    zeros = jnp.zeros(places.shape, dtype)
    raw = np.ascontiguousarray(places, np.int32).tobytes()
    return Gather(bias=zeros, in_shape=tuple(in_shape), out_shape=tuple(places.shape), places=raw)


@jax.tree_util.register_dataclass
@layer
class SumOver(Affine):
    """The sum over some axes.

    Attributes:
        axes: that are summed over.
    """

    axes: tuple[int, ...] = static()

    def linear(self, a: Array) -> Array:
        return jnp.sum(a, axis=self.axes)

    @property
    def terms(self) -> int:
        return math.prod(self.in_shape[axis] for axis in self.axes)

    @property
    def adjoint_terms(self) -> int:
        return 1

    def adjoint(self) -> Callable[[Array], Array]:
        return lambda z: jnp.broadcast_to(jnp.expand_dims(z, self.axes), self.in_shape)

    def absolute(self, r: Array) -> Array:
        return self.linear(r)

    def absolute_adjoint(self, s: Array) -> Array:
        return self.adjoint()(s)

    def row_norms(self, columns: Array) -> Array:
        squares = self.linear(columns.astype(self.dtype) ** 2)
        positive = squares > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), squares)

    def known_norm(self, rows: Array, columns: Array) -> Array:
        return highest(weighted(rows, self.row_norms(columns)).ravel())  # no two rows share a column

    def whole_norm(self) -> float:
        return math.nextafter(math.sqrt(self.terms), math.inf)

    def frozen(self) -> Affine:
        return self


def sum_over(axes: tuple[int, ...], in_shape: Shape, dtype: object = jnp.float32) -> SumOver:
    """The layer that sums over some axes of its input."""
    out_shape = tuple(size for axis, size in enumerate(in_shape) if axis not in axes)
    zeros = jnp.zeros(out_shape, dtype)
    return SumOver(bias=zeros, in_shape=tuple(in_shape), out_shape=out_shape, axes=tuple(axes))


def composed_places(first: Gather, second: Gather) -> Gather:
    """One gather behind another as one."""
    before, after = first.index, second.index
    places = np.where(after < 0, -1, before[np.maximum(after, 0)])
    return gather(places.reshape(second.out_shape), first.in_shape, first.dtype)

"""Layers whose norm is known by construction."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.layers import Affine, layer, static
from lipjax.networks.masks import kept


@jax.tree_util.register_dataclass
@layer
class Known(Affine):
    """Another layer, and what its parametrization says of its norm: that much, up to rounding.

    Training takes the norm as it is. A certificate does not rest on it: inference multiplies numbers, which are bounded
    like those of any other layer (:meth:`frozen`); what rounding has left is so in its norms.

    Attributes:
        inner: the other layer.
        norm: an upper bound of its norm in exact arithmetic.
    """

    inner: Affine
    norm: float = static()

    alone = True

    def linear(self, a: Array) -> Array:
        return self.inner.linear(a)

    @property
    def terms(self) -> int:
        return self.inner.terms

    @property
    def adjoint_terms(self) -> int:
        return self.inner.adjoint_terms

    def adjoint(self) -> Callable[[Array], Array]:
        return self.inner.adjoint()

    def matrix(self) -> Array:
        return self.inner.matrix()

    def row(self, index: Array | int) -> Array:
        return self.inner.row(index)

    def absolute(self, r: Array) -> Array:
        return self.inner.absolute(r)

    def absolute_adjoint(self, s: Array) -> Array:
        return self.inner.absolute_adjoint(s)

    def row_norms(self, columns: Array) -> Array:
        return self.inner.row_norms(columns)

    def magnitude_row_norms(self, columns: Array) -> Array:
        return self.inner.magnitude_row_norms(columns)

    def transform_error(self, unit: float) -> Array | None:
        return self.inner.transform_error(unit)

    def partial(self, r: Array) -> Array:
        return self.inner.partial(r)

    def flushed(self, r: Array) -> Array:
        return self.inner.flushed(r)

    def known_norm(self, rows: Array, columns: Array) -> Array:
        anything = jnp.any(kept(rows)) & jnp.any(kept(columns))
        return jnp.where(anything, jnp.asarray(self.norm, self.dtype), 0)

    def whole_norm(self) -> float:
        return self.inner.whole_norm()

    def frozen(self) -> Affine:
        return self.inner.biased(self.bias).frozen()


def known(inner: Affine, norm: float = 1.0) -> Known:
    """A layer with a norm that is known by construction."""
    return Known(bias=inner.bias, in_shape=inner.in_shape, out_shape=inner.out_shape, inner=inner, norm=norm)

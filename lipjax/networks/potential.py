"""Convex potential layers: residual layers that are 1-Lipschitz as a whole, though their parts are not."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import SMALLEST32, UNIT32, gamma
from lipjax.networks.activations import Activation, IdentityActivation, activation
from lipjax.networks.layers import FFT_ROUNDING, Affine
from lipjax.networks.linear_maps import length
from lipjax.networks.regions import Known, Region


@jax.tree_util.register_dataclass
@activation
class ConvexPotentialActivation(Activation):
    """``x - 2 A^T relu(A x + b)`` for an affine layer with ``||A|| <= 1``.

    Between two points it is ``I - 2 A^T D A`` with a diagonal D of slopes from 0 to 1, a symmetric matrix with
    eigenvalues from ``1 - 2 ||A||^2`` to 1: so its Lipschitz constant is at most ``max(1, 2 ||A||^2 - 1)``. It takes
    whole regions, as an activation does. The dual knows its outputs by their own region alone.

    Attributes:
        layer: A and b; its input has the shape of x.
        constant: an upper bound of the Lipschitz constant, scalar. By construction 1; of the numbers that inference
            multiplies, :meth:`frozen` finds it.

    Reference:
        Meunier et al., A Dynamical System Perspective for Lipschitz Neural Networks, ICML 2022; Araujo et al., A
        Unified Algebraic Perspective on Lipschitz Neural Networks, ICLR 2023 (SLL: A is T^(-1/2) W^T).
    """

    layer: Affine
    constant: Array

    mixes = True

    @property
    def lipschitz(self) -> Array:
        return self.constant

    def __call__(self, z: Array) -> Array:
        return z - 2 * self.layer.adjoint()(jnp.maximum(self.layer(z), 0))

    def frozen(self) -> ConvexPotentialActivation:
        """With the layer as inference computes it, and the constant that follows from its norm, in float64 on the host.

        Where all of A is not known to be small, ``max(1, 2 ||A||^2 - 1)`` is as large as its norm says.
        """
        layer = self.layer.frozen()
        norm = layer.whole_norm()
        if math.isinf(norm):
            matrix = np.asarray(layer.matrix(), np.float64)
            finite = np.isfinite(matrix).all()
            norm = float(np.linalg.norm(matrix, 2)) * (1 + FFT_ROUNDING) if finite else math.inf
        bound = 2 * norm * norm * (1 + FFT_ROUNDING) - 1
        bound = math.inf if math.isnan(bound) else max(1.0, bound)  # a norm that is not a number is no bound
        constant = np.float32(bound)
        if float(constant) < bound:  # as float32 they would be equal
            constant = np.nextafter(constant, np.float32(np.inf))
        return dataclasses.replace(self, layer=layer, constant=jnp.asarray(constant))

    def box(self, lower: Array, upper: Array) -> tuple[Array, Array]:
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        center, reach = self.layer(middle), self.layer.absolute(half)
        low, high = (jnp.maximum(bound, 0) for bound in (center - reach, center + reach))
        moved = 2 * self.layer.adjoint()((low + high) / 2)
        spread = 2 * self.layer.absolute_adjoint((high - low) / 2)
        return lower - moved - spread, upper - moved + spread

    def errors(self, before: Known) -> Array:
        return self._rounded(before)[0]

    def error_norm(self, before: Known, errors: Array) -> Array:
        return self._rounded(before)[1]

    def _rounded(self, before: Known) -> tuple[Array, Array]:
        """How far each output may be off, and all of them in the l2 norm.

        What A z rounds is passed on by the exact A^T, whose norm is small where that of ``|A^T|`` is not; what the
        product with A^T rounds is relative to ``|A^T| relu(A z + b)``, of which the center is known. Its sum may begin
        with x, which is rounded as often as the products then.
        """
        layer = self.layer
        if layer.transform_error(UNIT32) is not None:
            raise TypeError(f"{type(layer).__name__} is computed by transforms; a convex potential has no bound of it")
        every = jnp.ones(layer.in_shape, bool)
        norm, magnitudes = jnp.sqrt((self.constant + 1) / 2), layer.absolute_norm()  # of A and |A|, from above
        (lower, upper), center = before.box, before.center
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        ball = length(jnp.maximum(upper - center, center - lower))
        if before.radius is not None:
            ball = jnp.minimum(ball, before.radius)

        around = layer.absolute(jnp.abs(center)) + jnp.abs(layer.shift)
        sums = layer.absolute(largest) + jnp.abs(layer.shift)
        sums = jnp.minimum(sums, around + layer.magnitude_row_norms(every) * ball)
        flushed = SMALLEST32 * layer.flushed(largest)
        relative = gamma(layer.terms + 1, UNIT32)
        within = relative * sums + flushed
        within_all = relative * jnp.minimum(length(sums), length(around) + magnitudes * ball) + length(flushed)

        at_center = layer(center)
        hidden = at_center + layer.row_norms(every) * ball
        hidden = jnp.maximum(jnp.minimum(hidden, layer((lower + upper) / 2) + layer.absolute((upper - lower) / 2)), 0)
        at_center = jnp.maximum(at_center, 0)
        hidden_all = jnp.minimum(length(hidden), length(at_center) + norm * ball)

        relative = gamma(layer.adjoint_terms + 4, UNIT32)
        products = layer.absolute_adjoint(hidden + within)
        products_all = length(layer.absolute_adjoint(at_center)) + magnitudes * (norm * ball + within_all)
        moved = jnp.minimum(layer.absolute_adjoint(within), norm * within_all) + relative * products
        moved_all = norm * within_all + relative * jnp.minimum(length(products), products_all)

        tiny = SMALLEST32 * (layer.absolute_adjoint(jnp.ones_like(hidden)) + layer.adjoint_terms + 2)
        tiny = 4 * (1 + jnp.max(sums)) * tiny
        size = length(center) + ball
        of_sum = 2 * UNIT32 * (2 * products + 2 * moved) + (relative + 2 * UNIT32) * largest
        of_sum_all = 2 * UNIT32 * (2 * norm * hidden_all + 2 * moved_all) + (relative + 2 * UNIT32) * size
        return 2 * moved + of_sum + tiny, 2 * moved_all + of_sum_all + length(tiny)

    def largest(self, lower: Array, upper: Array) -> Array:
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        # Sums of more numbers than the outputs are count as so much larger.
        more = max(1.0, (self.layer.terms + self.layer.adjoint_terms) / lower.size)
        return more * (largest + self._magnitudes(largest)[1])

    def partial(self, lower: Array, upper: Array) -> Array:
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        _, added = self._magnitudes(largest)
        hidden = self.layer.partial(largest) + jnp.abs(self.layer.shift)
        return jnp.concatenate([hidden.ravel(), (largest + added).ravel()])

    def _magnitudes(self, largest: Array) -> tuple[Array, Array]:
        """Nothing that is summed up at the ReLU is larger, nor in what is subtracted."""
        hidden = self.layer.absolute(largest) + jnp.abs(self.layer.shift)
        return hidden, 2 * self.layer.absolute_adjoint(hidden)

    def minimum(self, c: Array, g: Array, weight: Array, region: Region) -> tuple[Array, Array]:
        """A lower bound: that of the outputs over their own region, and that of ``-<g, z>`` over the box.

        The minimiser is as far from the center as the outputs say, where g is zero.
        """
        lower, upper = region.box
        low, high = self.box(lower, upper)
        outputs = dataclasses.replace(region, lower=low, upper=high, center=self(region.center))
        of_outputs, s = IdentityActivation().minimum(c, jnp.zeros_like(c), weight / self.constant**2, outputs)
        z = jnp.where(g > 0, upper, jnp.where(g < 0, lower, region.center))
        as_far = region.center + (s - outputs.center) / self.constant
        return of_outputs - jnp.sum(g * z), jnp.where(g == 0, as_far, z)

    def feeding(self, c: Array) -> Array:
        return jnp.zeros((1, *self.layer.in_shape), c.dtype)


def convex_potential(layer: Affine) -> ConvexPotentialActivation:
    """The layer ``x - 2 A^T relu(A x + b)`` of an affine one whose norm is at most 1 by construction."""
    return ConvexPotentialActivation(layer, jnp.ones((), layer.dtype))

"""Convolutions of images on a torus, by their Fourier symbol: one small matrix for each frequency.

Their kernels may be as large as the image, as those of orthogonal convolutions are. What a computation by Fourier
transforms rounds is bounded in the l2 norm, not entry by entry as for dot products; see
:meth:`~lipjax.networks.layers.Affine.transform_error`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.floating_point import gamma, highest
from lipjax.networks.layers import FFT_ROUNDING, HIGHEST, Affine, layer
from lipjax.networks.linear_maps import length

SLACK = 1e-3  # relative, of a bound of errors: what is neglected in it is smaller


@jax.tree_util.register_dataclass
@layer
class Circular(Affine):
    """A convolution without borders: at each frequency, outputs are a matrix times inputs.

    ``W = F^-1 diag(S_f) F`` for the Fourier transform F of each channel, so ``||W||`` is the largest ``||S_f||``.

    Attributes:
        symbol: real and imaginary parts of the matrices, shape (2, H, W // 2 + 1, channels in, channels out), at the
            frequencies that :func:`jax.numpy.fft.rfft2` gives. Where those of a pair are not conjugate to each other,
            their mean acts, whose norm is not larger.
    """

    symbol: Array

    alone = True

    def linear(self, a: Array) -> Array:
        transformed = jnp.fft.rfft2(a, axes=(0, 1))
        parts = jnp.concatenate([transformed.real, transformed.imag], axis=-1)
        products = jnp.einsum("hwi,hwio->hwo", parts, self._matrices, precision=HIGHEST)
        real, imaginary = jnp.split(products, 2, axis=-1)
        return jnp.fft.irfft2(jax.lax.complex(real, imaginary), s=self.in_shape[:2], axes=(0, 1))

    @property
    def _matrices(self) -> Array:
        """The symbol as real matrices (H, W // 2 + 1, 2 in, 2 out): XLA has no fast complex products on a CPU."""
        real, imaginary = self.symbol
        above, below = jnp.concatenate([real, imaginary], axis=-1), jnp.concatenate([-imaginary, real], axis=-1)
        return jnp.concatenate([above, below], axis=-2)

    @property
    def kernel(self) -> Array:
        """The convolution's kernel (H, W, channels in, channels out), as large as the image."""
        return jnp.fft.irfft2(jax.lax.complex(*self.symbol), s=self.in_shape[:2], axes=(0, 1))

    @property
    def terms(self) -> int:
        """So many products in one sum round no less than the transforms and products here, relative to ``||W||``."""
        return math.ceil(2 * self._steps + self._products**1.5) + 1

    @property
    def adjoint_terms(self) -> int:
        return self.terms

    @property
    def _products(self) -> int:
        """The most products that are summed up at one frequency, on the way there or back, and two more."""
        return 2 * max(self.in_shape[-1], self.out_shape[-1]) + 2

    @property
    def _steps(self) -> float:
        """What one transform rounds, in unit roundoffs relative to its l2 norm; see :meth:`transform_error`."""
        height, width = self.in_shape[:2]
        return sum(map(_step, (*_prime_factors(height), *_prime_factors(width), 2, 2)))

    def absolute(self, r: Array) -> Array:
        kernel = jnp.abs(self.kernel)
        rows, columns = jnp.sum(kernel, axis=(0, 1, 2)), jnp.sum(kernel, axis=(0, 1, 3))
        # At least || |W| r ||: by the Schur test, with a mean that is no less than the root of the product.
        largest = (jnp.max(rows) + jnp.max(columns)) / 2 * length(r)
        return jnp.maximum(_of(kernel, self).linear(r), 0) + FFT_ROUNDING * largest

    def absolute_adjoint(self, s: Array) -> Array:
        # The convolution with the kernel mirrored, its channels exchanged.
        kernel = jnp.roll(jnp.flip(self.kernel, (0, 1)), (1, 1), (0, 1)).swapaxes(2, 3)
        return circular(kernel, jnp.zeros(self.in_shape[-1], self.dtype), self.out_shape).absolute(s)

    def row_norms(self, columns: Array) -> Array:
        squares = self.kernel**2
        found = _of(squares, self).linear(columns.astype(self.dtype) ** 2)
        whole = jnp.sum(squares, axis=(0, 1, 2)) * jnp.max(columns.astype(self.dtype)) ** 2
        # The transforms are off by a share of all squares, not of those that are left.
        found = jnp.maximum(found, 0) + FFT_ROUNDING * jnp.max(whole)
        positive = found > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, found, 1)), found)

    def transform_error(self, unit: float) -> Array:
        """Both transforms, each with a radix-p step for each prime factor p of the image's sides, and the products.

        A step is a transform of p numbers by dot products, or better, and a multiplication by roots of unity that are
        correctly rounded. Packing real numbers counts as two more steps of radix 2.

        Reference:
            Higham, Accuracy and Stability of Numerical Algorithms, Theorem 24.2.
        """
        of_transform = gamma(math.ceil(self._steps), unit)
        matrices, squares = self._matrices, jnp.sum(self.symbol**2, axis=(0, 3, 4))
        gram = jnp.einsum("hwio,hwjo->hwij", matrices, matrices, precision=HIGHEST)
        norm = jnp.sqrt(highest(jnp.sum(jnp.abs(gram), axis=-1).ravel()))  # at least ||W||, by the Schur test
        products = gamma(self._products, unit) * jnp.sqrt(2 * highest(squares.ravel()))
        return (2 * of_transform * norm + products) * (1 + of_transform) ** 2 * (1 + SLACK)

    def partial(self, r: Array) -> Array:
        sums = self.in_shape[0] * self.in_shape[1] * (1 + jnp.sum(jnp.abs(self.symbol))) * jnp.sum(r)
        return jnp.broadcast_to(sums, self.out_shape)

    def flushed(self, r: Array) -> Array:
        # Each of the numbers on the way may lose as much once, and is then multiplied and added up like the others.
        numbers = math.prod(self.in_shape) + math.prod(self.out_shape)
        steps = 8 * (self.terms + numbers.bit_length())
        return jnp.broadcast_to(
            steps * numbers * (2 + jnp.sum(jnp.abs(self.symbol))) * (1 + jnp.max(r)), self.out_shape
        )

    def whole_norm(self) -> float:
        real, imaginary = np.asarray(self.symbol, np.float64)
        if not (np.isfinite(real).all() and np.isfinite(imaginary).all()):
            return math.inf
        return float(np.linalg.norm(real + 1j * imaginary, ord=2, axis=(2, 3)).max()) * (1 + FFT_ROUNDING)

    def frozen(self) -> Affine:
        return self


def circular(kernel: Array, bias: Array, in_shape: tuple[int, int, int]) -> Circular:
    """The circular convolution ``y[p] = sum over t of x[p - t] kernel[t]``, with places modulo the image.

    Args:
        kernel: shape (kh, kw, channels in, channels out), no larger than the image.
        bias: shape (channels out,).
        in_shape: (H, W, channels in).

    Raises:
        ValueError: a kernel that does not fit the image.
    """
    height, width, channels = in_shape
    if kernel.shape[2] != channels or kernel.shape[0] > height or kernel.shape[1] > width:
        raise ValueError(
            f"a circular kernel of shape {kernel.shape} needs images of {kernel.shape[2]} channels, at least as large; "
            f"the input has shape {tuple(in_shape)}"
        )
    transformed = jnp.fft.rfft2(kernel, s=(height, width), axes=(0, 1))
    return of_symbol(transformed, bias, in_shape)


def of_symbol(symbol: Array, bias: Array, in_shape: tuple[int, int, int]) -> Circular:
    """The circular convolution with a complex symbol (H, W // 2 + 1, channels in, channels out)."""
    parts = jnp.stack([symbol.real, symbol.imag])
    return Circular(bias=bias, in_shape=tuple(in_shape), out_shape=(*in_shape[:2], symbol.shape[-1]), symbol=parts)


def _of(kernel: Array, like: Circular) -> Circular:
    return circular(kernel, jnp.zeros(kernel.shape[-1], kernel.dtype), like.in_shape)


def _step(p: int) -> float:
    """Relative error of a radix-p step in unit roundoffs: (p + 2) terms' worth of complex products, and the roots."""
    return (p + 2) * math.sqrt(2 * p) + 4


def _prime_factors(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found

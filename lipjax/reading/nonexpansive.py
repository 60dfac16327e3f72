"""Flax NNX modules that are 1-Lipschitz by construction: orthogonal and almost orthogonal layers, and SLL blocks.

Each computes what the operation that it is read as computes: there is one way to do it. Kernels are parametrized anew
in every call; see :mod:`lipjax.networks.parametrizations`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lipjax.networks import layers, parametrizations
from lipjax.networks.activations import Activation
from lipjax.networks.circular import of_symbol
from lipjax.networks.known import known
from lipjax.networks.layers import Affine, Shape
from lipjax.networks.potential import convex_potential
from lipjax.reading.values import Value

Size = int | tuple[int, int]
init = nnx.initializers.lecun_normal()


class Nonexpansive(nnx.Module):
    """A module that is one operation, of norm or Lipschitz constant at most 1 by construction."""

    def operation(self, in_shape: Shape) -> Affine | Activation:
        """What it does to one example of a shape.

        Raises:
            ValueError: a shape that does not fit.
        """
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        """Outputs for a batch x (B, ...)."""
        return jax.vmap(self.operation(x.shape[1:]))(x)

    def read(self, value: Value) -> Value:
        """What it gives for a value of :func:`lipjax.from_flax`."""
        operation = self.operation(value.shape)
        return value.affine(operation) if isinstance(operation, Affine) else value.activation(operation)


class CayleyLinear(Nonexpansive):
    """A dense layer with orthonormal rows, or columns if there are fewer of them: the Cayley transform of a kernel.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        rngs: source of the initial values.

    Reference:
        Trockman, Kolter, Orthogonalizing Convolutional Layers with the Cayley Transform, ICLR 2021.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.scale = nnx.Param(jnp.linalg.norm(self.kernel[...]))  # of the kernel before the transform

    def operation(self, in_shape: Shape) -> Affine:
        kernel = parametrizations.cayley(_of_length(self.kernel[...], self.scale[...]))
        return known(layers.dense(kernel, self.bias[...], in_shape))


class CayleyConv(Nonexpansive):
    """An orthogonal convolution of images on a torus: at each frequency the Cayley transform of its matrix.

    With more inputs than outputs its rows are orthonormal, else its columns. It is computed by Fourier transforms.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: per axis, or one for both.
        strides: s x s neighbouring pixels become channels first, and the kernel has ``kernel_size // s`` taps.
        rngs: source of the initial values.

    Reference:
        Trockman, Kolter, Orthogonalizing Convolutional Layers with the Cayley Transform, ICLR 2021.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: Size, strides: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        self.strides = strides
        size = tuple(max(1, taps // strides) for taps in _pair(kernel_size))
        self.kernel = nnx.Param(init(rngs.params(), (*size, in_features * strides**2, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))
        # Of its symbol before the transform, per frequency.
        self.scale = nnx.Param(jnp.linalg.norm(self.kernel[...]))

    def __call__(self, x: Array) -> Array:
        """Outputs for a batch of images x (B, H, W, C)."""
        places = self._places(x.shape[1:])
        moved = x.reshape(len(x), -1)[:, places.ravel()].reshape(len(x), *places.shape)
        return jax.vmap(self.operation(places.shape))(moved)

    def read(self, value: Value) -> Value:
        """What it gives for a value of :func:`lipjax.from_flax`."""
        moved = value if self.strides == 1 else value.gathered(self._places(value.shape))
        return moved.affine(self.operation(moved.shape))

    def operation(self, in_shape: Shape) -> Affine:
        """The convolution behind the move of pixels to channels."""
        kernel = _of_length(self.kernel[...], self.scale[...])
        height, width, channels = in_shape
        rows, columns = kernel.shape[:2]
        if channels != kernel.shape[2] or rows > height or columns > width:
            raise ValueError(
                f"CayleyConv with a kernel of shape {kernel.shape} needs images ({rows} or more, {columns} or more, "
                f"{kernel.shape[2]}), pixels moved to channels; its input has shape {tuple(in_shape)}"
            )
        around = jnp.pad(kernel, ((0, height - rows), (0, width - columns), (0, 0), (0, 0)))
        centered = jnp.roll(around, (-(rows // 2), -(columns // 2)), (0, 1))
        symbol = parametrizations.cayley(jnp.fft.rfft2(centered, axes=(0, 1)))
        return known(of_symbol(symbol, self.bias[...], (height, width, channels)))

    def _places(self, shape: Shape) -> np.ndarray:
        """For each place of the smaller image with more channels, the place that it comes from."""
        s = self.strides
        if len(shape) != 3 or shape[0] % s or shape[1] % s:
            raise ValueError(f"CayleyConv of stride {s} needs images (H, W, C), sides divisible by it, not {shape}")
        height, width, channels = shape
        numbers = np.arange(height * width * channels, dtype=np.int32)
        blocks = numbers.reshape(height // s, s, width // s, s, channels).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(height // s, width // s, s * s * channels)


class AOLLinear(Nonexpansive):
    """A dense layer whose inputs are divided so that its norm is at most 1: almost orthogonal.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        rngs: source of the initial values.

    Reference:
        Prach, Lampert, Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks, ECCV 2022.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.orthogonal()(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def operation(self, in_shape: Shape) -> Affine:
        return known(layers.dense(parametrizations.almost_orthogonal(self.kernel[...]), self.bias[...], in_shape))


class AOLConv(Nonexpansive):
    """A zero-padded convolution whose input channels are divided so that its norm is at most 1: almost orthogonal.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: per axis, or one for both.
        strides: per axis, or one for both.
        padding: zeros on each side, or "SAME".
        rngs: source of the initial values.

    Reference:
        Prach, Lampert, Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks, ECCV 2022.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        strides: Size = 1,
        padding: int | str = "SAME",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.strides, self.padding = _pair(strides), padding
        self.kernel = nnx.Param(init(rngs.params(), (*_pair(kernel_size), in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def operation(self, in_shape: Shape) -> Affine:
        kernel = parametrizations.almost_orthogonal(self.kernel[...])
        return known(_convolution(kernel, self.bias[...], in_shape, self.strides, self.padding))


class SLLLinear(Nonexpansive):
    """``x - 2 W T^-1 relu(W^T x + b)``, T from the sums of ``|W^T W|``: 1-Lipschitz as a whole.

    Args:
        features: number of inputs and outputs.
        hidden: number of neurons.
        rngs: source of the initial values.

    Reference:
        Araujo, Havens, Delattre, Allauzen, Hu, A Unified Algebraic Perspective on Lipschitz Neural Networks, ICLR 2023.
    """

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (features, hidden), jnp.float32))
        self.bias, self.log_weights = nnx.Param(jnp.zeros(hidden)), nnx.Param(jnp.zeros(hidden))

    def operation(self, in_shape: Shape) -> Activation:
        kernel = _scaled_outputs(self.kernel[...], self.log_weights[...])
        return convex_potential(layers.dense(kernel, self.bias[...], in_shape))


class SLLConv(Nonexpansive):
    """``x - 2 W T^-1 relu(W^T x + b)`` for a zero-padded convolution ``W^T``; see :class:`SLLLinear`.

    Args:
        features: channels of input and output.
        hidden: channels of neurons.
        kernel_size: per axis, or one for both; odd.
        rngs: source of the initial values.
    """

    def __init__(self, features: int, hidden: int, kernel_size: Size, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (*_pair(kernel_size), features, hidden), jnp.float32))
        self.bias, self.log_weights = nnx.Param(jnp.zeros(hidden)), nnx.Param(jnp.zeros(hidden))

    def operation(self, in_shape: Shape) -> Activation:
        kernel = _scaled_outputs(self.kernel[...], self.log_weights[...])
        return convex_potential(_convolution(kernel, self.bias[...], in_shape, (1, 1), "SAME"))


def _scaled_outputs(kernel: Array, log_weights: Array) -> Array:
    """The kernel of ``T^(-1/2) W^T``, almost orthogonal as its transpose is."""
    transposed = parametrizations.almost_orthogonal(jnp.swapaxes(kernel, -1, -2), jnp.exp(log_weights))
    return jnp.swapaxes(transposed, -1, -2)


def _convolution(kernel: Array, bias: Array, in_shape: Shape, strides: tuple[int, int], padding: int | str) -> Affine:
    if len(in_shape) != 3:
        raise ValueError(f"a convolution needs images (H, W, C), but its input has shape {tuple(in_shape)}")
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(in_shape[:2], kernel.shape[:2], strides, padding)
    else:
        pads = [(padding, padding)] * 2
    (top, bottom), (left, right) = pads
    return layers.convolution(kernel, bias, in_shape, strides, ((int(top), int(bottom)), (int(left), int(right))))


def _of_length(kernel: Array, length: Array) -> Array:
    """The kernel with another Frobenius norm; one of zeros stays so."""
    square = jnp.sum(kernel**2)
    return kernel * length * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

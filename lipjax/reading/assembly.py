"""Assembly of networks: layers in order become blocks, with shifts and scales folded into their neighbours.

Folding is exact but for the rounding of the parameters. A scale and shift after a convolution or dense layer goes
back into its kernel and bias; before one it goes forward. Zero padding adds zeros AFTER the shift, so the shift of an
input to a padded convolution becomes a bias map that is different at the borders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks import activations, layers, pooling
from lipjax.networks.convolutions import Padding, Pair
from lipjax.networks.graph import Block, Fork, Join, Network, Step

Shape = tuple[int, ...]


class Assembly:
    """The network so far.

    What the next layer sees is ``scale * a + shift`` of the activations ``a`` of the last step, where scale and shift
    are waiting to be folded into it, shaped like ``a`` or constant over its image.

    Args:
        input_shape: of one example.
    """

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = self.shape = tuple(input_shape)
        self.steps: list[Step] = []
        self.waiting: tuple[Array, Array] | None = None

    def dense(self, kernel: Array, bias: Array) -> None:
        """``a @ kernel + bias`` for a flat activation.

        Raises:
            ValueError: the kernel does not fit.
        """
        if self.waiting is not None and math.prod(self.shape) == kernel.shape[0]:
            scale, shift = (jnp.broadcast_to(array, self.shape).ravel() for array in self.waiting)
            shifted = jnp.matmul(shift, kernel, precision=jax.lax.Precision.HIGHEST)
            kernel, bias = kernel * scale[:, None], bias + shifted
            self.waiting = None
        self._affine(layers.dense(kernel, bias, self.shape))

    def convolution(self, kernel: Array, bias: Array, stride: Pair, padding: Padding) -> None:
        """A zero-padded convolution of an image.

        Raises:
            ValueError: the kernel does not fit.
        """
        layer = layers.convolution(kernel, bias, self.shape, stride, padding)
        if self.waiting is not None and any(math.prod(array.shape[:-1]) > 1 for array in self.waiting):
            self._flush()  # a scale that differs over the image is not one of the kernel
        if self.waiting is not None:
            scale, shift = self.waiting
            bias_map = layer(jnp.broadcast_to(shift, self.shape))
            layer = layers.convolution(kernel * scale.reshape(1, 1, -1, 1), bias_map, self.shape, stride, padding)
            self.waiting = None
        self._affine(layer)

    def rescale(self, scale: Array, shift: Array) -> None:
        """``scale * a + shift`` entry by entry, for arrays that broadcast to the activation."""
        scale, shift = (self._aligned(jnp.asarray(array)) for array in (scale, shift))
        last = self._open_block()
        if self.waiting is None and last is not None:
            per_channel = all(math.prod(array.shape[:-1]) == 1 for array in (scale, shift))
            fits = last.affine.out_shape == self.shape and not isinstance(last.affine, layers.Scale)
            if per_channel and fits and last.affine.bias.shape == self.shape[-1:]:
                self.steps[-1] = Block(_scaled(last.affine, scale.ravel(), shift.ravel()), last.activation)
                return
        if self.waiting is not None:
            scale, shift = scale * self.waiting[0], scale * self.waiting[1] + shift
        self.waiting = (scale, shift)

    def activation(self, make: Callable[[Shape], activations.Activation], *, elementwise: bool = True) -> None:
        """An activation, made for the shape of the affine layer that it follows.

        One that is not element-wise needs the shape that it has in the model, also after a reshape.
        """
        self._flush()
        block = self._open_block()
        if block is None or not (elementwise or block.affine.out_shape == self.shape):
            block = self._affine(layers.identity(self.shape))
        self.steps[-1] = Block(block.affine, make(block.affine.out_shape))

    def max_pool(self, window: Pair, stride: Pair, padding: Padding) -> None:
        """Maximum over windows of an image."""
        self.activation(lambda shape: pooling.MaxPool(shape, window, stride, padding), elementwise=False)
        sizes = zip(self.shape[:2], padding, window, stride, strict=True)
        self.shape = (*((n + sum(pad) - k) // s + 1 for n, pad, k, s in sizes), self.shape[2])

    def sum_pool(self, window: Pair, stride: Pair, padding: Padding) -> None:
        """Sum over windows of an image: a convolution of each channel with ones."""
        channels = self.shape[-1]
        kernel = jnp.broadcast_to(jnp.eye(channels), (*window, channels, channels))
        self.convolution(kernel, jnp.zeros(channels), stride, padding)

    def reshape(self, shape: Shape) -> None:
        """C order."""
        if self.waiting is not None:
            scale, shift = (jnp.broadcast_to(array, self.shape).reshape(shape) for array in self.waiting)
            self.waiting = (scale, shift)
        self.shape = tuple(shape)

    def fork(self) -> None:
        """The beginning of a residual sum."""
        self._flush()
        self.steps.append(Fork())

    def join(self) -> None:
        """The end of a residual sum."""
        self._flush()
        self.steps.append(Join())

    def network(self) -> Network:
        """The network.

        Raises:
            TypeError: the last layer is not dense.
        """
        last = self._open_block()
        if last is None or not isinstance(last.affine, layers.Dense) or self.waiting is not None:
            raise TypeError("the last layer of the model must be a dense one, nnx.Linear: it gives the logits")
        return Network(tuple(self.steps[:-1]), last.affine, self.input_shape)

    def _affine(self, layer: layers.Affine) -> Block:
        block = Block(layer, activations.Identity())
        self.steps.append(block)
        self.shape = layer.out_shape
        return block

    def _open_block(self) -> Block | None:
        """The last step, if it is an affine layer without an activation."""
        last = self.steps[-1] if self.steps else None
        return last if isinstance(last, Block) and last.activation == activations.Identity() else None

    def _aligned(self, array: Array) -> Array:
        """With one axis for each of the activation."""
        return array.reshape((1,) * (len(self.shape) - array.ndim) + array.shape)

    def _flush(self) -> None:
        """What is waiting becomes a layer of its own."""
        if self.waiting is not None:
            scale, shift = (jnp.broadcast_to(array, self.shape) for array in self.waiting)
            self.waiting = None
            self._affine(layers.Scale(scale, shift, self.shape, self.shape))


def _scaled(layer: layers.Affine, scale: Array, shift: Array) -> layers.Affine:
    """The layer followed by ``scale * z + shift``, per entry of its last axis."""
    kernel = layer.kernel * scale.reshape((1,) * (layer.kernel.ndim - 1) + (-1,))
    bias = layer.bias * scale + shift
    return dataclasses.replace(layer, kernel=kernel, bias=jnp.broadcast_to(bias, layer.bias.shape))

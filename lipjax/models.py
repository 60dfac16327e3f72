"""Models: Flax NNX modules of the paper's networks, as ordinary ``nnx.Sequential`` classifiers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclasses.dataclass(frozen=True)
class C:
    """Convolution: channels, square kernel, stride, zero padding."""

    channels: int
    kernel: int
    stride: int
    padding: int


@dataclasses.dataclass(frozen=True)
class F:
    """Dense layer."""

    width: int


# A new architecture is one line here: the layers of the feature map, each followed by the activation. The last dense
# layer follows from the number of classes.
ARCHITECTURES: dict[str, tuple[C | F, ...]] = {
    "4c3f": (C(32, 3, 1, 1), C(32, 4, 2, 1), C(64, 3, 1, 1), C(64, 4, 2, 1), F(512), F(512)),
    "6c2f": (C(32, 3, 1, 1), C(32, 3, 1, 1), C(32, 4, 2, 1), C(64, 3, 1, 1), C(64, 3, 1, 1), C(64, 4, 2, 1), F(512)),
    "small_cnn": (C(16, 3, 1, 1), C(32, 4, 2, 1), F(64)),
}


class ClippedReLU(nnx.Module):
    """``min(max(z, 0), theta)`` with one learnable clip theta per neuron, the paper's ReLU-theta ([H21] Eq 10).

    Args:
        shape: shape of one activation, without the batch axis.
        theta: initial value of every clip.
    """

    def __init__(self, shape: tuple[int, ...], theta: float = 1.0) -> None:
        self.theta = nnx.Param(jnp.full(shape, theta, jnp.float32))

    def __call__(self, z: Array) -> Array:
        return jnp.minimum(jnp.maximum(z, 0), self.theta[...][None])


class MaxMin(nnx.Module):
    """``max(z1, z2)`` then ``min(z1, z2)``, channel i (z1) paired with channel i + C / 2 (z2) of the last axis."""

    def __call__(self, z: Array) -> Array:
        first, second = jnp.split(z, 2, axis=-1)
        return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


class Residual(nnx.Module):
    """``x + f(x)``, for layers f that keep the shape.

    Args:
        *layers: f, layers and functions applied in order, or one ``nnx.Sequential``.
    """

    def __init__(self, *layers: Any) -> None:
        single = len(layers) == 1 and type(layers[0]) is nnx.Sequential
        self.inner = layers[0] if single else nnx.Sequential(*layers)

    @property
    def layers(self) -> Any:
        """The layers of f."""
        return self.inner.layers

    def __call__(self, x: Array) -> Array:
        return x + self.inner(x)


def flatten(x: Array) -> Array:
    """Flatten each example of a batch in C order."""
    return x.reshape(x.shape[0], -1)


def classifier(
    architecture: str,
    activation: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    theta: float = 1.0,
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """One of the paper's networks, initialised as in the authors' code.

    Convolution weights are normal with standard deviation sqrt(2 / (k k channels)), their biases zero; dense weights
    and biases are uniform within 1 / sqrt(inputs).

    Args:
        architecture: a name of :data:`ARCHITECTURES`.
        activation: ``"relu"`` or ``"clipped_relu"``.
        input_shape: (H, W, C).
        num_classes: number of logits.
        theta: initial clip of the clipped ReLU.
        rngs: source of the initial values.

    Raises:
        ValueError: an unknown architecture or activation.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    if activation not in ("relu", "clipped_relu"):
        raise ValueError(f"unknown activation {activation!r}; known are 'relu' and 'clipped_relu'")
    shape: tuple[int, ...] = tuple(input_shape)
    modules: list = []
    for spec in ARCHITECTURES[architecture]:
        if isinstance(spec, C):
            *size, channels = shape
            modules.append(_conv(channels, spec, rngs))
            shape = (*((n + 2 * spec.padding - spec.kernel) // spec.stride + 1 for n in size), spec.channels)
        else:
            if len(shape) > 1:
                modules.append(flatten)
            modules.append(_linear(math.prod(shape), spec.width, rngs))
            shape = (spec.width,)
        modules.append(ClippedReLU(shape, theta) if activation == "clipped_relu" else nnx.relu)
    if len(shape) > 1:
        modules.append(flatten)
    modules.append(_linear(math.prod(shape), num_classes, rngs))
    return nnx.Sequential(*modules)


def _conv(channels_in: int, spec: C, rngs: nnx.Rngs) -> nnx.Conv:
    std = math.sqrt(2 / (spec.kernel**2 * spec.channels))
    return nnx.Conv(
        channels_in,
        spec.channels,
        (spec.kernel, spec.kernel),
        strides=spec.stride,
        padding=spec.padding,
        kernel_init=jax.nn.initializers.normal(std),
        rngs=rngs,
    )


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, **_: object) -> Array:
        bound = 1 / math.sqrt(inputs)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)

"""Models: Flax NNX modules of the paper's networks, as ordinary ``nnx.Sequential`` classifiers."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lipjax.reading.modules import ClippedMaxMin, ClippedReLU, MaxMin


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
    "8c2f": (
        *(C(64, 3, 1, 1), C(64, 3, 1, 1), C(64, 4, 2, 0), C(128, 3, 1, 1), C(128, 3, 1, 1), C(128, 4, 2, 0)),
        *(C(256, 3, 1, 1), C(256, 4, 2, 0), F(256)),
    ),
    # The paper does not give the layers of its 7C1F; these are ours.
    "7c1f": (
        *(C(64, 3, 1, 1), C(64, 3, 1, 1), C(64, 4, 2, 0), C(128, 3, 1, 1), C(128, 4, 2, 0)),
        *(C(256, 3, 1, 1), C(256, 4, 2, 0)),
    ),
    "small_cnn": (C(16, 3, 1, 1), C(32, 4, 2, 1), F(64)),
    "mlp": (F(256), F(256)),
}

# Functions by name; PReLU, ClippedReLU and the pairs have parameters or take pairs of channels, and are modules.
FUNCTIONS = {
    **{"relu": nnx.relu, "relu6": nnx.relu6, "leaky_relu": nnx.leaky_relu, "abs": jnp.abs, "hard_tanh": nnx.hard_tanh},
    **{"tanh": nnx.tanh, "sigmoid": nnx.sigmoid, "softplus": nnx.softplus, "elu": nnx.elu, "silu": nnx.silu},
    "gelu": nnx.gelu,
}
ACTIVATIONS = (*FUNCTIONS, "prelu", "clipped_relu", "maxmin", "clipped_maxmin")
Clips = tuple[float, ...]  # one value for all hidden layers, or one for each


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
    upper_clip: Clips = (1.0,),
    lower_clip: Clips = (-1.0,),
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """One of the paper's networks, initialised as in the authors' code.

    Convolution weights are normal with standard deviation sqrt(2 / (k k channels)), their biases zero; dense weights
    and biases are uniform within 1 / sqrt(inputs).

    Args:
        architecture: a name of :data:`ARCHITECTURES`.
        activation: a name of :data:`ACTIVATIONS`; it follows every layer but the last.
        input_shape: (H, W, C).
        num_classes: number of logits.
        theta: initial clip of the clipped ReLU.
        upper_clip: initial clips of the max of a clipped MaxMin: one for all hidden layers, or one for each.
        lower_clip: initial clips of its min, likewise.
        rngs: source of the initial values.

    Raises:
        ValueError: an unknown architecture or activation, another number of clips, or images that are too small.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    specs = ARCHITECTURES[architecture]
    uppers, lowers = (_per_layer(clips, len(specs)) for clips in (upper_clip, lower_clip))
    shape: tuple[int, ...] = tuple(input_shape)
    modules: list = []
    for place, spec in enumerate(specs):
        if isinstance(spec, C):
            *size, channels = shape
            modules.append(_conv(channels, spec, rngs))
            shape = (*((n + 2 * spec.padding - spec.kernel) // spec.stride + 1 for n in size), spec.channels)
            if min(shape) < 1:
                raise ValueError(f"images {tuple(input_shape)} are too small for {architecture}: give larger ones")
        else:
            if len(shape) > 1:
                modules.append(flatten)
            modules.append(_linear(math.prod(shape), spec.width, rngs))
            shape = (spec.width,)
        if activation in FUNCTIONS:
            modules.append(FUNCTIONS[activation])
        elif activation == "prelu":
            modules.append(nnx.PReLU())
        elif activation == "clipped_relu":
            modules.append(ClippedReLU(shape, theta))
        elif activation == "maxmin":
            modules.append(MaxMin())
        else:
            modules.append(ClippedMaxMin(shape, uppers[place], lowers[place]))
    if len(shape) > 1:
        modules.append(flatten)
    modules.append(_linear(math.prod(shape), num_classes, rngs))
    return nnx.Sequential(*modules)


def _per_layer(clips: Clips, count: int) -> Clips:
    if len(clips) not in (1, count):
        raise ValueError(f"{len(clips)} clips {tuple(clips)} for {count} hidden layers; give one, or one for each")
    return tuple(clips) * (count if len(clips) == 1 else 1)


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

"""Architectures: the paper's networks and others by name, as ordinary ``nnx.Sequential`` classifiers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lipjax.reading.modules import ClippedMaxMin, ClippedReLU, MaxMin, Residual
from lipjax.reading.nonexpansive import AOLConv, AOLLinear, CayleyConv, CayleyLinear, SLLConv, SLLLinear

Shape = tuple[int, ...]
Module = Any  # a module of NNX, or a function of a batch
NEAR_IDENTITY = 0.1  # about the norm of a convolution in a linear residual block at the start


@dataclasses.dataclass(frozen=True)
class Spec:
    """A part of an architecture, and what stands for it."""

    activated: ClassVar[bool] = True  # whether the activation of the network follows it
    has_norm: ClassVar[bool] = True  # whether it is an affine layer, which has a place among the weight layers

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        """Its modules for an input of a shape, and the shape of their output."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class C(Spec):
    """Convolution: channels, square kernel, stride, zero padding."""

    channels: int
    kernel: int
    stride: int
    padding: int

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        return kind.convolution(self, shape, rngs)


@dataclasses.dataclass(frozen=True)
class F(Spec):
    """Dense layer, of whatever comes before in C order."""

    width: int

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        flat = [flatten] if len(shape) > 1 else []
        return [*flat, kind.dense(math.prod(shape), self.width, rngs)], (self.width,)


@dataclasses.dataclass(frozen=True)
class R(Spec):
    """Linear residual block x + conv(x), which is one convolution (LiResNet): square kernel."""

    kernel: int

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        channels = shape[-1]
        std = NEAR_IDENTITY / (self.kernel * math.sqrt(channels))
        normal, size = jax.nn.initializers.normal(std), (self.kernel, self.kernel)
        return [Residual(nnx.Conv(channels, channels, size, kernel_init=normal, rngs=rngs))], shape


@dataclasses.dataclass(frozen=True)
class S(Spec):
    """SLL block of convolutions, or of dense layers behind them (kernel 0): neurons, square kernel."""

    hidden: int
    kernel: int = 0

    activated = has_norm = False

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        if self.kernel:
            return [SLLConv(shape[-1], self.hidden, self.kernel, rngs=rngs)], shape
        size = math.prod(shape)
        flat = [flatten] if len(shape) > 1 else []
        return [*flat, SLLLinear(size, self.hidden, rngs=rngs)], (size,)


@dataclasses.dataclass(frozen=True)
class P(Spec):
    """Channels of zeros beside those of the image."""

    channels: int

    activated = False

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        more = (0, self.channels - shape[-1])
        return [lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), more))], (*shape[:-1], self.channels)


@dataclasses.dataclass(frozen=True)
class A(Spec):
    """Sums over square windows side by side, divided by the root of their size: of norm 1."""

    window: int

    activated = False

    def build(self, shape: Shape, kind: Kind, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
        def pool(x: Array) -> Array:
            return self.window * nnx.avg_pool(x, (self.window,) * 2, (self.window,) * 2)

        height, width, channels = shape
        return [pool], (height // self.window, width // self.window, channels)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What convolutions and dense layers of an architecture are made of.

    Attributes:
        convolution: from a spec, the shape of its input and rngs to modules and the shape of their output.
        dense: from numbers of inputs and outputs and rngs to a module.
    """

    convolution: Callable[[C, Shape, nnx.Rngs], tuple[list[Module], Shape]]
    dense: Callable[[int, int, nnx.Rngs], Module]


# A new architecture is one line here: the parts of the feature map, the activation behind each that is activated. The
# last dense layer follows from the number of classes.
ARCHITECTURES: dict[str, tuple[Spec, ...]] = {
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
    # Ours, of the kinds of their papers.
    "liresnet_s": (C(64, 5, 2, 2), *[R(3)] * 8, C(128, 4, 4, 0), F(192)),
    "sll_s": (P(32), *[S(32, 3)] * 6, A(4), S(512), S(512)),
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
    layers: str = "plain",
    theta: float = 1.0,
    upper_clip: Clips = (1.0,),
    lower_clip: Clips = (-1.0,),
    rngs: nnx.Rngs,
) -> nnx.Sequential:
    """A network by name; those of the paper initialised as in the authors' code.

    Plain convolution weights are normal with standard deviation sqrt(2 / (k k channels)), their biases zero; dense
    weights and biases are uniform within 1 / sqrt(inputs).

    Args:
        architecture: a name of :data:`ARCHITECTURES`.
        activation: a name of :data:`ACTIVATIONS`; it follows every layer but the last.
        input_shape: (H, W, C).
        num_classes: number of logits.
        layers: a name of :data:`LAYERS`, what convolutions and dense layers are made of; the last one is a plain one.
        theta: initial clip of the clipped ReLU.
        upper_clip: initial clips of the max of a clipped MaxMin: one for all hidden layers, or one for each.
        lower_clip: initial clips of its min, likewise.
        rngs: source of the initial values.

    Raises:
        ValueError: an unknown architecture, activation or kind of layers, another number of clips, or images that are
            too small.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    if layers not in LAYERS:
        raise ValueError(f"unknown layers {layers!r}; known are {', '.join(LAYERS)}")
    specs = ARCHITECTURES[architecture]
    count = num_activations(architecture)
    uppers, lowers = (iter(_per_layer(clips, count)) for clips in (upper_clip, lower_clip))
    shape: Shape = tuple(input_shape)
    modules: list[Module] = []
    for spec in specs:
        built, shape = spec.build(shape, LAYERS[layers], rngs)
        if min(shape) < 1:
            raise ValueError(f"images {tuple(input_shape)} are too small for {architecture}: give larger ones")
        modules += built
        if not spec.activated:
            continue
        if activation in FUNCTIONS:
            modules.append(FUNCTIONS[activation])
        elif activation == "prelu":
            modules.append(nnx.PReLU())
        elif activation == "clipped_relu":
            modules.append(ClippedReLU(shape, theta))
        elif activation == "maxmin":
            modules.append(MaxMin())
        else:
            modules.append(ClippedMaxMin(shape, next(uppers), next(lowers)))
    if len(shape) > 1:
        modules.append(flatten)
    modules.append(_linear(math.prod(shape), num_classes, rngs))
    return nnx.Sequential(*modules)


def num_activations(architecture: str) -> int:
    """How many hidden layers of an architecture have the activation behind them."""
    return sum(spec.activated for spec in ARCHITECTURES[architecture])


def num_hidden_layers(architecture: str) -> int:
    """How many affine layers an architecture has before the last one."""
    return sum(spec.has_norm for spec in ARCHITECTURES[architecture])


def _per_layer(clips: Clips, count: int) -> Clips:
    if len(clips) not in (1, count):
        raise ValueError(f"{len(clips)} clips {tuple(clips)} for {count} hidden layers; give one, or one for each")
    return tuple(clips) * (count if len(clips) == 1 else 1)


def _conv(spec: C, shape: Shape, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
    std = math.sqrt(2 / (spec.kernel**2 * spec.channels))
    conv = nnx.Conv(
        shape[-1],
        spec.channels,
        (spec.kernel, spec.kernel),
        strides=spec.stride,
        padding=spec.padding,
        kernel_init=jax.nn.initializers.normal(std),
        rngs=rngs,
    )
    return [conv], _behind(spec, shape)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, **_: object) -> Array:
        bound = 1 / math.sqrt(inputs)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def _cayley_conv(spec: C, shape: Shape, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
    """On a torus, so without padding: the image is as large as the stride leaves it."""
    conv = CayleyConv(shape[-1], spec.channels, spec.kernel, spec.stride, rngs=rngs)
    return [conv], (*(n // spec.stride for n in shape[:-1]), spec.channels)


def _aol_conv(spec: C, shape: Shape, rngs: nnx.Rngs) -> tuple[list[Module], Shape]:
    conv = AOLConv(shape[-1], spec.channels, spec.kernel, spec.stride, spec.padding, rngs=rngs)
    return [conv], _behind(spec, shape)


def _behind(spec: C, shape: Shape) -> Shape:
    return (*((n + 2 * spec.padding - spec.kernel) // spec.stride + 1 for n in shape[:-1]), spec.channels)


LAYERS = {
    "plain": Kind(_conv, _linear),
    "cayley": Kind(_cayley_conv, lambda inputs, outputs, rngs: CayleyLinear(inputs, outputs, rngs=rngs)),
    "aol": Kind(_aol_conv, lambda inputs, outputs, rngs: AOLLinear(inputs, outputs, rngs=rngs)),
}

"""Networks: a chain of affine layers with activations, then a last dense layer; and how a Flax model becomes one."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lipjax import layers, models


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """An affine layer and the activation after it. Activations are reshaped in C order to what the layer takes."""

    affine: layers.Affine
    activation: layers.Activation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier that bounds can be computed for: a frozen pytree with a static structure and arrays as leaves.

    Attributes:
        blocks: the feature map, in order.
        head: the last dense layer, from features to logits.
    """

    blocks: tuple[Block, ...]
    head: layers.Dense

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        first = self.blocks[0].affine if self.blocks else self.head
        return first.in_shape

    @property
    def num_classes(self) -> int:
        return self.head.out_shape[0]

    def __call__(self, x: Array) -> Array:
        """Logits (B, classes) of a batch x (B, ...)."""
        return jax.vmap(self.logits)(x)

    def logits(self, x: Array) -> Array:
        """Logits (classes,) of one example."""
        return self.head(self.features(x).reshape(self.head.in_shape))

    def features(self, x: Array) -> Array:
        """Activations of one example before the last dense layer."""
        for block in self.blocks:
            x = block.activation(block.affine(x.reshape(block.affine.in_shape)))
        return x


def from_flax(model: nnx.Sequential, input_shape: tuple[int, ...]) -> Network:
    """Read a Flax NNX ``Sequential`` classifier as a :class:`Network`.

    May be called inside a traced function: then the network's arrays are the traced parameters, and gradients with
    respect to the Flax parameters come out as usual.

    Args:
        model: layers and functions applied in order; the last layer must be ``nnx.Linear``. Supported: ``nnx.Conv``
            (2-D, zero-padded, any stride), ``nnx.Linear``, ``nnx.relu`` or ``jax.nn.relu``,
            ``lipjax.models.ClippedReLU`` and functions that flatten each example.
        input_shape: shape of one input without the batch axis, images as (H, W, C).

    Returns:
        A network that computes what the model does.

    Raises:
        TypeError: a layer that is not supported, named with its place. Nothing is ever guessed.
        ValueError: an input that does not fit a layer.
    """
    # Exact types: a subclass may compute something else.
    if type(model) is not nnx.Sequential:
        raise TypeError(f"from_flax reads flax.nnx.Sequential models, not {type(model).__name__}")
    blocks: list[Block] = []
    shape = tuple(input_shape)
    for place, module in enumerate(model.layers):
        if type(module) in (nnx.Linear, nnx.Conv):
            affine = _dense(module, shape, place) if type(module) is nnx.Linear else _conv(module, shape, place)
            blocks.append(Block(affine, layers.Identity()))
            shape = affine.out_shape
        elif type(module) is models.ClippedReLU:
            theta = jnp.asarray(module.theta[...])
            if theta.shape != shape:
                raise ValueError(f"layer {place}: theta of shape {theta.shape} does not fit activations {shape}")
            inner = blocks[-1].affine.out_shape if blocks else shape
            _append_activation(blocks, layers.ClippedReLU(theta.reshape(inner)), place)
        elif module in (nnx.relu, jax.nn.relu):
            _append_activation(blocks, layers.ReLU(), place)
        elif not isinstance(module, nnx.Module) and callable(module) and (flat := _reshaped(module, shape)):
            shape = flat
        else:
            raise TypeError(_unsupported(module, place))
    if not blocks or not isinstance(blocks[-1].affine, layers.Dense) or blocks[-1].activation != layers.Identity():
        raise TypeError("the last layer of the model must be nnx.Linear: it gives the logits")
    return Network(tuple(blocks[:-1]), blocks[-1].affine)


def _unsupported(module: object, place: int) -> str:
    name = getattr(module, "__name__", type(module).__name__)
    return (
        f"layer {place} of the model, {name}, is not supported; supported are nnx.Conv, nnx.Linear, nnx.relu, "
        "lipjax.models.ClippedReLU and functions that only reshape each example in C order"
    )


def _append_activation(blocks: list[Block], activation: layers.Activation, place: int) -> None:
    if not blocks:
        raise TypeError(f"layer {place} of the model is an activation with no affine layer before it")
    if blocks[-1].activation != layers.Identity():
        raise TypeError(f"layer {place} of the model is an activation that directly follows another one")
    blocks[-1] = Block(blocks[-1].affine, activation)


def _check_arithmetic(module: nnx.Linear | nnx.Conv, place: int) -> None:
    """Raises TypeError where a layer computes with anything but plain products in its own float32 or float64."""
    kernel_type = module.kernel[...].dtype
    if kernel_type not in (jnp.float32, jnp.float64) or (module.dtype is not None and module.dtype != kernel_type):
        raise TypeError(
            f"layer {place}, nnx.{type(module).__name__}, has a kernel of {kernel_type} and computes in "
            f"{module.dtype or kernel_type}; supported are float32 and float64, the same in both"
        )
    defaults = inspect.signature(type(module).__init__).parameters
    for option in ("dot_general", "conv_general_dilated", "promote_dtype", "preferred_element_type"):
        if option in defaults and getattr(module, option) is not defaults[option].default:
            raise TypeError(f"layer {place}, nnx.{type(module).__name__}, has its own {option}, which is not supported")


def _bias(module: nnx.Linear | nnx.Conv, channels: int, dtype: jnp.dtype) -> Array:
    return jnp.zeros((channels,), dtype) if module.bias is None else jnp.asarray(module.bias[...])


def _dense(module: nnx.Linear, shape: tuple[int, ...], place: int) -> layers.Dense:
    _check_arithmetic(module, place)
    kernel = jnp.asarray(module.kernel[...])
    if len(shape) != 1:
        raise TypeError(f"layer {place}, nnx.Linear, acts on activations of shape {shape}: flatten them first")
    return layers.dense(kernel, _bias(module, kernel.shape[1], kernel.dtype), shape)


def _conv(module: nnx.Conv, shape: tuple[int, ...], place: int) -> layers.Conv:
    _check_arithmetic(module, place)
    kernel = jnp.asarray(module.kernel[...])
    if kernel.ndim != 4:
        raise TypeError(f"layer {place}, nnx.Conv, is not two-dimensional: its kernel has shape {kernel.shape}")
    for option, neutral in (("input_dilation", 1), ("kernel_dilation", 1), ("feature_group_count", 1)):
        value = getattr(module, option)
        if any(v != neutral for v in (value if isinstance(value, tuple | list) else (value,))):
            raise TypeError(f"layer {place}, nnx.Conv, has {option}={value}, which is not supported")
    if getattr(module, "mask", None) is not None:
        raise TypeError(f"layer {place}, nnx.Conv, has a masked kernel, which is not supported")
    strides = module.strides if isinstance(module.strides, tuple | list) else (module.strides,) * 2
    stride = (int(strides[0]), int(strides[1]))
    padding = _padding(module.padding, shape, kernel.shape, stride, place)
    return layers.convolution(kernel, _bias(module, kernel.shape[3], kernel.dtype), shape, stride, padding)


def _padding(padding: object, shape: tuple, kernel_shape: tuple, stride: tuple, place: int) -> layers.Padding:
    """Flax's forms of zero padding as explicit pairs."""
    if padding in ("SAME", "VALID"):
        pads = jax.lax.padtype_to_pads(shape[:2], kernel_shape[:2], stride, padding)
    elif isinstance(padding, int):
        pads = [(padding, padding)] * 2
    elif isinstance(padding, tuple | list) and len(padding) == 2:
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    else:
        raise TypeError(f"layer {place}, nnx.Conv, has padding={padding!r}, which is not supported: use zero padding")
    (top, bottom), (left, right) = pads
    return ((int(top), int(bottom)), (int(left), int(right)))


def _reshaped(function: object, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a function reshapes one example to; None where it does anything else.

    A function is a reshape by what it does: for a batch of one and of two examples its jaxpr is a chain of C-order
    reshapes that keeps the batch axis.
    """
    results = []
    for batch in (1, 2):
        try:
            closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
        except Exception:  # whatever a function of the user raises, it is not a reshape
            return None
        variable = closed.jaxpr.invars[0]
        for equation in closed.jaxpr.eqns:
            is_reshape = equation.primitive.name == "reshape" and equation.params["dimensions"] is None
            if not is_reshape or equation.invars[0] is not variable:
                return None
            variable = equation.outvars[0]
        if len(closed.jaxpr.outvars) != 1 or closed.jaxpr.outvars[0] is not variable:
            return None
        result = variable.aval.shape
        if not result or result[0] != batch:
            return None
        results.append(result[1:])
    return results[0] if results[0] == results[1] else None

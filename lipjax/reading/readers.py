"""Readers: how each type of module becomes affine layers and activations. Users teach types of their own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lipjax.networks import layers
from lipjax.networks.activations import ClippedReLUActivation, ReLUActivation
from lipjax.networks.maxmin import ClippedMaxMinActivation, MaxMinActivation
from lipjax.reading import functions, modules
from lipjax.reading.values import Value

SUPPORTED = (
    "supported are convolutions (nnx.Conv, nn.Conv), dense layers (nnx.Linear, nn.Dense), batch norm in inference "
    "mode, nnx.relu, jax.nn.relu, ClippedReLU, MaxMin, ClippedMaxMin and Residual of lipjax, average and "
    "max pooling, and functions that only reshape, shift or scale each example"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a model a module stands, for messages, and what it finds there.

    Attributes:
        name: as in "2.0", the first layer of a block that is the third one.
        variables: of a Linen module by collection; None for NNX, whose modules hold their own.
    """

    name: str
    variables: Mapping[str, Any] | None

    def read(self, module: object, value: Value) -> Value:
        """What a module gives for a value.

        Raises:
            TypeError: a module that is not supported, named with its place; nothing is ever guessed.
            ValueError: an input that does not fit it.
        """
        key = module if isinstance(module, Hashable) and module in READERS else type(module)
        if key in READERS:
            return READERS[key](module, value, self)
        if not isinstance(module, nnx.Module | nn.Module) and callable(module):
            return _function(module, value, self)
        raise TypeError(_unsupported(module, self))

    def read_all(self, modules: Sequence[object], value: Value) -> Value:
        """What modules that follow each other give for a value; those of a Linen model are its ``layers_0`` and on."""
        prefix = f"{self.name}." if self.name else ""
        for k, module in enumerate(modules):
            value = Place(f"{prefix}{k}", self.variables_of(f"layers_{k}")).read(module, value)
        return value

    def variables_of(self, name: str) -> dict[str, Any] | None:
        """What the collections of a Linen model hold for one of its modules."""
        if self.variables is None:
            return None
        return {collection: entries[name] for collection, entries in self.variables.items() if name in entries}

    def parameter(self, module: Any, name: str, collection: str = "params") -> Array | None:
        """A parameter of an NNX module, or of a Linen module by its variables; None where there is none."""
        if not getattr(module, f"use_{name}", True):
            return None
        if self.variables is None:
            variable = getattr(module, name, None)
            return None if variable is None else jnp.asarray(variable[...])
        value = self.variables.get(collection, {}).get(name)
        return None if value is None else jnp.asarray(value)


class Reader(Protocol):
    """How a type of module is read: from the module, the value that it takes and its place, to the value it gives."""

    def __call__(self, module: Any, value: Value, place: Place) -> Value: ...


READERS: dict[Any, Reader] = {}  # by type, or by function


def register(kind: type | Callable, reader: Reader) -> None:
    """Teach :func:`lipjax.from_flax` a type of module, or a function.

    Args:
        kind: the exact type, of NNX or Linen, or a function of a batch.
        reader: ``(module, value, place) -> value``. What a module computes is said by
            :meth:`~lipjax.reading.values.Value.affine`, :meth:`~lipjax.reading.values.Value.activation`, sums and
            concatenations of the value; ``place.read(child, value)`` reads a module inside of it.

    Raises:
        TypeError: kind is neither a type nor callable.
    """
    if not callable(kind) or not isinstance(kind, Hashable):
        raise TypeError(f"kind={kind!r} is neither a type of module nor a function")
    READERS[kind] = reader


def _dense(module: Any, value: Value, place: Place) -> Value:
    kernel, bias = _kernel_and_bias(module, place)
    if len(value.shape) != 1:
        raise TypeError(f"layer {place.name}, a dense layer, acts on activations {value.shape}: flatten them first")
    return value.affine(layers.dense(kernel, bias, value.shape))


def _conv(module: Any, value: Value, place: Place) -> Value:
    kernel, bias = _kernel_and_bias(module, place)
    if kernel.ndim != 4:
        raise TypeError(f"layer {place.name}, Conv, is not two-dimensional: its kernel has shape {kernel.shape}")
    if _pair(module.input_dilation) != (1, 1):
        raise TypeError(f"layer {place.name}, Conv, has input_dilation={module.input_dilation}, which is not supported")
    if getattr(module, "mask", None) is not None:
        raise TypeError(f"layer {place.name}, Conv, has a masked kernel, which is not supported")
    stride, dilation = _pair(module.strides), _pair(module.kernel_dilation)
    kernel = _grouped(_dilated(kernel, dilation), module.feature_group_count)
    padding = _padding(module.padding, value.shape, kernel.shape, stride, place)
    return value.affine(layers.convolution(kernel, bias, value.shape, stride, padding))


def _batch_norm(module: Any, value: Value, place: Place) -> Value:
    if not module.use_running_average:
        raise TypeError(
            f"layer {place.name}, BatchNorm, is in training mode and mixes the examples of a batch; use running "
            "averages (model.eval(), or use_running_average=True)"
        )
    if module.axis != -1:
        raise TypeError(
            f"layer {place.name}, BatchNorm, has axis={module.axis}, which is not supported: use the last axis"
        )
    _check_precision(module, place, ("scale", "bias"))
    mean, var = (place.parameter(module, name, "batch_stats") for name in ("mean", "var"))
    if mean is None or var is None:
        raise TypeError(f"layer {place.name}, BatchNorm, has no batch_stats in the variables")
    scale, bias = place.parameter(module, "scale"), place.parameter(module, "bias")
    slope = (1.0 if scale is None else scale) / jnp.sqrt(var + module.epsilon)
    return value.rescaled(slope, (0.0 if bias is None else bias) - mean * slope)


def _dropout(module: Any, value: Value, place: Place) -> Value:
    if not (module.deterministic or module.rate == 0):
        raise TypeError(
            f"layer {place.name}, Dropout, is active; make it deterministic (model.eval()), or leave it out"
        )
    return value


def _relu(module: Any, value: Value, place: Place) -> Value:
    return value.activation(ReLUActivation())


def _clipped_relu(module: modules.ClippedReLU, value: Value, place: Place) -> Value:
    theta = jnp.asarray(module.theta[...])
    if theta.shape != value.shape:
        raise ValueError(f"layer {place.name}: theta of shape {theta.shape} does not fit activations {value.shape}")
    return value.activation(ClippedReLUActivation(theta))


def _maxmin(module: modules.MaxMin, value: Value, place: Place) -> Value:
    if value.shape[-1] % 2:
        raise ValueError(f"layer {place.name}: MaxMin needs an even number of channels, not {value.shape[-1]}")
    return value.activation(MaxMinActivation())


def _clipped_maxmin(module: modules.ClippedMaxMin, value: Value, place: Place) -> Value:
    upper, lower = jnp.asarray(module.upper_clip[...]), jnp.asarray(module.lower_clip[...])
    half = (*value.shape[:-1], value.shape[-1] // 2)
    if value.shape[-1] % 2 or upper.shape != half or lower.shape != half:
        raise ValueError(
            f"layer {place.name}: clips of shapes {upper.shape} and {lower.shape} do not fit pairs of {value.shape}"
        )
    return value.activation(ClippedMaxMinActivation(upper, lower))


def _residual(module: modules.Residual, value: Value, place: Place) -> Value:
    branch = place.read_all(module.layers, value)
    if {term.node for term in branch.terms} - {term.node for term in value.terms}:
        # An activation lies between, so that both cannot be one layer: what comes in is a node that both take.
        value = value.settled()
        branch = place.read_all(module.layers, value)
    if branch.shape != value.shape:
        raise ValueError(f"layer {place.name}: Residual adds activations {branch.shape} to its input {value.shape}")
    return value + branch


for kinds, reader in (
    ((nnx.Linear, nn.Dense), _dense),
    ((nnx.Conv, nn.Conv), _conv),
    ((nnx.BatchNorm, nn.BatchNorm), _batch_norm),
    ((nnx.Dropout, nn.Dropout), _dropout),
    ((nnx.relu, jax.nn.relu), _relu),
    ((modules.ClippedReLU,), _clipped_relu),
    ((modules.MaxMin,), _maxmin),
    ((modules.ClippedMaxMin,), _clipped_maxmin),
    ((modules.Residual,), _residual),
):
    for kind in kinds:
        register(kind, reader)


def _function(function: Callable[[Array], Array], value: Value, place: Place) -> Value:
    """A function that is known by what it does."""
    steps = functions.read(function, value.shape)
    if steps is None:
        raise TypeError(_unsupported(function, place))
    for step in steps:
        if isinstance(step, functions.Reshape):
            value = value.reshaped(step.shape)
        elif isinstance(step, functions.Rescale):
            value = value.rescaled(step.scale, step.shift)
        elif step.kind == "max":
            value = value.max_pooled(step.window, step.stride, step.padding)
        else:
            channels = value.shape[-1]
            ones = jnp.broadcast_to(jnp.eye(channels), (*step.window, channels, channels))
            window = layers.convolution(ones, jnp.zeros(channels), value.shape, step.stride, step.padding)
            value = value.affine(window)
    return value


def _unsupported(module: object, place: Place) -> str:
    name = getattr(module, "__name__", type(module).__name__)
    return f"layer {place.name} of the model, {name}, is not supported; {SUPPORTED}, and types given to lipjax.register"


def _kernel_and_bias(module: Any, place: Place) -> tuple[Array, Array]:
    """Of a layer that computes with plain products in its own float32 or float64. Raises TypeError for any other."""
    kernel, bias = place.parameter(module, "kernel"), place.parameter(module, "bias")
    if kernel is None:
        name = type(module).__name__
        raise TypeError(f"layer {place.name}, {name}, has no kernel in the variables; initialise the model first")
    _check_precision(module, place, ("kernel", "bias"))
    return kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype) if bias is None else bias


def _check_precision(module: Any, place: Place, names: tuple[str, ...]) -> None:
    """Raises TypeError unless parameters and computation are all float32 or all float64, by Flax's own products."""
    name = type(module).__name__
    for parameter in names:
        value = place.parameter(module, parameter)
        if value is None:
            continue
        if value.dtype not in (jnp.float32, jnp.float64) or (module.dtype is not None and module.dtype != value.dtype):
            raise TypeError(
                f"layer {place.name}, {name}, has a {parameter} of {value.dtype} and computes in "
                f"{module.dtype or value.dtype}; supported are float32 and float64, the same in both"
            )
    if module.dtype not in (None, jnp.float32, jnp.float64):
        raise TypeError(f"layer {place.name}, {name}, computes in {module.dtype}; supported are float32 and float64")
    defaults = inspect.signature(type(module).__init__).parameters
    options = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    for option in (*options, "promote_dtype", "preferred_element_type"):
        if option in defaults and getattr(module, option) is not defaults[option].default:
            raise TypeError(f"layer {place.name}, {name}, has its own {option}, which is not supported")


def _dilated(kernel: Array, dilation: tuple[int, int]) -> Array:
    """The kernel with zeros between its taps."""
    if dilation == (1, 1):
        return kernel
    size = tuple((k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True))
    return jnp.zeros((*size, *kernel.shape[2:]), kernel.dtype).at[:: dilation[0], :: dilation[1]].set(kernel)


def _grouped(kernel: Array, groups: int) -> Array:
    """The kernel of all channels, with zeros between different groups."""
    if groups == 1:
        return kernel
    kh, kw, c_in, c_out = kernel.shape
    split = kernel.reshape(kh, kw, c_in, groups, c_out // groups)
    whole = jnp.einsum("hwigo,gk->hwkigo", split, jnp.eye(groups, dtype=kernel.dtype), precision=layers.HIGHEST)
    return whole.reshape(kh, kw, groups * c_in, c_out)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return (int(1 if first is None else first), int(1 if second is None else second))


def _padding(padding: Any, shape: tuple, kernel_shape: tuple, stride: tuple, place: Place) -> layers.Padding:
    """Flax's forms of zero padding as explicit pairs."""
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        pads = jax.lax.padtype_to_pads(shape[:2], kernel_shape[:2], stride, padding)
    elif isinstance(padding, int):
        pads = [(padding, padding)] * 2
    elif isinstance(padding, tuple | list) and len(padding) == 2:
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    else:
        raise TypeError(f"layer {place.name}, Conv, has padding={padding!r}, which is not supported: use zero padding")
    (top, bottom), (left, right) = pads
    return ((int(top), int(bottom)), (int(left), int(right)))

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
from lipjax.networks.activations import ClippedReLUActivation
from lipjax.networks.leaky import LeakyReLUActivation
from lipjax.networks.maxmin import ClippedMaxMinActivation, MaxMinActivation
from lipjax.reading import activations, interpreter, linear, markers, modules, nonexpansive, tracing
from lipjax.reading.values import Value

SUPPORTED = (
    "supported are dense layers, convolutions, products with constants, batch norm in inference mode, sums, maxima "
    "and concatenations of branches, whatever moves entries, sums and means over axes, average and max pooling, the "
    "activations relu, relu6, leaky_relu, PReLU, abs, hard_tanh, clips, tanh, sigmoid, softplus, elu, silu and gelu, "
    "the modules of lipjax, and types given to lipjax.register"
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
        is_module = isinstance(module, nnx.Module | nn.Module)  # one of Linen may have no hash
        known = not is_module and isinstance(module, Hashable) and module in READERS
        key = module if known else type(module)
        if key in READERS:
            return READERS[key](module, value, self)
        activation = None if is_module else activations.known(module)
        if activation is not None:
            return value.activation(activation)
        if not callable(module):
            raise TypeError(_unsupported(module, self))
        return self.traced(module, value)

    def traced(self, module: Any, value: Value) -> Value:
        """What a module or a function gives that is known by what it does."""
        function = self.forward(module)
        parameters = nnx.state(module) if isinstance(module, nnx.Module) else self.variables
        wide = any(getattr(leaf, "dtype", None) == jnp.float64 for leaf in jax.tree.leaves(parameters))
        kinds = {kind for kind in READERS if isinstance(kind, type) and not kind.__module__.startswith("flax.")}
        try:
            with markers.marked(kinds):
                traces = [
                    tracing.trace(function, value.shape, batch, jnp.float64 if wide else jnp.float32)
                    for batch in tracing.BATCHES
                ]
        except Exception as error:  # whatever a model raises, it cannot be read
            reason = str(error).strip().split("\n")[0]
            raise TypeError(f"{self.label(module)} cannot be traced: {type(error).__name__}: {reason}") from error
        if not all(tracing.same_structure(traces[0], other) for other in traces[1:]):
            raise TypeError(f"{self.label(module)} does something else for another number of examples in a batch")
        try:
            return interpreter.Reader((traces[0], traces[1]), value, self._marked).read()
        except interpreter.UnsupportedError as error:
            raise TypeError(f"{self.label(module)} is not supported: {error}; {SUPPORTED}") from error

    def forward(self, module: Any) -> Callable[[Array], Array]:
        """A module as a function of a batch. What one of NNX changes of itself, it changes of a copy."""
        if isinstance(module, nn.Module):
            return lambda x: module.apply(self.variables, x)
        return (lambda x: nnx.clone(module)(x)) if isinstance(module, nnx.Module) else module

    def _marked(self, module: markers.Marked, value: Value) -> Value:
        place = Place(f"{self.name}.{module.name}".strip("."), module.variables)
        return READERS[type(module.it)](module.it, value, place)

    def label(self, module: object) -> str:
        """For messages: where a module stands, and what it is."""
        name = getattr(module, "__name__", type(module).__name__)
        return f"layer {self.name} of the model, {name}," if self.name else f"the model, {name},"

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
        return place.traced(module, value)
    return value.affine(layers.dense(kernel, bias, value.shape))


def _conv(module: Any, value: Value, place: Place) -> Value:
    kernel, bias = _kernel_and_bias(module, place)
    zero_padded = not isinstance(module.padding, str) or module.padding in ("SAME", "VALID")
    masked = getattr(module, "mask", None) is not None
    if kernel.ndim != 4 or masked or not zero_padded or _pair(module.input_dilation) != (1, 1):
        return place.traced(module, value)
    stride, dilation = _pair(module.strides), _pair(module.kernel_dilation)
    kernel = linear.grouped(linear.dilated(kernel, dilation), module.feature_group_count)
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


def _prelu(module: Any, value: Value, place: Place) -> Value:
    slope = place.parameter(module, "negative_slope")
    if slope is None:
        raise TypeError(
            f"layer {place.name}, PReLU, has no negative_slope in the variables; initialise the model first"
        )
    return value.activation(LeakyReLUActivation(slope))


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
    if branch.shape != value.shape:
        raise ValueError(f"layer {place.name}: Residual adds activations {branch.shape} to its input {value.shape}")
    return value + branch


def _nonexpansive(module: nonexpansive.Nonexpansive, value: Value, place: Place) -> Value:
    try:
        return module.read(value)
    except ValueError as error:
        raise ValueError(f"layer {place.name}: {error}") from error


def _sequential(module: Any, value: Value, place: Place) -> Value:
    return place.read_all(module.layers, value)


for kinds, reader in (
    ((nnx.Sequential, nn.Sequential), _sequential),
    ((nnx.Linear, nn.Dense), _dense),
    ((nnx.Conv, nn.Conv), _conv),
    ((nnx.BatchNorm, nn.BatchNorm), _batch_norm),
    ((nnx.Dropout, nn.Dropout), _dropout),
    ((nnx.PReLU, nn.PReLU), _prelu),
    ((modules.ClippedReLU,), _clipped_relu),
    ((modules.MaxMin,), _maxmin),
    ((modules.ClippedMaxMin,), _clipped_maxmin),
    ((modules.Residual,), _residual),
    ((nonexpansive.CayleyLinear, nonexpansive.CayleyConv), _nonexpansive),
    ((nonexpansive.AOLLinear, nonexpansive.AOLConv), _nonexpansive),
    ((nonexpansive.SLLLinear, nonexpansive.SLLConv), _nonexpansive),
):
    for kind in kinds:
        register(kind, reader)


def _unsupported(module: object, place: Place) -> str:
    return f"{place.label(module)} is not supported; {SUPPORTED}"


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

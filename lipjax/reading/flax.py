"""Reading Flax models: an NNX or Linen ``Sequential`` becomes a network that bounds can be computed for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lipjax.networks import activations, layers
from lipjax.networks.graph import Network
from lipjax.reading import functions, modules
from lipjax.reading.assembly import Assembly

SUPPORTED = (
    "supported are convolutions (nnx.Conv, nn.Conv), dense layers (nnx.Linear, nn.Dense), batch norm in inference "
    "mode, nnx.relu, jax.nn.relu, ClippedReLU, MaxMin and ClippedMaxMin of lipjax.models, lipjax.Residual, average and "
    "max pooling, and functions that only reshape, shift or scale each example"
)
CHECKED_INPUTS = 4
TOLERANCE = 1e-3


def from_flax(
    model: nnx.Sequential | nn.Sequential,
    variables: Mapping[str, Any] | tuple[int, ...] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Network:
    """Read a Flax ``Sequential`` classifier, of NNX or Linen, as a :class:`lipjax.Network`.

    May be called inside a traced function: then the network's arrays are the traced parameters, and gradients with
    respect to the Flax parameters come out as usual. Where the parameters are known, the network is compared with the
    model on random inputs.

    Args:
        model: layers and functions applied in order; the last one must be dense. Supported: 2-D convolutions with
            strides, zero padding, dilation and feature groups; dense layers; batch norm in inference mode, per-channel
            normalisation and other shifts and scales; average and max pooling; ``nnx.relu``, ``jax.nn.relu``,
            ``lipjax.reading.modules.ClippedReLU``, ``MaxMin`` and ``ClippedMaxMin``; ``lipjax.Residual``; C-order
            reshapes.
        variables: of a Linen model, with ``params`` and, for batch norm, ``batch_stats``. Not for NNX.
        input_shape: shape of one input without the batch axis, images as (H, W, C).

    Returns:
        A network that computes what the model does.

    Raises:
        TypeError: a layer that is not supported, named with its place; nothing is ever guessed.
        ValueError: an input that does not fit a layer, or a network that does not compute what the model does.
    """
    if isinstance(variables, tuple | list) and input_shape is None:
        variables, input_shape = None, variables
    if input_shape is None:
        raise TypeError("input_shape is missing: give the shape of one input, such as input_shape=(28, 28, 1)")
    parameters = nnx.state(model) if isinstance(model, nnx.Module) else variables
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(parameters)):
        raise TypeError("the model has shapes in place of parameters, as eval_shape gives them; initialise it first")
    assembly = Assembly(tuple(input_shape))
    # Exact types: a subclass may compute something else.
    if type(model) is nnx.Sequential:
        _read_all(model.layers, [None] * len(model.layers), assembly, "")
        forward = model
    elif type(model) is nn.Sequential:
        if not isinstance(variables, Mapping) or "params" not in variables:
            if isinstance(variables, Mapping) and any(str(name).startswith("layers_") for name in variables):
                raise TypeError("variables hold the parameters alone: give {'params': params}, as model.init does")
            raise TypeError("a Linen model needs its variables: from_flax(module, variables, input_shape=...)")
        _read_all(model.layers, [_collected(variables, f"layers_{k}") for k in range(len(model.layers))], assembly, "")
        forward = lambda x: model.apply(variables, x)  # noqa: E731
    else:
        raise TypeError(f"from_flax reads Sequential models of flax.nnx or flax.linen, not {type(model).__name__}")
    network = assembly.network()
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, variables))):
        _compare(network, forward, tuple(input_shape))
    return network


def _read_all(modules: Any, variables: list, assembly: Assembly, prefix: str) -> None:
    for place, (module, own) in enumerate(zip(modules, variables, strict=True)):
        _read_one(module, own, assembly, f"{prefix}{place}")


def _read_one(module: Any, variables: Any, assembly: Assembly, place: str) -> None:
    """One layer of a model; ``variables`` are those of a Linen module."""
    kind = type(module)
    if kind in (nnx.Linear, nn.Dense):
        _check_arithmetic(module, variables, place)
        if len(assembly.shape) != 1:
            raise TypeError(f"layer {place}, a dense layer, acts on activations {assembly.shape}: flatten them first")
        assembly.dense(*_kernel_and_bias(module, variables))
    elif kind in (nnx.Conv, nn.Conv):
        _check_arithmetic(module, variables, place)
        _convolution(module, variables, assembly, place)
    elif kind in (nnx.BatchNorm, nn.BatchNorm):
        assembly.rescale(*_batch_norm(module, variables, place))
    elif kind in (nnx.Dropout, nn.Dropout):
        if not (module.deterministic or module.rate == 0):
            raise TypeError(f"layer {place}, Dropout, is active; make it deterministic (model.eval()), or leave it out")
    elif kind is modules.ClippedReLU:
        theta = jnp.asarray(module.theta[...])
        if theta.shape != assembly.shape:
            raise ValueError(f"layer {place}: theta of shape {theta.shape} does not fit activations {assembly.shape}")
        assembly.activation(lambda shape: activations.ClippedReLU(theta.reshape(shape)))
    elif kind is modules.MaxMin:
        if assembly.shape[-1] % 2:
            raise ValueError(f"layer {place}: MaxMin needs an even number of channels, not {assembly.shape[-1]}")
        assembly.activation(lambda shape: activations.MaxMin(), elementwise=False)
    elif kind is modules.ClippedMaxMin:
        upper, lower = jnp.asarray(module.upper_clip[...]), jnp.asarray(module.lower_clip[...])
        half = (*assembly.shape[:-1], assembly.shape[-1] // 2)
        if assembly.shape[-1] % 2 or upper.shape != half or lower.shape != half:
            raise ValueError(
                f"layer {place}: clips of shapes {upper.shape} and {lower.shape} do not fit pairs of {assembly.shape}"
            )
        assembly.activation(lambda shape: activations.ClippedMaxMin(upper, lower), elementwise=False)
    elif kind is modules.Residual:
        shape = assembly.shape
        assembly.fork()
        _read_all(module.layers, [None] * len(module.layers), assembly, f"{place}.")
        if assembly.shape != shape:
            raise ValueError(f"layer {place}: Residual adds activations {assembly.shape} to its input {shape}")
        assembly.join()
    elif module is nnx.relu or module is jax.nn.relu:
        assembly.activation(lambda shape: activations.ReLU())
    elif not isinstance(module, nnx.Module | nn.Module) and callable(module):
        _function(module, assembly, place)
    else:
        raise TypeError(_unsupported(module, place))


def _function(function: Callable[[Array], Array], assembly: Assembly, place: str) -> None:
    operations = functions.read(function, assembly.shape)
    if operations is None:
        raise TypeError(_unsupported(function, place))
    for operation in operations:
        if isinstance(operation, functions.Reshape):
            assembly.reshape(operation.shape)
        elif isinstance(operation, functions.Rescale):
            assembly.rescale(operation.scale, operation.shift)
        elif operation.kind == "max":
            assembly.max_pool(operation.window, operation.stride, operation.padding)
        else:
            assembly.sum_pool(operation.window, operation.stride, operation.padding)


def _unsupported(module: object, place: str) -> str:
    name = getattr(module, "__name__", type(module).__name__)
    return f"layer {place} of the model, {name}, is not supported; {SUPPORTED}"


def _collected(variables: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the collections of a Linen model hold for one of its modules."""
    return {collection: entries[name] for collection, entries in variables.items() if name in entries}


def _parameter(module: Any, variables: Any, name: str, collection: str = "params") -> Array | None:
    """A parameter of an NNX module, or of a Linen module by its variables; None where there is none."""
    if not getattr(module, f"use_{name}", True):
        return None
    if variables is None:
        variable = getattr(module, name, None)
        return None if variable is None else jnp.asarray(variable[...])
    value = variables.get(collection, {}).get(name)
    return None if value is None else jnp.asarray(value)


def _kernel_and_bias(module: Any, variables: Any) -> tuple[Array, Array]:
    kernel, bias = _parameter(module, variables, "kernel"), _parameter(module, variables, "bias")
    assert kernel is not None  # _check_arithmetic was here before
    return kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype) if bias is None else bias


def _check_arithmetic(module: Any, variables: Any, place: str) -> None:
    """Raises TypeError where a layer computes with anything but plain products in its own float32 or float64."""
    kernel, name = _parameter(module, variables, "kernel"), type(module).__name__
    if kernel is None:
        raise TypeError(f"layer {place}, {name}, has no kernel in the variables; initialise the model first")
    _check_precision(module, variables, place, ("kernel", "bias"))


def _check_precision(module: Any, variables: Any, place: str, names: tuple[str, ...]) -> None:
    """Raises TypeError unless parameters and computation are all float32 or all float64, by Flax's own products."""
    name = type(module).__name__
    for parameter in names:
        value = _parameter(module, variables, parameter)
        if value is None:
            continue
        if value.dtype not in (jnp.float32, jnp.float64) or (module.dtype is not None and module.dtype != value.dtype):
            raise TypeError(
                f"layer {place}, {name}, has a {parameter} of {value.dtype} and computes in "
                f"{module.dtype or value.dtype}; supported are float32 and float64, the same in both"
            )
    if module.dtype not in (None, jnp.float32, jnp.float64):
        raise TypeError(f"layer {place}, {name}, computes in {module.dtype}; supported are float32 and float64")
    defaults = inspect.signature(type(module).__init__).parameters
    options = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    for option in (*options, "promote_dtype", "preferred_element_type"):
        if option in defaults and getattr(module, option) is not defaults[option].default:
            raise TypeError(f"layer {place}, {name}, has its own {option}, which is not supported")


def _convolution(module: Any, variables: Any, assembly: Assembly, place: str) -> None:
    kernel, bias = _kernel_and_bias(module, variables)
    if kernel.ndim != 4:
        raise TypeError(f"layer {place}, Conv, is not two-dimensional: its kernel has shape {kernel.shape}")
    if _pair(module.input_dilation) != (1, 1):
        raise TypeError(f"layer {place}, Conv, has input_dilation={module.input_dilation}, which is not supported")
    if getattr(module, "mask", None) is not None:
        raise TypeError(f"layer {place}, Conv, has a masked kernel, which is not supported")
    stride, dilation = _pair(module.strides), _pair(module.kernel_dilation)
    kernel = _grouped(_dilated(kernel, dilation), module.feature_group_count)
    padding = _padding(module.padding, assembly.shape, kernel.shape, stride, place)
    assembly.convolution(kernel, bias, stride, padding)


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
    whole = jnp.einsum("hwigo,gk->hwkigo", split, jnp.eye(groups, dtype=kernel.dtype))
    return whole.reshape(kh, kw, groups * c_in, c_out)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return (int(1 if first is None else first), int(1 if second is None else second))


def _padding(padding: Any, shape: tuple, kernel_shape: tuple, stride: tuple, place: str) -> layers.Padding:
    """Flax's forms of zero padding as explicit pairs."""
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        pads = jax.lax.padtype_to_pads(shape[:2], kernel_shape[:2], stride, padding)
    elif isinstance(padding, int):
        pads = [(padding, padding)] * 2
    elif isinstance(padding, tuple | list) and len(padding) == 2:
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    else:
        raise TypeError(f"layer {place}, Conv, has padding={padding!r}, which is not supported: use zero padding")
    (top, bottom), (left, right) = pads
    return ((int(top), int(bottom)), (int(left), int(right)))


def _batch_norm(module: Any, variables: Any, place: str) -> tuple[Array, Array]:
    """Scale and shift of a batch norm in inference mode."""
    if not module.use_running_average:
        raise TypeError(
            f"layer {place}, BatchNorm, is in training mode and mixes the examples of a batch; use running averages "
            "(model.eval(), or use_running_average=True)"
        )
    if module.axis != -1:
        raise TypeError(f"layer {place}, BatchNorm, has axis={module.axis}, which is not supported: use the last axis")
    _check_precision(module, variables, place, ("scale", "bias"))
    mean = _parameter(module, variables, "mean", "batch_stats")
    var = _parameter(module, variables, "var", "batch_stats")
    if mean is None or var is None:
        raise TypeError(f"layer {place}, BatchNorm, has no batch_stats in the variables")
    scale = _parameter(module, variables, "scale")
    bias = _parameter(module, variables, "bias")
    slope = (1.0 if scale is None else scale) / jnp.sqrt(var + module.epsilon)
    return slope, (0.0 if bias is None else bias) - mean * slope


def _compare(network: Network, forward: Callable[[Array], Array], input_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless network, in float64, and model give the same logits for random inputs."""
    x = np.random.default_rng(0).uniform(size=(CHECKED_INPUTS, *input_shape)).astype(np.float32)
    theirs = np.asarray(forward(jnp.asarray(x)), np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network)
        ours = np.asarray(wide(jnp.asarray(x, jnp.float64)))
    scale = 1 + np.abs(ours[np.isfinite(ours)]).max(initial=0)
    if ours.shape != theirs.shape or (np.isfinite(ours) & ~(np.abs(ours - theirs) <= TOLERANCE * scale)).any():
        raise ValueError(
            "the network that was read does not compute what the model does: logits differ by up to "
            f"{np.nanmax(np.abs(ours - theirs)) if ours.shape == theirs.shape else 'shape'}; please report the model"
        )

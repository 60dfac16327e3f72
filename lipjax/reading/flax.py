"""Reading Flax models: an NNX or Linen ``Sequential`` becomes a network that bounds can be computed for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lipjax.networks.graph import Network
from lipjax.reading import readers
from lipjax.reading.values import Value

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
    value = Value.of_input(tuple(input_shape))
    # Exact types: a subclass may compute something else.
    if type(model) is nnx.Sequential:
        value, forward = readers.Place("", None).read_all(model.layers, value), model
    elif type(model) is nn.Sequential:
        if not isinstance(variables, Mapping) or "params" not in variables:
            if isinstance(variables, Mapping) and any(str(name).startswith("layers_") for name in variables):
                raise TypeError("variables hold the parameters alone: give {'params': params}, as model.init does")
            raise TypeError("a Linen model needs its variables: from_flax(module, variables, input_shape=...)")
        value = readers.Place("", variables).read_all(model.layers, value)
        forward = lambda x: model.apply(variables, x)  # noqa: E731
    else:
        raise TypeError(f"from_flax reads Sequential models of flax.nnx or flax.linen, not {type(model).__name__}")
    network = value.network()
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, variables))):
        _compare(network, forward, tuple(input_shape))
    return network


def _compare(network: Network, forward: Callable[[Array], Array], input_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless network, in float64, and model give the same logits for random inputs."""
    x = np.random.default_rng(0).uniform(size=(CHECKED_INPUTS, *input_shape)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):  # Flax's average pooling divides by an integer
        theirs = np.asarray(forward(jnp.asarray(x)), np.float64)
    with jax.enable_x64(True):
        ours = np.asarray(network.astype(jnp.float64)(jnp.asarray(x, jnp.float64)))
    scale = 1 + np.abs(ours[np.isfinite(ours)]).max(initial=0)
    if ours.shape != theirs.shape or (np.isfinite(ours) & ~(np.abs(ours - theirs) <= TOLERANCE * scale)).any():
        raise ValueError(
            "the network that was read does not compute what the model does: logits differ by up to "
            f"{np.nanmax(np.abs(ours - theirs)) if ours.shape == theirs.shape else 'shape'}; please report the model"
        )

"""Reading models: a module of Flax, or any function of JAX, becomes a network that bounds can be computed for."""

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
    model: nnx.Module | nn.Module,
    variables: Mapping[str, Any] | tuple[int, ...] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Network:
    """Read a classifier of Flax, a module of NNX or Linen, as a :class:`lipjax.Network`.

    May be called inside a traced function: then the network's arrays are the traced parameters, and gradients with
    respect to the Flax parameters come out as usual. Where the parameters are known, the network is compared with the
    model on random inputs.

    Args:
        model: any module that takes a batch and gives logits; the last operation must be affine. A ``Sequential`` is
            read element by element; what is not known as a whole is traced, and its jaxpr is read. Supported: dense
            layers, convolutions (1-D and 2-D, transposed ones as well), products with constants (einsum), batch norm
            in inference mode, weight and spectral normalisation, sums, differences, maxima, minima and concatenations
            of branches, everything that moves entries (reshapes, transposes, slices, padding), sums and means over
            axes, average and max pooling; the activations of ``jax.nn`` (see ``lipjax.reading.activations``), clips,
            and the modules of lipjax. What is linear between two activations becomes one layer.
        variables: of a Linen model, with ``params`` and, for batch norm, ``batch_stats``. Not for NNX.
        input_shape: shape of one input without the batch axis, images as (H, W, C).

    Returns:
        A network that computes what the model does.

    Raises:
        TypeError: what is not supported, named with its place in the model and in its source; nothing is ever guessed.
            So is what mixes the examples of a batch or depends on their number.
        ValueError: an input that does not fit a layer, or a network that does not compute what the model does.
    """
    if isinstance(variables, tuple | list) and input_shape is None:
        variables, input_shape = None, variables
    if input_shape is None:
        raise TypeError("input_shape is missing: give the shape of one input, such as input_shape=(28, 28, 1)")
    parameters = nnx.state(model) if isinstance(model, nnx.Module) else variables
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(parameters)):
        raise TypeError("the model has shapes in place of parameters, as eval_shape gives them; initialise it first")
    if isinstance(model, nn.Module) and (not isinstance(variables, Mapping) or "params" not in variables):
        names = [str(name) for name in variables] if isinstance(variables, Mapping) else []
        if names and "params" not in names:
            raise TypeError("variables hold the parameters alone: give {'params': params}, as model.init does")
        raise TypeError("a Linen model needs its variables: from_flax(module, variables, input_shape=...)")
    if not isinstance(model, nnx.Module | nn.Module):
        raise TypeError(
            f"from_flax reads modules of flax.nnx or flax.linen, not {type(model).__name__}; from_function reads "
            "functions"
        )
    return _read(model, readers.Place("", variables), tuple(input_shape))


def from_function(function: Callable[[Array], Array], input_shape: tuple[int, ...]) -> Network:
    """Read a function of JAX as a :class:`lipjax.Network`.

    Args:
        function: from a batch (B, *input_shape) to logits (B, classes), with its parameters closed over. Supported is
            what :func:`from_flax` supports.
        input_shape: shape of one input without the batch axis.

    Returns:
        A network that computes what the function does.

    Raises:
        TypeError, ValueError: as :func:`from_flax`.
    """
    return _read(function, readers.Place("", None), tuple(input_shape))


def _read(model: Any, place: readers.Place, input_shape: tuple[int, ...]) -> Network:
    network = place.read(model, Value.of_input(input_shape)).network()
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((network, place.variables))):
        _compare(network, place.forward(model), input_shape)
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

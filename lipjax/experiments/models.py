"""Models of others: a function that builds one, and weights in a file, become a network."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lipjax.errors import InputError
from lipjax.networks.graph import Network
from lipjax.reading.flax import from_flax, from_function
from lipjax.training.checkpoints import Arrays, flat, sha256


def load_model(
    build: Callable[[], Any], weights: str | pathlib.Path, input_shape: tuple[int, ...]
) -> tuple[Network, str]:
    """A trained model as a network.

    Args:
        build: gives the model: a module of NNX, whose parameters and statistics are replaced by the weights; a module
            of Linen, whose variables are the weights; or a function ``(weights, x) -> logits`` of a batch x.
        weights: an ``.npz`` of arrays, or a folder that Orbax has written. Names of nested dictionaries are joined by
            ``"."`` or ``"/"``: ``"params.Dense_0.kernel"``, ``"conv/bias"``.
        input_shape: of one input.

    Returns:
        ``(network, sha256)``: the network, and a hash of the weights.

    Raises:
        InputError: weights that cannot be read, or are not those of the model; a model that cannot be.
    """
    arrays = read_weights(pathlib.Path(weights))
    try:
        model = build()
    except TypeError as error:
        raise InputError(f"--model cannot be called without arguments: {error}; give a function without any") from None
    try:
        if isinstance(model, nnx.Module):
            network = from_flax(_filled(model, arrays, weights), input_shape)
        elif isinstance(model, nn.Module):
            nested = _nested(arrays)
            network = from_flax(model, nested if "params" in nested else {"params": nested}, input_shape)
        elif callable(model):
            nested = jax.tree.map(jax.numpy.asarray, _nested(arrays))
            network = from_function(lambda x: model(nested, x), input_shape)
        else:
            raise InputError(
                f"--model gives {type(model).__name__}; expected a module of Flax, or (weights, x) -> logits"
            )
    except InputError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"--model cannot be read for inputs of shape {tuple(input_shape)}: {error}") from None
    return network, sha256(arrays)


def read_weights(path: pathlib.Path) -> Arrays:
    """Arrays by name, with ``"."`` between the names of nested dictionaries.

    Raises:
        InputError: neither an ``.npz`` of arrays nor a folder of Orbax.
    """
    try:
        if path.is_dir():
            return _restored(path.absolute())
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name.replace("/", "."): file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        wanted = "give an .npz of arrays, or a folder that Orbax has written"
        raise InputError(f"--weights={path} cannot be read: {str(error).splitlines()[0]}; {wanted}") from None


def _restored(path: pathlib.Path) -> Arrays:
    """What Orbax has written, as host arrays, from whatever device."""
    checkpointer = ocp.PyTreeCheckpointer()
    written = checkpointer.metadata(path).item_metadata
    if written is None:
        raise ValueError("nothing in it says what it holds")
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), written.tree)
    return flat(checkpointer.restore(path, restore_args=arguments))


def _filled(model: nnx.Module, arrays: Arrays, weights: Any) -> nnx.Module:
    """A module of NNX with its parameters and statistics replaced; what is random (of dropout) stays."""
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    expected = nnx.to_pure_dict(state)
    named = {name.removesuffix(".value"): array for name, array in arrays.items() if "rngs" not in name.split(".")}
    shapes = {name: array.shape for name, array in flat(expected).items()}
    wrong = [
        *(f"{name} is missing" for name in shapes if name not in named),
        *(f"{name} has no place in the model" for name in named if name not in shapes),
        *(
            f"{n} has shape {named[n].shape}, not {shapes[n]}"
            for n in shapes
            if n in named and named[n].shape != shapes[n]
        ),
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InputError(f"--weights={weights} are not those of the model: {'; '.join(wrong[:3])}{more}")
    paths, structure = jax.tree_util.tree_flatten_with_path(expected)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    nnx.replace_by_pure_dict(
        state, jax.tree_util.tree_unflatten(structure, [jax.numpy.asarray(named[n]) for n in names])
    )
    nnx.update(model, state)
    model.eval()
    return model


def _nested(arrays: Arrays) -> dict[str, Any]:
    """Arrays by name as nested dictionaries."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = array
    return nested

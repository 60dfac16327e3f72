"""Checks of what users give: batches, labels and random keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.graph import Network, check_network


def check_key(key: Any, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless it is a key of :func:`jax.random.key`, single or of one of some shapes."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape in ((), *shapes):
            return
        what = f"key has shape {key.shape}"
    elif getattr(key, "dtype", None) == jnp.uint32:
        what = "key holds the numbers of a key, as jax.random.PRNGKey gives them"
    else:
        what = f"key={key!r} is of type {type(key).__name__}"
    or_many = f", or keys of shape {' or '.join(map(str, shapes))}" if shapes else ""
    raise ValueError(f"{what}; expected a single key, such as jax.random.key(seed){or_many}")


def check_start_key(key: Any) -> None:
    """Raises ValueError unless it is a single key whose numbers do not depend on how many are drawn at once."""
    check_key(key)
    if "threefry" not in str(jax.random.key_impl(key)):
        raise ValueError(
            f"key is of the generator {jax.random.key_impl(key)}, whose numbers depend on the batch; expected "
            "jax.random.key(seed, impl='threefry2x32')"
        )


def check_batch(network: Network, x: Array) -> None:
    """Raises TypeError or ValueError unless this is a network, and x a batch of its inputs."""
    check_network(network)
    expected = ", ".join(map(str, ("B", *network.input_shape)))
    if not hasattr(x, "dtype"):
        raise TypeError(f"x is a {type(x).__name__}; expected a batch ({expected}), an array")
    if tuple(jnp.shape(x)[1:]) != network.input_shape or jnp.ndim(x) == 0:
        raise ValueError(f"x has shape {jnp.shape(x)}; expected a batch ({expected})")


def check_labels(num_classes: int, x: Array, label: Array) -> None:
    """Raises ValueError unless the labels are classes from 0 on, one per input."""
    kind = getattr(label, "dtype", type(label).__name__)
    if np.shape(label) != np.shape(x)[:1] or not np.issubdtype(getattr(label, "dtype", object), np.integer):
        raise ValueError(f"label has shape {np.shape(label)} and type {kind}; expected {len(x)} integers in an array")
    outside = (np.asarray(label) < 0) | (np.asarray(label) >= num_classes)
    if outside.any():
        raise ValueError(
            f"label[{np.flatnonzero(outside)[0]}] is {np.asarray(label)[outside][0]}; expected classes from 0 to "
            f"{num_classes - 1}"
        )

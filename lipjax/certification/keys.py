"""Random keys: which ones may be given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


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

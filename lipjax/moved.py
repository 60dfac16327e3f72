"""Names of older versions: what moved works for one version more, with a warning; what is gone says its successor."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# What it is called now. Of the activations of networks; the Flax modules have the short names.
NAMES = {
    "Identity": "lipjax.IdentityActivation",
    "ReLU": "lipjax.ReLUActivation",
    "MaxPool": "lipjax.MaxPoolActivation",
}
MODULES = {"models": ("lipjax.reading.modules", "lipjax.experiments.architectures")}
METHODS = {"globally": "with_global_norms", "locally": "with_local_norms", "dually": "by_dual"}  # of Certifier
GONE = {
    "Block": "a network is a graph: use lipjax.chain(layer, activation, ..., head), or lipjax.Graph",
    "Fork": "a network is a graph: use lipjax.Graph, with lipjax.Sum for a sum",
    "Join": "a network is a graph: use lipjax.Graph, with lipjax.Sum for a sum",
    "global_norms": "use lipjax.whole_norms(network.layers, ask)",
}


def look_up(name: str) -> Any:
    """What a name of an older version is today.

    Raises:
        AttributeError: there is no such name, or it is gone.
    """
    if name in NAMES:
        module, _, attribute = NAMES[name].rpartition(".")
        _warn(f"lipjax.{name}", NAMES[name])
        return getattr(importlib.import_module(module), attribute)
    if name in GONE:
        raise AttributeError(f"lipjax.{name} is gone since 0.5: {GONE[name]}")
    raise AttributeError(f"module 'lipjax' has no attribute {name!r}")


def look_up_in(module: str, name: str) -> Any:
    """What a name in a module of an older version is today.

    Raises:
        AttributeError: there is no such name.
    """
    for place in MODULES[module]:
        found = getattr(importlib.import_module(place), name, None)
        if found is not None:
            _warn(f"lipjax.{module}.{name}", f"{place}.{name}")
            return found
    raise AttributeError(f"module 'lipjax.{module}' has no attribute {name!r}")


def look_up_method(certifier: Any, name: str) -> Any:
    """What a method of a certifier of an older version is today.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in METHODS:
        raise AttributeError(f"{type(certifier).__name__!r} object has no attribute {name!r}")
    _warn(f"Certifier.{name}", f"Certifier.{METHODS[name]}")
    return getattr(certifier, METHODS[name])


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now; the old name goes in 0.6", DeprecationWarning, stacklevel=4)

"""References: things of a user that a config names, as in ``my_package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from lipjax.errors import InputError


def is_reference(name: str) -> bool:
    """Whether a name is one of a user's own module."""
    return ":" in name


def find(name: str, option: str) -> Any:
    """What ``package.module:name`` names; modules are looked for where Python looks, and in the working directory.

    Args:
        name: the reference.
        option: that gave it, for messages, such as ``--config.method.loss``.

    Raises:
        InputError: no such module, or no such name in it.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        remedy = "give package.module:name of a module that Python finds"
        raise InputError(f"{option}={name}: {error}; {remedy}") from None
    if not hasattr(found, attribute):
        raise InputError(f"{option}={name}: {found.__file__} has no {attribute!r}; give package.module:name")
    return getattr(found, attribute)

"""Models: where the modules and architectures of older versions were; see :mod:`lipjax.moved`."""

from typing import Any

from lipjax import moved


def __getattr__(name: str) -> Any:
    return moved.look_up_in("models", name)

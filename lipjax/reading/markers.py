"""Markers: modules that stand for themselves while a model is traced, because a reader knows them as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jax.extend import core

module_p = core.Primitive("lipjax_module")
module_p.def_abstract_eval(lambda x, *, module, shape, dtype: jax.core.ShapedArray(shape, dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
    """A module as a parameter of an equation.

    Attributes:
        it: the module.
        name: of a Linen module in its model.
        variables: of a Linen module.
    """

    it: Any
    name: str = ""
    variables: Any = None


@contextlib.contextmanager
def marked(types: set[type]) -> Iterator[None]:
    """While tracing: a call of a module of one of these types, with one array, is one equation."""
    originals = {kind: kind.__call__ for kind in types if issubclass(kind, nnx.Module)}

    def replaced(original: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            if len(args) != 1 or options or not isinstance(args[0], jax.core.Tracer):
                return original(self, *args, **options)
            return _bind(lambda x: original(self, x), args[0], Marked(self))

        return call

    def intercept(following: Any, args: tuple, options: dict, context: Any) -> Any:
        known = type(context.module) in types and context.method_name == "__call__"
        if not known or len(args) != 1 or options or not isinstance(args[0], jax.core.Tracer):
            return following(*args, **options)
        module = context.module
        return _bind(lambda x: following(x), args[0], Marked(module, "/".join(module.path), module.variables))

    for kind, original in originals.items():
        kind.__call__ = replaced(original)
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def _bind(function: Any, x: Any, module: Marked) -> Any:
    out = jax.eval_shape(function, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return module_p.bind(x, module=module, shape=out.shape, dtype=out.dtype)

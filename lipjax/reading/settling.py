"""Settling: from an expression of a value to a value, with the activations that are in it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lipjax.reading import expressions
from lipjax.reading.expressions import Constant, Expression, UnsupportedError
from lipjax.reading.values import Value


class Settler:
    """Finds what expressions of values are; each once, so that values that are used twice are one node."""

    def __init__(self) -> None:
        self.kept: list[tuple[Value, Expression, Value]] = []

    def settled(self, value: Value, expression: Expression, where: str) -> Value:
        """The value that an expression of a value is."""
        key = next((found for known, each, found in self.kept if known is value and each is expression), None)
        if key is not None:
            return key
        found = self._found(value, expression, where)
        self.kept.append((value, expression, found))
        return found

    def _found(self, value: Value, expression: Expression, where: str) -> Value:
        if isinstance(expression, str):
            return value
        plain = expressions.affine(expression)
        if plain is not None:
            return _rescaled(value, *plain)
        matched = expressions.match(expression)
        if matched is not None:
            argument, activation = matched
            return self.settled(value, argument, where).activation(activation)
        name, _, *operands = expression
        if name in ("add", "sub", "mul", "div", "neg"):
            if name == "neg":
                return self.settled(value, operands[0], where).rescaled(jnp.float32(-1))
            inner = [each for each in operands if not isinstance(each, Constant)]
            if len(inner) == 1:
                part = expressions.affine((name, (), *("x" if each is inner[0] else each for each in operands)))
                if part is not None:
                    return _rescaled(self.settled(value, inner[0], where), *part)
            elif name in ("add", "sub"):
                first, second = (self.settled(value, each, where) for each in operands)
                return first + (second if name == "add" else second.rescaled(jnp.float32(-1)))
        raise UnsupportedError(f"{_innermost(expression)}")


def _rescaled(value: Value, scale: Any, shift: Any) -> Value:
    """``scale a + shift``, for numbers and arrays."""
    if not (isinstance(scale, float) and scale == 1):
        value = value.rescaled(_array(scale))
    return value if isinstance(shift, float) and shift == 0 else value.shifted(_array(shift))


def _array(number: Any) -> Any:
    return jnp.asarray(number, None if hasattr(number, "dtype") else jnp.float32)


def _innermost(expression: Expression) -> str:
    """The operation of an expression that is no linear one, for messages."""
    name, _, *operands = expression
    inner = [each for each in operands if isinstance(each, tuple)]
    nonlinear = [each for each in inner if expressions.affine(each) is None and expressions.match(each) is None]
    return _innermost(nonlinear[0]) if nonlinear else name.equation.label

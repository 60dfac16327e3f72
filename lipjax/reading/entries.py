"""Entries: variables of a traced function that depend on its input, and where in a batch their numbers come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lipjax.reading.expressions import Expression, UnsupportedError, equal
from lipjax.reading.values import Value


@dataclasses.dataclass(frozen=True)
class Entry:
    """A variable that depends on the input: an expression of a value, moved.

    Attributes:
        value: of one example.
        expression: entry by entry, of the value.
        places: for a batch of two and one of three examples, where in the raveled batch of values each entry of the
            variable comes from, -1 for zero.
    """

    value: Value
    expression: Expression
    places: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, value: Value, axis: int = 0) -> Entry:
        """A value as it is, with the batch along an axis."""
        size = math.prod(value.shape)
        numbers = (np.arange(batch * size, dtype=np.int32).reshape(batch, *value.shape) for batch in (2, 3))
        one, two = (np.moveaxis(each, 0, axis) for each in numbers)
        return cls(value, "x", (one, two))

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> Entry:
        """The entry with its places moved."""
        return dataclasses.replace(self, places=(move(self.places[0]), move(self.places[1])))

    def broadcast(self, *shapes: tuple[int, ...]) -> Entry:
        """The entry with axes of length 1 repeated, to shapes for both batches."""
        if self.places[0].shape == shapes[0]:
            return self
        one, two = (np.broadcast_to(places, shape) for places, shape in zip(self.places, shapes, strict=True))
        return dataclasses.replace(self, places=(one, two))


def axis_of(entry: Entry, where: str) -> int:
    """The axis of the batch; TypeError unless each example has its own place along it."""
    (one, two), size = entry.places, math.prod(entry.value.shape)
    axes = [k for k, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if len(axes) == 1 and one.shape[axes[0]] == 2 and two.shape[axes[0]] == 3:
        (axis,) = axes
        first = np.moveaxis(one, axis, 0)[0]
        alike = np.stack([np.where(first < 0, -1, first + k * size) for k in range(3)], axis)
        within = first.size == 0 or (first.max() < size)
        if within and np.array_equal(one, np.take(alike, (0, 1), axis)) and np.array_equal(two, alike):
            return axis
    raise UnsupportedError(f"{where} mixes the examples of a batch, or loses them")


def moves(entry: Entry) -> bool:
    """Whether an entry is anything else than its value with the batch first."""
    size = math.prod(entry.value.shape)
    return entry.places[0].shape != (2, *entry.value.shape) or not np.array_equal(
        entry.places[0].ravel(), np.arange(2 * size)
    )


def drops(entry: Entry) -> bool:
    """Whether an entry leaves out numbers of its value."""
    if not moves(entry):
        return False
    taken = entry.places[0]
    return np.unique(taken[taken >= 0]).size < 2 * math.prod(entry.value.shape)


def same_places(a: Entry, b: Entry) -> bool:
    """Whether two entries are moved alike."""
    return all(x is y or np.array_equal(x, y) for x, y in zip(a.places, b.places, strict=True))


def same(a: Entry, b: Entry) -> bool:
    """Whether two entries are the same."""
    return a.value is b.value and equal(a.expression, b.expression) and same_places(a, b)

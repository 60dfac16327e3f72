"""Interpreter: from the equations of a traced function to the value that it gives, in terms of the nodes of a graph.

Whatever moves entries is followed by indices: a batch of two examples and one of three are numbered, the operation is
applied to the numbers, and what comes out says which entry went where, and that no example met another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipjax.networks.maxmin import MaxMinActivation
from lipjax.reading import expressions, linear, tracing
from lipjax.reading.entries import Entry, axis_of, drops, moves, same, same_places
from lipjax.reading.expressions import Constant, UnsupportedError
from lipjax.reading.settling import Settler
from lipjax.reading.tracing import Equation, Trace
from lipjax.reading.values import Value

MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "rev", "gather", "dynamic_slice"),
    *("split", "pad", "tile", "copy", "copy_p"),
}
JOINS = {"concatenate", "stack"}
PADDED, FILLED = -2, -3  # places that this padding made, or that lie outside
ENTRYWISE = {
    *(
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "neg",
        "max",
        "min",
        "abs",
        "sign",
        "integer_pow",
        "square",
        "pow",
        "sqrt",
    ),
    *("rsqrt", "cbrt", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erfc", "sin", "cos", "sinh"),
    *("cosh", "atan2", "ge", "gt", "le", "lt", "eq", "ne", "select_n", "clamp", "is_finite", "not", "and", "or"),
    "stop_gradient",
}


class Reader:
    """Reads the equations of a function.

    Args:
        module: reads a module that stands for itself: from the module and a value to a value.
    """

    def __init__(self, traces: tuple[Trace, Trace], value: Value, module: Callable[[Any, Value], Value]) -> None:
        self.trace, self.module = traces[0], module
        self.other = traces[1]
        self.constants = tuple(tracing.constants_of(each) for each in traces)
        self.unchanged = tracing.unchanged(*traces)
        self.made_by = {number: each for each in self.trace.equations for number in each.outputs}
        self.entries: dict[int, Entry] = {self.trace.input: Entry.of(value)}
        self.settler = Settler()
        self.gathers: list[tuple[Value, np.ndarray, Value]] = []
        self.pairs: list[tuple[list[Entry], dict[str, Entry]]] = []  # that were compared

    def read(self) -> Value:
        """The value that the function gives."""
        for one, two in zip(self.trace.equations, self.other.equations, strict=True):
            if not any(isinstance(each, int) and each in self.entries for each in one.inputs):
                continue
            for number, entry in zip(one.outputs, self._results(one, two), strict=True):
                if entry is None:
                    continue
                shapes = self.trace.types[number].shape, self.other.types[number].shape
                if tuple(places.shape for places in entry.places) != shapes:
                    raise UnsupportedError(f"{one.label} depends on the number of examples in a batch")
                self.entries[number] = entry
        output = self.trace.output
        if not isinstance(output, int) or output not in self.entries:
            raise UnsupportedError("what it gives does not depend on its input")
        value, axis = self._resolved(self.entries[output], "what it gives")
        if axis != 0:
            raise UnsupportedError(f"it gives the batch along axis {axis}; expected axis 0")
        return value

    def _results(self, one: Equation, two: Equation) -> list[Entry | None]:
        operands = [self.entries.get(each) if isinstance(each, int) else None for each in one.inputs]
        dtype = self.trace.types[one.outputs[0]].dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype not in (jnp.float32, jnp.float64):
            raise UnsupportedError(f"{one.label} computes in {dtype}; supported are float32 and float64")
        if one.name == "lipjax_module":
            value, axis = self._resolved(operands[0], one.place)
            if axis != 0:
                raise UnsupportedError(f"a module at {one.place} takes the batch along axis {axis}; expected axis 0")
            return [Entry.of(self.module(one.params["module"], value))]
        if one.name == "convert_element_type":
            if dtype != self.trace.types[one.inputs[0]].dtype:
                raise UnsupportedError(f"{one.label} turns {self.trace.types[one.inputs[0]].dtype} into {dtype}")
            return [operands[0]]
        if one.name in MOVES:
            return self._moved(one, two, operands)
        if one.name in JOINS:
            return [self._joined(one, operands)]
        if one.name in ENTRYWISE:
            return [self._entrywise(one, two, operands)]
        return [self._linear(one, two, operands, dtype)]

    # Entry by entry

    def _entrywise(self, one: Equation, two: Equation, operands: list[Entry | None]) -> Entry:
        shapes = self.trace.types[one.outputs[0]].shape, self.other.types[two.outputs[0]].shape
        operands = [None if each is None else each.broadcast(*shapes) for each in operands]
        given = [each for each in operands if each is not None]
        operands = [None if each is None else self._undropped(each, one.place) for each in operands]
        first, *rest = (each for each in operands if each is not None)
        if not all(each.value is first.value and same_places(each, first) for each in rest):
            return self._of_two(one, given)
        axis = axis_of(first, one.place)
        parts = [
            each.expression if each is not None else Constant(self._constant(one, two, k, axis))
            for k, each in enumerate(operands)
        ]
        # What is zero there is not what an operation makes of it.
        padded = any((places < 0).any() for places in first.places)
        arranged = any(isinstance(part, Constant) and np.ndim(part.array) for part in parts)
        if moves(first) and (padded or arranged):
            value, axis = self._resolved(first, one.place)  # constants are arranged like the moved value
            first = Entry.of(value, axis)
            parts = [part if isinstance(part, Constant) else "x" for part in parts]
        return dataclasses.replace(first, expression=expressions.operation(one, parts))

    def _of_two(self, one: Equation, mine: list[Entry]) -> Entry:
        """A sum, a difference, a maximum or a minimum of two values."""
        if one.name in ("max", "min"):
            return self._larger_and_smaller(one, mine)[one.name]
        if one.name not in ("add", "sub", "add_any") or len(mine) != 2:
            raise UnsupportedError(
                f"{one.label} joins two values that both depend on the input; sums, differences, maxima, minima and "
                "concatenations of them are supported, products are not"
            )
        (first, axis), (second, other) = (self._resolved(each, one.place) for each in mine)
        if axis != other or first.shape != second.shape:
            raise UnsupportedError(f"{one.label} adds values of shapes {first.shape} and {second.shape}")
        return Entry.of(first + (second if one.name != "sub" else second.rescaled(jnp.float32(-1))), axis)

    def _larger_and_smaller(self, one: Equation, mine: list[Entry]) -> dict[str, Entry]:
        """The maximum and the minimum of two values: the halves of MaxMin, which is one node for both."""
        known = next((found for pair, found in self.pairs if all(map(same, pair, mine))), None)
        if known is None:
            axis, last = axis_of(mine[0], one.place), mine[0].places[0].ndim - 1
            if axis == last:
                raise UnsupportedError(f"{one.label} compares values whose last axis is the batch")
            value, axis = self._resolved(self._beside(one, mine, last), one.place)
            pair = Entry.of(value.activation(MaxMinActivation()), axis)
            halves = [pair.moved(lambda places, k=k: np.split(places, 2, last)[k]) for k in (0, 1)]
            known = dict(zip(("max", "min"), halves, strict=True))
            self.pairs.append((mine, known))
        return known

    def _constant(self, one: Equation, two: Equation, place: int, axis: int) -> Any:
        """A constant operand of an operation entry by entry, without the axis of the batch.

        Raises:
            UnsupportedError: it treats examples differently, or depends on their number.
        """
        first, second = (self._operand(each, place, side) for side, each in enumerate((one, two)))
        if np.ndim(first) == 0:
            return self._same_operand(one, two, place)
        if not tracing.known(first, second):
            alike, row = self._alike(one.inputs[place], axis), lax.index_in_dim(first, 0, axis, keepdims=False)
        else:
            row = np.take(np.asarray(first), 0, axis)
            rows = (np.moveaxis(np.asarray(each), axis, 0) for each in (first, second))
            alike = all(np.array_equal(np.broadcast_to(row, each.shape), each, equal_nan=True) for each in rows)
        if not alike:
            raise UnsupportedError(
                f"{one.label} treats the examples of a batch differently, or depends on their number"
            )
        return row

    def _same_operand(self, one: Equation, two: Equation, place: int) -> Any:
        """A constant operand that is the same for both batches. Raises UnsupportedError for any other."""
        number = one.inputs[place]
        first, second = (self._operand(each, place, side) for side, each in enumerate((one, two)))
        same = number in self.unchanged if isinstance(number, int) else True
        if not (same or (tracing.known(first, second) and tracing.equal(first, second))):
            raise UnsupportedError(f"{one.label} takes a constant that depends on the number of examples")
        return first

    def _alike(self, number: int | np.ndarray, axis: int) -> bool:
        """Whether a constant that is not known yet is the same for all examples, by how it is computed."""
        if not isinstance(number, int) or number in self.unchanged:
            return True  # its shape is the same for both batches: it has no axis of the batch
        equation = self.made_by.get(number)
        if equation is None:
            return False
        if equation.name == "broadcast_in_dim":
            inner, dimensions = equation.inputs[0], equation.params["broadcast_dimensions"]
            unchanged = not isinstance(inner, int) or inner in self.unchanged
            return unchanged and (
                axis not in dimensions
                or (isinstance(inner, int) and self.trace.types[inner].shape[dimensions.index(axis)] == 1)
            )
        return equation.name in ENTRYWISE | {"convert_element_type", "copy"} and all(
            self._alike(each, axis) for each in equation.inputs
        )

    # Moves

    def _moved(self, one: Equation, two: Equation, operands: list[Entry | None]) -> list[Entry | None]:
        """Operations that move entries, applied to their numbers."""
        entry = operands[0]
        if entry is None:
            raise UnsupportedError(f"{one.label} takes indices that depend on the input")
        shift = self._same_operand(one, two, 1) if one.name == "pad" else None
        moved = [[], []]
        for side, (equation, places) in enumerate(zip((one, two), entry.places, strict=True)):
            rest = [self._operand(equation, k, side) for k in range(1, len(one.inputs))]
            if one.name == "pad":
                rest = [np.int32(PADDED)]
            if one.name == "gather":
                equation = dataclasses.replace(equation, params={**equation.params, "fill_value": FILLED})
            with jax.ensure_compile_time_eval():
                moved[side] = [
                    np.asarray(each) for each in equation.compute(jnp.asarray(places), *map(jnp.asarray, rest))
                ]
        if one.name == "gather" and any((each < -1).any() for side in moved for each in side):
            raise UnsupportedError(f"{one.label} takes entries that are out of bounds")
        padded = moved[0][0] == PADDED
        moved = [[np.where(each == PADDED, -1, each) for each in side] for side in moved]
        results: list[Entry | None] = [
            dataclasses.replace(entry, places=(np.asarray(a, np.int32), np.asarray(b, np.int32)))
            for a, b in zip(*moved, strict=True)
        ]
        if shift is not None and not (tracing.known(shift) and np.all(np.asarray(shift) == 0)):
            value, axis = self._resolved(results[0], one.place)
            return [Entry.of(value.shifted(jnp.where(np.moveaxis(padded, axis, 0)[0], shift, 0.0)), axis)]
        return results

    def _operand(self, equation: Equation, place: int, side: int = 0) -> Any:
        each = equation.inputs[place]
        return self.constants[side][each] if isinstance(each, int) else each

    def _joined(self, one: Equation, operands: list[Entry | None]) -> Entry:
        """Values side by side along an axis, or along a new one."""
        mine = [each for each in operands if each is not None]
        if len(mine) < len(operands):
            raise UnsupportedError(f"{one.label} joins a value and a constant; pad it instead")
        dimension = one.params["axis" if one.name == "stack" else "dimension"]
        if one.name == "stack":
            mine = [each.moved(lambda places: np.expand_dims(places, dimension)) for each in mine]
        return self._beside(one, mine, dimension)

    def _beside(self, one: Equation, mine: list[Entry], dimension: int) -> Entry:
        """Entries along an axis; those of one value stay entries of it."""
        first, *rest = mine
        if all(each.value is first.value and expressions.equal(each.expression, first.expression) for each in rest):
            both = (np.concatenate([each.places[side] for each in mine], dimension) for side in (0, 1))
            return dataclasses.replace(first, places=tuple(both))
        (value, axis), *others = (self._resolved(entry, one.label) for entry in mine)
        if any(other != axis for _, other in others) or dimension == axis:
            raise UnsupportedError(f"{one.label} joins examples of the batch")
        whole = value.concatenated(*(each for each, _ in others), axis=dimension - (dimension > axis))
        return Entry.of(whole, axis)

    # Linear maps

    def _linear(self, one: Equation, two: Equation, operands: list[Entry | None], dtype: Any) -> Entry:
        rule = linear.RULES.get(one.name)
        if rule is None:
            raise UnsupportedError(f"{one.label} is not supported")
        if sum(each is not None for each in operands) != 1:
            raise UnsupportedError(f"{one.label} takes several values that depend on the input")
        place = next(k for k, each in enumerate(operands) if each is not None)
        value, axis = self._resolved(operands[place], one.place)
        constants = [None if each is not None else self._same_operand(one, two, k) for k, each in enumerate(operands)]
        # Kernels may have another type than what is computed with them.
        constants = [None if each is None else jnp.asarray(each).astype(dtype) for each in constants]
        try:
            return Entry.of(*rule(one.params, value, axis, place, constants))
        except linear.MixedError as error:
            raise UnsupportedError(f"{one.label} mixes the examples of a batch") from error
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedError(f"{one.label}: {error}") from error

    # Values

    def _undropped(self, entry: Entry, where: str) -> Entry:
        """The entry as one of a value of which it takes everything: rows that nothing takes count in no norm."""
        return Entry.of(*self._resolved(entry, where)) if drops(entry) else entry

    def _resolved(self, entry: Entry | None, where: str) -> tuple[Value, int]:
        """The value of one example that a variable is, and the axis of its batch."""
        assert entry is not None
        axis = axis_of(entry, where)
        value = self.settler.settled(entry.value, entry.expression, where)
        places, size = np.moveaxis(entry.places[0], axis, 0)[0], math.prod(value.shape)
        if places.size == size and np.array_equal(places.ravel(), np.arange(size)):
            return (value if places.shape == value.shape else value.reshaped(places.shape)), axis
        # The same value each time, so that what is computed from it twice is known for the same.
        known = next((found for one, at, found in self.gathers if one is value and np.array_equal(at, places)), None)
        if known is None:
            known = value.gathered(places)
            self.gathers.append((value, places, known))
        return known, axis

"""Networks: a graph of affine layers, activations, sums and concatenations, then a last layer that gives the logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.activations import Activation
from lipjax.networks.layers import Affine, Shape, identity
from lipjax.networks.linear_maps import length

value = functools.partial(dataclasses.dataclass, frozen=True)
Value = TypeVar("Value")


@jax.tree_util.register_dataclass
@value
class Input:
    """Where a network begins."""


@jax.tree_util.register_dataclass
@value
class Sum:
    """The sum of two values."""

    def __call__(self, first: Array, second: Array) -> Array:
        return first + second


@jax.tree_util.register_dataclass
@value
class Concatenation:
    """Values side by side along an axis of one example.

    Attributes:
        axis: of the values, as they are arranged.
    """

    axis: int = dataclasses.field(default=-1, metadata={"static": True})

    def __call__(self, *values: Array) -> Array:
        return jnp.concatenate(values, axis=self.axis)

    def split(self, value: Array, shapes: Sequence[Shape]) -> list[Array]:
        """The parts of a value that come from inputs of the given shapes."""
        ends = [sum(shape[self.axis] for shape in shapes[: k + 1]) for k in range(len(shapes))]
        return jnp.split(value, ends[:-1], axis=self.axis)


Operation = Input | Affine | Activation | Sum | Concatenation


@jax.tree_util.register_dataclass
@value
class Node:
    """One place of a network: an operation and the nodes whose values it takes.

    Attributes:
        operation: what is done here.
        inputs: places of nodes that come before.
        arranged: the shape in which each of their values is taken, in C order.
        shape: of the value of this node, for one example.
    """

    operation: Operation
    inputs: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    arranged: tuple[Shape, ...] = dataclasses.field(default=(), metadata={"static": True})
    shape: Shape = dataclasses.field(default=(), metadata={"static": True})


@jax.tree_util.register_dataclass
@value
class Network:
    """A classifier that bounds can be computed for: a frozen pytree with a static structure and arrays as leaves.

    Built by :func:`lipjax.chain`, :class:`lipjax.Graph` or :func:`lipjax.from_flax`.

    Attributes:
        nodes: in an order in which each comes after those that it takes; the first is the input, the value of the last
            one are the features.
        head: the last layer, from features to logits.
    """

    nodes: tuple[Node, ...]
    head: Affine

    @property
    def input_shape(self) -> Shape:
        """Shape of one input."""
        return self.nodes[0].shape

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return math.prod(self.head.out_shape)

    @property
    def layers(self) -> tuple[Affine, ...]:
        """The affine layers of the feature map, in order: those that have a norm."""
        return tuple(node.operation for node in self.nodes if isinstance(node.operation, Affine))

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activations, in order."""
        return tuple(node.operation for node in self.nodes if isinstance(node.operation, Activation))

    @property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each node the places of those that take its value."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for place, node in enumerate(self.nodes):
            for source in node.inputs:
                found[source].append(place)
        return tuple(map(tuple, found))

    @property
    def weighs(self) -> tuple[bool, ...]:
        """For each layer whether its rows have weights: activations alone take it, and one of them has weights."""
        found = []
        for place, node in enumerate(self.nodes):
            if isinstance(node.operation, Affine):
                behind = [self.nodes[reader].operation for reader in self.readers[place]]
                only = bool(behind) and all(isinstance(each, Activation) for each in behind)
                found.append(only and any(each.weighs for each in behind if isinstance(each, Activation)))
        return tuple(found)

    def __call__(self, x: Array) -> Array:
        """Logits (B, classes) of a batch x (B, ...)."""
        return jax.vmap(self.logits)(x)

    def logits(self, x: Array) -> Array:
        """Logits (classes,) of one example."""
        return self.head(self.features(x).reshape(self.head.in_shape)).ravel()

    def features(self, x: Array) -> Array:
        """Activations of one example before the last layer."""

        def visit(place: int, node: Node, *values: Array) -> Array:
            return node.operation(*(value.reshape(shape) for value, shape in zip(values, node.arranged, strict=True)))

        return self.forward(x, visit)

    def with_features_from(self, layer: Affine) -> Network:
        """The network whose features are those of this one after one more layer; its logits are its features."""
        node = Node(layer, (len(self.nodes) - 1,), (layer.in_shape,), layer.out_shape)
        return Network((*self.nodes, node), identity(layer.out_shape, layer.dtype))

    def lipschitz(self, sigmas: Sequence[Array] | Array) -> Any:
        """The constant of the feature map from the norms of its layers.

        Products along a path; sums of those of two branches that are added, and the root of the sum of squares of those
        that are concatenated.

        Args:
            sigmas: one norm per layer; each of any shape, the same for all.
        """
        layers, first = iter(range(len(sigmas))), jnp.ones_like(sigmas[0]) if len(sigmas) else jnp.ones(())
        root = jnp.vectorize(length, signature="(k)->()")

        def visit(place: int, node: Node, *constants: Any) -> Any:
            if isinstance(node.operation, Affine):
                return constants[0] * sigmas[next(layers)]
            if isinstance(node.operation, Activation):
                return constants[0] * node.operation.lipschitz
            if isinstance(node.operation, Sum):
                return sum(constants)
            return root(jnp.stack(jnp.broadcast_arrays(*constants), axis=-1))

        return self.forward(first, visit)

    @property
    def constant_operations(self) -> int:
        """How many operations of :meth:`lipschitz` round, one after the other, at most."""
        return 4 * sum(1 + len(node.inputs) for node in self.nodes)

    def frozen(self) -> Network:
        """The network as inference computes it; see :meth:`lipjax.networks.layers.Affine.frozen`."""
        nodes = (
            dataclasses.replace(node, operation=node.operation.frozen())
            if isinstance(node.operation, Affine | Activation)
            else node
            for node in self.nodes
        )
        return Network(tuple(nodes), self.head.frozen())

    def astype(self, dtype: Any) -> Network:
        """The network with all parameters of one type."""
        # Through NumPy: XLA's own conversion takes numbers below the smallest normal one for zero.
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, dtype)), self)

    def forward(self, value: Value, visit: Callable[..., Value]) -> Value:
        """Carry a value from the input to the features.

        Args:
            value: of the input.
            visit: ``(place, node, *values of its inputs) -> value`` of every other node.
        """
        values = {0: value}
        for place, node in enumerate(self.nodes[1:], start=1):
            values[place] = visit(place, node, *(values[source] for source in node.inputs))
        return values[len(self.nodes) - 1]

    def backward(self, value: Any, visit: Callable[[int, Node, Any], Sequence[Any]]) -> Any:
        """Carry a value from the features to the input.

        Args:
            value: of the features.
            visit: ``(place, node, value) -> values``, one for each of its inputs.

        Returns:
            The value that comes to the input. What comes to one node from several is added up.
        """
        values = {len(self.nodes) - 1: value}
        for place in range(len(self.nodes) - 1, 0, -1):
            node = self.nodes[place]
            for source, given in zip(node.inputs, visit(place, node, values.pop(place)), strict=True):
                values[source] = values[source] + given if source in values else given
        return values[0]


class Graph:
    """Builds a network, node by node.

    A node is known by a number; :attr:`input` is that of the input. What a layer or an activation takes is arranged in
    the shape that it needs, in C order.

    Args:
        input_shape: of one example.
    """

    input = 0

    def __init__(self, input_shape: Shape) -> None:
        self.nodes = [Node(Input(), shape=tuple(input_shape))]
        self.settled: dict[int, tuple[Any, Any]] = {}  # what readers have made nodes of, by identity

    def shape(self, place: int) -> Shape:
        """Shape of the value of a node, for one example."""
        return self.nodes[place].shape

    def add(self, operation: Operation, *sources: int, arranged: Sequence[Shape] | None = None) -> int:
        """A new node.

        Args:
            operation: an affine layer, an activation, :class:`Sum` or :class:`Concatenation`.
            *sources: the nodes whose values it takes.
            arranged: the shapes in which it takes them; default: those that they have, or that a layer needs.

        Returns:
            Its number.

        Raises:
            TypeError: it is no operation of a network.
            ValueError: shapes that do not fit.
        """
        if not isinstance(operation, Affine | Activation | Sum | Concatenation):
            raise TypeError(
                f"{type(operation).__name__} is no operation of a network: give a layer, an "
                "activation, Sum() or Concatenation()"
            )
        if arranged is None:
            shapes = tuple(self.shape(source) for source in sources)
            arranged = (operation.in_shape,) if isinstance(operation, Affine) else shapes
            arranged = shapes[:1] * 2 if isinstance(operation, Sum) else arranged
        for source, shape in zip(sources, arranged, strict=True):
            if math.prod(shape) != math.prod(self.shape(source)):
                raise ValueError(
                    f"{type(operation).__name__} takes a value of shape {tuple(shape)}, but node {source} has "
                    f"{self.shape(source)}"
                )
        arranged = tuple(map(tuple, arranged))
        with jax.numpy_dtype_promotion("standard"):  # of a float64 operation too: no more than its shape is asked
            out = jax.eval_shape(operation, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arranged))
        self.nodes.append(Node(operation, tuple(sources), arranged, out.shape))
        return len(self.nodes) - 1

    def network(self, head: Affine, features: int | None = None) -> Network:
        """The network whose last layer takes the value of a node, the newest one by default. Others are left out."""
        last = len(self.nodes) - 1 if features is None else features
        if math.prod(head.in_shape) != math.prod(self.shape(last)):
            raise ValueError(f"the last layer takes {head.in_shape}, but the features have shape {self.shape(last)}")
        needed = {0, last}
        for place in range(last, 0, -1):
            if place in needed:
                needed |= set(self.nodes[place].inputs)
        order = sorted(needed)
        new = {place: k for k, place in enumerate(order)}
        nodes = (self.nodes[place] for place in order)
        moved = (dataclasses.replace(node, inputs=tuple(new[source] for source in node.inputs)) for node in nodes)
        return Network(tuple(moved), head)


def chain(*operations: Operation, input_shape: Shape | None = None) -> Network:
    """The network of layers and activations that follow each other; the last one gives the logits.

    Args:
        *operations: affine layers and activations.
        input_shape: of one example, reshaped in C order to what the first layer takes; default: just that.

    Raises:
        TypeError: the last one is no affine layer, or one is no operation.
        ValueError: shapes that do not fit.
    """
    *rest, head = operations
    if not isinstance(head, Affine):
        raise TypeError(f"the last of the operations is {type(head).__name__}; expected the affine layer of the logits")
    if input_shape is None:
        first = operations[0]
        if not isinstance(first, Affine):
            raise TypeError(f"the first of the operations is {type(first).__name__}: give the input_shape")
        input_shape = first.in_shape
    graph, place = Graph(input_shape), 0
    for each in rest:
        place = graph.add(each, place)
    return graph.network(head)


def check_network(network: Any) -> None:
    """Raises TypeError unless it is a :class:`Network`."""
    if not isinstance(network, Network):
        raise TypeError(
            f"network is of type {type(network).__name__}; expected a lipjax.Network, which "
            "lipjax.from_flax(model, input_shape=...) reads from a Flax model"
        )

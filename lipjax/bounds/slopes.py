"""Chains of layers and activations as matrices with slopes between them: what the Jacobian of a network is made of.

On a ball, the slope of each neuron lies in an interval, that of the pieces of its activation that its box meets.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from lipjax.bounds.propagation import Bounds
from lipjax.networks.activations import Elementwise, IdentityActivation
from lipjax.networks.graph import Network, check_network
from lipjax.networks.layers import Affine, Shape
from lipjax.networks.pieces import Piece


class Link(NamedTuple):
    """One layer of a chain as a matrix, and the activation behind it.

    Attributes:
        matrix: (outputs, inputs), both sides in C order.
        shift: the bias (outputs,).
        activation: the identity where two layers follow each other.
        shape: of the activation.
        before: its place among the activations of the network; None for the identity between two layers.
    """

    matrix: Array
    shift: Array
    activation: Elementwise
    shape: Shape
    before: int | None

    def pieces(self, bounds: Bounds | None) -> tuple[tuple[Piece, Array], ...]:
        """The linear pieces, every part of them (outputs,), each with the mask of the neurons that may be on it.

        Args:
            bounds: of one example, with boxes; or None for any input.
        """
        if self.before is None or bounds is None:
            infinite = jnp.full(self.shape, jnp.inf, self.shift.dtype)
            lower, upper = -infinite, infinite
        else:
            lower, upper = bounds.before[self.before].box
        found = []
        for piece in self.activation.pieces():
            parts = (jnp.broadcast_to(jnp.asarray(part, lower.dtype), self.shape).ravel() for part in piece)
            found.append(Piece(*parts))
        # Rounding may leave a box with its ends exchanged.
        lower, upper = jnp.minimum(lower, upper).ravel(), jnp.maximum(lower, upper).ravel()
        there = [piece.start < piece.end for piece in found]
        met = [some & ~(lower >= piece.end) & ~(upper <= piece.start) for some, piece in zip(there, found, strict=True)]
        # A box that meets no piece is the point between two: the neuron is constant, and counts by the flatter one.
        none = ~functools.reduce(jnp.logical_or, met)
        touched = [
            none & some & ~(lower > piece.end) & ~(upper < piece.start)
            for some, piece in zip(there, found, strict=True)
        ]
        steepness = [jnp.where(here, jnp.abs(piece.slope), jnp.inf) for piece, here in zip(found, touched, strict=True)]
        flattest = functools.reduce(jnp.minimum, steepness)
        return tuple(
            (piece, here | (point & (steep == flattest)))
            for piece, here, point, steep in zip(found, met, touched, steepness, strict=True)
        )

    def slopes(self, bounds: Bounds | None) -> tuple[Array, Array]:
        """The least and the largest slope of each neuron (outputs,), as :meth:`pieces` has it."""
        pieces = self.pieces(bounds)
        least = [jnp.where(met, piece.slope, jnp.inf) for piece, met in pieces]
        largest = [jnp.where(met, piece.slope, -jnp.inf) for piece, met in pieces]
        return functools.reduce(jnp.minimum, least), functools.reduce(jnp.maximum, largest)


def links(network: Network) -> tuple[Link, ...]:
    """The layers of the feature map of a chain.

    Raises:
        TypeError: network is no :class:`lipjax.Network`, not a chain, or has an activation that does not act on each
            entry by linear pieces.
    """
    check_network(network)
    found: list[Link] = []
    waiting: Affine | None = None
    count = 0

    def emit(layer: Affine, activation: Elementwise, shape: Shape, before: int | None) -> None:
        shift = jnp.broadcast_to(layer.shift, layer.out_shape).ravel()
        found.append(Link(layer.matrix(), shift, activation, shape, before))

    for place, node in enumerate(network.nodes[1:], start=1):
        operation = node.operation
        if node.inputs != (place - 1,) or not isinstance(operation, Affine | Elementwise):
            raise TypeError(
                f"node {place} of the network is {type(operation).__name__} of nodes {node.inputs}; constants of this "
                "kind are known for layers and activations with linear pieces that follow each other"
            )
        if isinstance(operation, Affine):
            if waiting is not None:
                emit(waiting, IdentityActivation(), waiting.out_shape, None)
            waiting = operation
        else:
            if waiting is None:
                size, dtype = jnp.zeros(node.shape).size, network.head.dtype
                found.append(Link(jnp.eye(size, dtype=dtype), jnp.zeros(size, dtype), operation, node.shape, count))
            else:
                emit(waiting, operation, node.arranged[0], count)
            waiting, count = None, count + 1
    if waiting is not None:
        emit(waiting, IdentityActivation(), waiting.out_shape, None)
    return tuple(found)


def differences(network: Network, label: Array) -> Array:
    """Rows ``w_label - w_j`` of the last layer (classes, features): margins are their products with the features."""
    rows = network.head.matrix()
    return rows[label][None] - rows

"""Networks: affine layers with activations and sums over skip connections, then a last dense layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from lipjax.networks import layers
from lipjax.networks.activations import Activation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """An affine layer and the activation after it. Activations are reshaped in C order to what the layer takes."""

    affine: layers.Affine
    activation: Activation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fork:
    """The beginning of a residual sum x + f(x): the steps up to its :class:`Join` are f, and what comes in is kept."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Join:
    """The end of a residual sum: what came out of f is added to what was kept at the :class:`Fork`."""


Step = Block | Fork | Join


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier that bounds can be computed for: a frozen pytree with a static structure and arrays as leaves.

    Attributes:
        steps: the feature map, in order.
        head: the last dense layer, from features to logits.
        shape: of one input, where it is not that of the first layer's: inputs are reshaped in C order.
    """

    steps: tuple[Step, ...]
    head: layers.Dense
    shape: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The steps that have a norm."""
        return tuple(step for step in self.steps if isinstance(step, Block))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        if self.shape is not None:
            return self.shape
        return self.blocks[0].affine.in_shape if self.blocks else self.head.in_shape

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_shape[0]

    @property
    def joins(self) -> tuple[int, ...]:
        """For each :class:`Fork`, in order, the place among all :class:`Join` of the one that ends its sum."""
        opened, ends, joins = [], {}, 0
        for step in self.steps:
            if isinstance(step, Fork):
                opened.append(len(opened) + len(ends))
            elif isinstance(step, Join):
                ends[opened.pop()] = joins
                joins += 1
        return tuple(ends[fork] for fork in range(len(ends)))

    def __call__(self, x: Array) -> Array:
        """Logits (B, classes) of a batch x (B, ...)."""
        return jax.vmap(self.logits)(x)

    def logits(self, x: Array) -> Array:
        """Logits (classes,) of one example."""
        return self.head(self.features(x).reshape(self.head.in_shape))

    def features(self, x: Array) -> Array:
        """Activations of one example before the last dense layer."""
        return self.walk(
            x,
            lambda place, block, a: block.activation(block.affine(a.reshape(block.affine.in_shape))),
            lambda kept, a: kept + a.reshape(kept.shape),
        )

    def lipschitz(self, sigmas: Array) -> Array | float:
        """The constant of the feature map from the norms of its blocks: products, and sums 1 + f over skips.

        Args:
            sigmas: one norm per block.
        """
        return self.walk(
            1.0,
            lambda place, block, constant: constant * sigmas[place] * block.activation.lipschitz,
            lambda kept, constant: constant + kept,
        )

    def walk(
        self,
        value: Any,
        block: Callable[[int, Block, Any], Any],
        join: Callable[[Any, Any], Any],
        *,
        backward: bool = False,
    ) -> Any:
        """Carry a value through the feature map, from the input to the features or backward.

        Backward, a sum gives what comes to it to both of its branches, and where they began their values are summed
        up: the same walk over the steps in reverse order, with :class:`Fork` and :class:`Join` exchanged.

        Args:
            value: at the first step.
            block: the value behind a block, from its place among the blocks, the block and the value before it.
            join: the value of a sum, from that of the skip connection and that of the other branch.
            backward: from the features to the input.
        """
        steps, places = list(self.steps), iter(range(len(self.blocks)))
        opening, closing = Fork, Join
        if backward:
            steps, places = steps[::-1], iter(reversed(range(len(self.blocks))))
            opening, closing = Join, Fork
        kept = []
        for step in steps:
            if isinstance(step, opening):
                kept.append(value)
            elif isinstance(step, closing):
                value = join(kept.pop(), value)
            else:
                value = block(next(places), step, value)
        return value


def check_network(network: Any) -> None:
    """Raises TypeError unless it is a :class:`Network`."""
    if not isinstance(network, Network):
        raise TypeError(
            f"network is of type {type(network).__name__}; expected a lipjax.Network, which "
            "lipjax.from_flax(model, input_shape=...) reads from a Flax model"
        )

"""Networks: affine layers with activations and sums over skip connections, then a last dense layer."""

from __future__ import annotations

import dataclasses

import jax
from jax import Array

from lipjax import layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """An affine layer and the activation after it. Activations are reshaped in C order to what the layer takes."""

    affine: layers.Affine
    activation: layers.Activation


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

    def __call__(self, x: Array) -> Array:
        """Logits (B, classes) of a batch x (B, ...)."""
        return jax.vmap(self.logits)(x)

    def logits(self, x: Array) -> Array:
        """Logits (classes,) of one example."""
        return self.head(self.features(x).reshape(self.head.in_shape))

    def features(self, x: Array) -> Array:
        """Activations of one example before the last dense layer."""
        kept: list[Array] = []
        for step in self.steps:
            if isinstance(step, Fork):
                kept.append(x)
            elif isinstance(step, Join):
                x = x.reshape(kept[-1].shape) + kept.pop()
            else:
                x = step.activation(step.affine(x.reshape(step.affine.in_shape)))
        return x

    def lipschitz(self, sigmas: Array) -> Array | float:
        """The constant of the feature map from the norms of its blocks: products, and sums 1 + f over skips.

        Args:
            sigmas: one norm per block.
        """
        constant, kept, place = 1.0, [], 0
        for step in self.steps:
            if isinstance(step, Fork):
                kept.append(constant)
            elif isinstance(step, Join):
                constant = constant + kept.pop()
            else:
                constant, place = constant * sigmas[place] * step.activation.lipschitz, place + 1
        return constant

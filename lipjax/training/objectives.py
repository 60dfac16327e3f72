"""Objectives: what a training step minimises, and how the norms in it are iterated."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jax import Array

from lipjax.bounds.rule import Rule
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.norms import estimates

Metrics = dict[str, Array]
Vectors = tuple[Array, ...]


class Objective(Protocol):
    """What a step minimises."""

    def layers(self, network: Network) -> tuple[Affine, ...]:
        """The layers whose norms are iterated, in the order of their vectors."""
        ...

    def kept(self, network: Network) -> tuple[int, ...]:
        """The places among them for which every example keeps a vector of its own."""
        ...

    def rule(self, network: Network) -> Rule | None:
        """The slopes of the dual before training, where the method trains through it."""
        ...

    def __call__(
        self,
        network: Network,
        x: Array,
        label: Array,
        eps: Array | float,
        kappa: Array | float,
        own_vectors: Vectors,
        global_vectors: Vectors,
        key: Array,
        rule: Rule | None,
    ) -> tuple[Array, Metrics, Vectors, Vectors]:
        """The losses of a batch, and the vectors for the next time.

        Args:
            network: the classifier.
            x: inputs (B, ...).
            label: integers (B,).
            eps: radius of this step.
            kappa: weight of the clean loss.
            own_vectors: each example's own (B, ...), one array per place of :meth:`kept`.
            global_vectors: of the whole layers, one per layer of :meth:`layers`.
            key: of this step.
            rule: trained slopes of the dual, where the method has them.

        Returns:
            Losses (B,), metrics with a leading axis (B,), and both kinds of vectors after the iterations.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Iterations:
    """How training estimates norms.

    Attributes:
        num_iters: power iterations per step and example.
        global_iters: power iterations per step for the whole layers; they cost next to nothing.
        noise: length of the noise added to the unit vectors in every step.
        saved: examples start from their own vectors; else each time from random ones (the paper's Table 1).
        global_layers: places whose norms are those of the whole layers also in a local method.
    """

    num_iters: int = 2
    global_iters: int = 10
    noise: float = 0.01
    saved: bool = True
    global_layers: tuple[int, ...] = ()


def warm_whole_norms(
    layers: tuple[Affine, ...], vectors: Vectors, options: Iterations, key: Array
) -> tuple[Array, Vectors]:
    """The norms of whole layers, warm-started, and their vectors after the iterations."""
    own = {place: vector[None] for place, vector in enumerate(vectors)}
    ask = estimates.WarmStarted(own, None, key, options.global_iters, options.noise)
    return estimates.whole_norms(layers, ask)

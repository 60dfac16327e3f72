"""Estimates of norms for a pass that is traced: power iteration, each example from its own start.

They are the ``ask`` of :func:`lipjax.propagate` in training and in experiments. Everything here is an estimate from
below, but for norms that are :class:`Given`. A norm that a layer knows by construction is taken as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.masks import drops_nothing
from lipjax.norms import power_iteration
from lipjax.norms.starts import random_start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimate:
    """Level ``estimate``: the paper's evaluation, power iteration from a random start to convergence, per example.

    Hands back the numbers of iterations (B,). See :func:`lipjax.converged_norm`.

    Attributes:
        key: the starts are drawn from it, one per layer, shared by the examples; or one key per example (B,).
        ceilings: one norm per place that no sigma may exceed, those of the whole layers, say; where nothing is masked
            that is the norm. None: no limits.
        tol: stop when the vector moves by no more than this.
        max_iters: cap on the iterations.
    """

    key: Array
    ceilings: Array | None = None
    tol: float = dataclasses.field(default=power_iteration.TOL, metadata={"static": True})
    max_iters: int = dataclasses.field(default=power_iteration.MAX_ITERS, metadata={"static": True})

    def __call__(self, place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, Array]:
        def one(masked: LinearMap, key: Array) -> tuple[Array, Array]:
            start = random_start(key, place, masked)
            return power_iteration.converged_norm(masked, start, tol=self.tol, max_iters=self.max_iters)

        sigma, iterations = _each(layer, rows, columns, one, lambda _: jnp.int32(0), _keys(self.key, rows))
        if self.ceilings is not None:
            ceiling = self.ceilings[place]
            masked = ~(drops_nothing(rows) & drops_nothing(columns))
            sigma = jnp.where(masked, jnp.minimum(sigma, ceiling), ceiling)
        return sigma, iterations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarmStarted:
    """Training: a few power iterations from stored vectors. Hands back the vectors to store for the next time.

    A stored vector can be absorbed, at zero or in a part of the layer that newly live neurons cannot reach, so a
    little noise, fresh in every step and shared by the examples, is added to it before iterating. Where the vector of
    the whole layer, which is iterated in every step, is the better start for the masked layer, it is taken instead:
    an example's own vector is only iterated once per epoch and lags behind the weights.

    Attributes:
        own_vectors: starts (B, ...) by place, on the smaller side of the layer, of length 1 or 0.
        global_vectors: one vector of the whole layer per place, or None.
        key: the noise of this step is drawn from it.
        num_iters: power iterations, at least 1.
        noise: length of the noise.
    """

    own_vectors: dict[int, Array]
    global_vectors: tuple[Array, ...] | None
    key: Array
    num_iters: int = dataclasses.field(metadata={"static": True})
    noise: float = dataclasses.field(default=0.01, metadata={"static": True})

    def __call__(self, place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, Array]:
        other = None if self.global_vectors is None else self.global_vectors[place].astype(layer.dtype)
        noise = self.noise * random_start(self.key, place, layer.linear_map().from_smaller_side())

        def one(masked: LinearMap, vector: Array) -> tuple[Array, Array]:
            return power_iteration.power_iteration(masked, vector.astype(masked.dtype) + noise, self.num_iters, other)

        return _each(layer, rows, columns, one, lambda vector: vector, self.own_vectors[place])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomStarted:
    """A few power iterations from random starts, new each time (the paper's Table 1). Hands back the last vectors.

    Attributes:
        key: the starts are drawn from it, one per layer, shared by the examples; or one key per example (B,).
        num_iters: power iterations, at least 1.
    """

    key: Array
    num_iters: int = dataclasses.field(metadata={"static": True})

    def __call__(self, place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, Array]:
        def one(masked: LinearMap, key: Array) -> tuple[Array, Array]:
            return power_iteration.power_iteration(masked, random_start(key, place, masked), self.num_iters)

        def none(key: Array) -> Array:
            return random_start(key, place, layer.linear_map().from_smaller_side())

        return _each(layer, rows, columns, one, none, _keys(self.key, rows))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Norms that are known already, whatever the masks: global norms, shared by all examples. Hands back nothing.

    Attributes:
        sigmas: one norm per place.
    """

    sigmas: Array

    def __call__(self, place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, None]:
        return jnp.broadcast_to(self.sigmas[place], rows.shape[:1]), None


def whole_norms(layers: Sequence[Affine], ask: Callable[..., tuple[Array, Any]]) -> tuple[Array, tuple[Any, ...]]:
    """The norms (layers,) of whole layers, and what ``ask`` hands back for each, without its batch axis."""
    sigmas, handed_back = [], []
    for place, layer in enumerate(layers):
        sigma, aux = ask(place, layer, jnp.ones((1, *layer.out_shape), bool), jnp.ones((1, *layer.in_shape), bool))
        sigmas.append(sigma[0])
        handed_back.append(jax.tree.map(lambda leaf: leaf[0], aux))
    return (jnp.stack(sigmas) if sigmas else jnp.ones(0, jnp.float32)), tuple(handed_back)


def _each(
    layer: Affine,
    rows: Array,
    columns: Array,
    iterate: Callable[[LinearMap, Array], tuple[Array, Any]],
    keep: Callable[[Array], Any],
    start: Array,
) -> tuple[Array, Any]:
    """What an iteration of each masked layer gives from its start; or what the layer knows, and what is kept then."""

    def one(rows: Array, columns: Array, start: Array) -> tuple[Array, Any]:
        known = layer.known_norm(rows, columns)
        if known is not None:
            return known, keep(start)
        return iterate(layer.linear_map().masked(rows, columns).from_smaller_side(), start)

    return jax.vmap(one)(rows, columns, start)


def _keys(key: Array, rows: Array) -> Array:
    """One key per example."""
    return key if key.ndim else jnp.broadcast_to(key, rows.shape[:1])

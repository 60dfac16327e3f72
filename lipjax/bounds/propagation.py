"""Bounds: one pass of a region through a network gives boxes, masks, norms and Lipschitz constants.

Every method of the paper is this pass with parts absent: drop the box from the input region and it is GloRo or LMT,
drop the ball and it is IBP, give norms and row norms of the whole layers and it is BCP; with everything it is
Local-Lip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks import linear_maps
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Block, Network, check_network
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.regions import (
    Region,
    all_finite,
)
from lipjax.norms import spectral


class Norm(Protocol):
    """How a pass gets its spectral norms: the one seam between bounds and norms.

    Called with the place of a layer and its masked map, it gives sigma and whatever it wants to hand back (the next
    start of a power iteration, say).
    """

    def __call__(self, place: int, linear_map: LinearMap) -> tuple[Array, Any]: ...


# How a pass gets its row norms: the layer and the live columns, to one norm per output.
RowNorms = Callable[[Affine, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one pass finds out, for one example. Tuples have one entry per block.

    Attributes:
        input: the first region.
        features: the region that contains the features of every input of the first region.
        preactivations: the regions between affine layer and activation. Their box is what the masks come from; their
            ``live`` are the rows that matter to the activation, and their ball is one of those rows alone.
        live: boolean masks of the activations that vary.
        sigmas: norms of the masked layers (blocks,).
        lipschitz: their product: a bound of the local Lipschitz constant of the feature map over the region, as good
            as the norms are. Ones where the pass had no ball.
        norm_results: what the norm handed back for each block.
    """

    input: Region
    features: Region
    preactivations: tuple[Region, ...]
    live: tuple[Array, ...]
    sigmas: Array
    lipschitz: Array
    norm_results: tuple[Any, ...]

    @property
    def radii(self) -> Array:
        """Radii (blocks,) of the balls of the pre-activations, over the rows that matter.

        Raises:
            ValueError: the pass had no ball.
        """
        radii = [region.ball for region in self.preactivations]
        return jnp.stack(radii, axis=-1) if radii else jnp.zeros_like(self.lipschitz)[..., None][..., :0]


def masked_row_norms(layer: Affine, live: Array) -> Array:
    """Row norms over the live columns: what certification uses."""
    return layer.row_norms(live)


def full_row_norms(layer: Affine, live: Array) -> Array:
    """Row norms over all columns: larger, but shared by all examples of a batch, which saves training a product."""
    return layer.row_norms(jnp.ones_like(live))


def propagate(network: Network, region: Region, norm: Norm, row_norms: RowNorms = masked_row_norms) -> Bounds:
    """Carry one region through the feature map of a network.

    For each block, with I the live coordinates that come in:

    - center <- W center + b;
    - box <- [mid - r, mid + r] with mid = W (upper + lower) / 2 + b, r = |W| (upper - lower) / 2, cut to
      center +- radius ||W_i I|| [H21 Eq 21-23];
    - sigma = ||I_out W I||, radius <- radius sigma [H21 Eq 6], then the activation's rule.

    Args:
        network: the classifier.
        region: where the inputs lie, for one example; see :func:`lipjax.networks.regions.l2_ball`.
        norm: gives the spectral norm of each masked layer.
        row_norms: gives the row norms of each layer.

    Returns:
        The bounds of one example; ``jax.vmap`` over regions for a batch.

    Soundness:
        Box and ball contain every reachable activation up to rounding, if the norms are upper bounds. With norms
        estimated from below (power iteration) all of it is an estimate.

    Raises:
        TypeError: network is no :class:`lipjax.Network`.

    Reference:
        [H21] sections 3.1 and 3.2.
    """
    check_network(network)
    preactivations, live, sigmas, norm_results = [], [], [], []

    def block(place: int, step: Block, region: Region) -> Region:
        region = region.reshape(step.affine.in_shape)
        before = preactivation(step.affine, region, row_norms)
        rows, sigma, result = live_rows(step.activation, before), None, None
        if region.radius is not None:
            sigma, result = norm(place, step.affine.linear_map().masked(rows, region.live))
        before = dataclasses.replace(before, radius=None if sigma is None else region.ball * sigma, live=rows)
        after = activate(step.activation, before)
        preactivations.append(before)
        live.append(after.live)
        norm_results.append(result)
        sigmas.append(jnp.ones_like(region.center, shape=()) if sigma is None else sigma)
        return after

    features = network.walk(region, block, join).reshape(network.head.in_shape)
    stacked = jnp.stack(sigmas) if sigmas else jnp.ones_like(features.center, shape=(0,))
    lipschitz = jnp.asarray(network.lipschitz(stacked), stacked.dtype)
    return Bounds(region, features, tuple(preactivations), tuple(live), stacked, lipschitz, tuple(norm_results))


def preactivation(layer: Affine, region: Region, row_norms: RowNorms = masked_row_norms) -> Region:
    """The box after an affine layer and before its activation; which rows matter, and their ball, follow from it."""
    center = layer(region.center)
    lower, upper = None, None
    if region.lower is not None and region.upper is not None:
        mid = layer((region.upper + region.lower) / 2)
        half = layer.absolute((region.upper - region.lower) / 2)
        lower, upper = mid - half, mid + half
        if region.radius is not None:
            ball = region.radius * row_norms(layer, region.live)
            lower, upper = jnp.maximum(lower, center - ball), jnp.minimum(upper, center + ball)
    finite = region.finite & all_finite(lower, upper, center)
    return Region(lower, upper, center, None, jnp.ones(center.shape, bool), finite)


def activate(activation: Activation, before: Region) -> Region:
    """The region after an activation."""
    radius = None if before.radius is None else before.radius * activation.lipschitz
    center = activation(before.center)
    finite = before.finite & all_finite(center, radius)
    if before.lower is None or before.upper is None:
        return Region(None, None, center, radius, jnp.ones(center.shape, bool), finite)
    lower, upper = activation(before.lower), activation(before.upper)
    return Region(lower, upper, center, radius, activation.live_outputs(before.lower, before.upper), finite)


def join(kept: Region, region: Region) -> Region:
    """The region of x + f(x), given those of x and of f(x): boxes and balls add up.

    Args:
        kept: the region of x. Its box is cut to its ball, so that the sum of the boxes is within the sum of the balls.
        region: the region of f(x), raveled in the same order.
    """
    region = region.reshape(kept.center.shape)
    center = kept.center + region.center
    radius = None if kept.radius is None or region.radius is None else kept.radius + region.radius
    lower, upper = None, None
    if kept.lower is not None and region.lower is not None:
        (lower, upper), (low, high) = kept.box, region.box
        if kept.radius is not None:
            around = jnp.where(kept.live, kept.radius, 0)
            lower, upper = jnp.maximum(lower, kept.center - around), jnp.minimum(upper, kept.center + around)
        lower, upper = lower + low, upper + high
    finite = kept.finite & region.finite & all_finite(lower, upper, center, radius)
    return Region(lower, upper, center, radius, kept.live | region.live, finite)


def global_norms(network: Network, norm: Norm) -> tuple[Array, tuple[Any, ...]]:
    """The norms (blocks,) of the whole layers of the feature map, and what ``norm`` hands back for each."""
    check_network(network)
    return layer_norms(tuple(block.affine for block in network.blocks), norm, network.head.kernel.dtype)


def layer_norms(layers: tuple[Affine, ...], norm: Norm, dtype: Any = jnp.float32) -> tuple[Array, tuple[Any, ...]]:
    """The norms (layers,) of whole layers, of ``dtype`` where there are none, and what ``norm`` hands back for each."""
    pairs = [norm(place, layer.linear_map()) for place, layer in enumerate(layers)]
    return jnp.stack([sigma for sigma, _ in pairs]) if pairs else jnp.ones(0, dtype), tuple(r for _, r in pairs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimate:
    """Level ``estimate``: the paper's evaluation, power iteration from a random start to convergence, per example.

    Hands back the number of iterations. Estimates from below; see :func:`lipjax.norms.spectral.converged_norm`.

    Attributes:
        key: the starts are drawn from it, one per layer.
        tol: stop when the vector moves by no more than this.
        max_iters: cap on the iterations.
    """

    key: Array
    tol: float = dataclasses.field(default=1e-3, metadata={"static": True})
    max_iters: int = dataclasses.field(default=2000, metadata={"static": True})

    def __call__(self, place: int, linear_map: LinearMap) -> tuple[Array, Array]:
        oriented = linear_map.from_smaller_side()
        start = jax.random.normal(jax.random.fold_in(self.key, place), oriented.in_shape, oriented.dtype)
        return spectral.converged_norm(oriented, start, tol=self.tol, max_iters=self.max_iters)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarmStarted:
    """Training: a few power iterations from stored vectors. Hands back the vectors to store for the next time.

    A stored vector can be absorbed, at zero or in a part of the layer that newly live neurons cannot reach, so a
    little noise, fresh in every step and shared by the examples, is added to it before iterating. Where the vector of
    the whole layer, which is iterated in every step, is the better start for the masked layer, it is taken instead:
    an example's own vector is only iterated once per epoch and lags behind the weights.

    Attributes:
        vectors: one start per block, or by place, on the smaller side of its layer, of length 1 or 0.
        shared: one vector of the whole layer per block, or None.
        key: the noise of this step is drawn from it.
        num_iters: power iterations, at least 1.
        noise: length of the noise.
    """

    vectors: tuple[Array, ...] | dict[int, Array]
    shared: tuple[Array, ...] | None
    key: Array
    num_iters: int = dataclasses.field(metadata={"static": True})
    noise: float = dataclasses.field(default=0.01, metadata={"static": True})

    def __call__(self, place: int, linear_map: LinearMap) -> tuple[Array, Array]:
        oriented = linear_map.from_smaller_side()
        noise = jax.random.normal(jax.random.fold_in(self.key, place), oriented.in_shape, oriented.dtype)
        start = self.vectors[place].astype(noise.dtype) + self.noise * linear_maps.unit(noise)
        other = None if self.shared is None else self.shared[place].astype(noise.dtype)
        return spectral.power_iteration(oriented, start, self.num_iters, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomStarted:
    """A few power iterations from a random start, new each time (the paper's Table 1). Hands back the last vector.

    Attributes:
        key: the starts are drawn from it, one per layer.
        num_iters: power iterations, at least 1.
    """

    key: Array
    num_iters: int = dataclasses.field(metadata={"static": True})

    def __call__(self, place: int, linear_map: LinearMap) -> tuple[Array, Array]:
        oriented = linear_map.from_smaller_side()
        start = jax.random.normal(jax.random.fold_in(self.key, place), oriented.in_shape, oriented.dtype)
        return spectral.power_iteration(oriented, start, self.num_iters)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Norms that are known already, whatever the masks: global norms, shared by all examples. Hands back nothing."""

    sigmas: Array

    def __call__(self, place: int, linear_map: LinearMap) -> tuple[Array, None]:
        return self.sigmas[place], None


def check_batch(network: Network, x: Array) -> None:
    """Raises TypeError or ValueError unless this is a network, and x a batch of its inputs."""
    check_network(network)
    if not hasattr(x, "dtype"):
        expected = ", ".join(map(str, ("B", *network.input_shape)))
        raise TypeError(f"x is a {type(x).__name__}; expected a batch ({expected}), an array")
    if tuple(jnp.shape(x)[1:]) != network.input_shape or jnp.ndim(x) == 0:
        expected = ", ".join(map(str, ("B", *network.input_shape)))
        raise ValueError(f"x has shape {jnp.shape(x)}; expected a batch ({expected})")


def check_labels(num_classes: int, x: Array, label: Array) -> None:
    """Raises ValueError unless the labels are classes from 0 on, one per input."""
    kind = getattr(label, "dtype", type(label).__name__)
    if np.shape(label) != np.shape(x)[:1] or not np.issubdtype(getattr(label, "dtype", object), np.integer):
        raise ValueError(f"label has shape {np.shape(label)} and type {kind}; expected {len(x)} integers in an array")
    outside = (np.asarray(label) < 0) | (np.asarray(label) >= num_classes)
    if outside.any():
        raise ValueError(
            f"label[{np.flatnonzero(outside)[0]}] is {np.asarray(label)[outside][0]}; expected classes from 0 to "
            f"{num_classes - 1}"
        )


def live_rows(activation: Activation, before: Region) -> Array:
    """The rows of the layer before an activation that matter; all of them where there is no box."""
    if before.lower is None or before.upper is None:
        return before.live
    return activation.live_rows(before.lower, before.upper)

"""Training: one explicit state, one pure step on one device, mapped over all local devices in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from lipjax import bounds, losses, margins, spectral
from lipjax.networks import Network
from lipjax.reading import from_flax
from lipjax.regions import Region, l2_ball

AXIS = "devices"
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. On devices every leaf has a leading device axis.

    Attributes:
        step: number of steps made.
        params: the trainable Flax NNX state.
        opt_state: of the optimiser.
        key: source of the noise of every step.
        global_vectors: one bfloat16 vector per block, for the norm of the whole layer.
        vectors: per block, bfloat16 (examples, ...): the vector of every training example. Empty with global norms.
        validation_vectors: the same for the validation split.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    global_vectors: tuple[Array, ...]
    vectors: tuple[Array, ...]
    validation_vectors: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a run trains through, and with which numbers.

    Attributes:
        local: norms of the masked layers per example, with boxes and masks; else global norms shared by all.
        margins: ``(head, region, label) -> margins``: worst-case margins, see :mod:`lipjax.margins`.
        needs_box: the margins use the box, so that it is computed also with global norms.
        loss: ``(logits, worst_logits, label) -> loss`` of one example.
        eps: schedule of the radius.
        kappa: schedule of the weight of the clean loss.
        learning_rate: schedule of the optimiser, for the log.
        optimizer: Optax transformation.
        num_iters: power iterations per step and example.
        global_iters: power iterations per step for the whole layers; they cost next to nothing.
        noise: length of the noise added to the unit vectors in every step.
    """

    local: bool
    margins: Callable[..., Array]
    needs_box: bool
    loss: Callable[[Array, Array, Array], Array]
    eps: optax.Schedule
    kappa: optax.Schedule
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    num_iters: int
    global_iters: int
    noise: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one device: places in its share of the data, and weights, 0 for padding."""

    index: Array
    weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """One device's share of a data set: uint8 images (n, H, W, C) and labels (n,)."""

    images: Array
    labels: Array
    scale: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Array) -> tuple[Array, Array]:
        x = jnp.take(self.images, index, axis=0, mode="clip").astype(jnp.float32) / self.scale
        return x, jnp.take(self.labels, index, axis=0, mode="clip")


def adam(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with its defaults; clips theta are projected to be at least 0 after each update."""

    def is_theta(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "theta" in jax.tree_util.keystr(path), params)

    return optax.chain(optax.adam(learning_rate), optax.masked(optax.keep_params_nonnegative(), is_theta))


def train_step(
    method: Method, graphdef: Any, state: TrainState, data: Images, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step on one device of the axis ``AXIS``: only gradients and metrics cross devices.

    Args:
        method: what to train through.
        graphdef: static half of the Flax model.
        state: of this device.
        data: this device's share.
        batch: which examples.

    Returns:
        The next state, and metrics averaged over the examples of all devices.
    """
    x, label = data[batch.index]
    eps, kappa = method.eps(state.step), method.kappa(state.step)
    stored = tuple(_gather(vectors, batch.index) for vectors in state.vectors)
    noise_key = jax.random.fold_in(state.key, state.step)
    share = batch.weight / lax.psum(jnp.sum(batch.weight), AXIS)

    def objective(params: Any) -> tuple[Array, tuple]:
        network = from_flax(nnx.merge(graphdef, params), x.shape[1:])
        result = _evaluate(method, network, x, label, eps, kappa, stored, state.global_vectors, noise_key)
        return jnp.sum(share * result[0]), result

    gradient, (loss, metrics, vectors, global_vectors) = jax.grad(objective, has_aux=True)(state.params)
    gradient = lax.psum(gradient, AXIS)
    updates, opt_state = method.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    kept = tuple(_scatter(old, batch, new) for old, new in zip(state.vectors, vectors, strict=True))
    metrics = _average({"loss": loss, **metrics}, share) | {"learning_rate": method.learning_rate(state.step)}
    metrics["eps"], metrics["kappa"] = jnp.asarray(eps, jnp.float32), jnp.asarray(kappa, jnp.float32)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, gradient))]
    metrics["finite"] = jnp.all(jnp.stack(finite)) & jnp.isfinite(metrics["loss"])
    new_state = TrainState(
        state.step + 1, params, opt_state, state.key, _stored(global_vectors), kept, state.validation_vectors
    )
    return new_state, metrics


def validation_step(
    method: Method, graphdef: Any, eps: float, state: TrainState, data: Images, batch: Batch
) -> tuple[TrainState, Metrics]:
    """The forward half of a step on the validation split, at the full ``eps``; its vectors are kept warm as well."""
    x, label = data[batch.index]
    network = from_flax(nnx.merge(graphdef, state.params), x.shape[1:])
    stored = tuple(_gather(vectors, batch.index) for vectors in state.validation_vectors)
    noise_key = jax.random.fold_in(state.key, state.step)
    loss, metrics, vectors, _ = _evaluate(method, network, x, label, eps, 0.0, stored, state.global_vectors, noise_key)
    share = batch.weight / lax.psum(jnp.sum(batch.weight), AXIS)
    kept = tuple(_scatter(old, batch, new) for old, new in zip(state.validation_vectors, vectors, strict=True))
    return dataclasses.replace(state, validation_vectors=kept), _average({"loss": loss, **metrics}, share)


def mapped(step: Callable[..., tuple[TrainState, Metrics]], *static: Any) -> Callable:
    """``step`` with its static arguments, jitted and mapped over all local devices; the state is donated.

    Takes and returns the state with a leading device axis; metrics come with one too, equal on all devices.
    """

    def run(state: TrainState, data: Images, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(*static, state, data, batch)

    run.__name__ = step.__name__
    return jax.pmap(run, axis_name=AXIS, donate_argnums=0)


def placed(tree: Any) -> Any:
    """Arrays with a leading device axis on the devices, placed as :func:`mapped` returns them: it compiles once."""
    return jax.pmap(lambda leaf: leaf, axis_name=AXIS)(tree)


def initial_vectors(network: Network, key: Array, num_iters: int = 100) -> tuple[Array, ...]:
    """One bfloat16 vector per block, iterated towards the top singular vector of the whole layer.

    It is the first start of every example too: most of the neurons of a fresh network are live.
    """

    def norm(place: int, linear_map: spectral.LinearMap) -> tuple[Array, Array]:
        oriented = linear_map.from_smaller_side()
        start = jax.random.normal(jax.random.fold_in(key, place), oriented.in_shape, oriented.dtype)
        return spectral.power_iteration(oriented, start, num_iters)

    return _stored(tuple(norm(place, bounds.linear_map(b.affine))[1] for place, b in enumerate(network.blocks)))


def _evaluate(
    method: Method,
    network: Network,
    x: Array,
    label: Array,
    eps: Array | float,
    kappa: Array | float,
    stored: tuple[Array, ...],
    global_stored: tuple[Array, ...],
    key: Array,
) -> tuple[Array, Metrics, tuple[Array, ...], tuple[Array, ...]]:
    """Loss (B,), metrics (B,) or (B, blocks), and the vectors after the iterations."""
    whole = bounds.WarmStarted(global_stored, None, key, method.global_iters, method.noise)
    shared, global_vectors = bounds.global_norms(network, whole)

    def one(x: Array, label: Array, vectors: tuple[Array, ...]) -> tuple[Array, Metrics, tuple[Array, ...]]:
        warm = bounds.WarmStarted(vectors, global_vectors, key, method.num_iters, method.noise)
        found = _propagate(method, network, l2_ball(x, eps), warm if method.local else bounds.Given(shared))
        logits = network.head(found.features.center)
        worst = method.margins(network.head, found.features, label)
        worst_case = method.loss(logits, margins.worst_logits(logits, worst, label), label)
        clean = losses.cross_entropy(logits, label)
        correct = jnp.argmax(logits) == label
        metrics = {
            "clean_accuracy": correct,
            "certified_accuracy": correct & (margins.worst_margin(worst, label) > 0),
            "local_lipschitz": found.lipschitz,
            "global_lipschitz": jnp.asarray(network.lipschitz(shared), shared.dtype),
            "live": jnp.stack([jnp.mean(live) for live in found.live]),
        }
        return losses.mixed(clean, worst_case, kappa), metrics, found.norm_results if method.local else vectors

    loss, metrics, vectors = jax.vmap(one)(x, label, stored)
    return loss, metrics, vectors, global_vectors


def _propagate(method: Method, network: Network, region: Region, norm: bounds.Norm) -> bounds.Bounds:
    region = region if method.local or method.needs_box else region.without_box()
    return bounds.propagate(network, region, norm, bounds.full_row_norms)


def _average(metrics: Metrics, share: Array) -> Metrics:
    """Weighted means over the examples of all devices; padding has weight 0, and its values are not looked at."""

    def mean(values: Array) -> Array:
        weights = share.reshape((-1,) + (1,) * (values.ndim - 1))
        return lax.psum(jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=0), AXIS)

    return jax.tree.map(mean, metrics)


def _stored(vectors: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(vector.astype(jnp.bfloat16) for vector in vectors)


def _gather(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0, mode="clip")


def _scatter(table: Array, batch: Batch, rows: Array) -> Array:
    """Write the rows of the batch back in place; those of padding are dropped."""
    place = jnp.where(batch.weight > 0, batch.index, table.shape[0])
    return table.at[place].set(rows.astype(table.dtype), mode="drop")

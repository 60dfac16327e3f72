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

from lipjax.bounds.rule import Rule
from lipjax.networks.layers import Affine
from lipjax.norms import estimates
from lipjax.reading.flax import from_flax
from lipjax.training import augmentation
from lipjax.training.methods import Method
from lipjax.training.objectives import Metrics

AXIS = "devices"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. On devices every leaf has a leading device axis.

    Attributes:
        step: number of steps made.
        params: the trainable Flax NNX state.
        opt_state: of the optimiser.
        key: source of the noise of every step.
        global_vectors: one bfloat16 vector per layer, for the norm of the whole layer.
        vectors: bfloat16 (examples, ...) for each place where examples keep vectors of their own.
        validation_vectors: the same for the validation split.
        rule: trained slopes of the dual, or None.
        rule_opt_state: of their optimiser, or None.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    global_vectors: tuple[Array, ...]
    vectors: tuple[Array, ...]
    validation_vectors: tuple[Array, ...]
    rule: Rule | None = None
    rule_opt_state: Any = None


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
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    if method.crop_padding:
        # The stored vectors are left as they are: moving them with the image gains nothing (docs/theory.md).
        own_key = jax.random.fold_in(jax.random.fold_in(key, 0), lax.axis_index(AXIS))
        x = augmentation.crops_and_flips(own_key, x, method.crop_padding)
    share = batch.weight / lax.psum(jnp.sum(batch.weight), AXIS)

    def objective(params: Any, rule: Rule | None) -> tuple[Array, tuple]:
        network = from_flax(nnx.merge(graphdef, params), x.shape[1:])
        result = method.objective(network, x, label, eps, kappa, stored, state.global_vectors, key, rule)
        return jnp.sum(share * result[0]), result

    gradients, result = jax.grad(objective, argnums=(0, 1), has_aux=True)(state.params, state.rule)
    gradient, of_rule = lax.psum(gradients, AXIS)
    loss, metrics, vectors, global_vectors = result
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of its counts
        updates, opt_state = method.optimizer.update(gradient, state.opt_state, state.params)
    params, rule, rule_opt_state = optax.apply_updates(state.params, updates), state.rule, state.rule_opt_state
    if rule is not None:
        with jax.numpy_dtype_promotion("standard"):
            updates, rule_opt_state = method.optimizer.update(of_rule, rule_opt_state, rule)
        rule = optax.apply_updates(rule, updates)
    kept = tuple(_scatter(old, batch, new) for old, new in zip(state.vectors, vectors, strict=True))
    metrics = _average({"loss": loss, **metrics}, share) | {"learning_rate": method.learning_rate(state.step)}
    metrics["eps"], metrics["kappa"] = jnp.asarray(eps, jnp.float32), jnp.asarray(kappa, jnp.float32)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, rule, gradients))]
    metrics["finite"] = jnp.all(jnp.stack(finite)) & jnp.isfinite(metrics["loss"])
    new_state = TrainState(
        *(state.step + 1, params, opt_state, state.key, _stored(global_vectors), kept, state.validation_vectors),
        rule=rule,
        rule_opt_state=rule_opt_state,
    )
    return new_state, metrics


def validation_step(
    method: Method, graphdef: Any, eps: float, state: TrainState, data: Images, batch: Batch
) -> tuple[TrainState, Metrics]:
    """The forward half of a step on the validation split, at the full ``eps``; its vectors are kept warm as well."""
    x, label = data[batch.index]
    network = from_flax(nnx.merge(graphdef, state.params), x.shape[1:])
    stored = tuple(_gather(vectors, batch.index) for vectors in state.validation_vectors)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss, metrics, vectors, _ = method.validation(
        network, x, label, eps, 0.0, stored, state.global_vectors, key, state.rule
    )
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


def initial_vectors(layers: tuple[Affine, ...], key: Array, num_iters: int = 100) -> tuple[Array, ...]:
    """One bfloat16 vector per layer, iterated towards the top singular vector of the whole layer.

    It is the first start of every example too: most of the neurons of a fresh network are live.
    """

    return _stored(estimates.whole_norms(layers, estimates.RandomStarted(key, num_iters))[1])


def _average(metrics: Metrics, share: Array) -> Metrics:
    """Weighted means over the examples of all devices; padding has weight 0, and its values are not looked at."""

    def mean(values: Array) -> Array:
        weights = share.reshape((-1,) + (1,) * (values.ndim - 1))
        return lax.psum(jnp.sum(jnp.where(weights > 0, weights * values.astype(weights.dtype), 0), axis=0), AXIS)

    return jax.tree.map(mean, metrics)


def _stored(vectors: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(vector.astype(jnp.bfloat16) for vector in vectors)


def _gather(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0, mode="clip")


def _scatter(table: Array, batch: Batch, rows: Array) -> Array:
    """Write the rows of the batch back in place; those of padding are dropped."""
    place = jnp.where(batch.weight > 0, batch.index, table.shape[0])
    return table.at[place].set(rows.astype(table.dtype), mode="drop")

"""The training step: gradients, padding, stored vectors, devices, compilation."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx

from lipjax.bounds import margins, propagation
from lipjax.experiments import architectures
from lipjax.networks import regions
from lipjax.norms import estimates
from lipjax.reading import flax, modules
from lipjax.training import losses, methods, objectives, sharding, training_step, worst_case

SHAPE, CLASSES, EXAMPLES = (6, 6, 1), 3, 12


def small_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Conv(1, 4, (3, 3), padding=1, rngs=rngs),
        modules.ClippedReLU((6, 6, 4)),
        nnx.Conv(4, 4, (4, 4), strides=2, padding=1, rngs=rngs),
        modules.ClippedReLU((3, 3, 4)),
        architectures.flatten,
        nnx.Linear(36, CLASSES, rngs=rngs),
    )


ITERATIONS = objectives.Iterations(num_iters=2, global_iters=3, noise=0.01)
LOCAL_GLORO = methods.Bounded(
    ITERATIONS,
    local=True,
    box=True,
    ball=True,
    margins=methods.forward(margins.pairwise_lipschitz),
    loss=worst_case.gloro_of,
)


@functools.cache
def method(**changes):
    constant = optax.constant_schedule
    return methods.Method(
        objective=dataclasses.replace(LOCAL_GLORO, **changes),
        validation=dataclasses.replace(LOCAL_GLORO, **changes),
        eps=constant(0.3),
        kappa=constant(0.25),
        learning_rate=constant(1.0),
        optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=1.0),  # the state has the rate: see with_rate
    )


def with_rate(state, learning_rate):
    """The state of an optimiser whose learning rate is another one."""
    hyperparams = {"learning_rate": jnp.full_like(state.opt_state.hyperparams["learning_rate"], learning_rate)}
    return dataclasses.replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))


@functools.cache
def step_of(method):
    """The mapped step, compiled once for all tests."""
    return training_step.mapped(training_step.train_step, method, nnx.split(small_model(), nnx.Param)[0])


def data_and_state(method, devices):
    """The same examples, dealt out over the devices, and a state whose vectors are all the global ones."""
    model = small_model()
    graphdef, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, *SHAPE), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    network = flax.from_flax(model, SHAPE)
    vectors = training_step.initial_vectors(method.objective.layers(network), jax.random.key(1), 5)
    share = EXAMPLES // devices
    own = [vectors[place] for place in method.objective.kept(network)]
    tables = tuple(jnp.broadcast_to(v[None, None], (devices, share, *v.shape)) for v in own)
    shared = (jnp.int32(0), params, method.optimizer.init(params), jax.random.key_data(jax.random.key(2)), vectors)
    shared = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (devices, *leaf.shape)), shared)
    data = training_step.Images(images.reshape(devices, share, *SHAPE), labels.reshape(devices, share), 255)
    return graphdef, training_step.TrainState(*shared, tables, ()), data


def full_batch(devices, first=EXAMPLES):
    """All examples; with a weight for the first ones only, as if the others were padding."""
    share = EXAMPLES // devices
    index = np.broadcast_to(np.arange(share, dtype=np.int32), (devices, share))
    return training_step.Batch(index, (index < first).astype(np.float32))


def one_step(devices=1):
    _, state, data = data_and_state(method(), devices)
    return step_of(method())(state, data, full_batch(devices))


def params_of(state):
    return [np.asarray(leaf)[0] for leaf in jax.tree.leaves(state.params)]


def test_gradient_of_the_step_is_that_of_the_mean_loss_written_out():
    chosen, examples = method(), 2
    graphdef, state, data = data_and_state(chosen, 1)
    before = params_of(state)
    stored = jax.tree.map(lambda leaf: leaf[0], state)
    x, labels = jnp.asarray(data.images[0], jnp.float32) / 255, data.labels[0]

    def mean_loss(params):
        network = flax.from_flax(nnx.merge(graphdef, params), SHAPE)
        key = jax.random.fold_in(stored.key, 0)
        own = {place: vector[None] for place, vector in enumerate(stored.global_vectors)}
        whole = estimates.WarmStarted(own, None, key, 3, 0.01)
        shared = estimates.whole_norms(network.layers, whole)[1]
        total = 0.0
        for i in range(examples):
            own = {place: table[i : i + 1] for place, table in enumerate(stored.vectors)}
            ask = estimates.WarmStarted(own, shared, key, 2, 0.01)
            region = regions.l2_ball(x[i : i + 1], 0.3)
            found = propagation.propagate(network, region, ask, row_norms=propagation.full_row_norms)
            features = jax.tree.map(lambda leaf: leaf[0], found.features)
            logits = network.logits(x[i])
            worst = margins.worst_logits(
                logits, margins.pairwise_lipschitz(network.head, features, labels[i]), labels[i]
            )
            clean = losses.cross_entropy(logits, labels[i])
            total += 0.25 * clean + 0.75 * losses.gloro(logits, worst, labels[i])
        return total / examples

    loss, expected = oracles.jit(jax.value_and_grad(mean_loss))(stored.params)
    after, metrics = step_of(chosen)(state, data, full_batch(1, examples))
    for old, new, gradient in zip(before, params_of(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(old - new, gradient, atol=2e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)


def test_padding_changes_neither_gradient_nor_metrics_nor_stored_vectors():
    chosen = method()
    _, state, data = data_and_state(chosen, 1)
    plain = training_step.Batch(np.arange(5, dtype=np.int32)[None], np.ones((1, 5), np.float32))
    index = np.array([[0, 1, 2, 3, 4, 7, 7, 0, 7, 8, 9, 10]], np.int32)
    padded = training_step.Batch(index, (np.arange(EXAMPLES) < 5).astype(np.float32)[None])
    results = []
    for batch in (plain, padded):
        copy = jax.tree.map(jnp.array, state)
        results.append(step_of(chosen)(copy, data, batch))
    (left, left_metrics), (right, right_metrics) = results
    for a, b in zip(params_of(left), params_of(right), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for key in left_metrics:
        np.testing.assert_allclose(left_metrics[key], right_metrics[key], rtol=1e-5, atol=1e-6)
    for before, a, b in zip(state.vectors, left.vectors, right.vectors, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(before[0, 7], np.float32), np.asarray(b[0, 7], np.float32))
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-2)
        assert np.any(np.asarray(a[0, :5], np.float32) != np.asarray(before[0, :5], np.float32))


def test_metrics_say_when_parameters_are_no_longer_finite():
    _, state, data = data_and_state(method(), 1)
    _, metrics = step_of(method())(with_rate(state, np.inf), data, full_batch(1))
    assert np.isfinite(metrics["loss"][0])
    assert not bool(metrics["finite"][0])


@pytest.mark.parametrize("norms", ["local", "global"])
def test_dead_network_has_finite_gradients(norms):
    model = small_model()
    model.layers[0].bias[...] = jnp.full(4, -1e3)
    params = nnx.state(model, nnx.Param)
    chosen = method(local=norms == "local", margins=methods.forward(margins.box_and_ball))
    _, state, data = data_and_state(chosen, 1)
    dead = jax.tree.map(lambda leaf: leaf[None], params)
    state = dataclasses.replace(state, params=dead)
    after, metrics = step_of(chosen)(state, data, full_batch(1))
    assert bool(metrics["finite"][0])
    assert all(np.isfinite(leaf).all() for leaf in params_of(after))


def test_clips_are_projected_to_be_nonnegative():
    model = small_model()
    params = nnx.state(model, nnx.Param)
    optimizer = training_step.adam(optax.constant_schedule(0.5))
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of its counts
            updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    thetas = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "theta" in jax.tree_util.keystr(path)]
    others = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "theta" not in jax.tree_util.keystr(path)]
    assert len(thetas) == 2
    assert all(float(jnp.min(leaf)) == 0.0 for leaf in thetas)
    assert any(float(jnp.min(leaf)) < 0 for leaf in others)


def test_warm_vectors_approach_the_converged_norm_over_steps():
    graphdef, state, data = data_and_state(method(), 1)
    state = with_rate(state, 0.0)
    network = flax.from_flax(nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state.params)), SHAPE)
    x = jnp.asarray(data.images[0], jnp.float32) / 255
    ask = estimates.Estimate(jax.random.key(5), tol=1e-6)
    converged = oracles.jit(lambda x: propagation.propagate(network, regions.l2_ball(x, 0.3), ask).lipschitz)
    exact = np.asarray(converged(x))
    for _ in range(30):
        state, metrics = step_of(method())(state, data, full_batch(1))
    assert metrics["local_lipschitz"][0] == pytest.approx(exact.mean(), rel=0.02)
    assert metrics["local_lipschitz"][0] <= exact.mean() * (1 + 2e-3)


DEVICES_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
import test_training
assert jax.local_device_count() == 4
state, metrics = test_training.one_step(4)
np.savez(sys.argv[2], metrics["loss"][0], *test_training.params_of(state))
"""


def test_gradients_on_four_devices_equal_those_on_one(tmp_path):
    path = tmp_path / "four.npz"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", DEVICES_SCRIPT, str(pathlib.Path(__file__).parent), str(path)]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
    state, metrics = one_step(1)
    with np.load(path) as four:
        for one, name in zip([metrics["loss"][0], *params_of(state)], four.files, strict=True):
            np.testing.assert_allclose(one, four[name], atol=2e-6)


def test_batches_cover_every_example_once_with_one_shape():
    batches = sharding.Batches(size=8, devices=2, seed=3)
    seen = [set(), set()]
    parts = list(batches.shuffled(27, epoch=1))
    assert len(parts) == batches.steps(27) == 4
    for batch in parts:
        assert batch.index.shape == batch.weight.shape == (2, 4)
        for device in range(2):
            real = batch.index[device][batch.weight[device] > 0].tolist()
            assert not seen[device] & set(real)
            seen[device] |= set(real)
    assert seen == [set(range(14)), set(range(13))]
    again = list(batches.shuffled(27, epoch=1))
    other = list(batches.shuffled(27, epoch=2))
    assert all((a.index == b.index).all() for a, b in zip(parts, again, strict=True))
    assert any((a.index != b.index).any() for a, b in zip(parts, other, strict=True))

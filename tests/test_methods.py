"""Every method's loss against its formula in NumPy, with norms by SVD; starts, chosen layers and the sparsity loss."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from configs import digits
from lipjax import Given, ReLUActivation, chain, dense, l2_ball, propagate
from lipjax.bounds import margins
from lipjax.experiments import defaults, recipe
from lipjax.training import objectives, training_step, unbounded

EPS, KAPPA, BATCH = 0.2, 0.25, 4
KEY = jax.random.key(3)
BOUNDED = [name for name, parts in defaults.METHODS.items() if parts["margins"] not in ("none", "dual", "crown")]
CONVERGED = objectives.Iterations(num_iters=300, global_iters=300, noise=0.01)


def objective(name, **changes):
    """The objective of a method, with enough iterations for norms to be those of the SVD."""
    return dataclasses.replace(recipe.objective_of(digits.get_config(name)), iterations=CONVERGED, **changes)


@functools.cache
def network_and_batch():
    network = oracles.network_of((30,), [12, 16, 12], "clipped", seed=1)
    x = jnp.asarray(oracles.random_inputs(network, 5, BATCH))
    return network, x, jnp.array([0, 1, 2, 1])


@functools.cache
def compiled(chosen):
    """The objective of a batch from vectors of the whole layers, as one function, compiled once for all tests."""

    @oracles.jit
    def run(network, x, label, eps, kappa, key):
        whole = training_step.initial_vectors(chosen.layers(network), key, 50)
        stored = tuple(jnp.repeat(whole[place][None], len(x), 0) for place in chosen.kept(network))
        return chosen(network, x, label, eps, kappa, stored, whole, key, chosen.rule(network))

    return run


def evaluate(chosen, network, x, label, eps=EPS, kappa=KAPPA, key=KEY):
    """Losses, metrics and vectors of a batch."""
    loss, metrics, vectors, _ = compiled(chosen)(network, x, label, eps, kappa, key)
    return np.asarray(loss, np.float64), metrics, vectors


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits)))


def features_of(exact, x, parts):
    """Center, box, radius and live features after the pass of a method in float64, row norms of the whole layers."""
    local, ball = parts["norms"] == "local", parts["norms"] != "none"
    box = local or parts["margins"] == "box_and_ball"
    live, center, radius, lower, upper = np.ones(x.size, bool), x, EPS, x - EPS, x + EPS
    for (matrix, bias), rule in zip(exact.layers, exact.rules, strict=True):
        center = matrix @ center + bias
        mid, half = matrix @ (lower + upper) / 2 + bias, np.abs(matrix) @ (upper - lower) / 2
        lower, upper = mid - half, mid + half
        if ball:
            rows = radius * np.linalg.norm(matrix, axis=1)
            lower, upper = np.maximum(lower, center - rows), np.minimum(upper, center + rows)
        rows, new, _ = rule.matter(lower, upper)
        radius = radius * oracles.spectral_norm(matrix * np.outer(rows, live) if local else matrix)
        live = new
        lower, upper, center = (rule.apply(z) for z in (lower, upper, center))
    return center, lower, upper, radius, live if box else np.ones_like(live)


def formula(name, network, x, label):
    """The loss of one example as published, in float64."""
    parts, exact = defaults.METHODS[name], oracles.DenseNetwork(network)
    center, lower, upper, radius, live = features_of(exact, x, parts)
    weights, bias = exact.head
    logits = weights @ center + bias
    if parts["margins"] == "pairwise_lipschitz":
        worst = logits + radius * np.linalg.norm((weights - weights[label]) * live, axis=1)
    elif parts["margins"] == "lipschitz_margin":
        others = np.arange(len(logits)) != label
        norm = oracles.spectral_norm(weights * live) if parts["norms"] == "local" else oracles.spectral_norm(weights)
        worst = logits + np.sqrt(2) * radius * norm * others
    elif parts["norms"] == "none":
        c = weights[label] - weights
        least = np.sum(np.where(c > 0, c * lower, c * upper), axis=1) + bias[label] - bias
        worst = logits[label] - least
    else:
        least, _ = oracles.margins_minimum(weights.T, bias, center, lower, upper, radius, label)
        worst = logits[label] - least
    clean = -log_softmax(logits)[label]
    if parts["loss"] == "gloro":
        rivals = np.delete(worst, label)
        worst_case = -log_softmax(np.append(logits, rivals.max()))[label]
    else:
        worst_case = -log_softmax(worst)[label]
    return KAPPA * clean + (1 - KAPPA) * worst_case


@pytest.mark.parametrize("name", BOUNDED)
def test_a_method_with_bounds_is_its_formula(name):
    network, x, label = network_and_batch()
    loss, metrics, _ = evaluate(objective(name), network, x, label)
    expected = [formula(name, network, np.asarray(x[i], np.float64), int(label[i])) for i in range(BATCH)]
    np.testing.assert_allclose(loss, expected, rtol=2e-4)
    assert {"clean_loss", "worst_loss", "clean_accuracy", "certified_accuracy", "live"} <= metrics.keys()


def test_standard_training_is_cross_entropy_whatever_the_radius():
    network, x, label = network_and_batch()
    loss, metrics, _ = evaluate(objective("standard"), network, x, label)
    logits = oracles.DenseNetwork(network).logits(np.asarray(x, np.float64))
    np.testing.assert_allclose(loss, [-log_softmax(z)[y] for z, y in zip(logits, label, strict=True)], rtol=1e-5)
    assert "certified_accuracy" not in metrics


def linear(slopes):
    """A classifier that is linear where pixels are positive: two logits, 0 and slopes . x."""
    kernel = np.stack([np.zeros_like(slopes), slopes], axis=1).astype(np.float32)
    head = dense(jnp.asarray(kernel), jnp.zeros(2), slopes.shape)
    hidden = dense(jnp.eye(slopes.size), jnp.zeros(slopes.size), slopes.shape)
    return chain(hidden, ReLUActivation(), head)


@pytest.mark.parametrize("name", ["at", "trades"])
def test_attacks_of_linear_classifiers_nearly_reach_the_worst_point(name):
    slopes, eps = np.array([3.0, -4.0, 1.0]), 0.2
    network, x, label = linear(slopes), jnp.full((2, 3), 0.5), jnp.array([0, 1])
    loss, metrics, _ = evaluate(objective(name), network, x, label, eps)
    assert set(metrics) >= {"clean_accuracy", "pgd_accuracy"}
    for i in range(2):
        clean = np.array([0.0, slopes @ np.full(3, 0.5)])

        def at(length, i=i, clean=clean):
            """The loss where the second logit is moved by so much."""
            moved = clean + np.array([0.0, length * np.linalg.norm(slopes)])
            y = int(label[i])
            if name == "at":
                return -log_softmax(moved)[y]
            p, q = (np.exp(log_softmax(z)) for z in (clean, moved))
            return -log_softmax(clean)[y] + unbounded.TRADES_BETA * np.sum(p * np.log(p / q))

        worst, nearly = max(at(eps), at(-eps)), max(at(0.95 * eps), at(-0.95 * eps))
        assert nearly <= loss[i] <= worst * (1 + 1e-5)


@pytest.mark.slow
def test_all_methods_differ_on_one_batch():
    network, x, label = network_and_batch()
    found = {name: evaluate(objective(name), network, x, label)[0].mean() for name in defaults.METHODS}
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert abs(a - b) > 1e-4, f"{one} and {other} have the same loss"


def test_an_unknown_method_is_named_with_the_list():
    with pytest.raises(ValueError, match=r"unknown method 'lipschitz'; known are local_gloro, local_bcp, local_lmt, "):
        digits.get_config("lipschitz")


def test_random_starts_are_new_in_every_step_and_lower_than_saved_ones():
    network, x, label = network_and_batch()
    few = objectives.Iterations(num_iters=1, global_iters=300)
    saved = dataclasses.replace(objective("local_bcp"), iterations=few)
    fresh = dataclasses.replace(saved, iterations=dataclasses.replace(few, saved=False))
    assert saved.kept(network) == (0, 1, 2)
    assert fresh.kept(network) == ()
    one, again, other = (evaluate(fresh, network, x, label, key=jax.random.key(k))[1] for k in (0, 0, 1))
    np.testing.assert_array_equal(one["sigma"], again["sigma"])
    assert np.all(np.asarray(one["sigma"])[:, 0] != np.asarray(other["sigma"])[:, 0])
    assert np.unique(np.asarray(one["sigma"])[:, 0]).size == BATCH  # another start for every example
    warm = evaluate(saved, network, x, label)[1]["sigma"]
    assert np.asarray(one["sigma"]).mean() < 0.97 * np.asarray(warm).mean()


def test_chosen_layers_have_the_norm_of_the_whole_layer_and_keep_no_vectors():
    network, x, label = network_and_batch()
    chosen = objective("local_lmt")
    mixed = dataclasses.replace(chosen, iterations=dataclasses.replace(CONVERGED, global_layers=(1, 3)))
    assert chosen.kept(network) == (0, 1, 2, 3)  # three layers and the last one
    assert mixed.kept(network) == (0, 2)
    _, metrics, vectors = evaluate(mixed, network, x, label)
    matrices = [matrix for matrix, _ in oracles.DenseNetwork(network).layers]
    np.testing.assert_allclose(metrics["sigma"][:, 1], oracles.spectral_norm(matrices[1]), rtol=1e-4)
    assert np.all(np.asarray(metrics["sigma"][:, 0]) < oracles.spectral_norm(matrices[0]))
    assert len(vectors) == 2


def test_the_sparsity_loss_is_added_with_its_weight():
    network, x, label = network_and_batch()
    plain = evaluate(objective("local_bcp"), network, x, label)[0]
    weighted = evaluate(objective("local_bcp", sparsity=0.5, sparsity_theta=0.1), network, x, label)[0]
    exact = oracles.DenseNetwork(network)
    for i in range(BATCH):
        lower = upper = np.asarray(x[i], np.float64)
        lower, upper, center, radius, expected = lower - EPS, upper + EPS, lower, EPS, 0.0
        live = np.ones(lower.size, bool)
        for (matrix, bias), rule in zip(exact.layers, exact.rules, strict=True):
            center = matrix @ center + bias
            mid, half = matrix @ (lower + upper) / 2 + bias, np.abs(matrix) @ (upper - lower) / 2
            ball = radius * np.linalg.norm(matrix, axis=1)
            lower, upper = np.maximum(mid - half, center - ball), np.minimum(mid + half, center + ball)
            expected += np.mean(np.maximum(upper, 0) + 0.1 * np.maximum(rule.theta - lower, 0))
            rows, new, _ = rule.matter(lower, upper)
            radius, live = radius * oracles.spectral_norm(matrix * np.outer(rows, live)), new
            lower, upper, center = (rule.apply(z) for z in (lower, upper, center))
        assert weighted[i] - plain[i] == pytest.approx(0.5 * expected, rel=1e-3)


def test_lipschitz_margins_are_never_above_pairwise_ones():
    network, x, label = network_and_batch()
    bounds = propagate(network, l2_ball(x[:1], EPS), Given(jnp.array([1.3, 0.8, 0.9])))
    features = jax.tree.map(lambda leaf: leaf[0], bounds.features)
    sigma = oracles.spectral_norm(np.asarray(network.head.kernel) * np.asarray(features.live)[:, None])
    lmt = margins.lipschitz_margin(network.head, features, label[0], jnp.float32(sigma))
    assert np.all(lmt <= margins.pairwise_lipschitz(network.head, features, label[0]) + 1e-6)
    assert float(lmt[0]) == 0

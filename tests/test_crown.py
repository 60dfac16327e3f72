"""CROWN and what came of it: against CROWN in NumPy, never above the truth, and in the order that theory says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dual import ascended, case, norms_of, samples

import lipjax
from configs import digits
from lipjax.bounds import margins
from lipjax.experiments import recipe
from lipjax.training import methods, objectives, training_step

EPS, KAPPA = 0.2, 0.25
SLOW = ("graph", *(kind for kind in oracles.KINDS if kind != "dense pairs"))
BOUNDS = {
    "CROWN": jax.jit(lipjax.crown_margins),
    "alpha-CROWN": jax.jit(lipjax.alpha_crown_margins),
    "SDP-CROWN": jax.jit(lipjax.sdp_crown_margins),
}


@jax.jit
def interval_bounds(network, x, eps):
    return lipjax.propagate(network, lipjax.l2_ball(x, eps), lipjax.no_norms)


@functools.cache
def network_and_batch(kind="relu"):
    network = jax.tree.map(jnp.asarray, oracles.network_of((20,), [12, 9, 7], kind, seed=2))
    x = jnp.asarray(oracles.random_inputs(network, 3, 4))
    return network, x, jnp.argmax(network(x), axis=1)


def boxes(exact, x, eps):
    """Boxes before each activation: rows' norms for the first layer, intervals behind it."""
    found, lower, upper = [], None, None
    for k, ((matrix, bias), rule) in enumerate(zip(exact.layers, exact.rules, strict=True)):
        mid = x if k == 0 else (lower + upper) / 2
        half = eps * np.linalg.norm(matrix, axis=1) if k == 0 else np.abs(matrix) @ (upper - lower) / 2
        center = matrix @ mid + bias
        found.append((center - half, center + half))
        lower, upper = (rule.apply(bound) for bound in found[-1])
    return found, lower, upper


def crown(network, x, label, eps):
    """Margins by CROWN as published, for ReLU, in float64."""
    exact = oracles.DenseNetwork(network)
    known, _, _ = boxes(exact, x, eps)
    weights, bias = exact.head
    found = []
    for rival in range(len(bias)):
        c, total = weights[label] - weights[rival], bias[label] - bias[rival]
        for (matrix, shift), (lower, upper) in list(zip(exact.layers, known, strict=True))[::-1]:
            split = (lower < 0) & (upper > 0)
            chord = np.where(split, upper / np.where(split, upper - lower, 1), lower >= 0)
            nearer = np.where(split, upper > -lower, lower >= 0)
            total -= np.sum(np.where(split & (c < 0), c * chord * lower, 0))
            c = c * np.where(c < 0, chord, nearer)
            total, c = total + c @ shift, matrix.T @ c
        found.append(total + c @ x - eps * np.linalg.norm(c))
    found[label] = 0
    return np.array(found)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1.5))
def test_crown_is_the_published_one(eps):
    network, x, label = network_and_batch()
    ours = BOUNDS["CROWN"](network, interval_bounds(network, x, jnp.float32(eps)), label)
    expected = [crown(network, np.asarray(x[i], np.float64), int(label[i]), eps) for i in range(4)]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_an_interval_pass_has_no_constant_and_no_balls_behind_the_first_layer():
    network, x, _ = network_and_batch()
    found = interval_bounds(network, x, EPS)
    assert np.isinf(found.lipschitz).all()
    assert all(before.radius is None for before in found.before)
    exact = oracles.DenseNetwork(network)
    expected, lower, upper = boxes(exact, np.asarray(x[0], np.float64), EPS)
    for before, (low, high) in zip(found.before, expected, strict=True):
        np.testing.assert_allclose(before.lower[0], low, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(before.upper[0], high, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.features.lower[0], lower, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.features.upper[0], upper, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["dense pairs", "residual", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
)
@pytest.mark.parametrize("name", BOUNDS)
def test_no_bound_is_above_a_sample(name, kind):
    for seed in range(3):
        with jax.enable_x64(True):
            network, x, label, bounds = case(kind, seed, 0.3)
            found = np.asarray(BOUNDS[name](network, bounds, label))
            for i in range(len(x)):
                least = samples(network, x[i], 0.3, seed)
                assert (found[i] <= np.asarray(least) + 1e-9).all()
            assert (found[np.arange(len(x)), np.asarray(label)] == 0).all()


@pytest.mark.parametrize("kind", ["relu", "clipped"])
def test_slopes_and_balls_only_help(kind):
    """alpha-CROWN is at least CROWN, and so is the dual, with balls, on the same boxes."""
    network, x, label = network_and_batch(kind)
    sigmas = jnp.asarray(norms_of(network), jnp.float32)
    propagate = jax.jit(lambda x, eps: lipjax.propagate(network, lipjax.l2_ball(x, eps), lipjax.Given(sigmas)))
    for eps in (0.05, 0.2, 0.6):
        bounds = propagate(x, eps)
        plain, alpha = (np.asarray(BOUNDS[name](network, bounds, label)) for name in ("CROWN", "alpha-CROWN"))
        assert (alpha >= plain - 1e-5).all()
        assert (alpha > plain + 1e-3).any()
        rivals = jnp.arange(3)[None].repeat(4, axis=0)
        climbed, _ = ascended(network, bounds, label, rivals=rivals, num_steps=150)
        assert (np.asarray(climbed) >= plain - 1e-4).all()


def test_sdp_crown_of_one_layer_is_its_minimum_by_grid():
    network = jax.tree.map(jnp.asarray, oracles.network_of((6,), [8], "relu", seed=4))
    x = jnp.asarray(oracles.random_inputs(network, 3, 1))
    label, exact = jnp.argmax(network(x), axis=1), oracles.DenseNetwork(network)
    (matrix, shift), (weights, bias) = exact.layers[0], exact.head
    bounds = jax.jit(lambda x: lipjax.propagate(network, lipjax.l2_ball(x, EPS), lipjax.Given(jnp.float32([9.0]))))(x)
    found = np.asarray(BOUNDS["SDP-CROWN"](network, bounds, label))[0]
    lower, upper = (np.asarray(bound[0], np.float64) for bound in bounds.before[0].box)
    rows = np.asarray(bounds.before[0].rows[0])
    center, radius, y = matrix @ np.asarray(x[0], np.float64) + shift, float(bounds.before[0].radius[0]), int(label[0])
    z = center[:, None] + radius * np.linspace(-1, 1, 20001)[None]
    for rival in range(3):
        if rival == y:
            continue
        c = weights[y] - weights[rival]
        split = (lower < 0) & (upper > 0)
        chord = np.where(split, upper / (upper - lower), lower >= 0)
        g = rows * c * np.where(c < 0, chord, np.where(split, upper > -lower, lower >= 0))

        def least(mu, c=c, g=g):
            values = c[:, None] * np.maximum(z, 0) - g[:, None] * z + mu / 2 * (z - center[:, None]) ** 2
            return values.min(axis=1).sum() - mu / 2 * radius**2

        back = matrix.T @ g
        rest = bias[y] - bias[rival] + g @ shift + back @ np.asarray(x[0]) - EPS * np.linalg.norm(back)
        best = max(least(mu) for mu in np.append(0, np.geomspace(1e-3, 1e3, 300)))
        assert found[rival] <= best + rest + 1e-3 * (1 + abs(best))
        assert found[rival] >= best + rest - 1e-2 * (1 + abs(best))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_crown_ibp_is_its_formula(share):
    """The mix goes from CROWN to intervals with the radius; at half of the ramp it is in the middle."""
    network, x, label = network_and_batch()
    chosen = recipe.objective_of(digits.get_config("crown_ibp"))
    end = EPS / share if share else 1e9
    chosen = dataclasses.replace(
        chosen, margins=methods.CrownMargins(end, 1.0, 0.0), iterations=objectives.Iterations(50, 50)
    )
    vectors = training_step.initial_vectors(chosen.layers(network), jax.random.key(0))
    found, metrics, own, _ = jax.jit(lambda: chosen(network, x, label, EPS, KAPPA, (), vectors, jax.random.key(1)))()
    assert own == ()
    exact = oracles.DenseNetwork(network)
    for i in range(4):
        point, y = np.asarray(x[i], np.float64), int(label[i])
        _, lower, upper = boxes(exact, point, EPS)
        weights, bias = exact.head
        c = weights[y] - weights
        of_box = np.sum(np.where(c > 0, c * lower, c * upper), axis=1) + bias[y] - bias
        margin = (1 - share) * crown(network, point, y, EPS) + share * of_box
        logits = exact.logits(point[None])[0]

        def entropy(z, y=y):
            return np.log(np.sum(np.exp(z - z[y])))

        expected = KAPPA * entropy(logits) + (1 - KAPPA) * entropy(logits[y] - margin)
        assert float(found[i]) == pytest.approx(expected, rel=1e-3)
        assert bool(metrics["certified_accuracy"][i]) == (np.delete(margin, y).min() > 0)


def test_the_stability_loss_is_added_to_adversarial_training():
    network, x, label = network_and_batch()
    config = digits.get_config("relu_stability")
    losses = []
    for weight in (0.0, 0.7):
        config.stability.weight = weight
        chosen = recipe.objective_of(config)
        vectors = training_step.initial_vectors(chosen.layers(network), jax.random.key(0))
        step = jax.jit(
            lambda chosen=chosen, vectors=vectors: chosen(network, x, label, EPS, 0, (), vectors, jax.random.key(1))
        )
        losses.append(np.asarray(step()[0]))
    exact = oracles.DenseNetwork(network)
    for i in range(4):
        known, _, _ = boxes(exact, np.asarray(x[i], np.float64), EPS)
        stable = -sum(np.mean(np.tanh(1 + lower * upper)) for lower, upper in known)
        assert losses[1][i] - losses[0][i] == pytest.approx(0.7 * stable, rel=1e-3, abs=1e-4)


def test_margins_of_the_box_are_never_above_crown_by_much_and_often_far_below():
    """On the same boxes CROWN is not always better than intervals; where it pays, on the whole, is what is trained."""
    network, x, label = network_and_batch()
    bounds = interval_bounds(network, x, EPS)
    of_box = np.asarray(margins.box_and_ball(network.head, bounds.features, label))
    of_crown = np.asarray(BOUNDS["CROWN"](network, bounds, label))
    rivals = np.arange(3)[None] != np.asarray(label)[:, None]
    assert (of_crown - of_box)[rivals].mean() > 0.1


def test_sdp_crown_of_a_row_with_a_weight_reaches_as_far_as_the_row():
    """``z = x + 1.5`` behind tanh: its weight is below 1, and z still moves by eps."""

    def dense(kernel, bias):
        return lipjax.dense(jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32), (1,))

    network = lipjax.chain(dense([[1.0]], [1.5]), lipjax.TanhActivation(), dense([[10.0, 0.0]], [0.0, 0.0]))

    def ask(place, layer, rows, columns):
        return jnp.max(jnp.abs(rows), axis=1) * 1.000001, None

    bounds = lipjax.propagate(network, lipjax.l2_ball(jnp.zeros((1, 1)), 1.0), ask)
    found = lipjax.sdp_crown_margins(network, bounds, jnp.array([0]))
    assert float(found[0, 1]) <= 10 * np.tanh(0.5) + 1e-4


def test_a_weight_proves_nothing_where_there_is_no_ball():
    network, x, label = network_and_batch()
    bounds, rivals = interval_bounds(network, x, EPS), (label[:, None] + 1) % 7
    assert all(before.radius is None for before in bounds.before[1:])
    g = tuple(jnp.zeros((len(x), 1, *before.center.shape[1:])) for before in bounds.before)
    with_weights, without = (
        lipjax.dual_margins(network, bounds, label, lipjax.Multipliers(g, (nothing, *[weight] * (len(g) - 1))), rivals)
        for nothing, weight in ((jnp.zeros((len(x), 1)), jnp.full((len(x), 1), each)) for each in (1e3, 0.0))
    )
    np.testing.assert_array_equal(with_weights, without)

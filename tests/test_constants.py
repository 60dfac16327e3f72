"""Other bounds of local constants: against hand numbers, NumPy and samples, and in the order that theory says."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

import lipjax
from lipjax import constants
from lipjax.bounds import slopes
from lipjax.bounds.enumeration import separated

ANY = ("product", "lip_lt", "merged", "fast_lip")
ORDERED = 1 + 1e-9
KINDS = ("relu", "clipped", "leaky", "clip")


def widths(sizes, kind, seed):
    """A float64 chain of random dense layers; call with x64 enabled."""
    rng = np.random.default_rng(seed)
    operations = []
    for inputs, outputs in itertools.pairwise(sizes):
        kernel, bias = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs), 0.3 * rng.normal(size=outputs)
        operations.append(lipjax.dense(jnp.asarray(kernel), jnp.asarray(bias), (inputs,)))
        operations.append(
            {
                "relu": lipjax.ReLUActivation(),
                "clipped": lipjax.ClippedReLUActivation(jnp.asarray(rng.uniform(-0.1, 1, outputs))),
                "leaky": lipjax.LeakyReLUActivation(jnp.asarray(-0.3 if seed % 2 else 0.1)),
                "clip": lipjax.ClipActivation(jnp.asarray(-0.4), jnp.asarray(0.3)),
            }[kind]
        )
    return lipjax.chain(*operations[:-1])


@jax.jit
def bounds_of(network, x, eps):
    return lipjax.propagate(network, lipjax.l2_ball(x, eps), constants.svd_norms)


@functools.partial(jax.jit, static_argnames="names")
def found_by(names, network, bounds, label):
    return {name: getattr(constants, name)(network, bounds, label) for name in names}


@jax.jit
def gradients(network, points, label):
    """Lengths (points, classes) of the gradients of all margins of one label."""

    def margins(x):
        logits = network.logits(x)
        return logits[label] - logits

    return jnp.linalg.norm(jax.vmap(jax.jacrev(margins))(points), axis=2)


def sampled(network, x, eps, label, seed, count=500):
    points = oracles.ball_points(np.random.default_rng(seed), np.asarray(x, np.float64), eps, count)
    return np.asarray(gradients(network, jnp.asarray(points), label)).max(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), eps=st.floats(1e-3, 1.0))
def test_all_bounds_are_above_samples_and_in_the_order_of_theory(kind, seed, eps):
    with jax.enable_x64(True):
        network = widths((3, 6, 5, 3), kind, seed)
        x, label = jnp.asarray(np.random.default_rng(seed).uniform(size=(2, 3))), jnp.array([seed % 3, 1])
        bounds = bounds_of(network, x, eps)
        found = found_by(ANY, network, bounds, label)
        whole = found_by(("product", "lip_lt"), network, None, label)
        exact = constants.exact(network, bounds, label)
        for i in range(2):
            assert (sampled(network, x[i], eps, label[i], seed) <= exact[i] * ORDERED).all()
            assert (exact[i] >= 0).all()
            assert exact[i, label[i]] == 0
        for name in ANY:
            assert found[name].shape == (2, 3)
            assert (exact <= np.asarray(found[name]) * ORDERED + 1e-12).all(), name
        for name in ("lip_lt", "merged"):
            assert (found[name] <= found["product"] * ORDERED).all()
        for name in whole:
            assert (found[name] <= whole[name] * ORDERED).all()
        assert (whole["lip_lt"] <= whole["product"] * ORDERED).all()
        assert (exact <= np.asarray(whole["lip_lt"]) * ORDERED).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), eps=st.floats(1e-3, 1.0))
def test_the_bound_of_one_hidden_layer_is_above_the_exact_constant(kind, seed, eps):
    with jax.enable_x64(True):
        network = widths((4, 8, 3), kind, seed)
        x, label = jnp.asarray(np.random.default_rng(seed).uniform(size=(1, 4))), jnp.array([2])
        bounds = bounds_of(network, x, eps)
        found = np.asarray(found_by(("hein_andriushchenko",), network, bounds, label)["hein_andriushchenko"])
        assert (constants.exact(network, bounds, label) <= found * ORDERED + 1e-12).all()


def toy():
    """The example of the paper's appendix A.1 with a second class of zeros."""
    kernel, zero = jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.zeros(3)
    block = lipjax.dense(kernel, zero, (3,)), lipjax.ClippedReLUActivation(jnp.ones(3))
    head = lipjax.dense(jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), jnp.zeros(2), (3,))
    return lipjax.chain(*block, *block, head)


def test_the_papers_example_is_1_by_all_local_bounds_and_9_root_3_globally():
    network, x, label = toy(), jnp.array([[1.0, -1.0, 0.0]]), jnp.array([0])
    bounds = bounds_of(network, x, 0.1)
    for name, found in found_by(ANY, network, bounds, label).items():
        np.testing.assert_allclose(found, [[0, 1]], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(constants.exact(network, bounds, label), [[0, 1]], rtol=1e-6)
    whole = found_by(("product", "lip_lt"), network, None, label)
    assert float(whole["product"][0, 1]) == pytest.approx(9 * np.sqrt(3), rel=1e-6)
    # m_1 = 3, m_2 = 9 / 2 + 3 / 2 * 3 = 9, and ||(9, 4, 1)|| / 4 + ||(3, 2, 1)|| / 4 * 3 + sqrt 3 / 2 * 9
    expected = np.sqrt(98) / 4 + np.sqrt(14) / 4 * 3 + np.sqrt(3) / 2 * 9
    assert float(whole["lip_lt"][0, 1]) == pytest.approx(expected, rel=1e-6)


def test_one_hidden_layer_by_hand():
    """``relu(x1) + relu(x1 - 3 x2 + 4) - relu(-x1)`` around 0: the second neuron is on, the others vary."""
    kernel = jnp.array([[1.0, 1.0, -1.0], [0.0, -3.0, 0.0]])
    hidden = lipjax.dense(kernel, jnp.array([0.0, 4.0, 0.0]), (2,)), lipjax.ReLUActivation()
    head = lipjax.dense(jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), jnp.zeros(2), (3,))
    network, label = lipjax.chain(*hidden, head), jnp.array([0])
    bounds = bounds_of(network, jnp.zeros((1, 2)), 1.0)
    found = {name: float(value[0, 1]) for name, value in found_by(ANY, network, bounds, label).items()}
    # gradients are (1, -3) + s1 (1, 0) + s3 (1, 0) with s1 and s3 in [0, 1]
    assert found["product"] == pytest.approx(np.sqrt(3) * np.linalg.norm(kernel, 2), rel=1e-5)
    assert found["merged"] == pytest.approx(np.sqrt(10) + np.sqrt(2) * np.sqrt(2), rel=1e-5)
    assert found["lip_lt"] == pytest.approx(np.hypot(2, 3) + np.sqrt(2) / 2 * np.sqrt(2), rel=1e-5)
    assert found["fast_lip"] == pytest.approx(np.hypot(3, 3), rel=1e-5)
    # each of the three pairs adds 1, twice
    pairs = constants.hein_andriushchenko(network, bounds, label)
    assert float(pairs[0, 1]) == pytest.approx(np.sqrt(1 + 10 + 1 + 2 * 3), rel=1e-5)
    # s1 = s3 = 1 on the plane x1 = 0 alone, which enumeration cannot leave out
    assert constants.exact(network, bounds, label)[0, 1] == pytest.approx(np.hypot(3, 3), rel=1e-6)
    assert sampled(network, np.zeros(2), 1.0, 0, 0)[1] == pytest.approx(np.hypot(2, 3), rel=1e-5)


def test_lip_lt_is_the_published_formula():
    with jax.enable_x64(True):
        network, label = widths((4, 6, 5, 5, 3), "relu", 3), jnp.array([1])
        found = np.asarray(found_by(("lip_lt",), network, None, label)["lip_lt"])[0]
    exact = oracles.DenseNetwork(network)
    for rival in (0, 2):
        matrices = [matrix for matrix, _ in exact.layers] + [exact.head[0][[1]] - exact.head[0][[rival]]]
        m = []
        for k in range(1, 5):
            norms = [np.linalg.norm(functools.reduce(lambda v, w: w @ v, matrices[j:k]), 2) for j in range(k)]
            terms = [2.0 ** (j - k) * norms[j] * m[j - 1] for j in range(1, k)]
            m.append(2.0 ** (1 - k) * norms[0] + sum(terms))
        assert found[rival] == pytest.approx(m[-1], rel=1e-9)


def test_fast_lip_is_its_formula_for_two_layers():
    with jax.enable_x64(True):
        network, label = widths((4, 7, 3), "relu", 6), jnp.array([0])
        bounds = bounds_of(network, jnp.full((1, 4), 0.5), 0.3)
        found = np.asarray(found_by(("fast_lip",), network, bounds, label)["fast_lip"])[0]
        (matrix, _), (head, _) = *oracles.DenseNetwork(network).layers, oracles.DenseNetwork(network).head
        lower, upper = (np.asarray(end[0]) for end in bounds.before[0].box)
    on, varies = lower >= 0, (lower < 0) & (upper > 0)
    assert on.any()
    assert varies.any()
    for rival in (1, 2):
        row = head[0] - head[rival]
        terms = row[:, None] * matrix
        most = terms[on].sum(axis=0) + np.maximum(terms[varies], 0).sum(axis=0)
        least = terms[on].sum(axis=0) + np.minimum(terms[varies], 0).sum(axis=0)
        assert found[rival] == pytest.approx(np.linalg.norm(np.maximum(np.abs(most), np.abs(least))), rel=1e-9)


def test_enumeration_finds_what_a_grid_of_the_disc_finds():
    """Every pattern of two inputs, from a grid that is finer than their cells."""
    with jax.enable_x64(True):
        for seed, kind in enumerate(("relu", "clipped", "leaky")):
            network = widths((2, 6, 4, 3), kind, seed)
            x, label, eps = jnp.array([[0.4, 0.6]]), jnp.array([0]), 0.5
            exact = constants.exact(network, bounds_of(network, x, eps), label)
            steps = np.linspace(-eps, eps, 801)
            grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
            points = np.asarray(x) + grid[np.linalg.norm(grid, axis=1) <= eps]
            np.testing.assert_allclose(exact[0], gradients(network, jnp.asarray(points), 0).max(axis=0), rtol=1e-9)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.1, 2.0))
def test_no_polytope_that_meets_the_ball_is_separated_from_it(seed, planes, radius):
    rng = np.random.default_rng(seed)
    normals, ends = rng.normal(size=(planes, 3)), rng.normal(size=planes)
    nearest = optimize.minimize(
        lambda d: d @ d / 2,
        np.zeros(3),
        jac=lambda d: d,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda d: normals @ d - ends, "jac": lambda d: normals},
    )
    if not nearest.success:
        return
    distance = np.linalg.norm(nearest.x)
    if abs(distance - radius) > 1e-3:
        assert separated(normals, ends, radius) == (distance > radius)


def test_a_neuron_that_is_constant_on_a_cell_is_on_one_piece():
    assert separated(np.zeros((1, 2)), np.ones(1), 1.0)
    assert not separated(np.zeros((1, 2)), np.zeros(1), 1.0)
    assert separated(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0.1, 0.1]), 1.0)  # empty


def test_convolutions_and_layers_without_activations_between_them():
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    conv = lipjax.convolution(array(2, 2, 1, 2), jnp.zeros(2), (3, 3, 1), (1, 1), ((0, 0), (0, 0)))
    linear, head = lipjax.dense(array(8, 3), jnp.zeros(3), (2, 2, 2)), lipjax.dense(array(3, 2), jnp.zeros(2), (3,))
    clip = lipjax.ClippedReLUActivation(jnp.full((2, 2, 2), 0.5))
    narrow = lipjax.chain(lipjax.ReLUActivation(), conv, clip, linear, head, input_shape=(3, 3, 1))
    with jax.enable_x64(True):
        network = narrow.astype(np.float64)
        x, label = jnp.asarray(rng.uniform(size=(1, 3, 3, 1)) - 0.5), jnp.array([1])
        bounds = bounds_of(network, x, 0.2)
        exact = constants.exact(network, bounds, label, max_unstable=20)
        for name, found in found_by(ANY, network, bounds, label).items():
            assert (exact <= np.asarray(found) * ORDERED).all(), name
        points = oracles.ball_points(rng, np.asarray(x).ravel(), 0.2, 300).reshape(-1, 3, 3, 1)
        rows = jax.vmap(jax.grad(lambda x: network.logits(x)[1] - network.logits(x)[0]))(jnp.asarray(points))
        assert np.linalg.norm(rows.reshape(len(points), -1), axis=1).max() <= exact[0, 0] * ORDERED


@pytest.mark.parametrize("ends", [(1e-9, -1e-9), (np.nan, 1.0), (1.0, np.nan), (-1e-9, 1e-9)])
def test_a_box_that_is_not_certain_leaves_both_slopes(ends):
    (link, _), bounds = slopes.links(toy()), bounds_of(toy(), jnp.ones((1, 3)), 0.1)
    lower, upper = (jnp.full(3, end) for end in ends)
    before = dataclasses.replace(bounds.before[0], lower=lower, upper=upper)
    least, largest = link.slopes(dataclasses.replace(bounds, before=(before,)))
    assert least.tolist() == [0, 0, 0]
    assert largest.tolist() == [1, 1, 1]


def test_a_linear_network_and_an_eps_of_zero():
    network = lipjax.chain(lipjax.dense(jnp.eye(2) * 2, jnp.zeros(2), (2,)))
    bounds = bounds_of(network, jnp.zeros((1, 2)), 0.5)
    for found in found_by(ANY, network, bounds, jnp.array([0])).values():
        np.testing.assert_allclose(found, [[0, np.sqrt(8)]], rtol=1e-6)
    np.testing.assert_allclose(constants.exact(network, bounds, jnp.array([0])), [[0, np.sqrt(8)]], rtol=1e-6)
    network, x = toy(), jnp.array([[0.2, 0.1, 0.0]])
    bounds = bounds_of(network, x, 0.0)
    assert all(np.isfinite(found).all() for found in found_by(ANY, network, bounds, jnp.array([0])).values())
    assert np.isfinite(constants.exact(network, bounds, jnp.array([0]))).all()


def test_the_product_is_that_of_the_pass():
    network = toy()
    x = jnp.array([[0.5, 0.5, 0.5], [1.0, -1.0, 0.0]])
    bounds = bounds_of(network, x, 0.3)
    rows = jnp.where(bounds.live[-1], network.head.kernel[:, 0], 0)
    expected = bounds.lipschitz * jnp.linalg.norm(rows, axis=1)
    found = found_by(("product",), network, bounds, jnp.array([0, 0]))["product"]
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*ANY, "hein_andriushchenko", "exact"])
def test_what_is_no_chain_of_linear_pieces_is_refused_by_name(name):
    layer = lipjax.dense(jnp.eye(2), jnp.zeros(2), (2,))
    smooth = lipjax.chain(layer, lipjax.TanhActivation(), layer)
    graph = lipjax.Graph((2,))
    first = graph.add(layer, graph.input)
    branched = graph.network(layer, graph.add(lipjax.Sum(), first, graph.input))
    for network, culprit in ((smooth, "TanhActivation"), (branched, "Sum")):
        bounds = bounds_of(network, jnp.zeros((1, 2)), 0.1)
        with pytest.raises(TypeError, match=culprit):
            getattr(constants, name)(network, bounds, jnp.array([0]))


def test_depth_and_unstable_neurons_beyond_what_is_said_are_refused():
    network = toy()
    bounds = bounds_of(network, jnp.zeros((1, 3)), 0.1)
    with pytest.raises(TypeError, match="2 hidden layers"):
        constants.hein_andriushchenko(network, bounds, jnp.array([0]))
    with pytest.raises(ValueError, match="3 neurons are unstable on the ball of example 0"):
        constants.exact(network, bounds, jnp.array([0]), max_unstable=2)
    assert constants.exact(network, bounds, jnp.array([0]), max_unstable=3).shape == (1, 2)

"""Networks as graphs: random ones with sums, concatenations and shared values against sampling and attacks."""

import dataclasses
import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import Concatenation, Graph, IdentityActivation, Multipliers, ReLUActivation, Sum, chain, dense
from lipjax.certification.pairs import proven_margin

SEEDS = st.integers(0, 10**6)
ACTIVATIONS = (
    lambda rng, n: ReLUActivation(),
    lambda rng, n: lipjax.ClippedReLUActivation(jnp.asarray(rng.uniform(-0.1, 1, n), jnp.float32)),
    lambda rng, n: lipjax.MaxMinActivation(),
    lambda rng, n: lipjax.ClippedMaxMinActivation(
        *(jnp.asarray(rng.uniform(low, high, n // 2), jnp.float32) for low, high in ((-0.1, 1), (-1, 0.1)))
    ),
    lambda rng, n: IdentityActivation(),
)


def linear(rng, inputs, outputs, scale=1.0):
    kernel = rng.standard_normal((inputs, outputs)) * scale / np.sqrt(inputs)
    return dense(
        jnp.asarray(kernel, jnp.float32), jnp.asarray(rng.standard_normal(outputs) / 5, jnp.float32), (inputs,)
    )


def random_graph(seed, size=7):
    """A random network of 4 inputs and 3 classes: any node may take the value of any before it, with 4 or 6 entries."""
    rng = np.random.default_rng(seed)
    graph, places = Graph((4,)), [0]
    places.append(graph.add(linear(rng, 4, int(rng.choice([4, 6]))), 0))
    for _ in range(size):
        source = int(rng.choice(places[-3:]))
        width, kind = graph.shape(source)[0], rng.choice(["layer", "activation", "activation", "sum", "concatenation"])
        same = [place for place in places if place != source and graph.shape(place) == (width,)]
        if kind == "sum" and same:
            place = graph.add(Sum(), source, int(rng.choice(same)))
        elif kind == "concatenation":
            parts = graph.add(Concatenation(), source, int(rng.choice(places)))
            place = graph.add(linear(rng, graph.shape(parts)[0], 4), parts)
        elif kind == "layer":
            place = graph.add(linear(rng, width, int(rng.choice([4, 6]))), source)
        else:
            place = graph.add(ACTIVATIONS[rng.integers(len(ACTIVATIONS))](rng, width), source)
        places.append(place)
    last = graph.add(Sum(), places[-1], places[-1]) if rng.integers(2) else places[-1]
    return graph.network(linear(rng, graph.shape(last)[0], 3), last)


class Exact:
    """Norms by the SVD of the masked matrices, a little above."""

    def __call__(self, place, layer, rows, columns):
        matrix = np.asarray(layer.matrix(), np.float64)
        kept = np.asarray(rows).reshape(len(rows), -1, 1) * np.asarray(columns).reshape(len(rows), 1, -1)
        return np.linalg.svd(matrix * kept, compute_uv=False)[:, 0] * (1 + 1e-12), None


def bounds_of(network, x, eps):
    """In float64, of float32 inference; call with x64 on."""
    region = lipjax.l2_ball(jnp.asarray(x, jnp.float64), jnp.asarray(eps, jnp.float64))
    return lipjax.propagate(network.astype(np.float64), region, Exact(), lipjax.FLOAT32)


def values_of(network, x):
    """The value of every node for inputs (n, ...), in the type of the network."""

    def one(x):
        values = [x]

        def visit(place, node, *inputs):
            arranged = (value.reshape(shape) for value, shape in zip(inputs, node.arranged, strict=True))
            values.append(node.operation(*arranged))
            return values[-1]

        network.forward(x, visit)
        return values

    return jax.vmap(one)(x)


def samples(network, x, eps, seed, count=200):
    # A little inside, so that rounding, also to float32, leaves them in the ball.
    return oracles.ball_points(np.random.default_rng(seed), x.astype(np.float64).ravel(), eps * (1 - 1e-5), count)


@settings(max_examples=15)
@given(SEEDS, st.floats(0.01, 1.0))
def test_every_value_of_the_ball_lies_in_the_regions_of_a_random_graph(seed, eps):
    network = random_graph(seed)
    x = oracles.random_inputs(network, seed, 2)
    with jax.enable_x64(True):
        bounds = bounds_of(network, x, eps)
        for i in range(2):
            points = samples(network, x[i], eps, seed)
            for kind in (np.float64, np.float32):
                values = values_of(network.astype(kind), jnp.asarray(points, kind))
                activations = [
                    k for k, node in enumerate(network.nodes) if isinstance(node.operation, lipjax.Activation)
                ]
                for place, before, live in zip(activations, bounds.before, bounds.live, strict=True):
                    z = np.asarray(values[network.nodes[place].inputs[0]], np.float64).reshape(len(points), -1)
                    lower, upper, center = (
                        np.asarray(a[i]).ravel() for a in (before.lower, before.upper, before.center)
                    )
                    rows = np.asarray(before.rows[i]).ravel()
                    assert (z >= lower).all()
                    assert (z <= upper).all()
                    assert (np.linalg.norm((z - center)[:, rows], axis=1) <= float(before.radius[i])).all()
                    outputs = np.asarray(values[place], np.float64).reshape(len(points), -1)
                    dead = ~np.asarray(live[i]).ravel()
                    assert (np.ptp(outputs[:, dead], axis=0) == 0).all()
                features = np.asarray(values[-1], np.float64).reshape(len(points), -1)
                away = np.linalg.norm(features - np.asarray(bounds.features.center[i]).ravel(), axis=1)
                assert (away <= float(bounds.features.radius[i])).all()


@settings(max_examples=15)
@given(SEEDS, st.floats(0.01, 1.0))
def test_features_of_any_two_points_are_within_the_constant_of_a_random_graph(seed, eps):
    network = random_graph(seed)
    x = oracles.random_inputs(network, seed, 1)
    with jax.enable_x64(True):
        constant = float(bounds_of(network, x, eps).lipschitz[0])
        points = samples(network, x[0], eps, seed)
        features = np.asarray(jax.vmap(network.astype(np.float64).features)(jnp.asarray(points))).reshape(
            len(points), -1
        )
    change = np.linalg.norm(features - features[::-1], axis=1)
    assert (change <= constant * np.linalg.norm(points - points[::-1], axis=1) * (1 + 1e-9) + 1e-12).all()


@settings(max_examples=15)
@given(SEEDS, st.floats(0.01, 0.5), st.floats(0.0, 2.0))
def test_no_point_of_the_ball_is_below_a_dual_margin_of_a_random_graph_at_random_multipliers(seed, eps, size):
    network, rng = random_graph(seed), np.random.default_rng(seed)
    x = oracles.random_inputs(network, seed, 1)
    with jax.enable_x64(True):
        bounds = jax.tree.map(lambda leaf: leaf[0], bounds_of(network, x, eps))
        g = tuple(jnp.asarray(size * rng.standard_normal(before.center.shape)) for before in bounds.before)
        weight = tuple(jnp.asarray(rng.choice([0.0, rng.exponential()])) for _ in bounds.before)
        proven = float(proven_margin(network.astype(np.float64), bounds, 0, 1, Multipliers(g, weight)))
        points = samples(network, x[0], eps, seed)
        for kind in (np.float64, np.float32):
            logits = np.asarray(network.astype(kind)(jnp.asarray(points, kind)), np.float64)
            assert (logits[:, 0] - logits[:, 1] >= proven).all()


@pytest.mark.parametrize("seed", oracles.slow_but(range(4), 0))
def test_certified_examples_of_a_random_graph_withstand_the_attack(seed):
    network = random_graph(seed, size=5)
    x = jnp.asarray(oracles.random_inputs(network, seed, 4))  # of each size that a search may come down to one compiles
    label = jnp.argmax(network(x), axis=1)
    radius = lipjax.certified_radius(network, x, label, key=jax.random.key(seed), dual_steps=10, max_rounds=5)
    eps = jnp.maximum(radius * 0.999, 0)
    attack = oracles.jit(functools.partial(lipjax.attack, network, num_steps=30, restarts=1, domain="ball"))
    points = attack(x, label, eps, jax.random.key(1))
    held = np.asarray(jnp.argmax(network(points), axis=1) == label) | (np.asarray(radius) == 0)
    assert held.all()
    assert (np.asarray(radius) > 0).any()


@pytest.mark.parametrize("seed", range(2))
def test_ascent_on_a_random_graph_is_never_worse_than_the_forward_margins(seed):
    network = random_graph(seed)
    x, label = jnp.asarray(oracles.random_inputs(network, seed, 3)), jnp.array([0, 1, 2])

    @oracles.jit
    def both(network, x):
        bounds = lipjax.propagate(network, lipjax.l2_ball(x, 0.1), lipjax.Given(jnp.full(len(network.layers), 3.0)))
        rivals = (label[:, None] + jnp.array([[1, 2]])) % 3
        forward = jax.vmap(lambda region, label: lipjax.box_and_ball(network.head, region, label))
        return forward(bounds.features, label), lipjax.ascend(network, bounds, label, rivals=rivals, num_steps=20)[0]

    forward, margins = both(network, x)
    assert (np.asarray(margins) >= np.asarray(forward) - 1e-5 * (1 + np.abs(forward))).all()


# One radius per example


def test_a_radius_per_example_is_what_each_has_alone():
    network = random_graph(3)
    x = jnp.asarray(oracles.random_inputs(network, 3, 3))
    eps = jnp.array([0.0, 0.1, 0.3])
    ask = lipjax.Estimate(jax.random.key(0))
    features = oracles.jit(lambda x, eps: lipjax.propagate(network, lipjax.l2_ball(x, eps), ask).features)
    together = features(x, eps)
    for i in range(3):
        alone = features(x[i : i + 1], eps[i])
        np.testing.assert_allclose(together.radius[i], alone.radius[0], rtol=1e-5)
        np.testing.assert_allclose(together.lower[i], alone.lower[0], atol=1e-5)


# Building


def test_only_what_the_features_need_is_kept():
    graph, rng = Graph((4,)), np.random.default_rng(0)
    used = graph.add(linear(rng, 4, 4), 0)
    graph.add(linear(rng, 4, 4), 0)
    network = graph.network(linear(rng, 4, 3), used)
    assert len(network.nodes) == 2


def test_a_chain_is_the_graph_of_its_operations():
    rng = np.random.default_rng(0)
    first, head = linear(rng, 4, 6), linear(rng, 6, 3)
    network = chain(first, ReLUActivation(), head, input_shape=(2, 2))
    x = rng.uniform(size=(5, 2, 2)).astype(np.float32)
    by_hand = np.maximum(x.reshape(5, 4) @ np.asarray(first.kernel) + np.asarray(first.bias), 0)
    by_hand = by_hand @ np.asarray(head.kernel) + np.asarray(head.bias)
    np.testing.assert_allclose(network(x), by_hand, rtol=1e-5, atol=1e-6)
    assert network.input_shape == (2, 2)
    assert network.num_classes == 3


@pytest.mark.parametrize(
    ("build", "error", "parts"),
    [
        (lambda graph, rng: graph.add(jnp.tanh, 0), TypeError, ("is no operation of a network", "Sum()")),
        (lambda graph, rng: graph.add(linear(rng, 5, 2), 0), ValueError, ("Dense", "(5,)", "(4,)")),
        (lambda graph, rng: graph.network(linear(rng, 5, 2)), ValueError, ("(5,)", "(4,)")),
        (lambda graph, rng: chain(linear(rng, 4, 2), ReLUActivation()), TypeError, ("last", "ReLUActivation")),
        (lambda graph, rng: chain(ReLUActivation(), linear(rng, 4, 2)), TypeError, ("first", "input_shape")),
    ],
)
def test_what_does_not_fit_is_named(build, error, parts):
    with pytest.raises(error) as caught:
        build(Graph((4,)), np.random.default_rng(0))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_concatenation_and_its_split_are_inverse_on_any_axis():
    rng = np.random.default_rng(0)
    for axis, shapes in ((-1, ((2, 3), (2, 1))), (0, ((1, 3), (4, 3)))):
        parts = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
        joined = Concatenation(axis)(*parts)
        for part, again in zip(parts, Concatenation(axis).split(joined, shapes), strict=True):
            np.testing.assert_array_equal(part, again)


def test_the_constant_of_sums_and_concatenations_is_by_hand():
    rng = np.random.default_rng(0)
    graph = Graph((4,))
    a, b = (graph.add(linear(rng, 4, 4), 0) for _ in range(2))
    total, joined = graph.add(Sum(), a, b), graph.add(Concatenation(), a, b)
    sigmas = np.array([3.0, 4.0])
    assert graph.network(linear(rng, 4, 2), total).lipschitz(sigmas) == 7
    assert graph.network(linear(rng, 8, 2), joined).lipschitz(sigmas) == 5


def test_another_operation_at_a_node_is_another_network():
    network = random_graph(1)
    other = dataclasses.replace(network, head=network.head.biased(network.head.bias + 1))
    x = oracles.random_inputs(network, 0, 2)
    np.testing.assert_allclose(other(x), network(x) + 1, rtol=1e-6)


def test_a_certificate_with_a_radius_per_example_is_what_all_with_that_radius_have():
    network = random_graph(3)
    x = jnp.asarray(oracles.random_inputs(network, 3, 3))
    label, eps = jnp.argmax(network(x), axis=1), np.array([0.0, 0.01, 0.3])
    together = lipjax.certify(network, x, label, eps, level="deterministic", dual_steps=5)
    for i in range(3):
        alone = lipjax.certify(network, x, label, eps[i], level="deterministic", dual_steps=5)
        assert bool(together.certified[i]) == bool(alone.certified[i])
        assert float(together.worst_margin[i]) == pytest.approx(float(alone.worst_margin[i]), rel=1e-3, abs=1e-4)
    constants = lipjax.local_lipschitz(network, x, eps, level="deterministic")
    assert float(constants[2]) == float(lipjax.local_lipschitz(network, x, 0.3, level="deterministic")[2])


@pytest.mark.parametrize(("copies", "scale"), [(200, 0.58659524), (1000, 0.7), (37, 1e-50)])
def test_the_constant_of_many_values_side_by_side_is_never_below_the_truth(copies, scale):
    with jax.enable_x64(True):
        kernel = jnp.full(1, scale, jnp.float64)
        graph = Graph((1,))
        place = graph.add(lipjax.Scale(kernel=kernel, bias=jnp.zeros(1), in_shape=(1,), out_shape=(1,)), graph.input)
        graph.add(Concatenation(), *[place] * copies, arranged=[(1,)] * copies)
        network = graph.network(dense(jnp.ones((copies, 2)), jnp.zeros(2), (copies,)))
        found = float(lipjax.global_lipschitz(network, level="deterministic"))
    truth = copies * fractions.Fraction(scale) ** 2
    assert truth <= fractions.Fraction(found) ** 2 <= truth * fractions.Fraction(1 + 1e-9)


def test_a_product_that_leaves_floating_point_is_not_zero():
    layers = [dense(jnp.eye(3) * 2e-38, jnp.zeros(3), (3,)) for _ in range(9)]
    network = chain(*layers, dense(jnp.ones((3, 2)), jnp.zeros(2), (3,)))
    assert lipjax.global_lipschitz(network, level="deterministic") > 0
    assert (lipjax.local_lipschitz(network, jnp.ones((1, 3)), 0.1, level="deterministic") > 0).all()
    dead = chain(dense(jnp.zeros((3, 3)), jnp.zeros(3), (3,)), dense(jnp.ones((3, 2)), jnp.zeros(2), (3,)))
    assert lipjax.global_lipschitz(dead, level="deterministic") == 0

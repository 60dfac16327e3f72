"""The proof of the dual: what its evaluation and float32 inference may round, term by term, and whole certificates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import (
    Certifier,
    Graph,
    IdentityActivation,
    Multipliers,
    Preactivation,
    Region,
    ReLUActivation,
    Sum,
    chain,
    dense,
    floating_point,
)
from lipjax.bounds import dual, rounding
from lipjax.certification.pairs import Ascent, proven_margin

KEY = jax.random.key(0)
SEEDS = st.integers(0, 10**6)


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)


def bounded(network, x, eps):
    """Bounds of one input with exact norms of the whole layers, without their batch axis. Call with x64 on."""
    matrices = [oracles.layer_matrix(layer)[0] for layer in network.layers]
    norms = [np.full(1, oracles.spectral_norm(matrix) * (1 + 1e-12)) for matrix in matrices]
    region = lipjax.l2_ball(jnp.asarray(x, jnp.float64)[None], eps)
    found = lipjax.propagate(wide(network), region, lambda place, *_: (norms[place], None), lipjax.FLOAT32)
    return jax.tree.map(lambda leaf: leaf[0], found)


def passing_on(network, bounds, label, rival):
    """The walk that passes every coefficient on, without weights: exact where all activations are linear."""

    def choose(place, activation, c, before):
        return c.reshape(before.center.shape), jnp.zeros(())

    return dual.pull(wide(network), bounds, label, rival, choose)


def terms(network, bounds, trace, label, rival):
    """What the float64 value at a walk is above the margin of float32 inference, and the errors that allow for it."""
    value = dual.value(wide(network), bounds, trace)
    errors = dual.errors(wide(network), bounds, trace, bounds.slack.logits[label] + bounds.slack.logits[rival])
    point = jnp.asarray(bounds.input.center, jnp.float32)
    computed = np.asarray(network(point[None])[0], np.float64)
    above = float(value) - (computed[label] - computed[rival])
    return above, dataclasses.asdict(Named(*map(float, errors)))


@dataclasses.dataclass
class Named:
    logits: float
    layers: float
    activations: float
    sums: float
    products: float
    minimisers: float


def needed(above, errors, name):
    """All terms allow for what was rounded, and without one of them they do not."""
    return sum(errors.values()) - errors[name] < above <= sum(errors.values())


# Float32 inference


def in_order(terms):
    """Weights that float32 adds up in order, or in any other, with a loss: 2^24, ones, and -2^24."""
    return np.concatenate([[2.0**24], np.ones(terms), [-(2.0**24)]]).astype(np.float32)


def test_what_float32_rounds_in_the_last_layer_is_needed():
    weights = in_order(6)
    kernel = np.stack([weights, np.zeros(8, np.float32)], axis=1)
    network = chain(dense(jnp.asarray(kernel), jnp.zeros(2), (8,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(8, np.float32), 0.0)
        _, errors = terms(network, bounds, passing_on(network, bounds, 0, 1), 0, 1)
    # Added in order, float32 loses all of the ones; what this machine loses is for its library to choose.
    lost = 6 - float(np.add.accumulate(weights)[-1])
    assert lost == 6
    assert needed(lost, errors, "logits")


@pytest.mark.parametrize("behind", [(), (IdentityActivation(),)])
def test_what_float32_rounds_in_a_layer_is_needed(behind):
    weights = in_order(6)
    layer = dense(jnp.asarray(weights[:, None]), jnp.zeros(1), (8,))
    network = chain(layer, *behind, dense(jnp.asarray([[1.0, 0.0]]), jnp.zeros(2), (1,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(8, np.float32), 0.0)
        trace = passing_on(network, bounds, 0, 1)
        assert float(dual.value(wide(network), bounds, trace)) == pytest.approx(6)
        _, errors = terms(network, bounds, trace, 0, 1)
    assert needed(6 - float(np.add.accumulate(weights)[-1]), errors, "layers")


def test_what_float32_rounds_in_an_activation_is_needed():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Off(IdentityActivation):
        """Whose float32 is off by as much as it declares."""

        def errors(self, before):
            return jnp.full_like(before.center, 0.5)

    layer = dense(jnp.ones((1, 1)), jnp.zeros(1), (1,))
    network = chain(layer, Off(), dense(jnp.asarray([[-2.0, 0.0]]), jnp.zeros(2), (1,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(1, np.float32), 0.0)
        above, errors = terms(network, bounds, passing_on(network, bounds, 0, 1), 0, 1)
        (lower, upper), radius = (bound.item() for bound in bounds.features.box), bounds.features.radius.item()
    assert above == pytest.approx(0, abs=1e-6)  # here it is not off; it may be by 0.5, and the logit by twice as much
    assert needed(1.0, errors, "activations")
    assert lower <= 0.5
    assert upper >= 1.5
    assert radius >= 0.5


def test_what_float32_rounds_in_a_sum_over_a_skip_connection_is_needed():
    sums = 24  # each adds one to 2^24, which float32 does not see
    graph = Graph((1,))
    place = graph.add(dense(jnp.asarray([[2.0**24]]), jnp.zeros(1), (1,)), graph.input)
    for _ in range(sums):
        place = graph.add(Sum(), place, graph.add(dense(jnp.zeros((1, 1)), jnp.ones(1), (1,)), place))
    network = graph.network(dense(jnp.asarray([[1.0, 0.0]]), jnp.asarray([-(2.0**24), 0.0]), (1,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(1, np.float32), 0.0)
        above, errors = terms(network, bounds, passing_on(network, bounds, 0, 1), 0, 1)
    assert above == pytest.approx(sums)
    assert needed(above, errors, "sums")


def linear(inputs, outputs, seed):
    kernel = np.random.default_rng(seed).normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return dense(jnp.asarray(kernel, jnp.float32), jnp.zeros(outputs), (inputs,))


# A pair of numbers is a layer of so many inputs and outputs; a list is a sum, of its two branches.
NESTS = {
    "in a row": [(3, 3), [[], [(3, 4), (4, 3)]], [[], [(3, 3)]]],
    "nested": [(3, 4), [[], [(4, 8), [[], [(8, 8)]], (8, 4)]]],
    "nested, then one": [(3, 3), [[], [[[], [(3, 3)]], (3, 3)]], [[], [(3, 3)]]],
    "right inside": [(3, 3), [[], [[[], [(3, 5), [[], [(5, 5)]], (5, 3)]]]]],
    "two branches": [(3, 3), [[(3, 4), [[(4, 4)], []], (4, 3)], [[[], [(3, 3)]], (3, 3)]], (3, 5)],
    "of the same": [(3, 3), [[], []], [[[[], []]], []]],
}


def grown(graph, place, steps):
    """The place that is reached from one by some steps of a nest."""
    for step in steps:
        if isinstance(step, tuple):
            place = graph.add(linear(*step, seed=len(graph.nodes)), place)
        else:
            place = graph.add(Sum(), *(grown(graph, place, branch) for branch in step))
    return place


@pytest.mark.parametrize("name", NESTS)
def test_the_coefficients_of_a_sum_are_those_of_what_float32_rounds_there(name):
    graph = Graph((3,))
    (last,) = graph.shape(grown(graph, graph.input, NESTS[name]))
    head = np.random.default_rng(9).normal(size=(last, 2))
    network = graph.network(dense(jnp.asarray(head, jnp.float32), jnp.zeros(2), (last,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(3, np.float32), 0.1)
        trace, wider, slack = passing_on(network, bounds, 0, 1), wide(network), bounds.slack.sums
        zeros = [jnp.zeros(each.shape) for each in slack]

        def margin(rounded):
            left = iter(rounded)

            def visit(place, node, *values):
                value = node.operation(*values)
                return value + next(left) if isinstance(node.operation, Sum) else value

            logits = wider.head(wider.forward(jnp.ones(3), visit))
            return logits[0] - logits[1]

        found = jax.grad(margin)(zeros)
        assert len(found) == len(trace.sums)
        for c, gradient in zip(trace.sums, found, strict=True):
            np.testing.assert_allclose(c.sum, gradient, atol=1e-12)
        errors = dual.errors(wider, bounds, trace, jnp.zeros(()))
        by_hand = sum(np.sum(np.abs(g) * s) for g, s in zip(found, slack, strict=True))
        assert float(errors.sums) == pytest.approx(float(by_hand))
        assert float(errors.sums) > 0


def test_sums_whose_coefficients_cancel_at_their_beginning_are_not_certified():
    # 16 nested x + (2 - x + ...) around 2^24: the coefficient of x is 0, that of each sum 1. Float32 loses all of it.
    def affine(slope, shift):
        return dense(jnp.full((1, 1), slope, jnp.float32), jnp.full(1, shift, jnp.float32), (1,))

    depth, graph = 16, Graph((1,))
    places = [graph.input]
    for _ in range(depth):
        places.append(graph.add(affine(-1, 2), places[-1]))
    last = graph.add(affine(0, 2**24), places.pop())
    while places:
        last = graph.add(Sum(), places.pop(), last)
    bias = jnp.asarray([-(2.0**24) - depth / 2, 0.0])
    network = graph.network(dense(jnp.asarray([[1.0, 0.0]]), bias, (1,)))
    x = jnp.ones((1, 1))
    label = jnp.zeros(1, jnp.int32)
    for eps in (0.0, 1e-9):
        found = lipjax.certify(network, x, label, eps, level="deterministic", stages=("global", "dual"))
        assert float(found.worst_margin[0]) <= float(network(x)[0, 0] - network(x)[0, 1])


# The evaluation: float32 evaluates, float64 is the truth, and the unit roundoff is that of float32


def as_float32(leaf):
    """Rounded to float32: what is evaluated is exact in both, so that the evaluation alone rounds."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float32).astype(jnp.float64) if floating else leaf


def evaluated(network, bounds, label, rival, multipliers):
    """What a float32 evaluation is above the truth, and its trace."""

    def value(network, bounds, multipliers):
        trace = dual.pull(network, bounds, label, rival, dual.given(multipliers))
        return dual.value(network, bounds, trace), trace

    arrays = wide(network), bounds, multipliers
    truth, _ = value(*arrays)
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, arrays
    )
    computed, trace = value(*narrow)
    assert computed.dtype == jnp.float32
    return float(computed) - float(truth), wide(trace)


def evaluation(network, bounds, label, rival, multipliers):
    """What a float32 evaluation of a chain is above the truth, and the errors that allow for it."""
    bounds, multipliers = jax.tree.map(as_float32, (bounds, multipliers))
    above, trace = evaluated(network, bounds, label, rival, multipliers)
    region, layers = bounds.input, []
    for layer, activation, before in zip(network.layers, network.activations, bounds.before, strict=True):
        entering = region.reshape(layer.in_shape)
        layers.append(rounding.adjoint_errors(wide(layer), entering, floating_point.UNIT32))
        lower, upper, center = (wide(activation)(value) for value in (*before.box, before.center))
        region = Region(lower, upper, center, before.radius, jnp.ones(center.shape, bool), before.finite)
    bounds = dataclasses.replace(bounds, slack=dataclasses.replace(bounds.slack, layers=tuple(layers)))
    errors = dual.errors(wide(network), bounds, trace, jnp.zeros(()), floating_point.UNIT32)
    return above, dataclasses.asdict(Named(*map(float, errors)))


def multipliers_of(bounds, seed, size):
    rng = np.random.default_rng(seed)
    g = tuple(jnp.asarray(size * rng.normal(size=before.center.shape)) for before in bounds.before)
    return Multipliers(g, tuple(jnp.asarray(float(np.exp(3 * rng.normal()))) for _ in g))


@pytest.mark.parametrize("kind", ["dense clipped", "dense pairs"])
@settings(max_examples=15)
@given(seed=SEEDS, size=st.sampled_from([0.1, 1.0, 1e3]))
def test_an_evaluation_is_not_above_the_truth_by_more_than_its_rounding(kind, seed, size):
    with jax.enable_x64(True):
        network = oracles.random_network(kind, seed)
        bounds = bounded(network, oracles.random_inputs(network, seed, 1)[0], 0.3)
        above, errors = evaluation(network, bounds, 0, 1, multipliers_of(bounds, seed, size))
        assert above <= sum(errors.values()) < np.inf


def test_what_the_sums_of_an_evaluation_round_is_needed():
    kernel = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32) * 1e4
    network = chain(dense(jnp.asarray(kernel), jnp.zeros(2), (200,)))
    with jax.enable_x64(True):
        found = []
        for seed in range(20):
            bounds = bounded(network, oracles.random_inputs(network, seed, 1)[0], 0.0)
            found.append(evaluation(network, bounds, 0, 1, Multipliers((), ())))
    assert all(above <= sum(errors.values()) for above, errors in found)
    assert any(needed(above, errors, "products") for above, errors in found)


def test_what_the_products_of_an_evaluation_with_a_layer_round_is_needed():
    # Rows whose three weights cancel at the input: the pre-activations are 0, and so are all magnitudes but those of
    # the products. Down a column the products with g cancel as well, and what is left of them is rounding.
    rng, rows, found = np.random.default_rng(0), 60, []
    for _ in range(20):
        weights = rng.integers(-(2**12), 2**12, (2, rows)).astype(np.float32)
        kernel = np.concatenate([weights, -weights.sum(axis=0, keepdims=True)])
        layer = dense(jnp.asarray(kernel), jnp.zeros(rows), (3,))
        network = chain(layer, ReLUActivation(), dense(jnp.zeros((rows, 2)), jnp.zeros(2), (rows,)))
        with jax.enable_x64(True):
            bounds = bounded(network, np.ones(3, np.float32), 0.0)
            g = rng.normal(size=rows)
            g -= np.linalg.lstsq(weights.T.astype(np.float64), g)[0] @ weights
            # Exact regions: what the layer itself rounds has tests of its own.
            zero, every = jnp.zeros(rows), jnp.ones(rows, bool)
            before = Preactivation(zero, zero, zero, every, jnp.zeros(()), jnp.asarray(True))
            exact = dataclasses.replace(bounds, before=(before,))
            found.append(evaluation(network, exact, 0, 1, Multipliers((jnp.asarray(g),), (jnp.zeros(()),))))
    assert all(above <= sum(errors.values()) for above, errors in found)
    assert any(needed(above, errors, "layers") for above, errors in found)


def test_what_the_coefficients_of_a_value_lose_where_they_cancel_is_needed():
    # Coefficients that come to one layer from its readers: -2^24, then minus ones that float32 loses, then 2^24.
    ones, graph = 24, Graph((1,))

    def times(slope, place):
        return graph.add(dense(jnp.full((1, 1), slope, jnp.float32), jnp.zeros(1), (1,)), place)

    shared = times(1, graph.input)
    positive, *between, negative = (times(slope, shared) for slope in (2.0**24, *[-1] * ones, -(2.0**24)))
    last = graph.add(Sum(), positive, negative)
    for place in between:
        last = graph.add(Sum(), last, place)
    network = graph.network(dense(jnp.asarray([[1.0, 0.0]]), jnp.zeros(2), (1,)))
    with jax.enable_x64(True):
        bounds = bounded(network, np.ones(1, np.float32), 0.0)
        above, trace = evaluated(network, bounds, 0, 1, Multipliers((), ()))
        assert above == ones
        assert (float(trace.layers[0].sum[0]), float(trace.layers[0].size[0])) == (0, 2**25)

        def allowed(trace):
            return float(sum(dual.errors(wide(network), bounds, trace, jnp.zeros(()), floating_point.UNIT32)))

        of_shared = dual.Coefficients.of(trace.layers[0].sum)
        forgetful = dataclasses.replace(trace, layers=(of_shared, *trace.layers[1:]))
        assert allowed(forgetful) < above <= allowed(trace)


def test_a_value_at_a_rounded_minimiser_is_above_the_minimum_by_no_more_than_its_term():
    rng, excess = np.random.default_rng(0), []
    with jax.enable_x64(True):
        for _ in range(300):
            center, weight = rng.uniform(0.5, 1, 4), np.float32(10.0 ** rng.uniform(-2, 4))
            width = 10.0 ** rng.uniform(-6, -3)
            c = rng.normal(size=4) * float(weight) * width
            arrays = (center - width, center + width, center, np.float64(1))
            lower, upper, center, radius = (as_float32(jnp.asarray(array)) for array in arrays)
            before = Preactivation(lower, upper, center, jnp.ones(4, bool), radius, jnp.asarray(True))
            narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, before)
            c = as_float32(jnp.asarray(c))
            _, z = ReLUActivation().minimum(
                c.astype(jnp.float32), jnp.zeros(4, jnp.float32), jnp.float32(weight), narrow
            )
            least, _ = ReLUActivation().minimum(c, jnp.zeros(4), jnp.float64(weight), before)
            z = z.astype(jnp.float64)
            attained = jnp.sum(c * jnp.maximum(z, 0) + float(weight) / 2 * (z - center) ** 2)
            largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
            allowed = 256 * floating_point.UNIT32**2 * float(weight) * jnp.sum(largest**2)
            noise = 1e-15 * float(jnp.sum(jnp.abs(c)))  # of this float64 comparison
            assert float(attained - least) <= float(allowed) + noise
            excess.append(float(attained - least) / noise)
    assert max(excess) > 10


# Whole certificates


@pytest.mark.parametrize("kind", oracles.slow_but(["dense relu", "dense pairs", "conv clipped"], "dense pairs"))
@settings(max_examples=10)
@given(seed=SEEDS, eps=st.floats(0.01, 0.6))
def test_an_attack_finds_nothing_inside_of_what_the_dual_certifies(kind, seed, eps):
    network = oracles.random_network(kind, seed)
    x = jnp.asarray(oracles.random_inputs(network, seed, 4))
    label = jnp.argmax(network(x), axis=1)
    certifier = Certifier(network, 4, level="deterministic")
    known = certifier.with_global_norms(x, label, eps)
    found = certifier.by_dual(x, label, eps, sigmas=known.sigmas, rows=known.rows, options=Ascent(21))
    margins = attacked(network, x, label, eps, KEY)
    assert np.all(found.certificate.worst_margin <= np.asarray(margins) + 1e-6)
    assert not np.any(found.certificate.certified & (np.asarray(margins) <= 0))
    assert np.all(found.certificate.worst_margin >= known.certificate.worst_margin - 1e-12)


@jax.jit
def attacked(network, x, label, eps, key):
    """The worst margins that the attack reaches."""
    logits = network(lipjax.attack(network, x, label, eps, key, num_steps=20))
    own = jnp.arange(logits.shape[1])[None] == label[:, None]
    return jnp.sum(jnp.where(own, logits, 0), axis=1) - jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)


def test_the_dual_certifies_what_the_forward_pass_does_not_and_draws_no_start():
    network = oracles.random_network("dense relu", 3)
    x = jnp.asarray(oracles.random_inputs(network, 3, 40))
    label = jnp.argmax(network(x), axis=1)
    certifier = Certifier(network, 40, key=KEY)
    local = certifier.with_local_norms(x, label, 0.12, np.arange(40))
    starts, products = certifier.ledger.starts, certifier.ledger.products
    found = certifier.by_dual(x, label, 0.12, sigmas=local.sigmas, rows=local.rows, options=Ascent(60))
    assert (certifier.ledger.starts, certifier.ledger.products) == (starts, products)
    assert np.all(local.certificate.certified <= found.certificate.certified)
    assert found.certificate.certified.sum() > local.certificate.certified.sum()
    assert np.all(found.dual_steps[local.certificate.certified] == 0)  # rivals that are refuted are not asked


def test_what_is_not_finite_proves_nothing():
    network = oracles.random_network("dense relu", 1)
    with jax.enable_x64(True):
        bounds = bounded(network, oracles.random_inputs(network, 1, 1)[0], 0.01)
        start = multipliers_of(bounds, 1, 0.1)
        proof = [proven_margin(wide(network), bounds, 0, 1, start)]
        for bad in (np.nan, np.inf):
            spoiled = Multipliers((start.g[0] * bad, *start.g[1:]), start.weight)
            proof.append(proven_margin(wide(network), bounds, 0, 1, spoiled))
        unfinite = dataclasses.replace(bounds.features, finite=jnp.asarray(False))
        overflowed = dataclasses.replace(bounds, features=unfinite)
        proof.append(proven_margin(wide(network), overflowed, 0, 1, start))
    assert np.isfinite(proof[0])
    assert np.isnan(proof[1:]).all()


def test_the_dual_is_refused_where_norms_are_estimates():
    network = oracles.random_network("dense relu", 1)
    x, label = jnp.asarray(oracles.random_inputs(network, 1, 1)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="name 'dual', which is a proof, but level='estimate' is none: leave it out"):
        lipjax.certify(network, x, label, 0.1, level="estimate", stages=("global", "dual"))

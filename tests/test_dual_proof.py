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
    Block,
    Certifier,
    Fork,
    Identity,
    Join,
    Multipliers,
    Network,
    ReLU,
    dense,
    floating_point,
)
from lipjax.bounds import dual, enclosures, rounding
from lipjax.certification.pairs import Ascent, proven_margin

KEY = jax.random.key(0)
SEEDS = st.integers(0, 10**6)


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)


def enclosed(network, x, eps):
    """The enclosure of one input with exact norms of the whole layers, without its batch axis. Call with x64 on."""
    matrices = [oracles.layer_matrix(block.affine)[0] for block in network.blocks]
    norms = [np.full(1, oracles.spectral_norm(matrix) * (1 + 1e-12)) for matrix in matrices]
    region = enclosures.enter(jnp.asarray(x, jnp.float64)[None], jnp.full(1, eps, jnp.float64), "ball")
    found = enclosures.enclose(wide(network), region, lambda place, *_: norms[place], enclosures.FLOAT32)
    return jax.tree.map(lambda leaf: leaf[0], found)


def passing_on(network, enclosure, label, rival):
    """The walk that passes every coefficient on, without weights: exact where all activations are linear."""

    def choose(place, activation, c, region):
        return c.reshape(region.center.shape), jnp.zeros(())

    return dual.pull(wide(network), enclosure.bounds, label, rival, choose)


def terms(network, enclosure, trace, label, rival):
    """What the float64 value at a walk is above the margin of float32 inference, and the errors that allow for it."""
    value = dual.value(wide(network), enclosure.bounds, trace)
    logits = enclosure.logits[label] + enclosure.logits[rival]
    errors = dual.errors(wide(network), enclosure.bounds, trace, enclosure.layers, enclosure.sums, logits)
    point = jnp.asarray(enclosure.bounds.input.center, jnp.float32)
    computed = np.asarray(network(point[None])[0], np.float64)
    above = float(value) - (computed[label] - computed[rival])
    return above, dataclasses.asdict(Named(*map(float, errors)))


@dataclasses.dataclass
class Named:
    logits: float
    layers: float
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
    network = Network((), dense(jnp.asarray(kernel), jnp.zeros(2), (8,)))
    with jax.enable_x64(True):
        enclosure = enclosed(network, np.ones(8, np.float32), 0.0)
        _, errors = terms(network, enclosure, passing_on(network, enclosure, 0, 1), 0, 1)
    # Added in order, float32 loses all of the ones; what this machine loses is for its library to choose.
    lost = 6 - float(np.add.accumulate(weights)[-1])
    assert lost == 6
    assert needed(lost, errors, "logits")


def test_what_float32_rounds_in_a_layer_is_needed():
    weights = in_order(6)
    block = Block(dense(jnp.asarray(weights[:, None]), jnp.zeros(1), (8,)), Identity())
    network = Network((block,), dense(jnp.asarray([[1.0, 0.0]]), jnp.zeros(2), (1,)))
    with jax.enable_x64(True):
        enclosure = enclosed(network, np.ones(8, np.float32), 0.0)
        trace = passing_on(network, enclosure, 0, 1)
        assert float(dual.value(wide(network), enclosure.bounds, trace)) == pytest.approx(6)
        _, errors = terms(network, enclosure, trace, 0, 1)
    assert needed(6 - float(np.add.accumulate(weights)[-1]), errors, "layers")


def test_what_float32_rounds_in_a_sum_over_a_skip_connection_is_needed():
    sums = 24  # each adds one to 2^24, which float32 does not see

    def one():
        return Block(dense(jnp.zeros((1, 1)), jnp.ones(1), (1,)), Identity())

    first = Block(dense(jnp.asarray([[2.0**24]]), jnp.zeros(1), (1,)), Identity())
    steps = (first, *(step for _ in range(sums) for step in (Fork(), one(), Join())))
    network = Network(steps, dense(jnp.asarray([[1.0, 0.0]]), jnp.asarray([-(2.0**24), 0.0]), (1,)))
    with jax.enable_x64(True):
        enclosure = enclosed(network, np.ones(1, np.float32), 0.0)
        above, errors = terms(network, enclosure, passing_on(network, enclosure, 0, 1), 0, 1)
    assert above == pytest.approx(sums)
    assert needed(above, errors, "sums")


def linear(inputs, outputs, seed):
    kernel = np.random.default_rng(seed).normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return Block(dense(jnp.asarray(kernel, jnp.float32), jnp.zeros(outputs), (inputs,)), Identity())


NESTS = {
    "in a row": ((3, 3), Fork(), (3, 4), (4, 3), Join(), Fork(), (3, 3), Join()),
    "nested": ((3, 4), Fork(), (4, 8), Fork(), (8, 8), Join(), (8, 4), Join()),
    "nested, then one": ((3, 3), Fork(), Fork(), (3, 3), Join(), (3, 3), Join(), Fork(), (3, 3), Join()),
    "right inside": ((3, 3), Fork(), Fork(), (3, 5), Fork(), (5, 5), Join(), (5, 3), Join(), Join()),
}


@pytest.mark.parametrize("name", NESTS)
def test_the_coefficients_of_a_sum_are_those_of_what_float32_rounds_there(name):
    steps = [linear(*step, seed) if isinstance(step, tuple) else step for seed, step in enumerate(NESTS[name])]
    last = [step for step in steps if isinstance(step, Block)][-1].affine.out_shape[0]
    head = np.random.default_rng(9).normal(size=(last, 2))
    network = Network(tuple(steps), dense(jnp.asarray(head, jnp.float32), jnp.zeros(2), (last,)))
    with jax.enable_x64(True):
        enclosure = enclosed(network, np.ones(3, np.float32), 0.1)
        trace, wider = passing_on(network, enclosure, 0, 1), wide(network)
        zeros = [jnp.zeros(slack.shape) for slack in enclosure.sums]

        def margin(rounded):
            left = iter(rounded)
            features = wider.walk(
                jnp.ones(3),
                lambda place, block, a: block.affine(a),
                lambda kept, a: kept + a + next(left),
            )
            logits = wider.head(features)
            return logits[0] - logits[1]

        found = jax.grad(margin)(zeros)
        assert len(found) == len(trace.sums)
        for c, gradient in zip(trace.sums, found, strict=True):
            np.testing.assert_allclose(c, gradient, atol=1e-12)
        errors = dual.errors(wider, enclosure.bounds, trace, enclosure.layers, enclosure.sums, jnp.zeros(()))
        by_hand = sum(np.sum(np.abs(g) * s) for g, s in zip(found, enclosure.sums, strict=True))
        assert float(errors.sums) == pytest.approx(float(by_hand))
        assert float(errors.sums) > 0


def test_sums_whose_coefficients_cancel_at_their_beginning_are_not_certified():
    # 16 nested x + (2 - x + ...) around 2^24: the coefficient of x is 0, that of each sum 1. Float32 loses all of it.
    def affine(slope, shift):
        return Block(dense(jnp.full((1, 1), slope, jnp.float32), jnp.full(1, shift, jnp.float32), (1,)), Identity())

    depth = 16
    steps = [step for _ in range(depth) for step in (Fork(), affine(-1, 2))]
    steps += [affine(0, 2**24), *(Join() for _ in range(depth))]
    bias = jnp.asarray([-(2.0**24) - depth / 2, 0.0])
    network = Network(tuple(steps), dense(jnp.asarray([[1.0, 0.0]]), bias, (1,)))
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


def evaluation(network, enclosure, label, rival, multipliers):
    """What a float32 evaluation is above the truth, and the errors that allow for it."""
    enclosure, multipliers = jax.tree.map(as_float32, (enclosure, multipliers))
    arrays = wide(network), enclosure.bounds, multipliers

    def value(network, bounds, multipliers):
        trace = dual.pull(network, bounds, label, rival, dual.given(multipliers))
        return dual.value(network, bounds, trace), trace

    truth, _ = value(*arrays)
    narrow = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, arrays
    )
    computed, trace = value(*narrow)
    assert computed.dtype == jnp.float32
    region, layers = enclosure.bounds.input, []
    for block, before in zip(network.blocks, enclosure.bounds.preactivations, strict=True):
        entering = region.reshape(block.affine.in_shape)
        layers.append(rounding.adjoint_errors(wide(block.affine), entering, floating_point.UNIT32))
        lower, upper = (block.activation(bound) for bound in before.box)
        region = dataclasses.replace(before, lower=lower, upper=upper, center=block.activation(before.center))
    bounds, trace = enclosure.bounds, wide(trace)
    errors = dual.errors(wide(network), bounds, trace, tuple(layers), (), jnp.zeros(()), floating_point.UNIT32)
    return float(computed) - float(truth), dataclasses.asdict(Named(*map(float, errors)))


def multipliers_of(enclosure, seed, size):
    rng = np.random.default_rng(seed)
    g = tuple(jnp.asarray(size * rng.normal(size=b.center.shape)) for b in enclosure.bounds.preactivations)
    return Multipliers(g, tuple(jnp.asarray(float(np.exp(3 * rng.normal()))) for _ in g))


@pytest.mark.parametrize("kind", ["dense clipped", "dense pairs"])
@settings(max_examples=15)
@given(seed=SEEDS, size=st.sampled_from([0.1, 1.0, 1e3]))
def test_an_evaluation_is_not_above_the_truth_by_more_than_its_rounding(kind, seed, size):
    with jax.enable_x64(True):
        network = oracles.random_network(kind, seed)
        enclosure = enclosed(network, oracles.random_inputs(network, seed, 1)[0], 0.3)
        above, errors = evaluation(network, enclosure, 0, 1, multipliers_of(enclosure, seed, size))
        assert above <= sum(errors.values()) < np.inf


def test_what_the_sums_of_an_evaluation_round_is_needed():
    kernel = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32) * 1e4
    network = Network((), dense(jnp.asarray(kernel), jnp.zeros(2), (200,)))
    with jax.enable_x64(True):
        found = []
        for seed in range(20):
            enclosure = enclosed(network, oracles.random_inputs(network, seed, 1)[0], 0.0)
            found.append(evaluation(network, enclosure, 0, 1, Multipliers((), ())))
    assert all(above <= sum(errors.values()) for above, errors in found)
    assert any(needed(above, errors, "products") for above, errors in found)


def test_what_the_products_of_an_evaluation_with_a_layer_round_is_needed():
    # Rows whose three weights cancel at the input: the pre-activations are 0, and so are all magnitudes but those of
    # the products. Down a column the products with g cancel as well, and what is left of them is rounding.
    rng, rows, found = np.random.default_rng(0), 60, []
    for _ in range(20):
        weights = rng.integers(-(2**12), 2**12, (2, rows)).astype(np.float32)
        kernel = np.concatenate([weights, -weights.sum(axis=0, keepdims=True)])
        network = Network(
            (Block(dense(jnp.asarray(kernel), jnp.zeros(rows), (3,)), ReLU()),),
            dense(jnp.zeros((rows, 2)), jnp.zeros(2), (rows,)),
        )
        with jax.enable_x64(True):
            enclosure = enclosed(network, np.ones(3, np.float32), 0.0)
            g = rng.normal(size=rows)
            g -= np.linalg.lstsq(weights.T.astype(np.float64), g)[0] @ weights
            # Exact regions: what the layer itself rounds has tests of its own.
            before = enclosure.bounds.preactivations[0]
            zero = jnp.zeros(rows)
            before = dataclasses.replace(
                before, lower=zero, upper=zero, center=zero, radius=jnp.zeros(()), live=jnp.ones(rows, bool)
            )
            bounds = dataclasses.replace(enclosure.bounds, preactivations=(before,))
            exact = dataclasses.replace(enclosure, bounds=bounds)
            found.append(evaluation(network, exact, 0, 1, Multipliers((jnp.asarray(g),), (jnp.zeros(()),))))
    assert all(above <= sum(errors.values()) for above, errors in found)
    assert any(needed(above, errors, "layers") for above, errors in found)


def test_a_value_at_a_rounded_minimiser_is_above_the_minimum_by_no_more_than_its_term():
    rng, excess = np.random.default_rng(0), []
    with jax.enable_x64(True):
        for _ in range(300):
            center, weight = rng.uniform(0.5, 1, 4), np.float32(10.0 ** rng.uniform(-2, 4))
            width = 10.0 ** rng.uniform(-6, -3)
            c = rng.normal(size=4) * float(weight) * width
            arrays = (center - width, center + width, center, np.float64(1))
            lower, upper, center, radius = (as_float32(jnp.asarray(array)) for array in arrays)
            region = lipjax.Region(lower, upper, center, radius, jnp.ones(4, bool), jnp.asarray(True))
            narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, region)
            c = as_float32(jnp.asarray(c))
            _, z = ReLU().minimum(c.astype(jnp.float32), jnp.zeros(4, jnp.float32), jnp.float32(weight), narrow)
            least, _ = ReLU().minimum(c, jnp.zeros(4), jnp.float64(weight), region)
            z = z.astype(jnp.float64)
            attained = jnp.sum(c * jnp.maximum(z, 0) + float(weight) / 2 * (z - center) ** 2)
            largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
            allowed = 256 * floating_point.UNIT32**2 * float(weight) * jnp.sum(largest**2)
            noise = 1e-15 * float(jnp.sum(jnp.abs(c)))  # of this float64 comparison
            assert float(attained - least) <= float(allowed) + noise
            excess.append(float(attained - least) / noise)
    assert max(excess) > 10


# Whole certificates


@pytest.mark.parametrize("kind", ["dense relu", "dense pairs", "conv clipped"])
@settings(max_examples=10)
@given(seed=SEEDS, eps=st.floats(0.01, 0.6))
def test_an_attack_finds_nothing_inside_of_what_the_dual_certifies(kind, seed, eps):
    network = oracles.random_network(kind, seed)
    x = jnp.asarray(oracles.random_inputs(network, seed, 4))
    label = jnp.argmax(network(x), axis=1)
    certifier = Certifier(network, 4, level="deterministic")
    known = certifier.globally(x, label, eps)
    found = certifier.dually(x, label, eps, sigmas=known.sigmas, rows=known.rows, options=Ascent(21))
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
    local = certifier.locally(x, label, 0.12, np.arange(40))
    starts, products = certifier.ledger.starts, certifier.ledger.products
    found = certifier.dually(x, label, 0.12, sigmas=local.sigmas, rows=local.rows, options=Ascent(60))
    assert (certifier.ledger.starts, certifier.ledger.products) == (starts, products)
    assert np.all(local.certificate.certified <= found.certificate.certified)
    assert found.certificate.certified.sum() > local.certificate.certified.sum()
    assert np.all(found.dual_steps[local.certificate.certified] == 0)  # rivals that are refuted are not asked


def test_what_is_not_finite_proves_nothing():
    network = oracles.random_network("dense relu", 1)
    with jax.enable_x64(True):
        enclosure = enclosed(network, oracles.random_inputs(network, 1, 1)[0], 0.01)
        start = multipliers_of(enclosure, 1, 0.1)
        proof = [proven_margin(wide(network), enclosure, 0, 1, start)]
        for bad in (np.nan, np.inf):
            spoiled = Multipliers((start.g[0] * bad, *start.g[1:]), start.weight)
            proof.append(proven_margin(wide(network), enclosure, 0, 1, spoiled))
        bounds = enclosure.bounds
        unfinite = dataclasses.replace(bounds.features, finite=jnp.asarray(False))
        overflowed = dataclasses.replace(enclosure, bounds=dataclasses.replace(bounds, features=unfinite))
        proof.append(proven_margin(wide(network), overflowed, 0, 1, start))
    assert np.isfinite(proof[0])
    assert np.isnan(proof[1:]).all()


def test_the_dual_is_refused_where_norms_are_estimates():
    network = oracles.random_network("dense relu", 1)
    x, label = jnp.asarray(oracles.random_inputs(network, 1, 1)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="end in a proof, which level='estimate' is not; leave out 'dual'"):
        lipjax.certify(network, x, label, 0.1, level="estimate", stages=("global", "dual"))

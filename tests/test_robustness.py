"""Certificates and Lipschitz constants with a stated probability: against SVD, by sampling, and what must not pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import (
    Certifier,
    ReLUActivation,
    chain,
    dense,
)
from lipjax.certification.ledger import Ledger
from lipjax.certification.robustness import _outward
from lipjax.norms import cohorts

KINDS = ["dense clipped", "conv relu", "dense pairs"]  # one compilation each
BATCH = 3
KEY = jax.random.key(0)
SEEDS = st.integers(0, 10**6)
EPS = st.just(0.0) | st.floats(1e-90, 2.0) | st.floats(1e-3, 0.1)
networks = st.builds(
    lambda kind, seed, scale, shift: oracles.random_network(kind, seed, scale=scale, shift=shift),
    st.sampled_from(KINDS),
    SEEDS,
    st.floats(0.3, 3.0),
    st.sampled_from([0.0, -0.3, 0.3]),
)


def case(kind, seed=0, count=BATCH, **options):
    """A network, inputs, and their predictions by the float64 oracle."""
    network = oracles.random_network(kind, seed, **options)
    x = oracles.random_inputs(network, seed, count)
    return network, x, predictions(network, x)


def predictions(network, x):
    logits = oracles.DenseNetwork(network).logits(x.reshape(len(x), -1).astype(np.float64))
    return np.argmax(logits, axis=1).astype(np.int32)


def certify(network, x, label, eps, **options):
    """By the forward pass with local norms, unless other stages are given."""
    options = {"key": KEY, "stages": ("local",), **options}
    return lipjax.certify(network, jnp.asarray(x), jnp.asarray(label), eps, **options)


def oracle_lipschitz(network, x, eps):
    """Products of the singular values of the oracle's own masked matrices."""
    blocks = [oracles.DenseNetwork(network).regions(one.astype(np.float64).ravel(), eps)[0] for one in x]
    return np.array([np.prod([sigma for *_, sigma in found]) for found in blocks])


def oracle_global(network):
    return np.prod([oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers])


def oracle_margin(network, x, eps, label):
    """The least margin over the box and the ball of the oracle's own features."""
    exact, center = oracles.DenseNetwork(network), x.astype(np.float64).ravel()
    blocks, _ = exact.regions(center, eps)
    lower, upper = (exact.rules[-1].apply(z) for z in blocks[-1][:2])
    radius = eps * np.prod([sigma for *_, sigma in blocks])
    kernel, bias = exact.head[0].T, exact.head[1]
    margins, _ = oracles.margins_minimum(kernel, bias, exact.features(center), lower, upper, radius, label)
    return np.delete(margins, label).min()


# Bounds against the oracle, from below and from above


@settings(max_examples=25)
@given(networks, SEEDS, EPS)
def test_local_constants_are_never_below_the_oracle_and_never_above_the_global_one(network, seed, eps):
    x = oracles.random_inputs(network, seed, BATCH)
    local = np.asarray(lipjax.local_lipschitz(network, x, eps, key=KEY), np.float64)
    everywhere = float(lipjax.global_lipschitz(network, key=KEY))
    assert np.all(local >= oracle_lipschitz(network, x, eps) * (1 - 1e-13))
    assert everywhere >= oracle_global(network) * (1 - 1e-13)
    assert np.all(local <= everywhere * (1 + 1e-3) ** 3)  # the two calls share out their delta differently


@settings(max_examples=20)
@given(networks, SEEDS)
def test_in_a_huge_ball_one_certifier_has_no_larger_local_constants_than_global_ones(network, seed):
    x = oracles.random_inputs(network, seed, BATCH)
    certifier = Certifier(network, BATCH, key=KEY, rtol=1e3)
    local = certifier.with_local_norms(x, np.zeros(BATCH, np.int32), 100.0, np.arange(BATCH)).certificate.lipschitz
    assert np.all(local <= certifier.global_lipschitz * (1 + 1e-15))
    everywhere = certifier.with_global_norms(x, np.zeros(BATCH, np.int32), 100.0).certificate.lipschitz
    np.testing.assert_allclose(everywhere, certifier.global_lipschitz, rtol=1e-14)


@settings(max_examples=20)
@given(networks, SEEDS, EPS)
def test_worst_margins_are_never_above_the_oracle(network, seed, eps):
    x = oracles.random_inputs(network, seed, BATCH)
    label = predictions(network, x)
    found = certify(network, x, label, eps)
    exact = np.array([oracle_margin(network, x[i], eps, label[i]) for i in range(BATCH)])
    assert np.all(np.asarray(found.worst_margin, np.float64) <= exact + 1e-12)
    assert not np.any(np.asarray(found.certified) & (exact <= 0))


@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end_bounds_are_within_a_hundredth_of_the_oracle(kind):
    for seed in range(4):
        network, x, label = case(kind, seed)
        assert oracle_global(network) <= lipjax.global_lipschitz(network, key=KEY) <= 1.01 * oracle_global(network)
        for eps in (0.0, 0.02, 0.2):
            exact = oracle_lipschitz(network, x, eps)
            found = certify(network, x, label, eps)
            assert exact.max() > 0
            assert np.all(np.asarray(found.lipschitz) <= 1.01 * exact)
            for i in range(BATCH):
                margin, clean = (oracle_margin(network, x[i], e, label[i]) for e in (eps, 0.0))
                assert found.worst_margin[i] >= margin - 0.01 * (clean - margin) - 1e-3


def _deep():
    """Networks of six to eight layers by name: level, input, layers before the last one, and the activation."""
    conv, down = (3, 1, 1), (4, 2, 1)  # kernel, stride, padding
    narrow = [16, 8, 16, 8, 16, 8, 16]
    six = [(4, *conv), (4, *conv), (4, *down), (6, *conv), (6, *conv), (6, *down), 8]
    return {
        "8 dense, ReLU, probabilistic": ("probabilistic", (10,), [12] * 7, "relu"),
        "8 dense, clipped, deterministic": ("deterministic", (10,), narrow, "clipped"),
        "6C2F, clipped, deterministic": ("deterministic", (8, 8, 1), six, "clipped"),
        "4C3F, ReLU, probabilistic": ("probabilistic", (4, 4, 2), [*six[1:3], *six[4:6], 10, 8], "relu"),
    }


DEEP = _deep()


@pytest.mark.parametrize("name", oracles.slow_but(DEEP, *(DEEP.keys() - {"6C2F, clipped, deterministic"})))
def test_deep_networks_are_bounded_within_a_hundredth_of_the_oracle(name):
    level, shape, layers, activation = DEEP[name]
    network = oracles.network_of(shape, layers, activation, seed=0)
    x = oracles.random_inputs(network, 0, 1)
    label = predictions(network, x)
    for eps in (0.02, 0.1):
        exact = oracle_lipschitz(network, x, eps)
        found = certify(network, x, label, eps, level=level)
        assert 0 < exact[0] < oracle_global(network)
        assert exact[0] * (1 - 1e-13) <= found.lipschitz[0] <= 1.01 * exact[0]


def test_estimates_are_close_to_the_oracle_and_named_so():
    network, x, label = case("dense clipped")
    found = certify(network, x, label, 0.1, level="estimate")
    assert found.level == "estimate"
    np.testing.assert_allclose(found.lipschitz, oracle_lipschitz(network, x, 0.1), rtol=0.01)
    assert certify(network, x, label, 0.1).level == "probabilistic"


@pytest.mark.parametrize("kind", KINDS)
def test_certify_and_local_lipschitz_agree(kind):
    network, x, label = case(kind)
    found = certify(network, x, label, 0.1)
    np.testing.assert_array_equal(found.lipschitz, lipjax.local_lipschitz(network, x, 0.1, key=KEY))
    np.testing.assert_array_equal(found.prediction, label)
    np.testing.assert_array_equal(found.certified, found.worst_margin > 0)


# 32 and 64 bits


@pytest.mark.parametrize("kind", KINDS)
def test_results_without_64_bits_are_those_with_them_rounded_outward(kind):
    for eps in (0.0, 0.01, 0.1, 0.3):
        network, x, label = case(kind, seed=int(100 * eps))
        narrow = certify(network, x, label, eps)
        with jax.enable_x64(True):
            wide = certify(network, x, label, eps)
        assert narrow.lipschitz.dtype == narrow.worst_margin.dtype == np.float32
        assert wide.lipschitz.dtype == wide.worst_margin.dtype == np.float64
        for small, large in [(wide.lipschitz, narrow.lipschitz), (narrow.worst_margin, wide.worst_margin)]:
            small, large = np.asarray(small, np.float64), np.asarray(large, np.float64)
            assert np.all(small <= large)
            np.testing.assert_allclose(small, large, rtol=2.0**-22)
        np.testing.assert_array_equal(narrow.certified, wide.certified)


def test_global_constants_without_64_bits_are_rounded_up():
    for seed in range(8):
        network = oracles.random_network("dense clipped", seed)
        narrow = lipjax.global_lipschitz(network, key=KEY)
        with jax.enable_x64(True):
            wide = lipjax.global_lipschitz(network, key=KEY)
        assert narrow.shape == wide.shape == ()
        assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
        assert float(wide) <= float(narrow) <= float(wide) * (1 + 2.0**-22)


def test_numbers_below_the_smallest_normal_one_are_not_returned_where_they_would_count_for_less():
    """Whoever multiplies a subnormal constant may get zero."""
    network, x, _ = case("dense clipped")
    tiny = jax.tree.map(lambda leaf: leaf * np.float32(1e-20), network)
    narrow, whole = lipjax.local_lipschitz(tiny, x, 0.1, key=KEY), lipjax.global_lipschitz(tiny, key=KEY)
    with jax.enable_x64(True):
        wide = np.asarray(lipjax.local_lipschitz(tiny, x, 0.1, key=KEY))
    assert 0 < wide.max() < whole == 2.0**-126
    np.testing.assert_array_equal(np.asarray(narrow), np.where(wide > 0, np.float32(2.0**-126), 0))
    small, zero = np.array([-1e-40, 0.0, 1e-40]), np.zeros(1)
    np.testing.assert_array_equal(_outward(small, -np.inf), np.float32([-(2.0**-126), 0, 0]))
    np.testing.assert_array_equal(_outward(small, np.inf), np.float32([0, 0, 2.0**-126]))
    np.testing.assert_array_equal(_outward(zero, np.inf), zero)


# What is refused


def test_a_certifier_refuses_inputs_and_labels_that_are_not_those_of_the_network():
    network, x, label = case("conv relu")
    certifier = Certifier(network, BATCH, key=KEY)
    index = np.arange(BATCH)
    with pytest.raises(ValueError, match="x has shape .*expected a batch"):
        certifier.with_local_norms(np.moveaxis(np.asarray(x), -1, 1), label, 0.1, index)
    with pytest.raises(ValueError, match=r"label\[0\] is .*expected classes from 0 to"):
        certifier.with_global_norms(x, label + network.num_classes, 0.1)
    certifier.with_local_norms(x, label, 0.1, index)  # what was refused has used up no start


@pytest.mark.parametrize("function", ["certify", "local_lipschitz"])
def test_traced_inputs_and_radii_are_refused(function):
    network, x, label = case("dense clipped")
    call = functools.partial(certify, network) if function == "certify" else None
    call = call or (lambda x, label, eps: lipjax.local_lipschitz(network, x, eps, key=KEY))
    with pytest.raises(TypeError, match="outside of traced code"):
        jax.jit(lambda x: call(x, label, 0.1))(x)
    with pytest.raises(TypeError, match="outside of traced code"):
        jax.jit(lambda eps: call(x, label, eps))(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, "key=None: .* give key="),
        ({"delta": 0.0}, r"delta=0\.0 is no probability"),
        ({"delta": 1.0}, r"delta=1\.0 is no probability"),
        ({"delta": -0.5}, r"delta=-0\.5 is no probability"),
        ({"delta": float("nan")}, "delta=nan is no probability"),
        ({"delta": 1e-15}, "smallest share that works"),
        ({"level": "exact"}, "level='exact' is not known; .*probabilistic.*estimate"),
        ({"rtol": 0.0}, r"rtol=0\.0 cannot be reached"),
        ({"rtol": float("nan")}, "rtol=nan cannot be reached"),
    ],
)
def test_an_option_that_cannot_be_used_is_named_with_its_value(options, message):
    network, x, label = case("dense clipped")
    options = {"key": KEY, **options}
    for call in (
        lambda: certify(network, x, label, 0.1, **options),
        lambda: lipjax.local_lipschitz(network, x, 0.1, **options),
        lambda: lipjax.global_lipschitz(network, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_that_do_not_fit_are_refused():
    network, x, label = case("dense clipped")
    for wrong in (label[:2], label.astype(np.float32), label[:, None]):
        with pytest.raises(ValueError, match=rf"label has shape .*{wrong.shape[0]}.* expected 3 integers"):
            certify(network, x, wrong, 0.1)


# The ledger, and whose starts are whose


def test_the_ledger_keeps_the_largest_gap_and_counts_each_start_once():
    ledger = Ledger(9, 1e-9)
    found = cohorts.Norms(np.ones(3), np.array([2, 0, 2]), np.array([0.5, np.nan, 0.25]), np.array([True, False, True]))
    ledger.enter(found)
    ledger.enter(cohorts.known(1.0, 2))  # norms that cost nothing have no gap
    assert (ledger.largest_gap, ledger.starts, ledger.products) == (0.5, 2, 4)


@pytest.mark.parametrize("level", ["probabilistic", "estimate"])
@pytest.mark.parametrize("kind", oracles.slow_but(["dense clipped", "dense pairs"], "dense pairs"))
def test_constants_of_logits_and_of_a_margin_are_those_of_the_oracle(kind, level):
    network, x, _ = case(kind, shift=0.3)
    features, options = oracle_lipschitz(network, x, 0.1), {"level": level, "key": KEY}
    head = oracles.DenseNetwork(network).head[0]
    live = [oracles.DenseNetwork(network).regions(one.astype(np.float64).ravel(), 0.1)[0][-1][2] for one in x]
    exact = {
        "logits": features * [oracles.spectral_norm(head * mask) for mask in live],
        (0, 2): features * [np.linalg.norm((head[0] - head[2]) * mask) for mask in live],
    }
    whole = oracle_global(network) * np.array([oracles.spectral_norm(head), np.linalg.norm(head[0] - head[2])])
    for (of, local), constant in zip(exact.items(), whole, strict=True):
        found = np.asarray(lipjax.local_lipschitz(network, jnp.asarray(x), 0.1, of=of, **options))
        everywhere = float(lipjax.global_lipschitz(network, of=of, **options))
        np.testing.assert_allclose(found, local, rtol=0.01)
        assert everywhere == pytest.approx(constant, rel=0.01)
        if level == "probabilistic":
            assert np.all(found >= local * (1 - 1e-5))
            assert everywhere >= constant * (1 - 1e-5)


@pytest.mark.parametrize("level", ["probabilistic", "deterministic"])
def test_rows_that_differ_by_less_than_float32_resolves_have_a_constant_above_zero(level):
    kernel = np.array([[2e-38, 1.5e-38]], np.float32)  # normal numbers, whose difference float32 flushes to zero
    network = lipjax.chain(lipjax.dense(jnp.asarray(kernel), jnp.zeros(2), (1,)))
    found = lipjax.local_lipschitz(network, jnp.ones((1, 1)), 0.1, of=(0, 1), level=level, key=KEY)
    assert float(found[0]) >= float(kernel[0, 0]) - float(kernel[0, 1]) > 0


def test_a_margin_of_a_head_whose_rows_are_computed_has_a_constant_above_samples():
    head = lipjax.Scale(kernel=jnp.array([3.0, -2.0]), bias=jnp.zeros(2), in_shape=(2,), out_shape=(2,))
    found = lipjax.global_lipschitz(lipjax.chain(head), of=(0, 1), key=KEY)
    assert np.hypot(3, 2) <= float(found) <= 3 * np.sqrt(2) * 1.001


def test_a_constant_of_what_is_not_there_is_refused():
    network, x, _ = case("dense clipped")
    for of, message in ((("features",), "two classes"), ((0, 99), r"of=\(0, 99\) names a class that is not there")):
        with pytest.raises(ValueError, match=message):
            lipjax.local_lipschitz(network, jnp.asarray(x), 0.1, of=of, key=KEY)


@pytest.mark.parametrize("kind", oracles.slow_but(["dense clipped", "conv relu"], "dense clipped"))
def test_level_estimate_is_one_procedure_traced_or_not(kind):
    network, x, label = case(kind, shift=0.3)
    host = Certifier(network, BATCH, level="estimate", key=KEY)
    found = host.with_local_norms(x, label, 0.1, np.arange(BATCH)).certificate.lipschitz
    traced = jax.jit(lambda x: lipjax.local_lipschitz(network, x, 0.1, level="estimate", key=KEY))(jnp.asarray(x))
    np.testing.assert_allclose(traced, found, rtol=1e-5)
    everywhere = lipjax.global_lipschitz(network, level="estimate", key=KEY)
    assert float(everywhere) == pytest.approx(host.global_lipschitz, rel=1e-5)


def test_the_ledger_counts_the_starts_of_the_whole_layers_and_of_every_example_and_layer():
    network, x, label = case("conv relu", count=2 * BATCH)
    certifier = Certifier(network, 2 * BATCH, key=KEY, delta=1e-3, rounds=2)
    assert certifier.ledger.planned == 3 + 3 * 6 * 2
    assert certifier.ledger.delta_per_start * certifier.ledger.planned == pytest.approx(1e-3)
    assert certifier.solver.delta == certifier.ledger.delta_per_start
    counts = [certifier.ledger.starts]
    for index, round_ in [([0, 1, 2], 0), ([3, 4, 5], 0), ([0, 1, 2], 1)]:
        certifier.with_local_norms(x[index], label[index], 0.1, np.array(index), round_)
        counts.append(certifier.ledger.starts)
    certifier.with_global_norms(x[:BATCH], label[:BATCH], 0.1)
    assert [*counts, certifier.ledger.starts] == [3, 12, 21, 30, 30]
    assert 0 < certifier.ledger.largest_gap <= 1e-3


def constants_of(places, index, key=KEY, round_=0, rtol=1e3, delta=1e-6):
    """Local constants of some of six examples, by a certifier of its own.

    The layers are wide, and where rtol is large only their first eight Lanczos vectors are found: starts matter.
    """
    network, x, label = case("conv relu", seed=2, count=2 * BATCH, shift=0.3)
    certifier = Certifier(network, 2 * BATCH, key=key, rounds=2, rtol=rtol, delta=delta)
    return certifier.with_local_norms(x[places], label[places], 0.05, np.array(index), round_).certificate.lipschitz


def test_an_example_has_the_same_constant_in_any_batch_and_order():
    first = constants_of([0, 1, 2], [0, 1, 2])
    np.testing.assert_allclose(constants_of([2, 5, 0], [2, 5, 0])[[2, 0]], first[[0, 2]], rtol=1e-9)


def test_a_smaller_delta_gives_larger_constants():
    bold, careful = (constants_of([0, 1, 2], [0, 1, 2], delta=delta) for delta in (0.5, 1e-9))
    assert np.all(bold < careful)


@pytest.mark.parametrize("change", [{"index": [3, 4, 5]}, {"round_": 1}, {"key": jax.random.key(1)}])
def test_another_index_round_or_key_draws_other_starts(change):
    options = {"index": [0, 1, 2], **change}
    one, other = constants_of([0, 1, 2], [0, 1, 2]), constants_of([0, 1, 2], **options)
    assert np.all(np.abs(one / other - 1) > 1e-6)


def test_two_keys_differ_by_less_than_the_gap_allows():
    one, other = (constants_of([0, 1, 2], [0, 1, 2], key=jax.random.key(seed), rtol=1e-3) for seed in (0, 1))
    assert np.any(one != other)
    np.testing.assert_allclose(one, other, rtol=(1 + 1e-3) ** 3 - 1)


# Breaking certificates


def attack(network, x, label, eps, certified):
    """Certified examples must keep their prediction at points of the ball, in float64 and in float32."""
    exact = oracles.DenseNetwork(network)
    for i in np.flatnonzero(certified):
        center, rng = x[i].astype(np.float64).ravel(), np.random.default_rng(0)
        with np.errstate(all="ignore"):
            jacobian = exact.jacobian(center)
            rivals = (exact.head[0] - exact.head[0][label[i]]) @ jacobian
        largest = np.abs(rivals).max()
        directions = np.concatenate([jacobian, rivals]) / (largest if largest > 0 else 1)
        points = oracles.ball_points(rng, center, eps * (1 - 1e-6), 40, directions)
        assert np.all(np.argmax(exact.logits(points), axis=1) == label[i])
        narrow = network(jnp.asarray(points.reshape(-1, *network.input_shape), jnp.float32))
        assert np.all(np.argmax(narrow, axis=1) == label[i])


def changed(network, **changes):
    """The network with leaves replaced: names are those of LEAVES, values functions of the array."""
    for name, change in changes.items():
        part, field = name.split("_")
        if part == "head":
            network = dataclasses.replace(network, head=_replaced(network.head, field, change))
            continue
        node = 2 * int(part[1:]) + (2 if field == "theta" else 1)  # each layer, then its activation
        network = oracles.changed(network, node, _replaced(network.nodes[node].operation, field, change))
    return network


def _replaced(operation, field, change):
    return dataclasses.replace(operation, **{field: change(getattr(operation, field))})


LEAVES = ["l0_kernel", "l0_bias", "l0_theta", "l1_kernel", "l1_bias", "l1_theta", "head_kernel", "head_bias"]


@settings(max_examples=40)
@given(networks, SEEDS, st.floats(0.001, 0.3))
def test_a_certified_example_keeps_its_prediction(network, seed, eps):
    x = oracles.random_inputs(network, seed, BATCH)
    label = predictions(network, x)
    attack(network, x, label, eps, certify(network, x, label, eps).certified)


def test_a_small_radius_is_certified_and_a_huge_one_is_not():
    network, x, label = case("dense clipped", seed=1)
    certified = np.array([certify(network, x, label, eps).certified for eps in (1e-4, 1e-2, 0.1, 1.0, 10.0)])
    assert certified[0].all()
    assert not certified[-1].any()


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_not_certified(leaf, bad):
    network, x, label = case("dense clipped", seed=1)
    assert certify(network, x, label, 1e-4).certified.all()
    broken = changed(network, **{leaf: lambda a: a.at[(0,) * a.ndim].set(bad)})
    own = np.argmax(broken(jnp.asarray(x)), axis=1)
    for labels, level in [(label, "probabilistic"), (own, "probabilistic"), (own, "estimate")]:
        found = certify(broken, x, labels, 1e-4, level=level)
        if leaf.endswith("theta") and bad == np.inf:  # no clip
            attack(broken, x, labels, 1e-4, found.certified)
        else:
            assert not found.certified.any()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_a_tie_is_not_certified(eps):
    network, x, label = case("dense clipped", seed=1)
    rival = (label[0] + 1) % 3

    def twin(a):
        return a.at[..., rival].set(a[..., label[0]])

    twins = changed(network, head_kernel=twin, head_bias=twin)
    tied = predictions(twins, x)
    same = np.isin(tied, [label[0], rival])
    assert same.any()
    for labels in (tied, np.full(BATCH, label[0]), np.full(BATCH, rival)):
        assert not certify(twins, x, labels, eps).certified[same].any()
    flat = changed(network, head_kernel=jnp.zeros_like, head_bias=jnp.zeros_like)
    assert not any(certify(flat, x, np.full(BATCH, j), eps).certified.any() for j in range(3))


def test_a_wrong_label_is_not_certified():
    network, x, label = case("dense clipped", seed=1)
    for other in (1, 2):
        assert not certify(network, x, (label + other) % 3, 0.0).certified.any()


@pytest.mark.parametrize("scales", [(1e-6, 1e6, 1), (1e6, 1e-6, 1), (1e-6, 1, 1e6), (1e6, 1e6, 1e-6), (1e-6, 1e-6, 1)])
def test_tiny_and_huge_weights_are_not_wrongly_certified(scales):
    network, x, _ = case("dense clipped", seed=1)
    rest = np.cumprod(scales)  # biases and clips grow with the activations, so that the network does the same
    factors = [scales[0], rest[0], rest[0], scales[1], rest[1], rest[1], scales[2], rest[2]]
    network = changed(network, **{leaf: lambda a, f=float(f): a * f for leaf, f in zip(LEAVES, factors, strict=True)})
    label = predictions(network, x)
    certified = []
    for eps in (1e-3, 0.03, 0.3, 3.0):
        found = certify(network, x, label, eps)
        attack(network, x, label, eps, found.certified)
        certified.append(np.asarray(found.certified))
        exact = oracle_lipschitz(network, x, eps)
        assert np.all(np.asarray(found.lipschitz, np.float64) >= exact * (1 - 1e-13))
    assert certified[0].any()
    assert not certified[-1].all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("leaf", ["l0_kernel", "l1_kernel", "head_kernel"])
def test_one_layer_of_tiny_or_huge_weights_is_not_wrongly_certified(leaf, scale):
    network, x, _ = case("dense clipped", seed=1)
    network = changed(network, **{leaf: lambda a: a * scale})
    label = predictions(network, x)
    for eps in (1e-8, 1e-3, 0.3):
        attack(network, x, label, eps, certify(network, x, label, eps).certified)


@pytest.mark.parametrize("place", ["l0", "l1"])
@pytest.mark.parametrize("dead", ["bias", "theta"])
def test_a_layer_that_is_dead_has_the_constant_0_and_is_certified_only_without_a_tie(place, dead):
    network, x, _ = case("dense clipped", seed=1)
    network = changed(network, **{f"{place}_{dead}": lambda a: jnp.full_like(a, -100.0 if dead == "bias" else 0.0)})
    label = predictions(network, x)
    found = certify(network, x, label, 1.0)
    assert not np.any(found.lipschitz)
    assert found.certified.all()  # its features do not depend on the input
    attack(network, x, label, 1.0, found.certified)
    level = changed(network, head_bias=jnp.zeros_like, head_kernel=jnp.ones_like)
    assert not certify(level, x, np.zeros(BATCH, np.int32), 1.0).certified.any()


# Faults of the published code


def test_a_norm_that_power_iteration_reports_too_low_is_bounded_all_the_same():
    # The start has little of the top vector, so the first iterations hardly move: the stop fires at .90 for 1.0.
    values = np.array([1.0, *([0.9] * 399)])
    network = chain(
        dense(jnp.diag(jnp.asarray(values, jnp.float32)), jnp.zeros(400), (400,)),
        ReLUActivation(),
        dense(jnp.ones((400, 2), jnp.float32), jnp.zeros(2), (400,)),
    )
    x = jnp.ones((1, 400))
    low = min(
        float(lipjax.local_lipschitz(network, x, 0.1, level="estimate", key=jax.random.key(seed))[0])
        for seed in range(20)
    )
    assert low < 0.95
    for level in ("probabilistic", "deterministic"):
        assert float(lipjax.local_lipschitz(network, x, 0.1, level=level, key=jax.random.key(0))[0]) >= 1.0


B5 = """
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Conv(1, 8, (3, 3), padding=1, rngs=rngs), nnx.relu,
    nnx.Conv(8, 8, (4, 4), strides=2, padding=1, rngs=rngs), nnx.relu,
    lambda x: x.reshape(x.shape[0], -1),
    nnx.Linear(8 * 4 * 4, 10, rngs=rngs),
)
network = lipjax.from_flax(model, input_shape=(8, 8, 1))
x, label = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)), jnp.array([0, 1])
sound = dict(level="probabilistic", delta=1e-6, key=jax.random.key(1))
lipschitz = lipjax.local_lipschitz(network, x, eps=0.1, **sound)
certificate = lipjax.certify(network, x, label, eps=0.1, **sound)
radius = lipjax.certified_radius(network, x, label, **sound)
"""


@pytest.mark.parametrize("x64", [False, True])
def test_a_flax_model_of_ones_own_is_certified_with_64_bits_off_and_on(x64):
    scope = {"jax": jax, "jnp": jnp, "lipjax": lipjax, "nnx": nnx}
    with jax.enable_x64(x64), jax.numpy_rank_promotion("allow"):
        exec(B5, scope)
    certificate = scope["certificate"]
    for value in (scope["lipschitz"], scope["radius"], certificate.worst_margin, certificate.lipschitz):
        assert value.shape == (2,)
        assert np.isfinite(value).all()
    # Whom global norms certify keeps their constant.
    assert np.all(np.asarray(scope["lipschitz"]) <= np.asarray(certificate.lipschitz) * (1 + 2e-3))
    right = np.asarray(certificate.prediction) == np.arange(2)
    assert np.all((np.asarray(scope["radius"]) > 0) <= right)
    assert np.all(np.asarray(certificate.certified) == (np.asarray(scope["radius"]) >= 0.1))


@pytest.mark.parametrize("level", ["probabilistic", "deterministic", "estimate"])
def test_nan_in_a_large_batch_is_not_certified(level):
    kernel, bias = jnp.eye(4, 10), jnp.zeros(10).at[3].set(jnp.nan)
    network = chain(dense(kernel, bias, (4,)))
    x = jnp.ones((1000, 4)).at[:, 0].set(100.0)
    found = lipjax.certify(network, x, jnp.zeros(1000, jnp.int32), 0.0, level=level, key=jax.random.key(0))
    assert not np.any(found.certified)
    assert not np.any(np.asarray(found.worst_margin) > 0)

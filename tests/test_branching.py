"""Branch and bound: the exact answer on tiny networks, never above the truth, and counterexamples that are ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dual import network_of, samples

import lipjax
from lipjax.certification.branching import Branching
from lipjax.certification.stages import Branch
from lipjax.experiments.data import Dataset
from lipjax.experiments.evaluation import evaluate

EPS = 0.6
SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in ((1, "relu"), (2, "relu"), (3, "relu"))]


@functools.cache
def tiny(seed, activation="relu"):
    """Two inputs, two layers of three neurons, three classes."""
    network = oracles.network_of((2,), [3, 3], activation, seed)
    return jax.tree.map(jnp.asarray, network), jnp.asarray(
        np.random.default_rng(seed).uniform(0.2, 0.8, (1, 2)), jnp.float32
    )


def exact_margins(network, x, label, eps):
    """The least margins (3,) over a grid of the disc, of which each point has one within a hundredth of the radius."""
    exact = oracles.DenseNetwork(network)

    def margins(points):
        logits = exact.logits(points)
        return logits[:, [label]] - logits

    angles = np.linspace(0, 2 * np.pi, 1001)
    radii = np.linspace(0, 1, 51)
    grid = x + eps * np.stack(
        [np.outer(radii, np.cos(angles)).ravel(), np.outer(radii, np.sin(angles)).ravel()], axis=1
    )
    return margins(grid).min(axis=0)


def branched(network, x, label, eps, **options):
    """Margins (B, classes) of branch and bound at level deterministic, and what came with them."""
    certifier = lipjax.Certifier(network, len(x), level="deterministic")
    found = {}

    class Recorded(Branching):
        def prove(self, *given, **more):
            proven = super().prove(*given, **more)
            found["margins"], found["points"] = proven.margins, proven.points
            return proven

    local = certifier.with_local_norms(x, label, eps, np.arange(len(x)))
    whole = certifier.by_dual(
        x,
        label,
        eps,
        sigmas=local.sigmas,
        rows=local.rows,
        options=Recorded(**{"seconds": 300.0, "max_domains": 3000, **options}),
    )
    return found["margins"], found["points"], whole


@pytest.mark.parametrize(("seed", "activation"), [(2, "clipped"), *SLOW])
def test_on_tiny_networks_the_answer_is_the_exact_one(seed, activation):
    """What is robust is proven, what is not is refuted, up to a sliver: by enumeration of the whole disc."""
    network, x = tiny(seed, activation)
    label = jnp.argmax(network(x), axis=1)
    exact_at = functools.partial(exact_margins, network, np.asarray(x[0], np.float64), int(label[0]))
    rivals = np.arange(3) != int(label[0])
    low, high = 0.0, 2.0
    for _ in range(12):  # to 1 / 2000, where five hundredths are left to either side
        middle = (low + high) / 2
        low, high = (middle, high) if exact_at(middle)[rivals].min() > 0 else (low, middle)
    if low > 1.9:
        return  # robust as far as we look: nothing to find
    for eps, robust in ((0.95 * low, True), (1.05 * low, False)):
        if eps < 0.01:
            continue
        margins, points, found = branched(network, x, label, eps)
        assert bool(found.certificate.certified[0]) == robust
        assert (margins[0] <= exact_at(eps) + 1e-3)[rivals].all()
        if not robust:
            assert np.isfinite(points[0]).all()
            assert np.linalg.norm(points[0].astype(np.float64) - np.asarray(x[0], np.float64)) <= eps
            assert int(jnp.argmax(network(jnp.asarray(points)), axis=1)[0]) != int(label[0])


@pytest.mark.parametrize(
    "kind", ["residual", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*oracles.KINDS, "graph"))]
)
def test_no_margin_is_above_a_sample_nor_below_that_of_the_dual(kind):
    network = network_of(kind, 3)
    x = jnp.asarray(oracles.random_inputs(network, 3, 2))
    label = jnp.argmax(network(x), axis=1)
    margins, points, found = branched(network, x, label, 0.4, max_domains=100)
    dual = lipjax.certify(network, x, label, 0.4, level="deterministic")
    with jax.enable_x64(True):
        wide = network.astype(jnp.float64)
        for i in range(2):
            least = np.asarray(samples(wide, jnp.asarray(x[i], jnp.float64), 0.4, 1))
            assert (margins[i] <= least + 1e-9).all()
            if np.isfinite(points[i]).all():
                assert not found.certificate.certified[i]
    assert not (np.asarray(dual.certified) & ~np.asarray(found.certificate.certified)).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["relu", "clip", "maxmin", "gelu", "leaky"]))
def test_cuts_lie_inside_of_boxes_and_gaps_are_zero_where_nothing_is_to_win(seed, name):
    rng = np.random.default_rng(seed)
    activation = {
        "relu": lipjax.ReLUActivation(),
        "clip": lipjax.ClipActivation(jnp.float32(-0.5), jnp.float32(0.5)),
        "maxmin": lipjax.MaxMinActivation(),
        "gelu": lipjax.GELUActivation(),
        "leaky": lipjax.LeakyReLUActivation(jnp.float32(0.1)),
    }[name]
    lower = rng.normal(size=6).astype(np.float32)
    upper = lower + np.float32(rng.exponential(size=6)) * (rng.random(6) > 0.3).astype(np.float32)
    cut = np.asarray(activation.cut(jnp.asarray(lower), jnp.asarray(upper)))
    gaps = np.asarray(activation.gaps(jnp.ones(6), jnp.asarray(lower), jnp.asarray(upper)))
    wide = upper > lower
    assert ((lower < cut) & (cut < upper))[wide].all()
    assert (gaps >= 0).all()
    if name == "relu":
        np.testing.assert_array_equal(gaps > 0, (lower < 0) & (upper > 0))
        np.testing.assert_array_equal(cut[(lower < 0) & (upper > 0)], 0)
    if name == "maxmin":
        assert (gaps == 0).all()  # equal coefficients: max and min add up to a linear function


def test_the_stage_decides_what_the_dual_left_and_writes_counterexamples():
    network = jax.tree.map(jnp.asarray, oracles.network_of((6,), [8, 8], "relu", seed=5))
    images = np.random.default_rng(1).uniform(size=(40, 6)).astype(np.float32)
    labels = np.asarray(jnp.argmax(network(jnp.asarray(images)), axis=1), np.int32)
    data = Dataset(images, labels, 1.0, 3)
    options = {"batch_size": 40, "level": "deterministic", "dual_steps": 5}
    dual = evaluate(network, data, EPS, stages=("global", "local", "dual"), **options)
    tree = evaluate(network, data, EPS, stages=("global", "local", "dual", "branch"), branch_seconds=5, **options)
    stage = tree.columns["stage"]
    assert (stage == "branch").any()
    assert (tree.columns["certified"] >= dual.columns["certified"]).all()
    assert tree.columns["certified"].sum() > dual.columns["certified"].sum()
    refuted = (stage == "branch") & tree.columns["attacked"]
    assert refuted.any()
    assert not (tree.columns["certified"] & tree.columns["attacked"]).any()
    assert tree.summary["branch_seconds"] == 5
    attacked = lipjax.attack(network, jnp.asarray(images), jnp.asarray(labels), EPS, jax.random.key(0))
    broken = np.asarray(jnp.argmax(network(attacked), axis=1)) != labels
    assert not (broken & tree.columns["certified"]).any()


def test_no_time_is_the_root_alone_and_bad_numbers_are_named():
    network, x = tiny(1)
    label = jnp.argmax(network(x), axis=1)
    _, _, found = branched(network, x, label, EPS, seconds=0.0)
    assert found.dual_steps[0] in (0, 60, 120)
    with pytest.raises(ValueError, match="branch_seconds=-1"):
        lipjax.certify(network, x, label, 0.1, level="deterministic", branch_seconds=-1)
    with pytest.raises(ValueError, match="stages of a radius"):
        lipjax.certified_radius(network, x, label, level="deterministic", stages=("global", "branch"))
    with pytest.raises(ValueError, match="'branch', which is a proof"):
        lipjax.certify(network, x, label, 0.1, level="estimate", stages=("global", "branch"))
    assert Branch(0.1).name == "branch"

"""Losses against their NumPy formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import (
    ClippedMaxMinActivation,
    ClippedReLUActivation,
    MaxMinActivation,
    Preactivation,
    ReLUActivation,
    cross_entropy,
    gloro,
    mixed,
    sparsity,
    trades,
    worst_logits,
    worst_margin,
)


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def sample(seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(5) * 3
    label = int(rng.integers(5))
    drops = rng.uniform(0, 2, 5)
    drops[label] = 0
    margins = logits[label] - logits - drops
    worst = logits + drops  # every rival raised, the label's own unchanged
    return logits, margins, worst, label


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_cross_entropy_is_minus_log_softmax_at_the_label(seed):
    logits, margins, worst, label = sample(seed)
    assert float(cross_entropy(jnp.asarray(logits, jnp.float32), label)) == pytest.approx(
        -log_softmax(logits)[label], rel=1e-5, abs=1e-6
    )
    ours = worst_logits(jnp.asarray(logits, jnp.float32), jnp.asarray(margins, jnp.float32), label)
    np.testing.assert_allclose(ours, worst, atol=1e-5)


def test_cross_entropy_of_a_batch_is_unreduced():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((4, 3)), np.array([0, 2, 1, 2])
    ours = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(ours, -log_softmax(logits)[np.arange(4), labels], rtol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_gloro_is_cross_entropy_with_the_largest_rival_as_one_more_class(seed):
    logits, _, worst, label = sample(seed)
    bottom = max(worst[j] for j in range(5) if j != label)
    expected = -log_softmax(np.append(logits, bottom))[label]
    ours = float(gloro(jnp.asarray(logits, jnp.float32), jnp.asarray(worst, jnp.float32), label))
    assert ours == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 12))
def test_gloro_is_below_log_2_only_where_the_example_is_certified(seed, lead):
    logits, _, worst, label = sample(seed)
    logits[label] += lead
    worst[label] += lead
    logits, worst = jnp.asarray(logits, jnp.float32), jnp.asarray(worst, jnp.float32)
    certified = float(worst_margin(logits[label] - worst, label)) > 0
    if float(gloro(logits, worst, label)) < np.log(2):
        assert certified
    if not certified:
        assert float(gloro(logits, worst, label)) >= np.log(2) - 1e-6


def test_gloro_goes_below_log_2_for_a_sure_and_certified_example():
    assert float(gloro(jnp.array([9.0, 0.0]), jnp.array([9.0, 1.0]), 0)) < 0.01


def test_mixed_at_its_ends_and_between():
    clean, worst = jnp.array([1.0, 2.0]), jnp.array([3.0, 8.0])
    assert mixed(clean, worst, 1.0).tolist() == [1.0, 2.0]
    assert mixed(clean, worst, 0.0).tolist() == [3.0, 8.0]
    assert mixed(clean, worst, 0.25).tolist() == [2.5, 6.5]


def _before(rng, shape):
    lower = rng.standard_normal(shape)
    upper = lower + rng.uniform(0, 2, shape)
    arrays = [jnp.asarray(a, jnp.float32) for a in (lower, upper)]
    return Preactivation(*arrays, arrays[0], jnp.ones(shape, bool), None, jnp.asarray(True)), lower, upper


def test_sparsity_is_the_mean_distance_of_neurons_from_being_constant():
    rng = np.random.default_rng(1)
    before, lower, upper = _before(rng, (3, 4, 2))
    theta = rng.uniform(0, 1, lower.shape)
    clipped = ClippedReLUActivation(jnp.asarray(theta, jnp.float32))
    below, above = np.where(upper > 0, upper, 0), np.where(theta > lower, theta - lower, 0)
    assert float(sparsity(clipped, before, 0.1)) == pytest.approx(np.mean(below + 0.1 * above), rel=1e-5)
    assert float(sparsity(ReLUActivation(), before, 0.1)) == pytest.approx(np.mean(below), rel=1e-5)
    assert float(sparsity(MaxMinActivation(), before, 0.1)) == 0
    dead = dataclasses.replace(before, lower=-(before.upper**2) - 2, upper=-(before.upper**2) - 1)
    assert float(sparsity(clipped, dead, 0.0)) == 0


def test_sparsity_of_clipped_maxmin_is_by_the_box_between_maxmin_and_its_clips():
    rng = np.random.default_rng(2)
    before, lower, upper = _before(rng, (2, 6))
    a, b = rng.uniform(0, 1, (2, 3)), rng.uniform(-1, 0, (2, 3))
    activation = ClippedMaxMinActivation(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    terms = []
    for i in range(2):
        for j in range(3):
            terms.append(0.5 * max(0.0, a[i, j] - max(lower[i, j], lower[i, j + 3])))
            terms.append(max(0.0, min(upper[i, j], upper[i, j + 3]) - b[i, j]))
    assert float(sparsity(activation, before, 0.5)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_trades_is_cross_entropy_and_a_weighted_divergence():
    rng = np.random.default_rng(3)
    clean, attacked = rng.standard_normal((2, 5, 3))
    label = rng.integers(0, 3, 5)
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (clean, attacked))
    expected = -np.log(p[np.arange(5), label]) + 6 * np.sum(p * np.log(p / q), axis=1)
    ours = trades(jnp.asarray(clean, jnp.float32), jnp.asarray(attacked, jnp.float32), jnp.asarray(label), 6.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_losses_work_under_vmap_and_their_gradients_sum_to_zero():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    labels = jnp.array([0, 1, 2, 1])
    worst = logits + jnp.where(jnp.arange(3)[None] != labels[:, None], 0.5, 0)
    values = jax.vmap(gloro)(logits, worst, labels)
    np.testing.assert_allclose(values[2], gloro(logits[2], worst[2], labels[2]), rtol=1e-6)
    slopes = jax.grad(lambda a: jax.vmap(gloro)(logits + a[:, None], worst + a[:, None], labels).sum())(jnp.zeros(4))
    np.testing.assert_allclose(slopes, 0, atol=1e-6)  # a common shift of all logits changes nothing

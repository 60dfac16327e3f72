"""Losses of what a pass came to: against their published formulas in NumPy, and where they have to be careful."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import dense
from lipjax.experiments import defaults
from lipjax.training import worst_case

CLASSES, BATCH = 5, 6
NUMBERS = {"crm": {"weight": 2.5, "temperature": 4.0, "radius": 1.5}, "cll": defaults.NUMBERS["cll"] | {"weight": 0.3}}


def log_softmax(logits):
    return logits - logits.max() - np.log(np.sum(np.exp(logits - logits.max())))


def loss_of(name):
    return functools.partial(worst_case.WORST_CASE[name], **NUMBERS.get(name, {}))


def sample(seed, eps=0.3):
    """The outcome of a pass of one constant, its parts in float64, and the constants m_j of each margin."""
    rng = np.random.default_rng(seed)
    kernel, features = rng.standard_normal((7, CLASSES)), 2 * rng.standard_normal((BATCH, 7))
    logits, label = features @ kernel, rng.integers(CLASSES, size=BATCH)
    logits[: BATCH // 2][np.arange(BATCH // 2), label[: BATCH // 2]] += 8  # half of them are right
    lipschitz = rng.uniform(0.5, 3, BATCH)
    slopes = lipschitz[:, None] * np.linalg.norm(kernel.T[label][:, None] - kernel.T[None], axis=2)
    clean = logits[np.arange(BATCH), label][:, None] - logits
    arrays = (jnp.asarray(each, jnp.float32) for each in (logits, clean - eps * slopes, lipschitz))
    head = dense(jnp.asarray(kernel, jnp.float32), jnp.zeros(CLASSES), (7,))
    outcome = worst_case.Outcome(*arrays, jnp.float32(eps), jnp.asarray(label), head)
    return outcome, logits, label, lipschitz, slopes, kernel


def emma_logits(z, y, m, eps):
    away = z - z[y]
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(m > 0, np.clip(-away / m, eps / 100, eps), 0)
    return away + reach * m


def cross_entropy(z, y):
    return -log_softmax(z)[y]


def formula(name, z, y, lipschitz, m, kernel, eps):
    one_hot, others = np.eye(CLASSES)[y], np.arange(CLASSES) != y
    if name == "gloro":
        return cross_entropy(np.append(z, (z + eps * m)[others].max()), y)
    if name == "cross_entropy":
        return cross_entropy(z + eps * m, y)
    if name == "emma":
        return cross_entropy(emma_logits(z, y, m, eps), y)
    if name == "la":
        entropy = cross_entropy((emma_logits(z, y, m, eps) - 2 * one_hot) / 0.75, y)
        return 0.75 * (1 - np.exp(-entropy)) ** 5 * entropy
    if name == "offset":
        return cross_entropy((z - 2 * np.sqrt(2) * eps * lipschitz * one_hot) * 4, y) / 4
    if name == "crm":
        weight, t, radius = (NUMBERS[name][key] for key in ("weight", "temperature", "radius"))
        radii = ((z[y] - z) / np.where(m > 0, m, 1))[others]
        penalty = np.log(np.sum(np.exp(-t * radii))) / t if 0 < radii.min() < radius else 0
        return cross_entropy(z, y) + weight * penalty
    numbers = NUMBERS["cll"]
    odds = 1 - numbers["violation"] / 2
    scale = 2 * numbers["radius"] / (2 * np.log(odds / (1 - odds)))
    shifted = z / (scale * lipschitz * np.linalg.norm(kernel, axis=0))
    shifted = shifted + np.where(others, 1, -1) * numbers["radius"] / scale
    return cross_entropy(shifted, y) + numbers["weight"] * lipschitz**2


@pytest.mark.parametrize("name", worst_case.WORST_CASE)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_a_loss_is_its_published_formula(name, seed):
    outcome, logits, label, lipschitz, slopes, kernel = sample(seed)
    expected = [formula(name, logits[i], label[i], lipschitz[i], slopes[i], kernel, 0.3) for i in range(BATCH)]
    np.testing.assert_allclose(loss_of(name)(outcome), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", worst_case.WORST_CASE)
def test_losses_and_gradients_are_finite_without_a_radius_and_where_nothing_varies(name):
    outcome, *_ = sample(1, eps=0.0)
    for lipschitz in (outcome.lipschitz, jnp.zeros(BATCH)):
        parts = outcome.logits, outcome.margins, lipschitz

        def total(parts):
            logits, margins, lipschitz = parts
            return jnp.sum(
                loss_of(name)(dataclasses.replace(outcome, logits=logits, margins=margins, lipschitz=lipschitz))
            )

        assert np.isfinite(total(parts))
        assert all(np.isfinite(each).all() for each in jax.grad(total)(parts))


@pytest.mark.parametrize("name", ["emma", "la", "crm"])
def test_classes_that_were_not_asked_count_for_nothing(name):
    """As those of the dual, whose margins are infinite: the loss is that of the classes that are left."""
    outcome, *_ = sample(2)
    label, logits = jnp.zeros(BATCH, jnp.int32), outcome.logits.at[:, 3:].add(-30)
    clean = logits[:, :1] - logits
    asked = dataclasses.replace(
        outcome, logits=logits, label=label, margins=clean - jnp.where(jnp.arange(CLASSES) == 0, 0, 0.7)[None]
    )
    some = dataclasses.replace(asked, margins=asked.margins.at[:, 3:].set(jnp.inf))
    fewer = dataclasses.replace(asked, logits=asked.logits[:, :3], margins=asked.margins[:, :3])
    loss = loss_of(name)
    if name == "crm":  # its clean part is about all classes
        without = [loss(each) - worst_case.cross_entropy(each.logits, label) for each in (some, fewer)]
    else:
        without = [loss(each) for each in (some, fewer)]
    np.testing.assert_allclose(*without, rtol=1e-5, atol=1e-5)

    def total(margins):
        return jnp.sum(loss(dataclasses.replace(some, margins=margins)))

    assert np.isfinite(jax.grad(total)(some.margins)).all()


def test_emma_pushes_a_rival_no_farther_than_it_can_be_certified():
    outcome, *_ = sample(3)
    logits = np.asarray(worst_case.emma_logits(outcome))
    certified = np.asarray(outcome.rivals & (outcome.margins > 0))
    worst = np.asarray(-outcome.margins)
    reached = np.asarray(outcome.rivals & (outcome.clean_margins > 0) & (outcome.margins <= 0))
    assert certified.any()
    assert reached.any()
    np.testing.assert_allclose(logits[certified], worst[certified], rtol=1e-5)
    assert (np.abs(logits[reached]) < 0.02 * np.abs(worst[reached] - np.asarray(-outcome.clean_margins)[reached])).all()


def test_the_gradient_of_emma_goes_through_the_constant_and_not_through_the_reach():
    outcome, *_ = sample(4)

    def total(scale):
        falls = outcome.falls * scale
        return jnp.sum(worst_case.emma(dataclasses.replace(outcome, margins=outcome.clean_margins - falls)))

    share = np.clip(np.asarray(outcome.clean_margins / jnp.maximum(outcome.falls, 1e-9)), 0.01, 1)
    raised = np.where(outcome.rivals, share * np.asarray(outcome.falls), 0)
    chances = np.asarray(jax.nn.softmax(worst_case.emma_logits(outcome), axis=1))
    assert float(jax.grad(total)(1.0)) == pytest.approx(float(np.sum(chances * raised)), rel=1e-4)

"""Worst margins against the exact minimum over box and ball, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

import lipjax
from lipjax import (
    Region,
    box_and_ball,
    dense,
    lipschitz_margin,
    pairwise_lipschitz,
    worst_logits,
    worst_margin,
)


def region_of(center, lower, upper, radius, live=None):
    live = np.asarray(upper) > np.asarray(lower) if live is None else live
    return Region(lower, upper, center, radius, jnp.asarray(live), jnp.asarray(True))


@jax.jit
def _both(head, region, label):
    return box_and_ball(head, region, label), pairwise_lipschitz(head, region, label)


def sample(seed, features, classes, center_scale, width_scale, radius, live_count):
    """A head and a region in float32, with ``live_count`` coordinates that vary."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((features, classes)).astype(np.float32) / np.float32(np.sqrt(features))
    bias = rng.standard_normal(classes).astype(np.float32)
    center = (rng.standard_normal(features) * center_scale).astype(np.float32)
    live = np.zeros(features, bool)
    live[rng.permutation(features)[:live_count]] = True
    widths = width_scale * np.exp(rng.standard_normal((2, features))) * live
    lower, upper = (center - widths[0]).astype(np.float32), (center + widths[1]).astype(np.float32)
    region = region_of(*(jnp.asarray(a) for a in (center, lower, upper, np.float32(radius))), live=live)
    return dense(jnp.asarray(kernel), jnp.asarray(bias), (features,)), region, int(rng.integers(classes))


def exact_margins(head, region, label):
    return oracles.margins_minimum(
        head.kernel, head.bias, region.center, region.lower, region.upper, float(region.radius), label
    )


SHAPES = st.sampled_from([(12, 4), (512, 10)])
LOG = st.floats(-4, 1.5)


@settings(max_examples=40)
@given(SHAPES, st.integers(0, 10**6), st.floats(-2, 2), LOG, LOG, st.sampled_from([1, 2, 7, None]))
def test_box_and_ball_is_the_exact_minimum_and_never_above(shape, seed, center, width, radius, live):
    features, classes = shape
    live = features if live is None else live
    head, region, label = sample(seed, features, classes, 10**center, 10**width, 10**radius, live)
    ours, pairwise = (np.asarray(m, np.float64) for m in _both(head, region, label))
    exact, clean = exact_margins(head, region, label)
    logits = np.abs(np.asarray(head.kernel)).T @ np.abs(np.asarray(region.center)) + np.abs(np.asarray(head.bias))
    rounding = 1e-6 * (1 + 2 * logits.max())  # of the clean float32 logits, which is not what is tested here
    drop = clean - exact
    assert np.all(ours <= exact + rounding + 1e-5 * drop)
    assert np.all(ours >= exact - rounding - 1e-4 * drop)
    assert ours[label] == 0
    assert np.all(ours >= pairwise - rounding - 1e-5 * drop)


@settings(max_examples=20)
@given(st.integers(0, 10**6), LOG, LOG, st.sampled_from([0, 1, 5, 12]))
def test_pairwise_lipschitz_is_its_formula(seed, width, radius, live):
    head, region, label = sample(seed, 12, 4, 1.0, 10**width, 10**radius, live)
    _, ours = _both(head, region, label)
    kernel = np.asarray(head.kernel, np.float64)
    logits = np.asarray(region.center, np.float64) @ kernel + np.asarray(head.bias, np.float64)
    directions = (kernel[:, [label]] - kernel) * np.asarray(region.live)[:, None]
    expected = logits[label] - logits - float(region.radius) * np.linalg.norm(directions, axis=0)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * (1 + float(region.radius)))
    assert ours[label] == 0


@pytest.mark.parametrize("live", [1, 2])
@pytest.mark.parametrize("radius", [1e-4, 1e-2, 1.0, 30.0])
def test_one_or_two_live_coordinates_of_512(live, radius):
    for seed in range(5):
        head, region, label = sample(seed, 512, 10, 0.0, 0.1, radius, live)
        ours = np.asarray(_both(head, region, label)[0], np.float64)
        exact, clean = exact_margins(head, region, label)
        assert np.all(np.abs(ours - exact) <= 1e-4 * (clean - exact) + 1e-6)


@pytest.mark.parametrize("radius", [1e-6, 1e-12, 0.0])
def test_a_tiny_ball_is_a_ball_without_a_box(radius):
    head, region, label = sample(3, 12, 4, 1.0, 0.5, radius, 12)
    if radius == 0:  # a region of radius 0 comes with a box of width 0
        region = region_of(region.center, region.center, region.center, jnp.float32(0))
    ours = np.asarray(_both(head, region, label)[0], np.float64)
    directions = np.asarray(head.kernel, np.float64)[:, [label]] - np.asarray(head.kernel, np.float64)
    _, clean = exact_margins(head, region, label)
    np.testing.assert_allclose(ours, clean - radius * np.linalg.norm(directions, axis=0), rtol=1e-6, atol=1e-6)


def test_a_box_inside_the_ball_gives_its_corner():
    head, region, label = sample(4, 12, 4, 1.0, 0.05, 100.0, 12)
    kernel = np.asarray(head.kernel, np.float64)
    directions = kernel[:, [label]] - kernel
    ends = [np.asarray(a, np.float64)[:, None] * directions for a in (region.lower, region.upper)]
    bias = np.asarray(head.bias, np.float64)
    corner = np.minimum(*ends).sum(0) + bias[label] - bias
    np.testing.assert_allclose(_both(head, region, label)[0], corner, rtol=1e-5, atol=1e-5)
    boxed = Region(region.lower, region.upper, region.center, None, region.live, region.finite)
    np.testing.assert_allclose(box_and_ball(head, boxed, label), corner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", [0.0, 1.0, 100.0])
def test_float32_cancellation_loses_nothing_of_the_bound(center):
    # Nearly all of the radius goes into a few wide coordinates that the box cuts off, the rest to many small ones: the
    # square of the radius minus that of the clipped part cancels. The published code loses up to 12 % here.
    rng = np.random.default_rng(6)
    for features_wide in (1, 3, 20):
        kernel = np.zeros((512, 2), np.float32)
        kernel[:, 0] = 1e-3 * rng.standard_normal(512)
        kernel[:features_wide, 0] = rng.uniform(0.9, 1.1, features_wide)
        widths = np.full(512, 10.0)
        widths[:features_wide] = 1.0
        middle = np.full(512, center)
        lower, upper = (middle - widths).astype(np.float32), (middle + widths).astype(np.float32)
        for excess in (1e-3, 1e-5, 1e-6):
            radius = np.float32(np.sqrt(features_wide) * (1 + excess))
            bias = np.array([-center * kernel[:, 0].astype(np.float64).sum(), 0], np.float32)
            head = dense(jnp.asarray(kernel), jnp.asarray(bias), (512,))
            region = region_of(*(jnp.asarray(a) for a in (middle.astype(np.float32), lower, upper, radius)))
            ours = float(_both(head, region, 0)[0][1])
            exact, clean = (float(a[1]) for a in exact_margins(head, region, 0))
            drop = clean - exact
            assert ours <= exact + 1e-5 * drop + 1e-6 * center * features_wide
            assert ours >= exact - 2e-4 * drop - 1e-6 * center * features_wide


def test_tiny_widths_around_large_centers():
    for seed in range(5):
        head, region, label = sample(seed, 512, 10, 100.0, 1e-3, 1e-2, 512)
        exact, clean = exact_margins(head, region, label)
        ours = np.asarray(_both(head, region, label)[0], np.float64)
        logits = np.asarray(head(region.center), np.float64)
        ours_clean = logits[label] - logits
        rounding = 2e-4  # of logits of about 100 in float32
        assert np.all(np.abs(ours_clean - clean) <= rounding)
        assert np.all(ours <= exact + rounding)
        assert np.all(np.abs((ours_clean - ours) - (clean - exact)) <= 1e-3 * (clean - exact) + 5e-5)


def test_identical_rows_of_the_head_give_a_margin_of_zero():
    head, region, _ = sample(7, 12, 4, 1.0, 0.5, 0.3, 12)
    kernel, bias = head.kernel.at[:, 2].set(head.kernel[:, 1]), head.bias.at[2].set(head.bias[1])
    margins = _both(dense(kernel, bias, (12,)), region, 1)
    for ours in margins:
        assert ours[1] == 0
        assert ours[2] == 0


def test_the_oracle_agrees_with_a_general_solver():
    rng = np.random.default_rng(8)
    for _ in range(15):
        c, radius = rng.standard_normal(4), rng.uniform(0.1, 2)
        low, high = -rng.uniform(0, 1, 4), rng.uniform(0, 1, 4)
        result = optimize.minimize(
            lambda d, c=c: c @ d,
            np.zeros(4),
            jac=lambda d, c=c: c,
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "ineq", "fun": lambda d, r=radius: r**2 - d @ d, "jac": lambda d: -2 * d},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert oracles.box_and_ball_minimum(c, low, high, radius) == pytest.approx(result.fun, abs=1e-6)


def test_worst_logits_raise_every_rival_and_keep_the_label():
    logits, margins = jnp.array([1.0, 3.0, 2.0]), jnp.array([1.5, 0.0, -0.25])
    assert worst_logits(logits, margins, 1).tolist() == [1.5, 3.0, 3.25]


def test_worst_margin_is_the_least_over_the_rivals():
    margins = jnp.array([0.0, 2.0, 1.5])
    assert float(worst_margin(margins, 0)) == 1.5
    assert float(worst_margin(margins, 1)) == 0.0
    assert float(worst_margin(jnp.array([-1.0, 0.0]), 1)) == -1.0
    assert np.isnan(worst_margin(jnp.array([0.0, jnp.nan, 1.0]), 0))


@pytest.mark.parametrize("leading", [(3,), (2, 2)])
def test_margins_of_a_batch_are_those_of_its_examples(leading):
    count = int(np.prod(leading))
    cases = [sample(0, 12, 4, 1.0, 0.3, 0.5, live) for live in range(2, 2 + count)]
    head = cases[0][0]
    regions = jax.tree.map(
        lambda *leaves: jnp.stack(leaves).reshape(*leading, *leaves[0].shape), *(c[1] for c in cases)
    )
    labels = jnp.arange(count).reshape(leading) % 4
    sigma = jnp.linspace(1, 2, count)
    for margins, rest in ((box_and_ball, ()), (pairwise_lipschitz, ()), (lipschitz_margin, (sigma,))):
        found = margins(head, regions, labels, *(each.reshape(leading) for each in rest))
        one_by_one = [
            margins(head, region, label, *(each[k] for each in rest))
            for k, ((_, region, _), label) in enumerate(zip(cases, labels.ravel(), strict=True))
        ]
        np.testing.assert_allclose(found, jnp.stack(one_by_one).reshape(*leading, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("radius", "width"), [(0.4, 0.2), (0.05, 0.2), (50.0, 0.2)])
def test_gradients_are_finite_differences_of_the_exact_minimum(radius, width):
    with jax.enable_x64(True):
        rng = np.random.default_rng(9)
        center = rng.standard_normal(8)
        values = {
            "kernel": rng.standard_normal((8, 3)),
            "bias": rng.standard_normal(3),
            "center": center,
            "lower": center - width * rng.uniform(0.1, 1, 8),
            "upper": center + width * rng.uniform(0.1, 1, 8),
            "radius": np.float64(radius),
        }
        weights = np.array([0.3, 1.0, -0.7])

        def ours(values):
            region = region_of(*(values[k] for k in ("center", "lower", "upper", "radius")), live=np.ones(8, bool))
            head = dense(values["kernel"], values["bias"], (8,))
            return jnp.asarray(weights) @ box_and_ball(head, region, 0, num_iters=60)

        def exact(values):
            return weights @ oracles.margins_minimum(**values, label=0)[0]

        arrays = {k: jnp.asarray(v) for k, v in values.items()}
        assert arrays["kernel"].dtype == np.float64
        value, gradient = jax.value_and_grad(ours)(arrays)
        assert value == pytest.approx(exact(values), rel=1e-9)
        for name, entry in values.items():
            direction = rng.standard_normal(np.shape(entry))
            plus, minus = ({**values, name: entry + sign * 1e-6 * direction} for sign in (1, -1))
            slope = (exact(plus) - exact(minus)) / 2e-6
            assert np.vdot(gradient[name], direction) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_gradients_are_finite_where_nothing_varies():
    head, region, label = sample(10, 12, 4, 1.0, 0.5, 0.0, 0)

    def total(head, radius):
        still = region_of(region.center, region.center, region.center, radius)
        return box_and_ball(head, still, label).sum() + pairwise_lipschitz(head, still, label).sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))(head, jnp.float32(0))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))


def test_a_region_without_what_the_margins_need_is_refused():
    head = lipjax.dense(jnp.eye(2), jnp.zeros(2), (2,))
    region = jax.tree.map(lambda leaf: leaf[0], lipjax.l2_ball(jnp.zeros((1, 2)), 0.1))
    with pytest.raises(ValueError, match="has no box"):
        lipjax.box_and_ball(head, region.without_box(), 0)
    with pytest.raises(ValueError, match="has no ball"):
        lipjax.pairwise_lipschitz(head, region.without_ball(), 0)


@pytest.mark.parametrize("batch", [4, 1000])  # XLA's CPU backend loses NaN in the maximum of thousands of numbers
def test_nan_among_many_margins_shows_in_the_worst_and_in_the_loss(batch):
    margins = jnp.ones((batch, 10)).at[::2, 3].set(jnp.nan)
    label = jnp.zeros(batch, jnp.int32)
    worst = jax.jit(jax.vmap(lipjax.worst_margin))(margins, label)
    assert np.array_equal(np.isnan(worst), np.arange(batch) % 2 == 0)
    loss = jax.jit(jax.vmap(lipjax.gloro))(jnp.ones((batch, 10)), -margins, label)
    assert np.array_equal(np.isnan(loss), np.arange(batch) % 2 == 0)

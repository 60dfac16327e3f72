"""Randomized smoothing: against functions whose smoothed form is known, and its chance of being wrong by simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lipjax import smoothing

KEY = jax.random.key(0)
NORMAL = jnp.asarray([0.6, -0.8])


def half_plane(x):
    """The class is the side of a line: smoothed it is the same, and the exact radius is the distance."""
    side = jnp.matmul(x, NORMAL)
    return jnp.stack([side, -side], axis=1)


def test_the_radius_of_a_half_plane_is_below_its_distance_and_close_to_it():
    x = jnp.asarray([[0.3, 0.0], [0.0, 0.5], [-0.2, 0.1], [1e-4, 0.0]])
    distance = np.asarray(jnp.matmul(x, NORMAL))
    found = smoothing.smoothed_radius(half_plane, x, 0.25, 100_000, 1e-3, KEY)
    np.testing.assert_array_equal(found.prediction[:3], (distance < 0)[:3])
    assert found.prediction[3] == smoothing.ABSTAINED  # it lies nearly on the line
    assert found.radius[3] == 0
    assert (found.radius <= np.abs(distance)).all()
    assert (found.radius[:3] >= 0.95 * np.abs(distance)[:3]).all()


@pytest.mark.parametrize("share", [0.6, 0.9, 0.999])
def test_the_confidence_bound_covers_as_often_as_it_says(share):
    delta, samples, rng = 0.1, 60, np.random.default_rng(1)
    bounds = {hits: smoothing.lower_confidence(hits, samples, delta) for hits in range(samples + 1)}
    wrong = np.mean([bounds[hits] > share for hits in rng.binomial(samples, share, 20_000)])
    assert wrong <= delta + 4 * np.sqrt(delta / 20_000)
    exact = sum(stats.binom.pmf(hits, samples, share) for hits in bounds if bounds[hits] > share)
    assert exact <= delta
    for hits in (1, 30, 60):  # and no larger p is left out
        assert stats.binom.sf(hits - 1, samples, bounds[hits] * (1 + 1e-6)) >= delta


def test_radii_are_wrong_no_more_often_than_delta():
    """The whole procedure, with few samples, so that it often is near its chance."""
    delta, count = 0.2, 400
    x = jnp.broadcast_to(0.2 * NORMAL[None], (count, 2))
    found = smoothing.smoothed_radius(half_plane, x, 0.3, 40, delta, jax.random.key(2), num_choosing=20)
    wrong = np.mean(found.radius > 0.2)
    assert 0 < wrong <= delta + 4 * np.sqrt(delta / count)


def test_keys_batches_and_odd_numbers_of_samples():
    x = jnp.asarray([[0.3, 0.0], [0.0, 0.5]])
    first, again = (smoothing.smoothed_radius(half_plane, x, 0.25, 1501, 1e-2, KEY) for _ in range(2))
    np.testing.assert_array_equal(first.radius, again.radius)
    other = smoothing.smoothed_radius(half_plane, x, 0.25, 1501, 1e-2, jax.random.key(5))
    assert (first.probability != other.probability).any()
    assert smoothing.smoothed_radius(half_plane, x[:0], 0.25, 10, 1e-2, KEY).radius.shape == (0,)


def test_a_function_that_fails_is_certified_for_nothing():
    found = smoothing.smoothed_radius(lambda x: jnp.full((len(x), 3), jnp.nan), jnp.ones((2, 4)), 0.1, 100, 0.1, KEY)
    assert (found.prediction == smoothing.ABSTAINED).all()
    assert (found.radius == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0.0}, "noise=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"num_samples": 0}, "num_samples=0"),
    ],
)
def test_bad_numbers_are_named(changes, message):
    given = {"noise": 0.1, "num_samples": 10, "delta": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        smoothing.smoothed_radius(half_plane, jnp.ones((1, 2)), **given, key=KEY)


@pytest.mark.parametrize("kind", [jnp.int32, jnp.bfloat16, jnp.float16])
def test_narrow_types_are_refused(kind):
    with pytest.raises(TypeError, match="floating-point"):
        smoothing.smoothed_radius(half_plane, jnp.ones((1, 2), kind), 0.1, 10, 0.1, KEY)

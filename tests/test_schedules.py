"""Schedules: their values at the points of change, their ends, and that nothing is ever passed."""

import numpy as np
import pytest

from lipjax.training.schedules import constant_then_exponential, ramp


def values(schedule, num_steps, more=30):
    return np.array([float(schedule(step)) for step in range(num_steps + more)])


@pytest.mark.parametrize(("start_value", "end_value"), [(0.0, 1.58), (1.0, 0.0)])
def test_ramp_at_its_points_of_change(start_value, end_value):
    series = values(ramp(200, 0.1, 0.6, start_value, end_value), 200)
    assert np.all(series[:21] == np.float32(start_value))  # up to the end of the warm-up, step 20
    assert series[21] != np.float32(start_value)
    middle = (start_value + end_value) / 2
    assert series[70] == pytest.approx(middle, rel=1e-5)
    assert series[119] != np.float32(end_value)
    np.testing.assert_allclose(series[120:], end_value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.diff(series)[20:120], (end_value - start_value) / 100, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("start_value", "end_value"), [(0.0, 0.1551), (1.0, 0.0), (0.3, 0.3)])
@pytest.mark.parametrize("num_steps", [1, 7, 33, 1000])
def test_ramp_never_overshoots(num_steps, start_value, end_value):
    series = values(ramp(num_steps, 0.07, 0.41, start_value, end_value), num_steps)
    assert np.all(series >= np.float32(min(start_value, end_value)))
    assert np.all(series <= np.float32(max(start_value, end_value)))
    assert series[-1] == np.float32(end_value)
    assert np.all(np.diff(series) * np.sign(end_value - start_value) >= 0)


def test_ramp_without_warm_up_starts_at_once():
    series = values(ramp(100, 0.0, 0.5, 0.0, 1.0), 100)
    assert series[0] == 0
    assert series[1] == pytest.approx(0.02)


def test_ramp_of_no_length_is_a_step():
    series = values(ramp(100, 0.5, 0.5, 0.0, 1.0), 100)
    assert np.all(series[:51] == 0)
    assert np.all(series[51:] == 1)


def test_constant_then_exponential_at_its_points_of_change():
    series = values(constant_then_exponential(300, 1 / 3, 1e-3, 1e-6), 300)
    np.testing.assert_allclose(series[:101], 1e-3, rtol=1e-6)
    assert series[101] < 1e-3 * (1 - 1e-3)
    assert series[200] == pytest.approx(1e-3 * 1e-3**0.5, rel=1e-4)
    ratios = series[101:300] / series[100:299]
    np.testing.assert_allclose(ratios, 1e-3 ** (1 / 200), rtol=1e-4)
    assert series[299] > 1e-6
    np.testing.assert_allclose(series[300:], 1e-6, rtol=1e-5)  # the end of the run, and never below it


def test_a_growing_rate_is_clamped_too():
    series = values(constant_then_exponential(50, 0.0, 1e-3, 1e-1), 50)
    assert series[0] == pytest.approx(1e-3)
    assert np.all(series <= 1e-1 * (1 + 1e-6))
    assert series[50] == pytest.approx(1e-1, rel=1e-5)


@pytest.mark.parametrize("factor", [2, 5])
def test_a_longer_run_is_the_same_schedule_stretched(factor):
    for short, long in (
        (ramp(100, 0.1, 0.6, 0.0, 1.58), ramp(100 * factor, 0.1, 0.6, 0.0, 1.58)),
        (constant_then_exponential(100, 0.3, 1e-3, 1e-6), constant_then_exponential(100 * factor, 0.3, 1e-3, 1e-6)),
    ):
        for step in range(0, 101, 5):
            assert float(long(step * factor)) == pytest.approx(float(short(step)), rel=1e-4, abs=1e-9)

"""The minimum of each activation over a box, which the dual adds up: against dense grids, and empty pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import (
    ClippedMaxMinActivation,
    ClippedReLUActivation,
    IdentityActivation,
    MaxMinActivation,
    MaxPoolActivation,
    Preactivation,
    ReLUActivation,
)
from lipjax.networks import activations

POINTS = 121  # of a grid, per axis
numbers = st.floats(-3, 3, width=32)
weights = st.just(0.0) | st.floats(1e-3, 30)
UNITS = {
    "identity": (1, lambda clips: IdentityActivation()),
    "relu": (1, lambda clips: ReLUActivation()),
    "clipped_relu": (1, lambda clips: ClippedReLUActivation(jnp.asarray([clips[0]]))),
    "maxmin": (2, lambda clips: MaxMinActivation()),
    "clipped_maxmin": (2, lambda clips: ClippedMaxMinActivation(jnp.asarray([clips[0]]), jnp.asarray([clips[1]]))),
}


def known_of(lower, upper, center):
    lower, upper, center = (jnp.asarray(bound, jnp.float64) for bound in (lower, upper, center))
    return Preactivation(lower, upper, center, jnp.ones(center.shape, bool), jnp.float64(1), jnp.asarray(True))


@functools.partial(jax.jit, static_argnames="name")
def _minimum(name, clips, c, g, weight, lower, upper, center):
    return UNITS[name][1](clips).minimum(c, g, weight, known_of(lower, upper, center))


def minimum(name, clips, c, g, weight, lower, upper, center):
    """Value and minimiser of one unit, in float64."""
    with jax.enable_x64(True):
        arrays = (np.asarray(array, np.float64) for array in (clips, c, g, weight, lower, upper, center))
        return tuple(np.asarray(found) for found in _minimum(name, *arrays))


def objective(name, clips, c, g, weight, center, z):
    """The objective at points z (n, size), by NumPy."""
    if name in ("maxmin", "clipped_maxmin"):
        larger, smaller = z.max(axis=1), z.min(axis=1)
        if name == "clipped_maxmin":
            larger, smaller = np.minimum(larger, clips[0]), np.maximum(smaller, clips[1])
        s = np.stack([larger, smaller], axis=1)
    else:
        s = {"identity": z, "relu": np.maximum(z, 0), "clipped_relu": np.minimum(np.maximum(z, 0), clips[0])}[name]
    return s @ c - z @ g + weight / 2 * ((z - center) ** 2).sum(axis=1)


def grid(lower, upper):
    axes = [np.linspace(low, high, POINTS) for low, high in zip(lower, upper, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(lower))


@pytest.mark.parametrize("name", UNITS)
@settings(max_examples=150)
@given(data=st.data())
def test_the_minimum_is_that_of_a_dense_grid(name, data):
    size = UNITS[name][0]
    vector = st.tuples(*[numbers] * size).map(np.array)
    c, g, ends, others = (data.draw(vector) for _ in range(4))
    clips, weight, share = data.draw(st.tuples(numbers, numbers)), data.draw(weights), data.draw(st.floats(0, 1))
    lower, upper = np.minimum(ends, others), np.maximum(ends, others)
    if data.draw(st.booleans()):  # as narrow as a box can be
        upper = np.nextafter(lower, np.inf)
    center = np.clip(lower + share * (upper - lower), lower, upper)
    value, z = minimum(name, clips, c, g, weight, lower, upper, center)
    assert np.all((z >= lower) & (z <= upper))
    points = grid(lower, upper)
    values = objective(name, clips, c, g, weight, center, points)
    tolerance = 1e-10 * (1 + np.abs(values).max())
    assert value <= values.min() + tolerance
    assert value == pytest.approx(objective(name, clips, c, g, weight, center, z[None])[0], abs=tolerance)
    step = np.linalg.norm((upper - lower) / (POINTS - 1))
    slope = np.abs(c).sum() * np.sqrt(2) + np.linalg.norm(g) + weight * np.linalg.norm(upper - lower)
    assert value >= values.min() - slope * step - tolerance


def test_by_hand():
    # |z - 1| <= 1 with c = -1: the ReLU is z there; -z + 2 / 2 (z - 1)^2 is least at 1.5.
    value, z = minimum("relu", (0, 0), [-1.0], [0.0], 2.0, [0.0], [2.0], [1.0])
    assert (value, z) == (pytest.approx(-1.25), pytest.approx(1.5))
    # A clip at -1: the neuron outputs -1 everywhere.
    value, _ = minimum("clipped_relu", (-1, 0), [2.0], [0.0], 0.0, [-1.0], [1.0], [0.5])
    assert value == pytest.approx(-2)
    # z1 in [2, 3] is the larger one of any z2 in [0, 1]: the order that is impossible must not be counted.
    value, z = minimum("maxmin", (0, 0), [1.0, 0.0], [0.0, 0.0], 0.0, [2.0, 0.0], [3.0, 1.0], [2.5, 0.5])
    assert (value, z[0]) == (2, 2)


def test_without_coefficients_an_activation_contributes_exactly_nothing():
    for name, (size, _) in UNITS.items():
        zeros = np.zeros(size)
        value, _ = minimum(name, (0.3, -0.3), zeros, zeros, 0.0, zeros - 1, zeros + 1, zeros + 0.2)
        assert value == 0


@pytest.mark.parametrize("name", UNITS)
def test_nan_in_the_box_or_the_center_shows(name):
    size = UNITS[name][0]
    whole = {"lower": -np.ones(size), "upper": np.ones(size), "center": np.zeros(size)}
    for bad in whole:
        value, _ = minimum(
            name, (0.3, -0.3), np.ones(size), np.ones(size) / 2, 1.0, **whole | {bad: np.full(size, np.nan)}
        )
        assert np.isnan(value)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradients_are_those_of_differences(name, weight):
    rng, size = np.random.default_rng(3), UNITS[name][0]
    with jax.enable_x64(True):
        c, g, center = (jnp.asarray(np.array(rng.normal(size=size))) for _ in range(3))
        clips = jnp.asarray([0.4, -0.4])

        def value(c, g, weight, lower, upper, center):
            return UNITS[name][1](clips).minimum(c, g, weight, known_of(lower, upper, center))[0]

        point = (c, g, jnp.float64(weight), center - 0.7, center + 0.8, center)
        places = (0, 1, 3, 4, 5) + ((2,) if weight else ())  # at 0 the weight has a derivative to one side alone
        found = jax.grad(value, argnums=places)(*point)
        for place, gradient in zip(places, found, strict=True):
            for k in np.ndindex(gradient.shape):  # once, with (), for the weight
                ends = []
                for change in (1e-6, -1e-6):
                    moved = list(point)
                    moved[place] = moved[place].at[k].add(change)
                    ends.append(value(*moved))
                assert float(gradient[k]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-5), (place, k)


@settings(max_examples=30)
@given(st.integers(0, 10**6), weights)
def test_max_pooling_has_a_lower_bound_of_its_minimum(seed, weight):
    rng = np.random.default_rng(seed)
    pool = MaxPoolActivation((3, 3, 1), (2, 2), (1, 1), ((0, 0), (0, 0)))
    with jax.enable_x64(True):
        center = jnp.asarray(rng.normal(size=(3, 3, 1)))
        before = known_of(center - rng.uniform(0, 1, (3, 3, 1)), center + rng.uniform(0, 1, (3, 3, 1)), center)
        c, g = jnp.asarray(rng.normal(size=(2, 2, 1))), jnp.asarray(rng.normal(size=(3, 3, 1)))
        value, _ = pool.minimum(c, g, weight, before)
        z = rng.uniform(before.lower, before.upper, (2000, 3, 3, 1))
        outputs = np.asarray(jax.vmap(pool)(jnp.asarray(z)))
        c, g, center, value = (np.asarray(array) for array in (c, g, center, value))
    axes = (1, 2, 3)
    values = (outputs * c).sum(axes) - (z * g).sum(axes) + weight / 2 * ((z - center) ** 2).sum(axes)
    assert value <= values.min() + 1e-12
    assert value > -100


def test_an_activation_without_a_minimum_says_so():
    class Odd(activations.Activation):
        pass

    with jax.enable_x64(True):
        zeros = jnp.zeros(1)
        with pytest.raises(NotImplementedError, match="Odd has no minimum, which the dual needs: define one"):
            Odd().minimum(zeros, zeros, jnp.zeros(()), known_of(zeros, zeros, zeros))

"""Norms without chance: never below the dense SVD, and close to it where the smaller side is small."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import convolution, dense
from lipjax.norms import cohorts, solvers

CONVOLUTIONS = [
    ((3, 3, 2, 4), (1, 1), ((1, 1), (1, 1)), (7, 7, 2)),
    ((4, 4, 2, 3), (2, 2), ((1, 1), (1, 1)), (8, 8, 2)),
    ((3, 2, 2, 3), (2, 3), ((0, 1), (2, 0)), (9, 8, 2)),
    ((5, 5, 1, 2), (3, 3), ((2, 2), (2, 2)), (11, 10, 1)),
]


def random_layer(case, seed):
    rng = np.random.default_rng(seed)
    if case is None:
        return dense(jnp.asarray(rng.normal(size=(30, 12))), jnp.zeros(12), (30,))
    kernel, stride, padding, shape = case
    return convolution(jnp.asarray(rng.normal(size=kernel)), jnp.zeros(kernel[3]), shape, stride, padding)


def masked_norms(layer, seed, count=3):
    """Masks of a few examples, and the SVD norms of what they leave."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.random((count, *shape)) < 0.6 for shape in (layer.out_shape, layer.in_shape))
    rows[0] = False
    matrix, _ = oracles.layer_matrix(layer)
    exact = [oracles.spectral_norm(matrix * np.outer(r, c)) for r, c in zip(rows, columns, strict=True)]
    return jnp.asarray(rows), jnp.asarray(columns), np.array(exact)


@pytest.mark.parametrize("small", [2048, 0])
@pytest.mark.parametrize("case", [None, *CONVOLUTIONS])
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_bounds_are_never_below_the_norm_of_their_own_masked_matrix(case, small, seed):
    with jax.enable_x64(True):
        layer = random_layer(case, seed)
        rows, columns, exact = masked_norms(layer, seed)
        found = cohorts.norms(solvers.Deterministic(small), cohorts.MaskedLayer(layer, rows, columns, None)).sigma
    assert np.all(found >= exact)
    assert found[0] <= 1e-6
    if small:
        assert np.all(found[1:] <= 1.0001 * exact[1:])


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_circulant_bound_is_above_the_whole_convolution_and_near_it(case):
    with jax.enable_x64(True):
        layer = random_layer(case, 0)
        matrix, _ = oracles.layer_matrix(layer)
        bound = layer.whole_norm()
    assert oracles.spectral_norm(matrix) <= bound <= 1.2 * oracles.spectral_norm(matrix)


def test_a_circulant_bound_by_hand():
    # Two taps of 1 in a row: on a circle both add up to 2, for the constant image.
    layer = convolution(np.ones((1, 2, 1, 1)), jnp.zeros(1), (1, 50, 1), (1, 1), ((0, 0), (0, 0)))
    assert layer.whole_norm() == pytest.approx(2, rel=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("small", [2048, 0])
def test_weights_that_are_not_finite_have_an_infinite_bound(bad, small):
    with jax.enable_x64(True):
        layer = convolution(np.full((3, 3, 1, 1), bad), jnp.zeros(1), (4, 4, 1), (1, 1), ((1, 1), (1, 1)))
        masks = jnp.ones((2, 4, 4, 1), bool)
        assert np.isinf(
            cohorts.norms(solvers.Deterministic(small), cohorts.MaskedLayer(layer, masks, masks, None)).sigma
        ).all()


def test_norms_that_are_claimed_to_be_bounds_take_float64():
    narrow = cohorts.whole(dense(jnp.ones((3, 2)), jnp.zeros(2), (3,)))
    with pytest.raises(TypeError, match=r"computes in float32, but level 'deterministic' claims bounds.*astype"):
        cohorts.norms(solvers.Deterministic(), narrow)


def test_what_is_no_norm_proves_nothing():
    class Wrong(solvers.Deterministic):
        def enclose(self, masked, state):
            return dataclasses.replace(super().enclose(masked, state), upper=np.array([-1.0]))

    with jax.enable_x64(True):
        masked = cohorts.whole(dense(jnp.ones((3, 2), jnp.float64), jnp.zeros(2, jnp.float64), (3,)))
        assert cohorts.norms(Wrong(), masked).sigma == np.inf

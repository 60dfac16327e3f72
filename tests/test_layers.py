"""Affine layers against their dense matrices; the rules of the activations by sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import (
    Affine,
    Bilinear,
    ClippedMaxMinActivation,
    ClippedReLUActivation,
    IdentityActivation,
    MaxMinActivation,
    ReLUActivation,
    convolution,
    dense,
)


def _array(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _layers():
    rng = np.random.default_rng(0)
    yield "dense", dense(_array(rng, 7, 5), _array(rng, 5), (7,))
    yield "dense on images", dense(_array(rng, 12, 4), _array(rng, 4), (2, 3, 2))
    for size, stride, padding in [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((4, 4), (2, 2), ((1, 1), (1, 1))),
        ((3, 2), (2, 1), ((2, 0), (0, 1))),
        ((1, 1), (2, 3), ((0, 0), (0, 0))),
        ((4, 4), (2, 2), ((0, 0), (0, 0))),
    ]:
        kernel, bias = _array(rng, *size, 2, 3), _array(rng, 3)
        yield f"conv {size} {stride} {padding}", convolution(kernel, bias, (6, 7, 2), stride, padding)


LAYERS = dict(_layers())


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual).ravel(), np.ravel(expected), rtol=1e-5, atol=1e-5)


def test_apply_is_matrix_plus_bias(layer):
    matrix, bias = oracles.layer_matrix(layer)
    a = _array(np.random.default_rng(1), *layer.in_shape)
    assert layer(a).shape == layer.out_shape
    close(layer(a), matrix @ np.asarray(a, np.float64).ravel() + bias)
    close(layer.linear(a), matrix @ np.asarray(a, np.float64).ravel())


def test_absolute_is_the_matrix_of_absolute_entries(layer):
    matrix, _ = oracles.layer_matrix(layer)
    half = jnp.abs(_array(np.random.default_rng(2), *layer.in_shape))
    close(layer.absolute(half), np.abs(matrix) @ np.asarray(half, np.float64).ravel())


def test_row_norms_are_those_over_the_live_columns_also_at_borders(layer):
    matrix, _ = oracles.layer_matrix(layer)
    rng = np.random.default_rng(3)
    for live in (np.ones(layer.in_shape, bool), rng.random(layer.in_shape) < 0.4, np.zeros(layer.in_shape, bool)):
        close(layer.row_norms(jnp.asarray(live)), np.linalg.norm(matrix * live.ravel(), axis=1))


def test_row_norms_at_a_padded_border_are_smaller_than_the_kernel_norm():
    layer = LAYERS["conv (3, 3) (1, 1) ((1, 1), (1, 1))"]
    norms = layer.row_norms(jnp.ones(layer.in_shape, bool))
    whole = np.sqrt((np.asarray(layer.kernel, np.float64) ** 2).sum((0, 1, 2)))
    close(norms[2, 2], whole)
    assert np.all(np.asarray(norms[0, 0]) < whole - 1e-3)


def test_adjoint_is_the_transposed_matrix(layer):
    matrix, _ = oracles.layer_matrix(layer)
    z = _array(np.random.default_rng(4), *layer.out_shape)
    back = layer.adjoint()(z)
    assert back.shape == layer.in_shape
    close(back, matrix.T @ np.asarray(z, np.float64).ravel())


class OnlyForm(Bilinear):
    def form(self, kernel, a):
        return kernel * a


class OnlyLinear(Affine):
    scale = jnp.array([0.5, -2.0, 0.0, 3.0])

    def linear(self, a):
        return self.scale * a


def test_a_new_layer_with_only_a_form_or_only_its_products_has_everything_else():
    rng = np.random.default_rng(5)
    options = {"bias": jnp.zeros(4), "in_shape": (4,), "out_shape": (4,)}
    for layer, scale in (
        (OnlyForm(kernel=OnlyLinear.scale, **options), np.asarray(OnlyLinear.scale)),
        (OnlyLinear(**options), np.asarray(OnlyLinear.scale)),
    ):
        z = _array(rng, 4)
        close(layer.adjoint()(z), scale * np.asarray(z))
        close(layer.row_norms(jnp.ones(4, bool)), np.abs(scale))
        close(layer.absolute(jnp.abs(z)), np.abs(scale * np.asarray(z)))
        close(layer.absolute_adjoint(jnp.abs(z)), np.abs(scale * np.asarray(z)))
        close(layer.matrix(), np.diag(scale))
        close(layer.row(1), [0, scale[1], 0, 0])


def test_gradient_of_row_norms_is_finite_for_rows_without_live_columns():
    layer = LAYERS["dense"]
    gradient = jax.grad(lambda layer: layer.row_norms(jnp.zeros(7, bool)).sum())(layer)
    assert np.all(np.asarray(gradient.kernel) == 0)


def test_dense_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="7 inputs"):
        dense(jnp.ones((7, 5)), jnp.ones(5), (2, 3))


@pytest.mark.parametrize("in_shape", [(6, 7), (6, 7, 3), (1, 7, 2)])
def test_convolution_that_does_not_fit_is_refused(in_shape):
    with pytest.raises(ValueError, match="kernel of shape"):
        convolution(jnp.ones((3, 3, 2, 4)), jnp.ones(4), in_shape, (1, 1), ((0, 0), (0, 0)))


# The rules of the activations

NEURONS = 24


def _boxes(seed, clip):
    rng = np.random.default_rng(seed)
    mid, half = rng.standard_normal(NEURONS), rng.uniform(0, 1, NEURONS) * rng.integers(0, 2, NEURONS)
    lower, upper = (jnp.asarray(mid + sign * half, jnp.float32) for sign in (-1, 1))
    theta = jnp.asarray(rng.uniform(-0.3, 2 * clip, NEURONS) * rng.integers(0, 2, NEURONS), jnp.float32)
    points = np.asarray(lower) + rng.uniform(0, 1, (60, NEURONS)) * np.asarray(upper - lower)
    points = np.concatenate([points, [np.asarray(lower)], [np.asarray(upper)]])
    points = np.clip(points.astype(np.float32), np.asarray(lower), np.asarray(upper))
    return rng, lower, upper, points, theta


def _activation(kind, theta):
    clips = theta[: NEURONS // 2], -theta[NEURONS // 2 :]
    kinds = {"identity": IdentityActivation(), "relu": ReLUActivation(), "clipped": ClippedReLUActivation(theta)}
    return (kinds | {"maxmin": MaxMinActivation(), "clipped maxmin": ClippedMaxMinActivation(*clips)})[kind]


KINDS = st.sampled_from(["identity", "relu", "clipped", "maxmin", "clipped maxmin"])


def pair_lengths(differences):
    """l2 norms over neuron i and neuron i + NEURONS / 2, which MaxMin couples."""
    return np.sqrt(np.sum(differences.reshape(-1, 2, NEURONS // 2) ** 2, axis=1))


@settings(max_examples=40)
@given(KINDS, st.integers(0, 10**6), st.floats(0.05, 1.5))
def test_a_dead_output_is_exactly_constant_over_the_box(kind, seed, clip):
    _, lower, upper, points, theta = _boxes(seed, clip)
    activation = _activation(kind, theta)
    live = np.asarray(activation.live_outputs(lower, upper))
    assert live.dtype == bool
    outputs = np.stack([np.asarray(activation(jnp.asarray(z))) for z in points])
    assert np.all((outputs == outputs[:1])[:, ~live])


@settings(max_examples=40)
@given(KINDS, st.integers(0, 10**6), st.floats(0.05, 1.5))
def test_dropping_rows_changes_no_output(kind, seed, clip):
    rng, lower, upper, points, theta = _boxes(seed, clip)
    activation = _activation(kind, theta)
    rows = np.asarray(activation.live_rows(lower, upper))
    assert rows.dtype == bool
    for z in points:
        dropped = np.where(rows, z, points[rng.integers(len(points))])
        np.testing.assert_array_equal(activation(jnp.asarray(z)), activation(jnp.asarray(dropped)))


@settings(max_examples=40)
@given(KINDS, st.integers(0, 10**6), st.floats(0.05, 1.5))
def test_boxes_map_corner_to_corner_and_steps_never_grow(kind, seed, clip):
    rng, lower, upper, points, theta = _boxes(seed, clip)
    activation = _activation(kind, theta)
    low, high = np.asarray(activation(lower)), np.asarray(activation(upper))
    outputs = np.stack([np.asarray(activation(jnp.asarray(z))) for z in points])
    assert np.all((low <= outputs) & (outputs <= high))
    shuffled, rows = rng.permutation(len(points)), np.asarray(activation.live_rows(lower, upper))
    moved = pair_lengths((points - points[shuffled]) * rows)  # what is dropped does not count
    assert np.all(pair_lengths(outputs - outputs[shuffled]) <= moved * (1 + 1e-6))


def test_live_is_what_varies_in_a_case_by_case_table():
    lower = jnp.array([-2.0, -1.0, -1.0, 0.5, 1.0, 0.0, 0.0, 2.0])
    upper = jnp.array([-1.0, 0.0, 0.5, 0.9, 3.0, 0.0, 0.1, 3.0])
    relu, clipped = ReLUActivation(), ClippedReLUActivation(jnp.ones(8))
    assert relu.live_rows(lower, upper).tolist() == [False, False, True, True, True, False, True, True]
    assert clipped.live_rows(lower, upper).tolist() == [False, False, True, True, False, False, True, False]
    for activation in (relu, clipped):
        assert activation.live_outputs(lower, upper).tolist() == activation.live_rows(lower, upper).tolist()
    assert IdentityActivation().live_rows(lower, upper).all()
    assert IdentityActivation().live_outputs(lower, upper).all()


def test_rows_and_outputs_of_clipped_maxmin_in_a_case_by_case_table():
    # Pairs: both vary and cross; row 1 above; row 1 above and its max clipped; both above the upper clip; min clipped
    # and row 2 below; min clipped and the rows cross.
    lower1, upper1 = [-1.0, 0.5, 1.5, 2.0, 0.0, -1.5], [1.0, 0.9, 1.9, 3.0, 0.5, 0.5]
    lower2, upper2 = [-0.5, -0.5, -0.5, 1.2, -3.0, -3.0], [0.5, 0.0, 0.5, 1.5, -2.0, -1.2]
    lower, upper = jnp.array(lower1 + lower2), jnp.array(upper1 + upper2)
    activation = ClippedMaxMinActivation(jnp.ones(6), -jnp.ones(6))
    outputs, rows = activation.live_outputs(lower, upper).tolist(), activation.live_rows(lower, upper).tolist()
    assert outputs[:6] == [True, True, False, False, True, True]
    assert outputs[6:] == [True, True, True, True, False, False]
    assert rows[:6] == [True, True, False, False, True, True]
    assert rows[6:] == [True, True, True, True, False, True]


def test_dropping_rows_of_clipped_maxmin_tightens_the_norm_and_dropping_them_like_outputs_would_be_wrong():
    """The published code drops columns only; by the outputs that vary it would drop rows that feed another output."""
    activation = ClippedMaxMinActivation(jnp.ones(1), jnp.full(1, -1.0))
    lower, upper = jnp.array([1.5, -0.5]), jnp.array([2.5, 0.5])  # the max is clipped; the min is row 2
    rows, outputs = activation.live_rows(lower, upper), activation.live_outputs(lower, upper)
    assert rows.tolist() == outputs.tolist() == [False, True]
    matrix = np.array([[3.0, 0.0], [0.0, 0.5]])
    assert oracles.spectral_norm(matrix) == 3.0
    assert oracles.spectral_norm(matrix * np.asarray(rows)[:, None]) == 0.5
    # The other way round the max, in the first place, is fed by row 2, and the min is clipped.
    lower, upper = jnp.array([-2.5, -0.5]), jnp.array([-1.5, 0.5])
    assert activation.live_outputs(lower, upper).tolist() == [True, False]
    assert activation.live_rows(lower, upper).tolist() == [False, True]


def test_neurons_with_theta_at_or_below_zero_are_dead_and_masks_are_booleans():
    activation = ClippedReLUActivation(jnp.array([-1.0, 0.0, 1.0]))
    lower, upper = jnp.full(3, -1.0), jnp.full(3, 0.5)
    for mask in (activation.live_rows(lower, upper), activation.live_outputs(lower, upper)):
        assert mask.dtype == bool
        assert mask.tolist() == [False, False, True]
    assert activation(jnp.full(3, 9.0)).tolist() == [-1.0, 0.0, 1.0]
    assert activation(jnp.full(3, -9.0)).tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "activation",
    [
        IdentityActivation(),
        ReLUActivation(),
        ClippedReLUActivation(jnp.full(2, 1.0)),
        MaxMinActivation(),
        ClippedMaxMinActivation(*jnp.ones((2, 1))),
    ],
)
def test_nan_bounds_come_out_live(activation):
    nan = jnp.full(2, jnp.nan)
    assert activation.live_rows(nan, nan).all()
    assert activation.live_outputs(nan, nan).all()


def test_a_nan_clip_comes_out_live():
    activation = ClippedReLUActivation(jnp.full(2, jnp.nan))
    assert activation.live_rows(jnp.full(2, -1.0), jnp.full(2, 1.0)).all()

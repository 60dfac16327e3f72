"""Rounding: boxes against exact arithmetic, and the error of float32 inference against float64."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import Block, Identity, Network, bounds, convolution, dense, l2_ball, rounding

SEEDS = st.integers(0, 10**6)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def test_gamma_by_hand():
    assert rounding.gamma(1, 0.25) == pytest.approx(1 / 3)
    assert rounding.gamma(3, 0.125) == pytest.approx(3 / 5)
    assert rounding.gamma(3, rounding.UNIT32) == pytest.approx(3 / (2**24 - 3))
    assert np.finfo(np.float64).eps / 2 == rounding.UNIT64
    assert np.finfo(np.float32).eps / 2 == rounding.UNIT32
    assert np.finfo(np.float32).tiny == rounding.SMALLEST32


def test_so_many_terms_that_nothing_can_be_said_are_refused():
    with pytest.raises(ValueError, match="8388608 terms are too many"):
        rounding.gamma(2**23, rounding.UNIT32)


def test_gamma_covers_a_sum_whose_every_addition_rounds_down():
    # 1 + 2^-25 + 2^-25 + ... in float32 stays 1: the error is (n - 1) 2^-25 of a sum of about 1
    terms = np.append(1, np.full(999, 2.0**-25)).astype(np.float32)
    computed = functools.reduce(lambda a, b: np.float32(a + b), terms)
    exact = terms.astype(np.float64).sum()
    assert computed == 1
    assert 1e-5 < exact - computed <= rounding.gamma(1000, rounding.UNIT32) * exact


# The widened box, in exact arithmetic

INPUTS, OUTPUTS = 5, 4


@jax.jit
def _boxes(layer, center, eps):
    entering = l2_ball(center, eps)
    before = bounds.preactivation(layer, entering)
    return before.box, rounding.widen(before, layer, entering, 0.0).box


def boxes(layer, center, eps):
    """The box after a layer as computed, and widened, as arrays (2, outputs)."""
    with jax.enable_x64(True):
        plain, wide = _boxes(in_float64(layer), center, jnp.asarray(eps, jnp.float64))
    assert wide[0].dtype == np.float64
    return np.asarray(plain), np.asarray(wide)


def exact_image(layer, point):
    """``W a + b`` of rational entries, exactly."""
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    columns = [[Fraction(float(w)) for w in column] for column in kernel.T]
    return [
        sum((w * a for w, a in zip(column, point, strict=True)), Fraction(float(b)))
        for column, b in zip(columns, bias, strict=True)
    ]


def exact_points(center, eps, directions):
    """The center, and the points of the sphere around it in some directions but for a relative 1e-25 inwards."""
    center, eps = [Fraction(float(c)) for c in center], Fraction(float(eps))
    points = [center]
    for direction in directions:
        direction = [Fraction(float(d)) for d in direction]
        square = sum(d * d for d in direction)
        length = Fraction(math.isqrt(int(square * 10**100)) + 1, 10**50)
        points.append([c + eps * d / length for c, d in zip(center, direction, strict=True)])
        assert sum((p - c) ** 2 for p, c in zip(points[-1], center, strict=True)) <= eps**2
    return points


def random_layer(seed, scale):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((INPUTS, OUTPUTS)) * scale
    layer = dense(kernel, rng.standard_normal(OUTPUTS), (INPUTS,))
    directions = [*kernel.T, *-kernel.T, *np.eye(INPUTS), *rng.standard_normal((4, INPUTS))]
    return layer, rng.uniform(0, 1, INPUTS), directions


def misses(layer, points, box):
    """How many exact outputs of the points lie outside of a box."""
    lower, upper = ([Fraction(float(v)) for v in bound] for bound in box)
    images = [exact_image(layer, point) for point in points]
    return sum(not low <= z <= high for image in images for low, z, high in zip(lower, image, upper, strict=True))


@settings(max_examples=40)
@given(SEEDS, st.sampled_from([1e-8, 1.0, 1e8]), st.sampled_from([0.0, 1e-9, 0.1, 1e9]))
def test_widened_boxes_contain_every_exact_output_of_the_ball(seed, scale, eps):
    layer, center, directions = random_layer(seed, scale)
    _, wide = boxes(layer, center, eps)
    assert misses(layer, exact_points(center, eps, directions), wide) == 0


def test_boxes_that_are_not_widened_miss_exact_outputs():
    missed = 0
    for seed in range(10):
        layer, center, directions = random_layer(seed, 1.0)
        plain, _ = boxes(layer, center, 0.1)
        missed += misses(layer, exact_points(center, 0.1, directions), plain)
    assert missed > 0


def test_widening_is_far_below_anything_that_matters():
    layer, center, _ = random_layer(0, 1.0)
    plain, wide = boxes(layer, center, 0.1)
    assert np.all(wide[0] < plain[0])
    assert np.all(wide[1] > plain[1])
    np.testing.assert_allclose(wide, plain, atol=1e-13)


def test_a_ball_without_a_box_has_nothing_to_widen():
    layer, center, _ = random_layer(0, 1.0)
    entering = l2_ball(jnp.asarray(center, jnp.float32), 0.1).without_box()
    layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer)
    before = bounds.preactivation(layer, entering)
    assert rounding.widen(before, layer, entering, 0.0) is before


# Float32 inference


@jax.jit
def _errors(network, center, eps, sigmas):
    """Bounds of the error of the features, and of each logit, by the recursion over the layers."""
    region, error = l2_ball(center, eps), jnp.zeros(())
    for block, sigma in zip(network.blocks, sigmas, strict=True):
        entering = region.reshape(block.affine.in_shape)
        norm = rounding.absolute_norm(block.affine)
        error = rounding.inference_error(error, block.affine, entering, sigma, norm)
        before = rounding.widen(bounds.preactivation(block.affine, entering), block.affine, entering, error)
        region = bounds.activate(block.activation, before, sigma)
    return error, rounding.logit_errors(error, network.head, region.reshape(network.head.in_shape))


def errors(network, center, eps):
    sigmas = [oracles.spectral_norm(matrix) * (1 + 1e-12) for matrix, _ in oracles.DenseNetwork(network).layers]
    with jax.enable_x64(True):
        error, logits = _errors(in_float64(network), in_float64(center), jnp.asarray(eps, jnp.float64), sigmas)
    assert logits.dtype == np.float64
    return float(error), np.asarray(logits)


@jax.jit
def _inference(network, points):
    return jax.vmap(network.features)(points), network(points)


def float32_points(center, eps, seed):
    """Float32 points of the ball (100, ...)."""
    points = oracles.ball_points(np.random.default_rng(seed), center.astype(np.float64).ravel(), eps * (1 - 1e-5), 100)
    points = points.astype(np.float32)
    assert np.all(np.linalg.norm(points - center.ravel().astype(np.float64), axis=1) <= eps)
    return points


def deviations(network, points):
    """By how much float32 features (l2) and logits are off."""
    features, logits = _inference(network, jnp.asarray(points).reshape(-1, *network.input_shape))
    assert features.dtype == logits.dtype == np.float32
    exact, points = oracles.DenseNetwork(network), points.astype(np.float64)
    off = np.asarray(features, np.float64).reshape(len(points), -1) - exact.features(points)
    return np.linalg.norm(off, axis=1), np.abs(np.asarray(logits, np.float64) - exact.logits(points))


@settings(max_examples=30)
@given(st.sampled_from(["dense clipped", "conv relu"]), SEEDS, st.floats(0.3, 10.0), st.sampled_from([0.01, 0.3, 2.0]))
def test_float32_inference_is_within_the_bound_anywhere_in_the_ball(kind, seed, scale, eps):
    network = oracles.random_network(kind, seed, scale=scale)
    center = oracles.random_inputs(network, seed, 1)[0]
    error, logit_errors = errors(network, center, eps)
    features_off, logits_off = deviations(network, float32_points(center, eps, seed))
    assert features_off.max() <= error
    assert np.all(logits_off.max(axis=0) <= logit_errors)


@pytest.mark.parametrize("kind", ["dense clipped", "conv relu"])
def test_the_bound_of_a_small_network_is_small(kind):
    for seed in range(10):
        network = oracles.random_network(kind, seed)
        center = oracles.random_inputs(network, seed, 1)[0]
        error, logit_errors = errors(network, center, 0.1)
        features_off, _ = deviations(network, float32_points(center, 0.1, seed))
        assert features_off.max() > 0
        assert error < 1e-4
        assert logit_errors.max() < 1e-4


def cancelling(terms):
    """Layers that add ``terms`` ones to 2^24 one by one and take 2^24 away: float32 may lose them all."""
    kernel = jnp.concatenate([jnp.array([2.0**24]), jnp.ones(terms), jnp.array([-(2.0**24)])])[:, None]
    blocks = (Block(dense(kernel, jnp.zeros(1), (terms + 2,)), Identity()),)
    return Network(blocks, dense(jnp.ones((1, 2)), jnp.zeros(2), (1,)))


def test_the_bound_covers_a_sum_that_cancels():
    network, ones = cancelling(6), np.ones((1, 8), np.float32)
    kernel = np.asarray(network.blocks[0].affine.kernel)[:, 0]
    in_order = functools.reduce(lambda a, b: np.float32(a + b), kernel)
    off = 6 - float(in_order)  # what float32 loses when it adds in order
    assert off == 6
    error, logit_errors = errors(network, ones[0], 0.0)
    assert off <= error <= 100
    assert np.all(logit_errors >= off)
    features_off, logits_off = deviations(network, ones)
    assert np.all(features_off <= error)
    assert np.all(logits_off[0] <= logit_errors)


def test_an_error_before_a_layer_grows_by_no_less_than_its_norm():
    network = oracles.random_network("dense clipped", 3)
    affine = network.blocks[0].affine
    sigma = oracles.spectral_norm(oracles.layer_matrix(affine)[0])
    with jax.enable_x64(True):
        layer, entering = in_float64(affine), l2_ball(jnp.zeros(5, jnp.float64), 0.1)
        norm = rounding.absolute_norm(layer)
        none, some = (rounding.inference_error(jnp.asarray(e), layer, entering, sigma, norm) for e in (0.0, 1.0))
    assert sigma < float(some) - float(none) < sigma + 1e-4


def test_magnitude_by_hand():
    layer = dense(jnp.array([[2.0], [-3.0]]), jnp.array([-5.0]), (2,))
    region = l2_ball(jnp.array([1.0, -1.0]), 0.5)  # largest magnitudes 1.5 and 1.5
    assert float(rounding.magnitude(layer, region)[0]) == pytest.approx(2 * 1.5 + 3 * 1.5 + 5)


# The norm of |W|


@pytest.mark.parametrize("seed", range(3))
def test_absolute_norm_is_at_least_that_of_the_absolute_matrix(seed):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 2, 3)), jnp.float32)
    for layer in (
        dense(jnp.asarray(rng.standard_normal((6, 15)), jnp.float32), jnp.zeros(15), (6,)),
        convolution(kernel, jnp.zeros(3), (4, 5, 2), (2, 1), ((1, 0), (0, 1))),
    ):
        exact = oracles.spectral_norm(np.abs(oracles.layer_matrix(layer)[0]))
        with jax.enable_x64(True):
            bound = float(jax.jit(rounding.absolute_norm)(in_float64(layer)))
        assert exact <= bound <= 2 * exact


def test_absolute_norm_of_a_constant_matrix_by_hand():
    layer = dense(-2 * jnp.ones((3, 4)), jnp.zeros(4), (3,))
    assert float(rounding.absolute_norm(layer)) == pytest.approx(2 * math.sqrt(12), rel=1e-6)

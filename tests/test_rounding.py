"""Rounding: boxes against exact arithmetic, and float32 inference against the region of the float64 pass."""

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

from lipjax import (
    EXACT,
    FLOAT32,
    ClippedReLUActivation,
    Given,
    Graph,
    IdentityActivation,
    ReLUActivation,
    Sum,
    box_and_ball,
    chain,
    convolution,
    dense,
    floating_point,
    l2_ball,
    propagate,
)
from lipjax.bounds import rounding
from lipjax.bounds.arithmetic import Float32Inference
from lipjax.certification.certificates import certificate

SEEDS = st.integers(0, 10**6)


def in_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def test_gamma_by_hand():
    assert floating_point.gamma(1, 0.25) == pytest.approx(1 / 3)
    assert floating_point.gamma(3, 0.125) == pytest.approx(3 / 5)
    assert floating_point.gamma(3, floating_point.UNIT32) == pytest.approx(3 / (2**24 - 3))
    assert np.finfo(np.float64).eps / 2 == floating_point.UNIT64
    assert np.finfo(np.float32).eps / 2 == floating_point.UNIT32
    assert np.finfo(np.float32).tiny == rounding.SMALLEST32


def test_so_many_terms_that_nothing_can_be_said_are_refused():
    with pytest.raises(ValueError, match="8388608 terms are too many"):
        floating_point.gamma(2**23, floating_point.UNIT32)


def test_gamma_covers_a_sum_whose_every_addition_rounds_down():
    # 1 + 2^-25 + 2^-25 + ... in float32 stays 1: the error is (n - 1) 2^-25 of a sum of about 1
    terms = np.append(1, np.full(999, 2.0**-25)).astype(np.float32)
    computed = functools.reduce(lambda a, b: np.float32(a + b), terms)
    exact = terms.astype(np.float64).sum()
    assert computed == 1
    assert 1e-5 < exact - computed <= floating_point.gamma(1000, floating_point.UNIT32) * exact


# The widened box, in exact arithmetic

INPUTS, OUTPUTS = 5, 4


@jax.jit
def _boxes(layer, center, eps):
    head = dense(jnp.ones((OUTPUTS, 1)), jnp.zeros(1), (OUTPUTS,))
    network, region = chain(layer, IdentityActivation(), head), l2_ball(center[None], eps)
    found = (propagate(network, region, Given(jnp.ones(1)), arithmetic) for arithmetic in (EXACT, FLOAT32))
    return [[bound[0] for bound in bounds.before[0].box] for bounds in found]


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
    np.testing.assert_allclose(wide, plain, atol=1e-5)


# Float32 inference, in the region of the certification pass


def features_region(network, center, eps):
    """The region of the features as the certifier has it, with exact norms of the masked layers; and logit errors."""
    with jax.enable_x64(True):
        region = l2_ball(jnp.asarray(center, jnp.float64)[None], eps)
        matrices = [oracles.layer_matrix(layer)[0] for layer in network.layers]

        def sigma(place, layer, rows, columns):
            masked = matrices[place] * np.asarray(rows).reshape(-1, 1) * np.asarray(columns).reshape(1, -1)
            return np.full(1, oracles.spectral_norm(masked) * (1 + 1e-12)), None

        found = propagate(in_float64(network), region, sigma, FLOAT32)
        assert found.slack.logits.dtype == np.float64
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), (found.features, found.slack.logits))


@jax.jit
def _inference(network, points):
    return jax.vmap(network.features)(points), network(points)


def inference(network, points):
    """Features of points in float32 and in float64, and logits in float32."""
    features, logits = _inference(network, jnp.asarray(points).reshape(-1, *network.input_shape))
    assert features.dtype == logits.dtype == np.float32
    computed = np.asarray(features, np.float64).reshape(len(points), -1)
    return computed, oracles.DenseNetwork(network).features(points.astype(np.float64)), np.asarray(logits, np.float64)


def float32_points(center, eps, seed):
    """The center and float32 points of the ball (101, ...)."""
    center = center.astype(np.float64).ravel()
    points = oracles.ball_points(np.random.default_rng(seed), center, eps * (1 - 1e-5), 100).astype(np.float32)
    inside = np.linalg.norm(points - center, axis=1) <= eps  # all of them, unless eps is below the spacing of float32
    assert inside.all() or eps < 1e-3
    return np.concatenate([center.astype(np.float32)[None], points[inside]])


def misfits(region, features):
    """How many features are outside of the box, and of the ball."""
    lower, upper, center = (np.ravel(bound) for bound in (region.lower, region.upper, region.center))
    outside = (features < lower) | (features > upper)
    return outside.sum() + (np.linalg.norm(features - center, axis=1) > region.radius).sum()


@settings(max_examples=30)
@given(
    st.sampled_from(["dense clipped", "conv relu"]),
    SEEDS,
    st.floats(0.3, 10.0),
    st.sampled_from([0.0, 1e-6, 0.01, 0.3, 2.0]),
)
def test_float32_features_are_in_the_region_anywhere_in_the_ball(kind, seed, scale, eps):
    network = oracles.random_network(kind, seed, scale=scale)
    center = oracles.random_inputs(network, seed, 1)[0]
    region, logit_errors = features_region(network, center, eps)
    computed, _, logits = inference(network, float32_points(center, eps, seed))
    assert misfits(region, computed) == 0
    dead = ~region.live.ravel()
    assert np.all(computed[:, dead] == region.center.ravel()[dead])
    matrix, bias = oracles.DenseNetwork(network).head
    assert np.all(np.abs(logits - (computed @ matrix.T + bias)) <= logit_errors)


@pytest.mark.parametrize("kind", ["dense clipped", "conv relu"])
def test_what_rounding_adds_to_the_radius_is_needed_and_small(kind):
    left = 0
    for seed in range(10):
        network = oracles.random_network(kind, seed)
        center = oracles.random_inputs(network, seed, 1)[0]
        region, logit_errors = features_region(network, center, 0.0)
        computed, exact, _ = inference(network, center.reshape(1, -1))
        assert 0 < region.radius < 1e-4
        assert logit_errors.max() < 1e-4
        assert misfits(region, computed) == misfits(region, exact) == 0
        left += np.linalg.norm(computed - exact) > 0  # out of a ball of radius eps * norms, which is 0
    assert left > 5


def nearly_dead(seed):
    """A neuron of 60 inputs that are one, whose exact preactivation is just below or above zero."""
    kernel = np.random.default_rng(seed).standard_normal((60, 1)).astype(np.float32)
    bias = -np.asarray([kernel.astype(np.float64).sum()]).astype(np.float32)
    layer = dense(jnp.asarray(kernel), jnp.asarray(bias), (60,))
    return chain(layer, ReLUActivation(), dense(jnp.ones((1, 2)), jnp.zeros(2), (1,)))


def test_a_neuron_that_rounding_revives_is_not_dead():
    revived, ones = 0, np.ones((1, 60), np.float32)
    for seed in range(40):
        network = nearly_dead(seed)
        region, _ = features_region(network, ones[0], 0.0)
        computed, exact, _ = inference(network, ones)
        assert region.live.all()
        assert misfits(region, computed) == misfits(region, exact) == 0
        revived += bool(exact[0, 0] == 0 < computed[0, 0])
    assert revived > 5


def test_a_sum_of_constants_that_float32_rounds_counts_as_varying():
    graph = Graph((1,))

    def constant(place, inputs, theta):
        layer = graph.add(dense(jnp.zeros((inputs, 2)), jnp.array([5.0, -5.0]), (inputs,)), place)
        return graph.add(ClippedReLUActivation(jnp.full(2, theta, jnp.float32)), layer)

    with jax.enable_x64(True):
        first = constant(graph.input, 1, 0.1)
        graph.add(Sum(), first, constant(first, 2, 0.2))
        network = in_float64(graph.network(dense(jnp.ones((2, 2)), jnp.zeros(2), (2,))))
        found = propagate(network, l2_ball(jnp.zeros((1, 1)), 0.1), Given(jnp.zeros(2)), FLOAT32)
        joined = jax.tree.map(np.asarray, found.features)
    assert not np.any(found.live)
    np.testing.assert_array_equal(joined.live, [[True, False]])  # 0.1 + 0.2 is rounded, 0 + 0 is not
    computed, exact = float(np.float32(0.1) + np.float32(0.2)), float(np.float32(0.1)) + float(np.float32(0.2))
    assert computed != exact
    for value in (computed, exact):
        assert joined.lower[0, 0] <= value <= joined.upper[0, 0]
        assert abs(value - joined.center[0, 0]) <= joined.radius[0]


def cancelling(terms):
    """Layers that add ``terms`` ones to 2^24 one by one and take 2^24 away: float32 may lose them all."""
    kernel = jnp.concatenate([jnp.array([2.0**24]), jnp.ones(terms), jnp.array([-(2.0**24)])])[:, None]
    return chain(dense(kernel, jnp.zeros(1), (terms + 2,)), dense(jnp.ones((1, 2)), jnp.zeros(2), (1,)))


def test_the_region_covers_a_sum_that_cancels():
    network, ones = cancelling(6), np.ones(8, np.float32)
    kernel = np.asarray(network.layers[0].kernel)[:, 0]
    in_order = functools.reduce(lambda a, b: np.float32(a + b), kernel)
    off = 6 - float(in_order)  # what float32 loses when it adds in order
    assert off == 6
    region, _ = features_region(network, ones, 0.0)
    assert off <= region.radius <= 100
    assert misfits(region, np.array([[6.0], [float(in_order)]])) == 0


def test_what_was_rounded_before_a_layer_grows_by_the_norm_of_the_masked_layer():
    # The second of two inputs ends in a dead neuron of weight 1000: what was rounded there does not come through.
    plain = dense(jnp.eye(2), jnp.zeros(2), (2,))
    second = dense(jnp.array([[1.0, 0.0], [0.0, 1000.0]]), jnp.array([0.0, -2e5]), (2,))
    network = chain(plain, second, ReLUActivation(), plain)
    region, _ = features_region(network, np.array([1.0, 100.0], np.float32), 0.0)
    np.testing.assert_array_equal(region.live, [True, False])
    assert 100 * floating_point.UNIT32 < region.radius < 1000 * floating_point.UNIT32


class Poisoned(Float32Inference):
    def ball(self, layer, entering, rows, radius):
        return jnp.nan * radius


def test_a_rounding_that_is_not_a_number_certifies_nothing():
    layer = dense(jnp.eye(2), jnp.zeros(2), (2,))
    with jax.enable_x64(True):
        network = in_float64(chain(layer, ReLUActivation(), layer))
        region = l2_ball(jnp.array([[0.9, 0.1]]), 0.01)
        for arithmetic in (FLOAT32, Poisoned()):
            found = propagate(network, region, Given(jnp.ones(1)), arithmetic)
            bounds = jax.tree.map(lambda leaf: leaf[0], found)
            margins = box_and_ball(network.head, bounds.features, 0) - bounds.slack.logits
            certified = certificate(network, bounds, margins, 0, "deterministic").certified
            assert bool(certified) == (arithmetic == FLOAT32)


def test_magnitude_by_hand():
    layer = dense(jnp.array([[2.0], [-3.0]]), jnp.array([-5.0]), (2,))
    region = jax.tree.map(lambda leaf: leaf[0], l2_ball(jnp.array([[1.0, -1.0]]), 0.5))  # magnitudes up to 1.5
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
            bound = float(jax.jit(lambda layer: layer.absolute_norm())(in_float64(layer)))
        assert exact <= bound <= 2 * exact


def test_absolute_norm_of_a_constant_matrix_by_hand():
    layer = dense(-2 * jnp.ones((3, 4)), jnp.zeros(4), (3,))
    assert float(layer.absolute_norm()) == pytest.approx(2 * math.sqrt(12), rel=1e-6)

"""One pass of a region: boxes, masks, Lipschitz constants and certificates against float64 oracles and by sampling."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import (
    ClippedReLUActivation,
    Estimate,
    Given,
    WarmStarted,
    certify,
    chain,
    dense,
    l2_ball,
    propagate,
)
from lipjax.bounds.margins import box_and_ball, pairwise_lipschitz
from lipjax.certification.certificates import certificate

TIGHT = Estimate(jax.random.key(3), tol=1e-5, max_iters=3000)


class Exact:
    """The norm of a layer by the SVD of its dense matrix: nothing of what a pass with it proves is an estimate."""

    def __call__(self, place, layer, rows, columns):
        kept = rows.reshape(len(rows), -1, 1) & columns.reshape(len(columns), 1, -1)
        return jnp.linalg.svd(jnp.where(kept, layer.matrix()[None], 0), compute_uv=False)[:, 0], None


@jax.jit
def bounds_of(network, x, eps):
    return propagate(network, l2_ball(x, eps), Exact())


@oracles.jit
def estimates_of(network, x, eps):
    """Local and global constants with norms by power iteration."""
    return local_constants(network, x, eps, TIGHT), jnp.prod(lipjax.whole_norms(network.layers, TIGHT)[0])


def local_constants(network, x, eps, ask):
    """Local Lipschitz constants (B,) with norms of any kind."""
    return propagate(network, l2_ball(x, eps), ask).lipschitz


@jax.jit
def margins_of(network, features, label):
    """Worst margins (B, classes) by box and ball, and by the pairwise Lipschitz constant."""
    return tuple(
        jax.vmap(lambda region, label, f=f: f(network.head, region, label))(features, label)
        for f in (box_and_ball, pairwise_lipschitz)
    )


KINDS = st.sampled_from(oracles.KINDS)
SEEDS = st.integers(0, 10**6)
EPS = st.floats(0.0, 2.0) | st.floats(1e-3, 0.1)
SHIFTS = st.sampled_from([0.0, -0.3, 0.3])
networks = st.builds(
    lambda kind, seed, scale, shift, clip: oracles.random_network(kind, seed, scale=scale, shift=shift, clip=clip),
    KINDS,
    SEEDS,
    st.floats(0.3, 3.0),
    SHIFTS,
    st.floats(0.1, 1.0),
)


# The example of the paper's appendix A.1 with a second class of zeros: layers diag(3, 2, 1), clips 1, zero biases. At
# x = (1, -1, 0) and eps 0.1 the first neuron is clipped and the second one is below zero, so only the third varies.


def _toy():
    kernel, zero = jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.zeros(3)
    block = dense(kernel, zero, (3,)), ClippedReLUActivation(jnp.ones(3))
    head = dense(jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), jnp.zeros(2), (3,))
    return chain(*block, *block, head), jnp.array([[1.0, -1.0, 0.0]])


def test_paper_example_is_locally_1_and_globally_9():
    network, x = _toy()
    local, everywhere = estimates_of(network, x, 0.1)
    assert float(local[0]) == pytest.approx(1.0, rel=1e-5)
    assert float(everywhere) == pytest.approx(9.0, rel=1e-4)
    bounds = bounds_of(network, x, 0.1)
    assert bounds.live[0][0].tolist() == [False, False, True]
    assert bounds.live[1][0].tolist() == [False, False, True]
    np.testing.assert_allclose(bounds.before[0].lower[0], [2.7, -2.2, -0.1], atol=1e-6)
    np.testing.assert_allclose(bounds.before[0].upper[0], [3.3, -1.8, 0.1], atol=1e-6)
    np.testing.assert_allclose(bounds.before[1].upper[0], [3.0, 0.0, 0.1], atol=1e-6)


def test_paper_example_with_its_last_layer_is_locally_1_and_globally_9_sqrt_3():
    network, x = _toy()
    bounds = bounds_of(network, x, 0.1)
    last = np.asarray(network.head.kernel, np.float64)[:, :1]
    local = np.linalg.norm(last * np.asarray(bounds.live[-1][0])[:, None], 2) * float(bounds.lipschitz[0])
    assert local == pytest.approx(1.0, rel=1e-5)
    everywhere = np.linalg.norm(last, 2) * float(estimates_of(network, x, 0.1)[1])
    assert everywhere == pytest.approx(9 * np.sqrt(3), rel=1e-4)
    # the margin drops by what the one live feature can do, 0.1, where the global bound would allow 1.56
    _, pairwise = margins_of(network, bounds.features, jnp.array([0]))
    assert float(pairwise[0, 1]) == pytest.approx(1.0 - 0.1, rel=1e-5)


# Local against global, and against the SVD of the matrices with the rows and columns that a float64 pass drops


@settings(max_examples=40)
@given(networks, SEEDS, EPS)
def test_local_is_never_above_global(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    local = np.asarray(bounds_of(network, x, eps).lipschitz)
    exact = np.prod([oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers])
    assert np.all(local <= exact * (1 + 1e-5))


@settings(max_examples=20)
@given(st.sampled_from(["dense clipped", "conv relu"]), SEEDS, st.floats(0.3, 3.0), SHIFTS, SEEDS, EPS)
def test_converged_estimates_are_those_of_the_svd_and_never_above_global(kind, weights, scale, shift, seed, eps):
    network = oracles.random_network(kind, weights, scale=scale, shift=shift)
    x = oracles.random_inputs(network, seed, 3)
    local, everywhere = (np.asarray(a, np.float64) for a in estimates_of(network, x, eps))
    exact = np.prod([oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers])
    assert everywhere == pytest.approx(exact, rel=1e-3)
    assert np.all(local <= everywhere * (1 + 1e-4))
    np.testing.assert_allclose(local, bounds_of(network, x, eps).lipschitz, rtol=5e-3, atol=1e-6)


@settings(max_examples=40)
@given(networks, SEEDS, EPS)
def test_masks_boxes_and_norms_are_those_of_the_float64_pass(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    bounds = bounds_of(network, x, eps)
    exact = oracles.DenseNetwork(network)
    for i in range(3):
        blocks, nearest = exact.regions(x[i].astype(np.float64).ravel(), eps)
        assume(nearest > 1e-4)  # no neuron so near its kink that float32 may decide otherwise
        for k, (lower, upper, live, sigma) in enumerate(blocks):
            before = bounds.before[k]
            np.testing.assert_array_equal(np.asarray(bounds.live[k][i]).ravel(), live)
            scale = 1 + np.abs(upper).max() + np.abs(lower).max()
            np.testing.assert_allclose(np.asarray(before.lower[i]).ravel(), lower, rtol=0, atol=3e-4 * scale)
            np.testing.assert_allclose(np.asarray(before.upper[i]).ravel(), upper, rtol=0, atol=3e-4 * scale)
            assert float(bounds.sigmas[i, k]) == pytest.approx(sigma, rel=5e-4, abs=1e-6)
        product = np.prod([sigma for *_, sigma in blocks])
        assert float(bounds.lipschitz[i]) == pytest.approx(product, rel=1e-3, abs=1e-6)
        assert float(bounds.features.radius[i]) == pytest.approx(eps * product, rel=1e-3, abs=1e-6)
        assert bool(bounds.features.finite[i])


@settings(max_examples=20)
@given(networks, SEEDS)
def test_eps_zero_gives_a_point_with_the_product_at_its_activation_pattern(network, seed):
    x = oracles.random_inputs(network, seed, 3)
    bounds = bounds_of(network, x, 0.0)
    exact = oracles.DenseNetwork(network)
    assert np.all(np.asarray(bounds.features.radius) == 0)
    assert np.asarray(bounds.features.finite).all()
    np.testing.assert_array_equal(bounds.features.upper, bounds.features.lower)
    np.testing.assert_allclose(bounds.features.lower, bounds.features.center, atol=1e-6)
    for i in range(3):
        _, nearest = exact.regions(x[i].astype(np.float64).ravel(), 0.0)
        assume(nearest > 1e-4)
        before, _ = exact.activations(x[i].astype(np.float64).ravel())
        product, live = 1.0, np.ones(x[i].size, bool)
        for (matrix, _), z, rule in zip(exact.layers, before, exact.rules, strict=True):
            rows, new, _ = rule.matter(z, z)
            product, live = product * oracles.spectral_norm(matrix * np.outer(rows, live)), new
        assert float(bounds.lipschitz[i]) == pytest.approx(product, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["dense relu", "conv relu"])
def test_a_huge_ball_gives_the_global_constant(kind):
    network = oracles.random_network(kind, 5)
    local = bounds_of(network, oracles.random_inputs(network, 0, 3), 1e4).lipschitz
    exact = np.prod([oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers])
    np.testing.assert_allclose(local, exact, rtol=1e-5)


def test_a_larger_ball_never_has_a_smaller_constant():
    for kind in oracles.KINDS:
        network = oracles.random_network(kind, 6)
        x = oracles.random_inputs(network, 1, 3)
        values = [np.asarray(bounds_of(network, x, eps).lipschitz) for eps in (0.0, 0.01, 0.05, 0.2, 0.6, 2.0)]
        assert all(np.all(a <= b * (1 + 1e-5)) for a, b in itertools.pairwise(values))


# Soundness by sampling


def _samples(network, x, eps, seed, count=80):
    """Points of the ball around one input, and along the directions to which its features react the most."""
    exact, rng = oracles.DenseNetwork(network), np.random.default_rng(seed)
    center = x.astype(np.float64).ravel()
    jacobian = exact.jacobian(center)
    top = np.linalg.svd(jacobian)[2][:2] if jacobian.any() else None
    directions = jacobian if top is None else np.concatenate([jacobian, top])
    return exact, center, oracles.ball_points(rng, center, eps, count, directions)


@settings(max_examples=40)
@given(networks, SEEDS, EPS)
def test_every_activation_of_the_ball_lies_in_box_and_ball(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    bounds = bounds_of(network, x, eps)
    for i in range(3):
        exact, center, points = _samples(network, x[i], eps, seed)
        before, after = exact.activations(points)
        before_center, after_center = exact.activations(center)
        reach = eps
        for k, region in enumerate(bounds.before):
            lower, upper = (np.asarray(a[i], np.float64).ravel() for a in (region.lower, region.upper))
            tolerance = 1e-5 * (1 + np.abs(before[k]).max())
            assert np.all(before[k] >= lower - tolerance)
            assert np.all(before[k] <= upper + tolerance)
            assert np.all(np.abs(np.asarray(region.center[i]).ravel() - before_center[k]) <= tolerance)
            dead = ~np.asarray(bounds.live[k][i]).ravel()
            assert np.all(np.abs(after[k] - after_center[k])[:, dead] <= tolerance)
            reach = reach * float(bounds.sigmas[i, k])
            assert np.all(np.linalg.norm(after[k] - after_center[k], axis=1) <= reach * (1 + 1e-4) + tolerance)
        assert reach == pytest.approx(float(bounds.features.radius[i]), rel=1e-4, abs=1e-9)


@settings(max_examples=40)
@given(networks, SEEDS, EPS.filter(lambda eps: eps > 0))
def test_features_of_any_two_points_are_within_the_local_constant(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    constants = np.asarray(bounds_of(network, x, eps).lipschitz, np.float64)
    for i in range(3):
        exact, center, points = _samples(network, x[i], eps, seed)
        points = np.concatenate([points, [center]])
        rng = np.random.default_rng(seed + 1)
        for other in (points[rng.permutation(len(points))], points[::-1], np.broadcast_to(center, points.shape)):
            distance = np.linalg.norm(points - other, axis=1)
            change = np.linalg.norm(exact.features(points) - exact.features(other), axis=1)
            assert np.all(change <= constants[i] * distance * (1 + 1e-4) + 1e-9)


@jax.jit
def _pgd(network, x, label, eps, num_steps):
    return lipjax.pgd(network, x, label, eps, jax.random.key(1), num_steps=num_steps)


def _attacked(network, x, label, eps):
    """PGD on the networks with clips; the others are searched along their Jacobians alone, which spares compiling."""
    clipped = isinstance(network.activations[0], ClippedReLUActivation)
    points = _pgd(network, jnp.asarray(x), jnp.asarray(label, jnp.int32), eps, 20) if clipped else x
    return np.asarray(points, np.float64)


@settings(max_examples=40)
@given(networks, SEEDS, EPS)
def test_no_point_of_the_ball_has_logits_below_the_worst_margins(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    exact = oracles.DenseNetwork(network)
    label = np.argmax(exact.logits(x.reshape(3, -1).astype(np.float64)), axis=1)
    features = bounds_of(network, x, eps).features
    worst = [np.asarray(m, np.float64) for m in margins_of(network, features, jnp.asarray(label, jnp.int32))]
    attacked = _attacked(network, x, label, eps)
    for i in range(3):
        _, center, points = _samples(network, x[i], eps, seed)
        jacobian = (exact.head[0][[label[i]]] - exact.head[0]) @ exact.jacobian(center)
        steepest = oracles.ball_points(np.random.default_rng(0), center, eps, 0, jacobian)
        logits = exact.logits(np.concatenate([points, steepest, [center], [attacked[i].ravel()]]))
        differences = logits[:, [label[i]]] - logits
        tolerance = 1e-5 * (1 + np.abs(logits).max())
        for margins in worst:
            assert np.all(differences >= margins[i] - tolerance)


@settings(max_examples=20)
@given(networks, SEEDS, st.floats(0.001, 0.3))
def test_a_certified_example_keeps_its_prediction(network, seed, eps):
    x = oracles.random_inputs(network, seed, 3)
    exact = oracles.DenseNetwork(network)
    logits = exact.logits(x.reshape(3, -1).astype(np.float64))
    label = np.argmax(logits, axis=1).astype(np.int32)
    result = _certificates(network, bounds_of(network, x, eps), label)
    attacked = _attacked(network, x, label, eps)
    for i in np.flatnonzero(result.certified):
        _, _, points = _samples(network, x[i], eps, seed)
        points = np.concatenate([points, [attacked[i].ravel()]])
        assert np.all(np.argmax(exact.logits(points), axis=1) == label[i])


@jax.jit
def _certificates(network, bounds, label):
    def one(bounds, label):
        margins = box_and_ball(network.head, bounds.features, label)
        return certificate(network, bounds, margins, label, "exact")

    return jax.vmap(one)(bounds, label)


# Parts of the region that are absent


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_without_its_box_the_region_is_the_global_ball(kind):
    network = oracles.random_network(kind, 7)
    x = oracles.random_inputs(network, 2, 2)
    bounds = oracles.jit(lambda x: propagate(network, l2_ball(x, 0.1).without_box(), Exact()))(x)
    assert bounds.features.lower is None
    assert bounds.features.upper is None
    assert all(np.asarray(live).all() for live in bounds.live)
    exact = np.prod([oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers])
    np.testing.assert_allclose(bounds.features.radius, 0.1 * exact, rtol=1e-3)
    np.testing.assert_allclose(bounds.lipschitz, exact, rtol=1e-3)


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_without_its_ball_the_region_is_the_interval_box(kind):
    network = oracles.random_network(kind, 8)
    x = oracles.random_inputs(network, 3, 2)
    bounds = oracles.jit(lambda x: propagate(network, l2_ball(x, 0.1).without_ball(), Exact()))(x)
    assert bounds.features.radius is None
    exact = oracles.DenseNetwork(network)
    for i in range(2):
        lower, upper = x[i].astype(np.float64).ravel() - 0.1, x[i].astype(np.float64).ravel() + 0.1
        for k, ((matrix, bias), rule) in enumerate(zip(exact.layers, exact.rules, strict=True)):
            plus, minus = np.maximum(matrix, 0), np.minimum(matrix, 0)
            lower, upper = plus @ lower + minus @ upper + bias, plus @ upper + minus @ lower + bias
            np.testing.assert_allclose(np.asarray(bounds.before[k].lower[i]).ravel(), lower, atol=1e-5)
            np.testing.assert_allclose(np.asarray(bounds.before[k].upper[i]).ravel(), upper, atol=1e-5)
            lower, upper = rule.apply(lower), rule.apply(upper)
        np.testing.assert_allclose(bounds.features.upper[i], upper, atol=1e-5)
    assert np.asarray(box_and_ball(network.head, jax.tree.map(lambda a: a[0], bounds.features), 0)).shape == (3,)


def test_given_global_norms_give_the_ball_of_those_norms_inside_the_same_masks():
    network = oracles.random_network("dense relu", 9)
    x = oracles.random_inputs(network, 4, 2)
    sigmas = oracles.jit(lambda network: lipjax.whole_norms(network.layers, Exact())[0])(network)
    exact = [oracles.spectral_norm(matrix) for matrix, _ in oracles.DenseNetwork(network).layers]
    np.testing.assert_allclose(sigmas, exact, rtol=1e-5)
    bounds = oracles.jit(lambda x: propagate(network, l2_ball(x, 0.2), Given(sigmas)))(x)
    np.testing.assert_allclose(bounds.features.radius, 0.2 * np.prod(exact), rtol=1e-3)
    assert np.all(np.asarray(bounds.lipschitz) >= np.asarray(bounds_of(network, x, 0.2).lipschitz) * (1 - 1e-5))


def test_full_row_norms_give_a_box_that_is_never_smaller():
    network = oracles.random_network("conv clipped", 10)
    x = oracles.random_inputs(network, 5, 2)
    masked = bounds_of(network, x, 0.2)
    row_norms = lipjax.full_row_norms
    full = oracles.jit(lambda x: propagate(network, l2_ball(x, 0.2), Exact(), row_norms=row_norms))(x)
    for a, b in zip(masked.before, full.before, strict=True):
        assert np.all(np.asarray(b.lower) <= np.asarray(a.lower) + 1e-5)
        assert np.all(np.asarray(b.upper) >= np.asarray(a.upper) - 1e-5)


# Transformations


def test_local_lipschitz_under_jit_vmap_and_per_example():
    network = oracles.random_network("dense clipped", 11)
    x = oracles.random_inputs(network, 6, 3)
    together = np.asarray(estimates_of(network, x, 0.1)[0])
    assert together.shape == (3,)
    alone = [float(estimates_of(network, x[i : i + 1], 0.1)[0][0]) for i in range(3)]
    np.testing.assert_allclose(alone, together, rtol=1e-4)
    over_eps = oracles.jit(jax.vmap(lambda eps: local_constants(network, x, eps, Exact())))(jnp.array([0.0, 0.1]))
    np.testing.assert_allclose(over_eps[1], together, rtol=1e-3)
    with jax.disable_jit():
        slow = local_constants(network, x, 0.1, Exact())
    np.testing.assert_allclose(slow, together, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dense clipped", "conv relu"])
def test_gradient_of_local_lipschitz_is_finite_nonzero_and_matches_differences(kind):
    network = oracles.random_network(kind, 12)
    x = oracles.random_inputs(network, 7, 2)

    def total(network):
        return local_constants(network, x, 0.1, TIGHT).sum()

    gradient = oracles.jit(jax.grad(total))(network)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(np.asarray(layer.kernel)).max() > 1e-3 for layer in gradient.layers)
    # the exact constant of the float64 pass, along a random direction of one kernel
    rng = np.random.default_rng(0)
    affine = network.layers[0]
    direction = rng.standard_normal(affine.kernel.shape)

    def exact(step):
        moved = np.asarray(affine.kernel, np.float64) + step * direction
        passes = oracles.DenseNetwork(oracles.changed(network, 1, dataclasses.replace(affine, kernel=moved)))
        return sum(
            np.prod([sigma for *_, sigma in passes.regions(one.astype(np.float64).ravel(), 0.1)[0]]) for one in x
        )

    slope = (exact(1e-6) - exact(-1e-6)) / 2e-6
    assert np.vdot(gradient.layers[0].kernel, direction) == pytest.approx(slope, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "level"), [("dense clipped", "converged"), ("dense relu", "warm"), ("conv clipped", "warm")]
)
def test_everything_dead_gives_zero_with_finite_gradients(kind, level):
    network = oracles.random_network(kind, 13, shift=-100.0)
    x = oracles.random_inputs(network, 8, 2)
    label = jnp.array([0, 1])
    smaller = [min((layer.in_shape, layer.out_shape), key=np.prod) for layer in network.layers]
    zeros = {place: jnp.zeros((2, *shape)) for place, shape in enumerate(smaller)}
    ask = TIGHT if level == "converged" else WarmStarted(zeros, None, jax.random.key(0), 2)

    def loss(network):
        bounds = propagate(network, l2_ball(x, 0.5), ask)
        margins = margins_of(network, bounds.features, label)
        return bounds.lipschitz.sum() + sum(m.sum() for m in margins), bounds

    (value, bounds), gradient = oracles.jit(jax.value_and_grad(loss, has_aux=True))(network)
    assert np.isfinite(value)
    assert np.all(np.asarray(bounds.lipschitz) == 0)
    assert np.all(np.asarray(bounds.features.radius) == 0)
    assert np.asarray(bounds.features.finite).all()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


# What is never certified


def certified(network, x, label, eps):
    return certify(network, x, label, eps, key=jax.random.key(0))


def _sure():
    """A network that is certain of class 0 everywhere near, with its input."""
    network = chain(
        dense(jnp.eye(3) * 0.1, jnp.ones(3), (3,)),
        ClippedReLUActivation(jnp.full(3, 9.0)),
        dense(jnp.array([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]), jnp.zeros(2), (3,)),
    )
    return network, jnp.full((1, 3), 0.5)


@pytest.mark.parametrize("level", ["estimate", "probabilistic"])
def test_a_sure_prediction_is_certified_and_names_its_level(level):
    network, x = _sure()
    result = certify(network, x, jnp.array([0]), 0.1, level=level, key=jax.random.key(0))
    assert result.certified.tolist() == [True]
    assert result.prediction.tolist() == [0]
    assert result.level == level
    # the drop of 2 (z1 + z2 + z3) over the ball of radius 0.1 under 0.1 x + 1 is 2 * 0.1 * 0.1 * sqrt 3
    assert float(result.worst_margin[0]) == pytest.approx(6 * 1.05 - 0.02 * np.sqrt(3), rel=1e-5)
    assert float(result.lipschitz[0]) == pytest.approx(0.1, rel=1e-4)


def test_a_wrong_prediction_is_not_certified():
    network, x = _sure()
    result = certified(network, x, jnp.array([1]), 0.1)
    assert result.certified.tolist() == [False]
    assert float(result.worst_margin[0]) < 0


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_a_tie_is_not_certified(eps):
    network, x = _sure()
    head = dense(jnp.array([[1.0, 1.0, -1.0]] * 3), jnp.zeros(3), (3,))  # two identical rows
    result = certified(dataclasses.replace(network, head=head), x, jnp.array([0]), eps)
    assert result.prediction.tolist() == [0]
    assert float(result.worst_margin[0]) <= 0
    assert result.certified.tolist() == [False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_in_the_input_has_no_bounds_and_is_refused(bad):
    network, x = _sure()
    batch = jnp.concatenate([x, x.at[0, 1].set(bad)])
    bounds = bounds_of(network, batch, 0.1)
    assert bounds.features.finite.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"x\[1\] holds NaN or infinity"):
        certified(network, batch, jnp.array([0, 0]), 0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["kernel", "bias", "theta", "head kernel", "head bias"])
def test_nan_or_inf_in_the_weights_is_not_certified(bad, place):
    network, x = _sure()
    (affine,), (activation,), head = network.layers, network.activations, network.head
    if place == "kernel":
        affine = dataclasses.replace(affine, kernel=affine.kernel.at[0, 0].set(bad))
    elif place == "bias":
        affine = dataclasses.replace(affine, bias=affine.bias.at[0].set(bad))
    elif place == "theta":
        if bad == np.inf:
            pytest.skip("an infinite clip is a plain ReLU, and sound")
        activation = ClippedReLUActivation(activation.theta.at[0].set(bad))
    elif place == "head kernel":
        head = dataclasses.replace(head, kernel=head.kernel.at[0, 0].set(bad))
    else:
        head = dataclasses.replace(head, bias=head.bias.at[0].set(bad))
    broken = chain(affine, activation, head)
    for label in (0, 1):
        assert certified(broken, x, jnp.array([label]), 0.1).certified.tolist() == [False]


def test_nan_norms_are_not_certified():
    network, x = _sure()
    for sigma in (np.nan, np.inf):
        bounds = propagate(network, l2_ball(x, 0.1), Given(jnp.array([sigma])))
        assert _certificates(network, bounds, jnp.array([0])).certified.tolist() == [False]


def test_nan_bounds_keep_neurons_live():
    network, x = _sure()
    bounds = bounds_of(network, x.at[0, 0].set(jnp.nan), 0.1)
    assert np.asarray(bounds.live[0]).all()
    assert _certificates(network, bounds, jnp.array([0])).certified.tolist() == [False]


# Wrong arguments


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1), ()])
def test_an_input_that_is_no_batch_is_refused(shape):
    network, _ = _sure()
    for call in (
        lambda x: certify(network, x, jnp.zeros(shape[:1], jnp.int32), 0.1, key=jax.random.key(0)),
        lambda x: lipjax.local_lipschitz(network, x, 0.1, key=jax.random.key(0)),
        lambda x: lipjax.local_lipschitz(network, x, 0.1, level="estimate"),
    ):
        with pytest.raises(ValueError, match="expected a batch"):
            call(jnp.zeros(shape))


@pytest.mark.parametrize("label", [jnp.zeros(2, jnp.int32), jnp.zeros(1), jnp.int32(0), jnp.zeros((1, 1), jnp.int32)])
def test_labels_that_do_not_fit_are_refused(label):
    network, x = _sure()
    with pytest.raises(ValueError, match="expected 1 integers"):
        certify(network, x, label, 0.1, key=jax.random.key(0))

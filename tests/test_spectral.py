"""Power iteration on masked layers against the SVD of the masked dense matrix."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import lipjax
from lipjax import (
    LinearMap,
    WarmStarted,
    converged_norm,
    convolution,
    dense,
    power_iteration,
)
from lipjax.networks.linear_maps import unit


def _array(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _layers():
    rng = np.random.default_rng(0)
    yield "dense tall", dense(_array(rng, 6, 15), jnp.zeros(15), (6,))
    yield "dense wide", dense(_array(rng, 18, 5), jnp.zeros(5), (3, 3, 2))
    for size, stride, padding in [((3, 3), (1, 1), ((1, 1), (1, 1))), ((4, 4), (2, 2), ((1, 1), (1, 1)))]:
        yield f"conv {size}", convolution(_array(rng, *size, 2, 3), jnp.zeros(3), (6, 6, 2), stride, padding)


LAYERS = dict(_layers())


def of_matrix(matrix):
    """The linear map of a matrix (outputs, inputs)."""
    return LinearMap(lambda a: matrix @ a, lambda z: matrix.T @ z, matrix.shape[1:], matrix.shape[:1])


def masks(layer, seed, density):
    rng = np.random.default_rng(seed)
    return rng.random(layer.out_shape) < density, rng.random(layer.in_shape) < density


def length(vector):
    return jnp.sqrt(jnp.sum(vector**2))


@oracles.jit
def _norms(layer, rows, columns, key):
    """Converged norms from both sides, a few iterations, and gains, of a masked layer."""
    masked = layer.linear_map().masked(rows, columns)
    small = masked.from_smaller_side()
    start, other = (jax.random.normal(key, m.in_shape) for m in (masked, small))
    converged, _ = converged_norm(masked, start, tol=1e-6, max_iters=3000)
    from_small, _ = converged_norm(small, other, tol=1e-6, max_iters=3000)
    return (
        converged,
        from_small,
        power_iteration(small, other, 1)[0],
        power_iteration(small, other, 7)[0],
        [
            length(masked.image(start)),
            length(small.image(other)),
        ],
    )


@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_masked_layers_against_svd(name):
    layer = LAYERS[name]
    matrix, _ = oracles.layer_matrix(layer)
    for seed, density in enumerate([1.0, 0.7, 0.4, 0.15]):
        rows, columns = masks(layer, seed, density)
        sigma = oracles.spectral_norm(matrix * np.outer(rows, columns))
        converged, from_small, *estimates, gains = _norms(layer, rows, columns, jax.random.key(seed))
        assert converged == pytest.approx(sigma, rel=1e-4)
        assert from_small == pytest.approx(sigma, rel=1e-4)
        for estimate in (converged, from_small, *estimates, *gains):
            assert estimate <= sigma * (1 + 1e-5)
        assert estimates[0] <= estimates[1] * (1 + 1e-5)  # more iterations never give less


@pytest.mark.parametrize("name", LAYERS)
def test_the_smaller_side_keeps_singular_values_and_masks(name):
    layer = LAYERS[name]
    rows, columns = (jnp.asarray(m) for m in masks(layer, 3, 0.6))
    masked = layer.linear_map().masked(rows, columns)
    small = masked.from_smaller_side()
    assert np.prod(small.in_shape) == min(np.prod(layer.in_shape), np.prod(layer.out_shape))
    flipped = small.in_shape != masked.in_shape
    assert small.in_mask is (rows if flipped else columns)
    assert small.out_mask is (columns if flipped else rows)
    matrix = oracles.layer_matrix(layer)[0] * np.outer(rows, columns)
    eye = np.eye(int(np.prod(small.in_shape)), dtype=np.float32).reshape(-1, *small.in_shape)
    ours = np.stack([np.asarray(small.matvec(jnp.asarray(e))).ravel() for e in eye], axis=1)
    back = np.asarray(small.rmatvec(jnp.ones(small.out_shape))).ravel()
    np.testing.assert_allclose(ours, matrix.T if flipped else matrix, atol=1e-6)
    np.testing.assert_allclose(back, ours.sum(0), atol=1e-4)


def test_image_is_that_of_the_unit_vector_along_the_kept_part_without_a_gradient():
    layer = LAYERS["dense tall"]
    rows, columns = (jnp.asarray(m) for m in masks(layer, 5, 0.6))
    matrix = oracles.layer_matrix(layer)[0] * np.outer(rows, columns)
    masked = layer.linear_map().masked(rows, columns)
    vector = np.random.default_rng(6).standard_normal(6).astype(np.float32)
    kept = vector * np.asarray(columns)
    np.testing.assert_allclose(masked.image(jnp.asarray(vector)), matrix @ kept / np.linalg.norm(kept), atol=1e-5)
    assert not masked.image(jnp.zeros(6)).any()
    assert not masked.image(jnp.where(columns, 0.0, 1.0)).any()  # nothing of it is kept

    def total(layer, vector):
        return jnp.sum(layer.linear_map().masked(rows, columns).image(vector))

    for start in (jnp.asarray(vector), jnp.zeros(6)):
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(layer, start)))


def test_of_two_starts_the_one_that_is_stretched_more_is_taken():
    rng = np.random.default_rng(11)
    matrix = _array(rng, 7, 5)
    starts = [_array(rng, 5) * scale for scale in (1.0, 100.0, 0.01)]
    stretch = [float(length(matrix @ s) / length(s)) for s in starts]
    for i, j in ((0, 1), (1, 0), (0, 2), (2, 1)):
        both, vector = power_iteration(of_matrix(matrix), starts[i], 2, starts[j])
        better, expected = power_iteration(of_matrix(matrix), starts[i if stretch[i] > stretch[j] else j], 2)
        assert both == pytest.approx(float(better), rel=1e-5)
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert power_iteration(of_matrix(matrix), jnp.zeros(5), 2, starts[0])[0] > 0
    assert power_iteration(of_matrix(matrix), starts[0], 2, jnp.zeros(5))[0] > 0


def test_under_vmap_every_example_stops_by_itself_and_gives_what_it_gives_alone():
    rng = np.random.default_rng(1)
    # gaps from wide to narrow: the numbers of iterations are far apart
    bases = [np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(5)]
    matrices = [
        q @ np.diag([1.0, second, 0.1, 0.1, 0.05, 0.0]) @ q.T
        for q, second in zip(bases, [0.05, 0.5, 0.8, 0.9, 0.95], strict=True)
    ]
    matrices = jnp.asarray(np.stack(matrices), jnp.float32)
    starts = _array(rng, 5, 6)

    def norm(matrix, start):
        return converged_norm(of_matrix(matrix), start)

    sigmas, iterations = jax.jit(jax.vmap(norm))(matrices, starts)
    alone = jax.jit(norm)
    for i in range(5):
        sigma, count = alone(matrices[i], starts[i])
        assert int(iterations[i]) == int(count)
        assert float(sigmas[i]) == pytest.approx(float(sigma), rel=1e-6)
    assert len(set(iterations.tolist())) >= 3
    assert int(iterations.min()) < int(iterations.max()) / 3


def test_the_stop_is_the_first_step_that_moves_no_more_than_the_tolerance():
    matrix = np.diag([1.0, 0.9, 0.3])
    start = np.array([0.2, 1.0, 1.0])
    u, count = start / np.linalg.norm(start), 0
    while True:
        new = matrix.T @ matrix @ u
        new /= np.linalg.norm(new)
        count, change, u = count + 1, np.linalg.norm(new - u), new
        if change <= 1e-3:
            break
    _, ours = converged_norm(of_matrix(jnp.asarray(matrix, jnp.float32)), jnp.asarray(start, jnp.float32), tol=1e-3)
    assert int(ours) == count
    _, capped = converged_norm(
        of_matrix(jnp.asarray(matrix, jnp.float32)), jnp.asarray(start, jnp.float32), max_iters=4
    )
    assert int(capped) == 4


def _block_diagonal():
    """Two blocks that share neither rows nor columns: norms .6 and .93."""
    rng = np.random.default_rng(2)
    matrix = np.zeros((8, 8))
    for place, sigma in ((slice(0, 4), 0.6), (slice(4, 8), 0.93)):
        block = rng.standard_normal((4, 4))
        matrix[place, place] = block * sigma / np.linalg.norm(block, 2)
    return jnp.asarray(matrix, jnp.float32)


def warm_started(matrix, vector, *options, **more):
    """Sigma and the next vector of the whole square matrix, for one example."""
    layer = dense(matrix.T, jnp.zeros(len(matrix)), matrix.shape[1:])
    every = jnp.ones((1, len(matrix)), bool)
    sigma, new = WarmStarted({0: vector[None]}, *options, **more)(0, layer, every, every)
    return sigma[0], new[0]


@pytest.mark.parametrize("stored", ["zero", "cut off"])
def test_a_stored_vector_that_was_absorbed_recovers_through_fresh_noise(stored):
    matrix = _block_diagonal()
    vector = jnp.zeros(8)
    if stored == "cut off":  # the top vector of the first block, learned while the second one was dead
        live = jnp.arange(8) < 4
        sigma, vector = power_iteration(of_matrix(matrix).masked(live, live), jnp.ones(8), 200)
        assert sigma == pytest.approx(0.6, rel=1e-3)
        assert not vector[4:].any()

    @jax.jit
    def step(vector, key):
        return warm_started(matrix, vector, None, key, 2)

    @jax.jit
    def noiseless(vector, key):
        return warm_started(matrix, vector, None, key, 2, noise=0.0)

    stuck, sigma = vector, None
    for i in range(12):
        sigma, vector = step(vector, jax.random.key(i))
        stuck_sigma, stuck = noiseless(stuck, jax.random.key(i))
        assert sigma <= 0.93 * (1 + 1e-5)
    assert sigma == pytest.approx(0.93, rel=1e-3)
    assert stuck_sigma == pytest.approx(0.0 if stored == "zero" else 0.6, abs=1e-3)  # it is the noise that mends it


def test_warm_started_takes_the_shared_vector_where_it_is_the_better_start():
    matrix = jnp.diag(jnp.array([2.0, 1.0, 0.5]))
    good, bad = jnp.array([1.0, 0, 0]), jnp.array([0, 0, 1.0])
    for own, shared in ((good, bad), (bad, good)):
        assert warm_started(matrix, own, (shared,), jax.random.key(0), 1)[0] == pytest.approx(2.0, rel=1e-3)
    assert warm_started(matrix, bad, (bad,), jax.random.key(0), 1)[0] < 1.5


@pytest.mark.parametrize("rows_dead", [True, False])
def test_an_all_dead_mask_gives_zero_with_zero_finite_gradients(rows_dead):
    def norms(kernel):
        layer = convolution(kernel, jnp.zeros(3), (4, 4, 2), (1, 1), ((1, 1), (1, 1)))
        rows = jnp.full((4, 4, 3), not rows_dead)
        columns = jnp.full((4, 4, 2), rows_dead)
        masked = layer.linear_map().masked(rows, columns)
        sigma, vector = power_iteration(masked, jnp.ones((4, 4, 2)), 3)
        converged, _ = converged_norm(masked, jnp.ones((4, 4, 2)))
        return sigma + converged, (sigma, converged, vector)

    kernel = _array(np.random.default_rng(3), 3, 3, 2, 3)
    (_, (sigma, converged, vector)), gradient = jax.jit(jax.value_and_grad(norms, has_aux=True))(kernel)
    assert sigma == 0
    assert converged == 0
    assert not vector.any()
    assert np.all(np.asarray(gradient) == 0)  # NaN is not 0


def test_gradient_of_sigma_is_the_rank_one_formula():
    rng = np.random.default_rng(4)
    kernel = _array(rng, 6, 9)
    layer = dense(kernel, jnp.zeros(9), (6,))
    rows, columns = masks(layer, 4, 0.7)
    left, singular, right = np.linalg.svd(np.asarray(kernel, np.float64).T * np.outer(rows, columns))
    expected = np.outer(right[0], left[:, 0])  # towards kernel = W^T

    def sigma(kernel, norm):
        return norm(dense(kernel, jnp.zeros(9), (6,)).linear_map().masked(jnp.asarray(rows), jnp.asarray(columns)))

    start = jnp.asarray(rng.standard_normal(6), jnp.float32)
    for norm in (
        lambda m: power_iteration(m, start, 300)[0],
        lambda m: converged_norm(m, start, tol=1e-6)[0],
    ):
        value, gradient = jax.value_and_grad(sigma)(kernel, norm)
        assert value == pytest.approx(singular[0], rel=1e-5)
        np.testing.assert_allclose(gradient, expected, atol=1e-3)


@pytest.mark.parametrize("num_iters", [1, 2, 5])
def test_gradient_at_warm_vectors_is_that_of_the_unrolled_loop(num_iters):
    rng = np.random.default_rng(7)
    kernel = _array(rng, 3, 3, 2, 3)
    shape = (5, 5, 2)

    def layer_map(kernel):
        layer = convolution(kernel, jnp.zeros(3), shape, (2, 2), ((1, 1), (1, 1)))
        return layer.linear_map().masked(jnp.asarray(rows), jnp.asarray(columns))

    rows, columns = rng.random((3, 3, 3)) < 0.8, rng.random(shape) < 0.8
    warm = power_iteration(layer_map(kernel), _array(rng, *shape), 800)[1]

    def unrolled(kernel):
        masked, u = layer_map(kernel), warm
        for _ in range(num_iters):
            v = masked.matvec(u)
            v = v / jnp.sqrt(jnp.sum(v**2))
            u = masked.rmatvec(v)
            u = u / jnp.sqrt(jnp.sum(u**2))
        return jnp.sqrt(jnp.sum(masked.matvec(u) ** 2))

    ours = jax.jit(jax.grad(lambda k: power_iteration(layer_map(k), warm, num_iters)[0]))(kernel)
    theirs = jax.jit(jax.grad(unrolled))(kernel)
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


def test_one_iteration_is_one_step_of_the_formula():
    rng = np.random.default_rng(8)
    matrix, start = rng.standard_normal((4, 6)), rng.standard_normal(6)
    v = matrix @ start / np.linalg.norm(matrix @ start)
    back = matrix.T @ v
    sigma, vector = power_iteration(of_matrix(jnp.asarray(matrix, jnp.float32)), jnp.asarray(start, jnp.float32), 1)
    assert sigma == pytest.approx(np.linalg.norm(back), rel=1e-5)
    np.testing.assert_allclose(vector, back / np.linalg.norm(back), atol=1e-5)


def test_the_returned_vector_continues_the_iteration():
    matrix = of_matrix(_array(np.random.default_rng(9), 5, 5))
    start = jnp.ones(5)
    first, middle = power_iteration(matrix, start, 3)
    second, _ = power_iteration(matrix, middle, 4)
    assert first <= second
    assert second == pytest.approx(float(power_iteration(matrix, start, 7)[0]), rel=1e-5)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-5, 1.0, 2.0**20])
def test_sigma_scales_with_the_matrix_and_not_with_the_start(factor):
    rng = np.random.default_rng(10)
    matrix, start = _array(rng, 5, 4), _array(rng, 4)
    sigma = oracles.spectral_norm(np.asarray(matrix, np.float64))
    assert power_iteration(of_matrix(factor * matrix), start, 100)[0] == pytest.approx(factor * sigma, rel=1e-4)
    assert converged_norm(of_matrix(matrix), factor * start, tol=1e-5)[0] == pytest.approx(sigma, rel=1e-4)


def test_unit_has_length_one_and_keeps_zero_with_a_finite_gradient():
    np.testing.assert_allclose(unit(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    assert unit(jnp.zeros(3)).tolist() == [0, 0, 0]
    assert np.isfinite(jax.grad(lambda a: unit(a).sum())(jnp.zeros(3))).all()


@pytest.mark.parametrize(
    "function", [lipjax.certify, lipjax.certified_radius, lipjax.local_lipschitz, lipjax.Certifier]
)
def test_certificates_take_no_start_from_outside(function):
    assert not {"start", "vector", "vectors", "u"} & inspect.signature(function).parameters.keys()

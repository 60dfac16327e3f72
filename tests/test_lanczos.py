"""Enclosures of spectral norms by Lanczos: against SVD, an independent Lanczos process, and the stated probability."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipjax import convolution, dense
from lipjax.norms import cohorts, lanczos, solvers

RTOL = 1e-3
SURE = 1e-10  # a t_delta that no start of a test comes near
SIZES = (1, 5, 24)
BATCH, ROWS = 8, 40
SEEDS = st.integers(0, 10**6)


def _gram(matrices):
    return lambda u: jnp.einsum("bmn,bm->bn", matrices, jnp.einsum("bmn,bn->bm", matrices, u))


_begin = jax.jit(lanczos.begin, static_argnames="max_steps")
_first = jax.jit(lambda looks, matrices, *given: lanczos.first_steps(_gram(matrices), *given), static_argnums=0)
_more = jax.jit(lambda looks, matrices, *given: lanczos.more_steps(_gram(matrices), *given), static_argnums=0)
_enclosures = jax.jit(lanczos.enclosures)


def enclosed(matrices, start, t_delta=SURE, *, rtol=RTOL, max_steps=256):
    """Lower and upper bounds, in float64, and the number of steps."""
    looks = lanczos.FIRST_STEPS, lanczos.MORE_STEPS  # a test may change them: compiled functions are told
    with jax.enable_x64(True):
        process, steps = _first(looks, matrices, _begin(start, max_steps=max_steps)), min(looks[0], max_steps)
        lower, upper = _enclosures(process.matrix, steps, t_delta)
        while steps < max_steps and np.any(upper > lower * (1 + rtol)):
            process, steps = _more(looks, matrices, process, steps), min(steps + looks[1], max_steps)
            below, above = _enclosures(process.matrix, steps, t_delta)
            lower, upper = np.maximum(lower, below), np.minimum(upper, above)
    assert upper.dtype == np.float64
    return np.asarray(lower), np.asarray(upper), steps


def units(rng, count, length):
    start = rng.standard_normal((count, length))
    return start / np.linalg.norm(start, axis=1, keepdims=True)


def with_spectrum(rng, rows, values):
    """A matrix (rows, n) with random singular vectors and the given singular values."""
    n = len(values)
    left = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    right = np.linalg.qr(rng.standard_normal((n, n)))[0]
    k = min(rows, n)
    return (left[:, :k] * values[:k]) @ right[:, :k].T


def random_matrices(rng, n):
    """Matrices of different heights and spectra, all padded by zero rows to one height."""
    spectra = [
        np.ones(n),
        np.linspace(1, 0, n),
        0.5 ** np.arange(n),
        np.where(np.arange(n) == 0, 1, 0.3),
        np.where(np.arange(n) < n // 2, 1, 1 - 1e-3),
        rng.exponential(size=n),
    ]
    matrices = [with_spectrum(rng, rng.integers(1, ROWS + 1), np.sort(values)[::-1]) for values in spectra]
    matrices += [rng.standard_normal((rng.integers(1, ROWS + 1), n)), np.zeros((1, n))]
    return np.stack([np.pad(m, ((0, ROWS - len(m)), (0, 0))) for m in matrices])


def svd(matrices):
    return np.array([oracles.spectral_norm(matrix) for matrix in matrices])


# Enclosures against SVD


@settings(max_examples=40)
@given(st.sampled_from(SIZES), SEEDS, st.sampled_from([1e-6, 1.0, 1e6]))
def test_lower_and_upper_enclose_the_largest_singular_value_as_tightly_as_asked(n, seed, scale):
    rng = np.random.default_rng(seed)
    matrices = scale * random_matrices(rng, n)
    lower, upper, _ = enclosed(matrices, units(rng, BATCH, n))
    sigma = svd(matrices)
    assert np.all(lower <= sigma * (1 + 1e-13))
    assert np.all(upper >= sigma)
    assert np.all(upper <= lower * (1 + RTOL))


def test_a_tight_tolerance_takes_more_steps_than_a_loose_one():
    rng = np.random.default_rng(0)
    matrices, start = np.repeat(with_spectrum(rng, ROWS, np.linspace(1, 0, 24))[None], BATCH, 0), units(rng, BATCH, 24)
    loose, tight = (enclosed(matrices, start, rtol=rtol) for rtol in (2.0, 1e-6))
    assert loose[2] < tight[2]
    assert np.all(loose[1] <= 3 * loose[0])
    assert np.all(tight[1] <= tight[0] * (1 + 1e-6))


def test_a_cap_that_is_hit_leaves_a_looser_bound_that_still_holds():
    rng = np.random.default_rng(1)
    matrices, start = np.repeat(with_spectrum(rng, ROWS, np.linspace(1, 0, 24))[None], BATCH, 0), units(rng, BATCH, 24)
    lower, upper, steps = enclosed(matrices, start, max_steps=8)
    assert steps == 8
    assert np.all(lower < 1)
    assert np.all(upper > lower * (1 + RTOL))
    assert np.all(upper >= 1)


# A power of two scales without rounding; another factor changes the noise in which a breakdown ends.
@pytest.mark.parametrize(("scale", "rtol"), [(1024.0, 1e-12), (1e3, 1e-4)])
def test_a_scaled_matrix_has_a_scaled_bound(scale, rtol):
    rng = np.random.default_rng(2)
    matrices, start = random_matrices(rng, 24), units(rng, BATCH, 24)
    _, upper, _ = enclosed(matrices, start, max_steps=8)
    _, scaled, _ = enclosed(scale * matrices, start, max_steps=8)
    np.testing.assert_allclose(scaled, scale * upper, rtol=rtol)


def test_a_zero_map_and_a_zero_start_have_the_bound_zero():
    start = units(np.random.default_rng(3), BATCH, 24)
    start[0] = 0
    lower, upper, _ = enclosed(np.zeros((BATCH, ROWS, 24)), start)
    assert not lower.any()
    assert not upper.any()


def test_an_orthogonal_map_has_the_bound_1():
    rng = np.random.default_rng(4)
    matrices = np.stack([with_spectrum(rng, ROWS, np.ones(24)) for _ in range(BATCH)])
    _, upper, _ = enclosed(matrices, units(rng, BATCH, 24))
    np.testing.assert_allclose(upper, 1, rtol=1e-4)
    assert np.all(upper >= 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_not_finite_has_an_infinite_bound_and_leaves_the_rest_of_the_batch_alone(bad):
    rng = np.random.default_rng(5)
    matrices, start = random_matrices(rng, 24), units(rng, BATCH, 24)
    matrices[2, 0, 7] = bad
    _, upper, _ = enclosed(matrices, start)
    assert upper[2] == np.inf
    others = np.arange(BATCH) != 2
    sigma = svd(matrices[others])
    assert np.all((upper[others] >= sigma) & (upper[others] <= sigma * (1 + RTOL)))


# The root of log p_k(t) = -log t_delta, from another Lanczos process in NumPy


def tridiagonal(gram, u, steps):
    """T_k and the residual b_k by Arnoldi's process, orthogonalised by QR: no three-term recurrence."""
    basis = u[:, None]
    for _ in range(steps):
        q, r = np.linalg.qr(np.concatenate([basis, (gram @ basis[:, -1])[:, None]], axis=1))
        basis = q * np.sign(np.diag(r))
    inner = basis.T @ gram @ basis
    return inner[:steps, :steps], inner[steps, steps - 1]


def root(tridiagonal_matrix, off, t_delta):
    """t above all eigenvalues with sum log(t - theta_j) - sum log b_j = -log t_delta, by halving."""
    theta = np.linalg.eigvalsh(tridiagonal_matrix)
    target = np.sum(np.log(off)) - np.log(t_delta)
    low, high = theta[-1], theta[-1] + math.exp(target / len(theta))
    for _ in range(200):
        middle = (low + high) / 2
        small = np.sum(np.log(np.maximum(middle - theta, 1e-300))) < target
        low, high = (middle, high) if small else (low, middle)
    return high


def closed_formula(matrix, u, t_delta, steps):
    t, residual = tridiagonal(matrix.T @ matrix, u, steps)
    return np.sqrt(root(t, np.append(np.diag(t, -1), residual), t_delta)), np.sqrt(np.linalg.eigvalsh(t)[-1])


def one_step_at_a_time(monkeypatch):
    monkeypatch.setattr(lanczos, "FIRST_STEPS", 1)
    monkeypatch.setattr(lanczos, "MORE_STEPS", 1)


@pytest.mark.parametrize("t_delta", [1e-2, 1e-12])
@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_bounds_are_the_root_of_the_lanczos_polynomial_and_the_largest_ritz_value(monkeypatch, steps, t_delta):
    if steps < 8:
        one_step_at_a_time(monkeypatch)
    rng = np.random.default_rng(7)
    matrices = np.stack([with_spectrum(rng, ROWS, 30 * np.linspace(1, 0.2, 24) ** p) for p in range(1, BATCH + 1)])
    start = units(rng, BATCH, 24)
    lower, upper, _ = enclosed(matrices, start, t_delta, rtol=0, max_steps=steps)
    looks = sorted({min(steps, k) for k in range(lanczos.FIRST_STEPS, steps + 16, lanczos.MORE_STEPS)})
    for i in range(BATCH):
        at = [closed_formula(matrices[i], start[i], t_delta, k) for k in looks]
        assert upper[i] == pytest.approx(min(u for u, _ in at), rel=1e-8)
        assert lower[i] == pytest.approx(at[-1][1], rel=1e-8)


def test_one_step_by_hand(monkeypatch):
    one_step_at_a_time(monkeypatch)
    # W = diag(2, 0) from (3, 4) / 5: a = 4 * 9 / 25, b = 4 * 12 / 25, and t = a + b / t_delta
    lower, upper, _ = enclosed(np.diag([2.0, 0.0])[None], np.array([[0.6, 0.8]]), 0.5, max_steps=1)
    assert lower[0] == pytest.approx(1.2, rel=1e-9)
    assert upper[0] == pytest.approx(math.sqrt(1.44 + 1.92 / 0.5), rel=1e-9)


# The stated probability, for thousands of starts at a delta at which failures can be counted

STARTS, LENGTH, DELTA = 4000, 40, 0.05
FLAT = np.where(np.arange(LENGTH) == 0, 100.0, 30.0)
SPECTRA = {
    "one outlier": (FLAT, 1),
    "one outlier above a slope": (np.append(100, np.linspace(90, 0, LENGTH - 1)), 8),
    "slope": (np.linspace(100, 0, LENGTH), 8),
    "close pair": (np.append([100, 99.9], np.linspace(90, 0, LENGTH - 2)), 8),
    "geometric": (100 * 0.99 ** np.arange(LENGTH), 8),
}


def allowed(trials):
    """Failures that DELTA makes likely: the mean of the binomial distribution and four standard deviations."""
    return trials * DELTA + 4 * math.sqrt(trials * DELTA * (1 - DELTA))


def smallest_part():
    return DELTA * math.sqrt(math.pi / (2 * LENGTH))


@functools.cache
def random_starts(seed):
    return units(np.random.default_rng(seed), STARTS, LENGTH)


def uppers(values, start, steps):
    with jax.enable_x64(True):
        process = lanczos.begin(start, max_steps=steps)
        return np.asarray(_of_diagonal(values, process, lanczos.smallest_start(DELTA, LENGTH)))


@jax.jit
def _of_diagonal(values, process, t_delta):
    matrix = lanczos.first_steps(lambda u: u * values[None] ** 2, process).matrix
    return lanczos.enclosures(matrix, min(lanczos.FIRST_STEPS, matrix.diagonal.shape[1]), t_delta)[1]


@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_fail_no_more_often_than_stated_and_only_for_starts_without_the_top_direction(monkeypatch, name):
    values, steps = SPECTRA[name]
    if steps == 1:
        one_step_at_a_time(monkeypatch)
    start = random_starts(0)
    failed = uppers(values, start, steps) < values[0]
    assert failed.sum() <= allowed(STARTS)
    assert np.all(np.abs(start[failed, 0]) < smallest_part())


def test_the_stated_probability_is_reached_by_one_outlier_at_one_step(monkeypatch):
    one_step_at_a_time(monkeypatch)
    assert np.mean(uppers(FLAT, random_starts(1), 1) < FLAT[0]) > 0.6 * DELTA


def one_step(start):
    """a, b and the start's part along the top direction, for the spectrum FLAT."""
    image = start * FLAT**2
    a = np.sum(start * image, axis=1)
    return a, np.linalg.norm(image - a[:, None] * start, axis=1)


def test_the_check_accepts_the_formula_in_numpy():
    a, b = one_step(random_starts(0))
    assert np.sum(np.sqrt(a + b / smallest_part()) < FLAT[0]) <= allowed(STARTS)


def test_the_check_refuses_a_root_at_1():
    a, b = one_step(random_starts(0))
    assert np.sum(np.sqrt(a + b) < FLAT[0]) > allowed(STARTS)


def test_the_check_refuses_a_formula_without_the_residual():
    a, _ = one_step(random_starts(0))
    assert np.sum(np.sqrt(a + 1 / smallest_part()) < FLAT[0]) > allowed(STARTS)


def test_the_check_refuses_the_least_of_ten_starts_at_one_delta():
    a, b = one_step(random_starts(0))
    least = np.sqrt(a + b / smallest_part()).reshape(-1, 10).min(axis=1)
    assert np.sum(least < FLAT[0]) > allowed(len(least))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("part", [1e-3, 1e-9, 1e-14])
def test_a_start_with_the_smallest_part_that_counts_never_fails(name, part):
    """Not after many steps either, when the vectors have long ceased to be orthogonal."""
    values, _ = SPECTRA[name]
    start = random_starts(2)[:BATCH].copy()
    start[:, 0] = 0
    start *= math.sqrt(1 - part**2) / np.linalg.norm(start, axis=1, keepdims=True)
    start[:, 0] = part * (1 + 1e-9)
    matrices = np.repeat(np.diag(values)[None], BATCH, 0)
    for steps in (8, 40, 400):
        _, upper, _ = enclosed(matrices, start, part, rtol=0, max_steps=steps)
        assert np.all(upper >= values[0])


def top_direction(matrix):
    """The first right singular vector and value in extended precision, by Newton's method from those of float64."""
    extended = matrix.astype(np.longdouble)
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    top = vectors[:, -1].astype(np.longdouble)
    for _ in range(4):
        top /= np.sqrt(top @ top)
        image = extended.T @ (extended @ top)
        value = top @ image
        residual = (image - value * top).astype(float)
        top = top - vectors[:, :-1] @ ((vectors[:, :-1].T @ residual) / (values[:-1] - float(value)))
    return top, float(np.sqrt(value))


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="there is no extended precision here")
def test_rounding_that_is_larger_than_the_part_of_a_start_reveals_as_many_as_it_hides():
    """So the stated probability holds over start and rounding together, where it does not for every start."""
    rng, count, part, reach = np.random.default_rng(0), 200, 1e-14, 20
    matrix = with_spectrum(rng, 120, np.append(1, np.linspace(1 - 1e-4, 0.5, 119)))
    top, sigma = top_direction(matrix)

    def failures(parts):
        start = rng.standard_normal((count, 120)).astype(np.longdouble)
        for _ in range(2):
            start -= (start @ top)[:, None] * top[None]
        start *= np.sqrt((1 - parts**2) / np.sum(start**2, axis=1))[:, None]
        start = (start + parts[:, None] * top[None]).astype(np.float64)
        _, upper, _ = enclosed(np.repeat(matrix[None], count, 0), start, part, rtol=0, max_steps=160)
        return np.sum(upper < sigma)

    share = 1 / reach  # of uniform parts that are smaller
    uniform = rng.uniform(-reach * part, reach * part, count).astype(np.longdouble)
    assert failures(uniform) <= count * share + 2 * math.sqrt(count * share)
    # The smallest part that should count is below what rounding leaves of it.
    assert failures(np.full(count, part, np.longdouble)) > 0


def test_a_process_that_breaks_down_does_not_forget_a_part_that_counts():
    values, part = np.where(np.arange(24) == 0, 1.1, 1.0), 1e-13
    start = np.zeros((1, 24))
    start[0, :2] = 2 * part, 1
    _, upper, _ = enclosed(np.diag(values)[None], start, part)
    assert upper[0] >= 1.1


@pytest.mark.parametrize("scale", [1e-170, 1e-85, 1e85, 1e150])
def test_float64_weights_far_from_one_have_true_bounds(scale):
    with jax.enable_x64(True):
        layer = dense(jnp.asarray(scale * np.diag(np.linspace(1, 0, 24))), jnp.zeros(24), (24,))
        for solver in (solvers.Lanczos(1e-6), solvers.Deterministic()):
            found = cohorts.norms(solver, cohorts.whole(layer, key=jax.random.key(0)))
            assert scale <= found.sigma[0] <= scale * 1.001


@pytest.mark.parametrize("t_delta", [1e-3, 1e-6 / 3, 7e-11])
def test_the_end_of_the_bracket_is_no_lower_than_the_root(t_delta):
    # After one step the root is known, a + b / t_delta, and it is where the bracket ends.
    a, b = 1.0, np.linspace(0.1, 3, 50)
    with jax.enable_x64(True):
        tables = (jnp.full((50, 1), a), jnp.asarray(b)[:, None], jnp.full(50, 2, jnp.int32), jnp.zeros(50, bool))
        _, upper = lanczos.enclosures(lanczos.Tridiagonal(*tables), 1, t_delta)
    root = (a + b.astype(np.longdouble) / t_delta) ** 0.5
    assert np.all(np.asarray(upper, np.longdouble) >= root)
    np.testing.assert_allclose(np.asarray(upper), root.astype(float), rtol=1e-9)


# The smallest part


def test_smallest_start_by_hand():
    assert lanczos.smallest_start(1.0, 2) == pytest.approx(0.886227, rel=1e-6)  # sqrt(pi) / 2
    assert lanczos.smallest_start(1e-6, 200) == pytest.approx(1e-6 * 0.0886227, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_few_random_directions_have_a_smaller_part_than_the_smallest_start(length):
    part = np.abs(units(np.random.default_rng(8), 20000, length)[:, 0])
    assert np.sum(part < lanczos.smallest_start(DELTA, length)) <= allowed(20000)


def test_a_delta_that_float64_cannot_resolve_is_refused_with_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"delta leaves 1e-15 .* 200 entries.* smallest share that works is 1\.13e-14"):
        lanczos.smallest_start(1e-15, 200)
    lanczos.smallest_start(1.13e-14, 200)


# Norms of masked layers


def _layers():
    rng = np.random.default_rng(9)
    yield "dense", dense(rng.standard_normal((20, 30)), np.zeros(30), (20,))
    kernel = rng.standard_normal((3, 3, 2, 3))
    yield "strided conv", convolution(kernel, np.zeros(3), (5, 6, 2), (2, 1), ((1, 0), (0, 1)))


LAYERS = dict(_layers())
EXAMPLES = 5


def masked(layer, dtype):
    """The layer in a precision under masks, and the SVD of each masked matrix; two examples have no rows."""
    rng = np.random.default_rng(10)
    density = np.array([1.0, 0.7, 0.3, 0.0, 0.5])[:, None]
    rows = rng.random((EXAMPLES, math.prod(layer.out_shape))) < density
    columns = rng.random((EXAMPLES, math.prod(layer.in_shape))) < np.maximum(density, 0.5)
    columns[0] = True
    columns[4] = False
    sigma = svd([oracles.layer_matrix(layer)[0] * np.outer(r, c) for r, c in zip(rows, columns, strict=True)])
    layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), layer)
    masks = jnp.asarray(rows).reshape(-1, *layer.out_shape), jnp.asarray(columns).reshape(-1, *layer.in_shape)
    return cohorts.MaskedLayer(layer, *masks, jax.random.split(jax.random.key(0), EXAMPLES)), sigma


@pytest.mark.parametrize(("name", "batch_size"), [("dense", 2), ("dense", 8), ("strided conv", 2)])
def test_lanczos_bounds_the_norm_of_every_masked_layer_whatever_the_batch(name, batch_size):
    with jax.enable_x64(True):
        layer, sigma = masked(LAYERS[name], jnp.float64)
        found = cohorts.norms(solvers.Lanczos(delta=1e-9, rtol=RTOL, batch_size=batch_size), layer)
    assert np.all(found.sigma >= sigma)
    assert np.all(found.sigma <= sigma * (1 + RTOL))
    assert np.all(found.gap <= RTOL)
    assert sigma.tolist()[3:] == [0.0, 0.0]


def test_no_place_is_written_twice_and_what_fills_up_a_batch_lies_outside():
    found = list(cohorts.parts(np.array([0, 2, 3, 5, 6]), 2, 7))
    assert [part.tolist() for part in found] == [[0, 2], [3, 5], [6, 7]]


def test_lanczos_beyond_its_cap_is_loose_and_still_a_bound():
    with jax.enable_x64(True):
        layer, sigma = masked(LAYERS["strided conv"], jnp.float64)
        found = cohorts.norms(solvers.Lanczos(delta=1e-9, rtol=1e-9, max_steps=8), layer)
    assert np.all(found.sigma >= sigma)
    assert found.gap[0] > 1e-3
    assert found.gap[0] >= found.sigma[0] / sigma[0] - 1


def test_a_ceiling_cuts_the_norms_of_a_layer_and_a_larger_one_does_nothing():
    with jax.enable_x64(True):
        layer, sigma = masked(LAYERS["dense"], jnp.float64)
        found = cohorts.norms(solvers.Lanczos(delta=1e-9), layer, sigma[1])
    assert found.sigma[0] == sigma[1]
    assert found.sigma[2] == pytest.approx(sigma[2], rel=RTOL)


@pytest.mark.parametrize(
    "solver", [solvers.Lanczos(delta=1e-9, batch_size=2), solvers.Deterministic(), solvers.PowerIteration(batch_size=2)]
)
def test_examples_that_are_not_asked_about_keep_their_ceiling_and_cost_nothing(solver):
    with jax.enable_x64(True):
        layer, _ = masked(LAYERS["dense"], jnp.float64)
        only = np.array([2, 0])
        whole, found = cohorts.norms(solver, layer, 100.0), cohorts.norms(solver, layer, 100.0, only)
    np.testing.assert_array_equal(found.sigma[only], whole.sigma[only])
    others = np.setdiff1d(np.arange(EXAMPLES), only)
    assert np.all(found.sigma[others] == 100)
    assert not found.products[others].any()
    assert not found.drawn[others].any()


@pytest.mark.parametrize(("name", "batch_size"), [("dense", 2), ("dense", 8), ("strided conv", 2)])
def test_power_iteration_estimates_the_norm_of_every_masked_layer_from_below(name, batch_size):
    layer, sigma = masked(LAYERS[name], jnp.float32)
    found = cohorts.norms(solvers.PowerIteration(batch_size=batch_size), layer)
    assert np.all(found.sigma <= sigma * (1 + 1e-5))
    assert np.all(found.sigma >= 0.99 * sigma)


def test_power_iteration_does_not_depend_on_the_batch():
    layer, _ = masked(LAYERS["dense"], jnp.float32)
    one, all_ = (cohorts.norms(solvers.PowerIteration(batch_size=size), layer).sigma for size in (2, 8))
    np.testing.assert_allclose(one, all_, rtol=1e-4)

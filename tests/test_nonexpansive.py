"""Layers whose norms are known by construction: against dense matrices, Jacobians, samples and attacks."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax.bounds import rounding
from lipjax.networks import folding, parametrizations
from lipjax.networks.layers import Bilinear
from lipjax.networks.regions import Region

FLOAT32 = {"atol": 2e-6}


def matrix_of(layer):
    return np.asarray(layer.matrix(), np.float64)


def circular_matrix(kernel, in_shape):
    """The dense matrix of a circular convolution, tap by tap, both sides in C order."""
    height, width, channels = in_shape
    matrix = np.zeros((height, width, kernel.shape[3], height, width, channels))
    for p, q, a, b in itertools.product(*map(range, (height, width, *kernel.shape[:2]))):
        matrix[p, q, :, (p - a) % height, (q - b) % width, :] += kernel[a, b].T
    return matrix.reshape(height * width * kernel.shape[3], -1)


# Parametrizations


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999), shape=st.sampled_from([(4, 4), (6, 3), (3, 6), (1, 4)]), size=st.sampled_from([0.1, 5])
)
@pytest.mark.parametrize("is_complex", [False, True])
def test_the_cayley_transform_has_orthonormal_rows_or_columns(is_complex, seed, shape, size):
    rng = np.random.default_rng(seed)
    kernel = size * rng.standard_normal((2, *shape))
    kernel = kernel + 1j * rng.standard_normal(kernel.shape) if is_complex else kernel
    dtype = jnp.complex64 if is_complex else jnp.float32
    found = np.asarray(parametrizations.cayley(jnp.asarray(kernel, dtype)))
    assert found.shape == kernel.shape
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), 1, atol=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_row_sums_are_those_of_the_whole_plane(weighted):
    rng = np.random.default_rng(0)
    kernel, weights = rng.standard_normal((3, 2, 3, 4)), np.exp(rng.standard_normal(3))
    # On an image this large, the pixel in the middle meets all that its convolution reaches.
    matrix = oracles.conv_matrix(kernel, (9, 9, 3), (1, 1), ((2, 2), (1, 1)))
    products = np.abs(matrix.T @ matrix).reshape(81, 3, 81, 3)[40].sum(axis=1)
    if weighted:
        products = products * weights / weights[:, None]
    found = parametrizations.row_sums(jnp.asarray(kernel), jnp.asarray(weights) if weighted else None)
    np.testing.assert_allclose(found, products.sum(axis=1), rtol=1e-5)


def test_almost_orthogonal_kernels_have_norms_of_at_most_1_and_channels_of_zeros_stay():
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((5, 7))).at[2].set(0)
    found = parametrizations.almost_orthogonal(kernel)
    assert np.linalg.norm(found, 2) <= 1 + 1e-6
    assert (np.asarray(found)[2] == 0).all()
    gradient = jax.grad(lambda kernel: jnp.sum(parametrizations.almost_orthogonal(kernel) ** 3))(kernel)
    assert np.isfinite(gradient).all()
    orthogonal = jnp.asarray(np.linalg.qr(np.random.default_rng(2).standard_normal((5, 5)))[0])
    np.testing.assert_allclose(parametrizations.almost_orthogonal(orthogonal), orthogonal, atol=1e-3)


# The circular convolution


@oracles.jit
def facts_of(layer, r, s, columns):
    exact = layer.linear(r), layer.adjoint()(s), layer.row(7)
    return exact, (layer.absolute(r), layer.absolute_adjoint(s), layer.row_norms(columns)), layer.absolute_norm()


@pytest.mark.parametrize(
    ("shape", "taps", "outputs"), [((4, 6, 1), (3, 3), 3), ((5, 4, 2), (5, 4), 2), ((7, 6, 3), (1, 2), 1)]
)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_circular_convolution_has_the_facts_of_its_dense_matrix(shape, taps, outputs, seed, size):
    rng = np.random.default_rng(seed)
    kernel = size * rng.standard_normal((*taps, shape[2], outputs))
    dense = circular_matrix(kernel, shape)
    r, s = rng.uniform(size=dense.shape[1]), rng.uniform(size=dense.shape[0])
    columns = rng.uniform(size=dense.shape[1]) < 0.3
    with jax.enable_x64(True):
        layer = lipjax.circular(jnp.asarray(kernel), jnp.zeros(outputs), shape)
        vectors = (jnp.asarray(a.reshape(side)) for a, side in ((r, shape), (s, layer.out_shape), (columns, shape)))
        exact, bounds, absolute_norm = jax.tree.map(np.ravel, facts_of(layer, *vectors))
    for found, expected in zip(exact, (dense @ r, dense.T @ s, dense[7]), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-11 * size)
    norms = np.linalg.norm(dense * columns, axis=1)
    for found, expected in zip(bounds, (np.abs(dense) @ r, np.abs(dense).T @ s, norms), strict=True):
        assert (found >= expected).all()
        np.testing.assert_allclose(found, expected, atol=3e-4 * size)
    norm = np.linalg.norm(dense, 2)
    assert norm * (1 - 1e-12) <= layer.whole_norm() <= norm * (1 + 1e-8)
    assert absolute_norm >= np.linalg.norm(np.abs(dense), 2)


@pytest.mark.parametrize("shape", [(8, 8, 16), (14, 7, 3)])
def test_float32_transforms_are_off_by_less_than_is_said(shape):
    """On random, constant and sparse inputs; and what is said is within what worst cases cost."""
    key = jax.random.key(0)
    layer = lipjax.CayleyConv(shape[2], 8, 3, rngs=nnx.Rngs(0)).operation(shape).inner
    inputs = jnp.stack([jax.random.normal(key, shape), jnp.ones(shape), jnp.zeros(shape).at[1, 2, 0].set(3.0)])
    there_and_back = oracles.jit(jax.vmap(lambda layer, a, z: (layer.linear(a), layer.adjoint()(z)), (None, 0, 0)))
    images = jax.vmap(layer.linear)(inputs)
    found = there_and_back(layer, inputs, images)
    said = float(layer.transform_error(rounding.UNIT32))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (layer, inputs, images))
        exact = there_and_back(*wide)
    for narrow, true, taken in zip(found, exact, (inputs, images), strict=True):
        off = np.linalg.norm((np.asarray(narrow, np.float64) - np.asarray(true)).reshape(3, -1), axis=1)
        assert (off > 0).any()
        assert (off <= said * np.linalg.norm(np.reshape(taken, (3, -1)), axis=1) * (1 + 1e-3)).all()
    assert said < 3e-4


def test_kernels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"kernel of shape \(5, 2, 1, 3\) needs images .*has shape \(4, 4, 1\)"):
        lipjax.circular(jnp.ones((5, 2, 1, 3)), jnp.zeros(3), (4, 4, 1))
    layer = lipjax.CayleyConv(2, 3, 3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer 0: CayleyConv of stride 2 needs images .* not \(5, 4, 2\)"):
        lipjax.from_flax(nnx.Sequential(layer, nnx.relu), (5, 4, 2))
    with pytest.raises(ValueError, match="CayleyConv with a kernel of shape"):
        lipjax.from_flax(nnx.Sequential(lipjax.CayleyConv(2, 3, 3, rngs=nnx.Rngs(0)), nnx.relu), (4, 4, 1))


def test_what_is_known_of_a_layer_alone_is_not_folded_away():
    conv = lipjax.CayleyConv(2, 2, 3, rngs=nnx.Rngs(0))

    def model(x):
        moved = conv(2 * x)
        return ((x + moved) / 3 + 1).reshape(len(x), -1)

    network = lipjax.from_function(model, (4, 4, 2))
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds.count("Known") == 1
    x = jax.random.uniform(jax.random.key(0), (3, 4, 4, 2))
    np.testing.assert_allclose(network(x), model(x), atol=1e-5)
    with pytest.raises(ValueError, match="Circular does not fold"):
        folding.rescaled(network.frozen().layers[kinds.index("Known")], after=jnp.ones(()))


# Modules


MODULES = {
    "cayley linear": (lambda rngs: lipjax.CayleyLinear(12, 7, rngs=rngs), (12,)),
    "cayley conv": (lambda rngs: lipjax.CayleyConv(3, 5, 3, rngs=rngs), (6, 4, 3)),
    "cayley conv, fewer channels": (lambda rngs: lipjax.CayleyConv(4, 2, (3, 2), rngs=rngs), (5, 4, 4)),
    "cayley conv, stride": (lambda rngs: lipjax.CayleyConv(2, 6, 4, 2, rngs=rngs), (8, 4, 2)),
    "aol linear": (lambda rngs: lipjax.AOLLinear(9, 12, rngs=rngs), (9,)),
    "aol conv": (lambda rngs: lipjax.AOLConv(2, 3, 3, rngs=rngs), (5, 4, 2)),
    "aol conv, stride": (lambda rngs: lipjax.AOLConv(2, 5, 4, 2, 1, rngs=rngs), (6, 6, 2)),
}
BLOCKS = {
    "sll linear": (lambda rngs: lipjax.SLLLinear(8, 13, rngs=rngs), (8,)),
    "sll conv": (lambda rngs: lipjax.SLLConv(2, 5, 3, rngs=rngs), (4, 5, 2)),
}


def moved_away(module, seed):
    """The module with random parameters, as far from the initial ones as training may bring them."""
    graph, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return nnx.merge(
        graph,
        jax.tree.unflatten(
            structure, [leaf + jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
        ),
    )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("seed", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_a_module_computes_what_it_is_read_as_and_its_norm_is_the_known_one(name, seed):
    make, shape = MODULES[name]
    module = make(nnx.Rngs(0)) if seed is None else moved_away(make(nnx.Rngs(0)), seed)
    x = jax.random.normal(jax.random.key(2), (3, *shape))
    out = module(x)
    identity = jnp.eye(out[0].size)
    network = lipjax.from_function(lambda x: jnp.matmul(jnp.maximum(module(x).reshape(len(x), -1), 0), identity), shape)
    np.testing.assert_allclose(network(x), np.maximum(np.reshape(out, (3, -1)), 0), **FLOAT32)
    dense = np.eye(int(np.prod(shape)))
    with jax.enable_x64(True):
        for layer in network.frozen().astype(jnp.float64).layers:
            dense = matrix_of(layer) @ dense
    values = np.linalg.svd(dense, compute_uv=False)
    if name.startswith("cayley"):
        np.testing.assert_allclose(values, 1, atol=1e-4)
    else:
        assert values[0] <= 1 + 1e-6
    known = network.layers[-1].known_norm(*(jnp.ones(s, bool) for s in (network.layers[-1].out_shape, shape)))
    assert float(known) == 1
    level = "deterministic" if seed is None else "probabilistic"
    found = float(lipjax.global_lipschitz(network, level=level, key=jax.random.key(0)))
    assert values[0] * (1 - 1e-9) <= found <= 1.0003  # what rounding has left is in what is certified


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [None, 1])
def test_an_sll_block_is_1_lipschitz_though_its_parts_are_not(name, seed):
    make, shape = BLOCKS[name]
    module = make(nnx.Rngs(0)) if seed is None else moved_away(make(nnx.Rngs(0)), seed)
    size = int(np.prod(shape))

    def flat(x):
        return module(x.reshape(-1, *shape)).reshape(len(x), -1)

    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda x: flat(x[None])[0])))
    points = 2 * jax.random.normal(jax.random.key(3), (50, size))
    norms = np.linalg.norm(jacobian(points), 2, axis=(1, 2))
    assert 0.9 < norms.max() <= 1 + 1e-5
    kernel = np.asarray(module.operation(shape).layer.matrix(), np.float64)
    assert 1 + 2 * np.linalg.norm(kernel, 2) ** 2 > 1.2  # what the parts alone would say


def test_a_convex_potential_is_as_steep_as_its_layer_says():
    """With A = 1.2 I and no bias, x -> x - 2 A^T relu(A x) has the slope 1 - 2.88 for x > 0."""
    steep = lipjax.convex_potential(lipjax.dense(1.2 * jnp.eye(3), jnp.zeros(3), (3,)))
    assert float(steep.lipschitz) == 1  # by construction, if it were one
    assert float(steep.frozen().lipschitz) == pytest.approx(2 * 1.44 - 1, rel=1e-6)
    assert float(steep.frozen().lipschitz) >= 2 * 1.44 - 1
    np.testing.assert_allclose(steep(jnp.asarray([1.0, -1.0, 2.0])), [-1.88, -1, -3.76], rtol=1e-6)
    head = lipjax.dense(jnp.asarray([[1.0, -1.0], [0, 0], [0, 0]]), jnp.asarray([3.0, 0]), (3,))
    network = lipjax.chain(steep, head, input_shape=(3,))
    x = jnp.asarray([[0.5, 0.5, 0.5]])
    # Logits 3 - 1.88 x_1 and 1.88 x_1: equal at x_1 = 3 / 3.76.
    exact = 3 / 3.76 - 0.5
    for eps, holds in ((exact * 0.99, True), (exact * 1.01, False)):
        assert bool(lipjax.certify(network, x, jnp.asarray([0]), eps, level="deterministic").certified[0]) == holds


@settings(max_examples=30, deadline=None)
@given(a=st.floats(1.0, 3.0, width=32))
def test_the_constant_of_a_convex_potential_is_rounded_up(a):
    block = lipjax.convex_potential(lipjax.dense(jnp.full((1, 1), a, jnp.float32), jnp.zeros(1), (1,)))
    exact = 2 * Fraction(a) ** 2 - 1
    assert exact <= Fraction(float(block.frozen().lipschitz)) <= exact * (1 + Fraction(1, 10**6))


def test_a_kernel_that_is_not_a_number_certifies_nothing():
    for bad in (np.nan, np.inf):
        kernel = jnp.eye(3).at[0, 1].set(bad)
        block = lipjax.convex_potential(lipjax.dense(kernel, jnp.zeros(3), (3,)))
        assert float(block.frozen().lipschitz) == np.inf
        network = lipjax.chain(block, lipjax.dense(jnp.eye(3)[:, :2], jnp.ones(2), (3,)), input_shape=(3,))
        found = lipjax.certify(network, jnp.ones((1, 3)), jnp.asarray([0]), 0.0, level="deterministic")
        assert not bool(found.certified[0])


def test_a_norm_that_is_not_a_number_is_no_constant_of_1(monkeypatch):
    monkeypatch.setattr(lipjax.Dense, "whole_norm", lambda self: np.nan)
    block = lipjax.convex_potential(lipjax.dense(0.5 * jnp.eye(3), jnp.zeros(3), (3,)))
    assert float(block.frozen().lipschitz) == np.inf


def test_a_convex_potential_that_may_overflow_inside_certifies_nothing():
    """Its outputs are about 1e38, but the products of 60 entries add up to 4e38 before the bias is added."""
    size, big = 60, 7e37
    first = lipjax.dense(big * jnp.eye(size + 1), jnp.zeros(size + 1), (size + 1,))
    kernel = jnp.zeros((size + 1, 1)).at[:size].set(0.1)
    block = lipjax.convex_potential(lipjax.dense(kernel, jnp.asarray([-3.3e38]), (size + 1,)))
    head = lipjax.dense(jnp.zeros((size + 1, 2)).at[size, 1].set(1), jnp.zeros(2), (size + 1,))
    network, x = lipjax.chain(first, block, head), jnp.full((1, size + 1), 0.9)
    assert not np.isfinite(network(x)).all()
    found = lipjax.certify(network, x, jnp.asarray([1]), 1e-3, level="deterministic", stages=("local",))
    assert not bool(found.certified[0])


def summed_in_turn(terms):
    """Sums of the rows of float32 products, added one after the other, each rounded."""
    return np.add.accumulate(np.asarray(terms, np.float32), axis=1, dtype=np.float32)[:, -1]


@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_what_float32_rounds_in_a_convex_potential_is_within_its_errors(radius):
    """Inference may add up in any order: here one after the other."""
    rng = np.random.default_rng(0)
    kernels = {
        "alike": np.full((900, 3), 1 / np.sqrt(2700) * 0.99),
        "random": np.linalg.qr(rng.normal(size=(600, 200)))[0],
        "signs": rng.choice([-1.0, 1.0], (700, 20)) / 50,
    }
    for name, kernel in kernels.items():
        kernel = np.float32(kernel)
        center = np.float32(rng.uniform(0.5, 1, len(kernel)))
        if name == "alike":  # beyond 8 each addition of such products loses 0.49 of a last place
            center = np.full(len(kernel), np.float32((18_000 + 0.49) * 2.0**-20 / kernel[0, 0]))
        block = lipjax.convex_potential(lipjax.dense(kernel, jnp.full(kernel.shape[1], 0.1), center.shape)).frozen()
        assert float(block.lipschitz) < 1 + 1e-6
        away = rng.normal(size=center.shape)
        z = np.float32(center + radius * away / np.linalg.norm(away))
        hidden = np.maximum(summed_in_turn(kernel.T * z) + np.float32(0.1), 0)
        ours = z - 2 * summed_in_turn(kernel * hidden)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), block)
            exact = np.asarray(wide(jnp.asarray(z, jnp.float64)))
            around = jnp.asarray(center, jnp.float64)
            reach = radius + 1e-6
            finite, every = jnp.asarray(True), jnp.ones(center.shape, bool)
            known = Region(around - reach, around + reach, around, jnp.asarray(reach), every, finite)
            each = np.asarray(wide.errors(known))
            together = float(wide.error_norm(known, each))
            by_box = float(wide.error_norm(known.without_ball(), each))
        off = np.abs(ours - exact)
        assert (off <= each).all(), name
        assert 0 < np.linalg.norm(off) <= together <= by_box, name
        if name == "alike" and radius == 0:
            assert np.linalg.norm(off) > together / 20
        if name == "random":  # entry by entry the norm of |A| counts twice
            assert together < np.linalg.norm(each) / 2


def test_a_sum_of_products_that_begins_with_the_input_is_covered():
    """1,000 products of 1e-6, of which each that is subtracted from a number near 1 rounds it."""
    kernel = np.full((1, 1000), 0.99 / np.sqrt(1000), np.float32)
    bias, z = np.float32(1e-6 - kernel[0]), np.ones(1, np.float32)
    block = lipjax.convex_potential(lipjax.dense(jnp.asarray(kernel), jnp.asarray(bias), (1,))).frozen()
    products = 2 * kernel * np.maximum(np.float32(kernel[0] * z + bias), 0)
    ours = summed_in_turn(np.concatenate([z[None], -products], axis=1))
    with jax.enable_x64(True):
        wide, at = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), block), jnp.asarray(z, jnp.float64)
        known = Region(at, at, at, jnp.zeros(()), jnp.ones(1, bool), jnp.asarray(True))
        off, each = np.abs(ours - np.asarray(wide(at))), np.asarray(wide.errors(known))
        together = float(wide.error_norm(known, each))
    assert 10 * 2.0**-24 < off[0] <= min(each[0], together)


def test_gradients_are_finite_where_nothing_varies_and_where_there_is_no_kernel():
    def spread(kernel, width):
        layer = lipjax.circular(kernel, jnp.zeros(2), (3, 2, 1))
        r = jnp.full((3, 2, 1), width)
        return jnp.sum(layer.absolute(r)) + jnp.sum(layer.row_norms(r > 0))

    for kernel in (jnp.ones((2, 2, 1, 2)), jnp.zeros((2, 2, 1, 2))):
        for width in (0.0, 1.0):
            assert np.isfinite(jax.grad(spread)(kernel, width)).all()


def test_a_norm_that_is_not_what_is_said_is_noticed():
    layer = lipjax.known(lipjax.dense(2 * jnp.eye(3), jnp.zeros(3), (3,)))
    network = lipjax.chain(layer, lipjax.ReLUActivation(), lipjax.dense(jnp.eye(3)[:, :2], jnp.zeros(2), (3,)))
    with pytest.raises(ValueError, match="layer 0, Known, says that its norm is at most 1, but it is at least 2"):
        lipjax.certify(network, jnp.ones((1, 3)), jnp.asarray([0]), 0.1, level="deterministic")


# Networks


def flatten(x):
    return x.reshape(len(x), -1)


def network_of(name):
    rngs = nnx.Rngs(1)
    linear = nnx.Linear(24, 4, rngs=rngs)
    parts = {
        "cayley": (
            *(lipjax.CayleyConv(1, 4, 3, rngs=rngs), lipjax.MaxMin(), lipjax.CayleyConv(4, 6, 4, 2, rngs=rngs)),
            *(lipjax.MaxMin(), flatten, lipjax.CayleyLinear(24, 24, rngs=rngs), lipjax.MaxMin(), linear),
        ),
        "sll": (
            *(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 5))), lipjax.SLLConv(6, 9, 3, rngs=rngs)),
            *(lambda x: 2 * nnx.avg_pool(x, (2, 2), (2, 2)), flatten, lipjax.SLLLinear(24, 16, rngs=rngs), linear),
        ),
        "aol": (
            lipjax.AOLConv(1, 6, 2, 2, 0, rngs=rngs),
            nnx.relu,
            flatten,
            lipjax.AOLLinear(24, 24, rngs=rngs),
            linear,
        ),
        "linear residual": (
            *(nnx.Conv(1, 6, (2, 2), 2, padding=0, rngs=rngs), lipjax.Residual(nnx.Conv(6, 6, (3, 3), rngs=rngs))),
            *(lipjax.MaxMin(), flatten, linear),
        ),
    }
    return lipjax.from_flax(nnx.Sequential(*parts[name]), (4, 4, 1))


@pytest.mark.parametrize("name", oracles.slow_but(["cayley", "sll", "aol", "linear residual"], "sll"))
def test_samples_and_attacks_obey_what_is_certified(name):
    network, eps = network_of(name), 0.05 if name == "linear residual" else 0.12
    x = jax.random.uniform(jax.random.key(5), (12, 4, 4, 1))
    label = jnp.argmax(network(x), axis=1)
    key = jax.random.key(0)
    found = lipjax.certify(network, x, label, eps, key=key, stages=("global", "local", "dual"))
    forward = lipjax.certify(network, x, label, eps, level="deterministic", stages=("local",))
    assert np.mean(found.certified) > 0
    assert np.isfinite(found.worst_margin).all()
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((200, *x.shape))
    directions *= eps / np.linalg.norm(directions.reshape(*directions.shape[:2], -1), axis=2)[..., None, None, None]
    points = jnp.asarray(np.asarray(x) + directions, jnp.float32)
    logits = np.asarray(jax.vmap(network)(points), np.float64)
    own = np.take_along_axis(logits, np.asarray(label)[None, :, None], axis=2)[..., 0]
    rivals = np.where(np.arange(4) == np.asarray(label)[None, :, None], -np.inf, logits).max(axis=2)
    for certificate in (found, forward):
        assert (own - rivals >= np.asarray(certificate.worst_margin) - 1e-6).all()
    attacked = lipjax.attack(network, x, label, eps, jax.random.key(1), restarts=1)
    broken = np.argmax(network(attacked), axis=1) != label
    assert not (np.asarray(found.certified) & broken).any()


@pytest.mark.parametrize("name", ["cayley", "sll"])
def test_regions_hold_what_float32_computes(name):
    """Boxes, balls and float32 errors of the proof's arithmetic: at a radius of 0 nothing else is left."""
    network = network_of(name)
    x = jax.random.uniform(jax.random.key(5), (6, 4, 4, 1))
    narrow = np.asarray(network(x), np.float64)
    with jax.enable_x64(True):
        wide = network.frozen().astype(jnp.float64)
        exact = np.asarray(wide(jnp.asarray(x, jnp.float64)))
        norms = jnp.asarray([max(layer.whole_norm(), 0) for layer in wide.layers])
        norms = jnp.where(jnp.isinf(norms), 1.001, norms)
        bounds = lipjax.propagate(
            wide, lipjax.l2_ball(jnp.asarray(x, jnp.float64), 0.0), lipjax.Given(norms), lipjax.FLOAT32
        )
        reach = np.asarray(bounds.features.radius)
        rows = np.linalg.norm(matrix_of(wide.head), axis=1)
        allowed = reach[:, None] * rows + np.asarray(bounds.slack.logits)
    off = np.abs(narrow - exact)
    assert (off > 0).any()
    assert (off <= allowed).all()
    assert (allowed < 1e-3).all()


def test_training_takes_known_norms_as_they_are():
    network = network_of("cayley")
    norms, _ = lipjax.whole_norms(network.layers, lipjax.RandomStarted(jax.random.key(0), 2))
    np.testing.assert_array_equal(norms, np.ones(len(network.layers)))
    assert not any(isinstance(layer, Bilinear) for layer in network.layers)
    nothing = jnp.zeros(network.layers[0].out_shape, bool), jnp.ones(network.layers[0].in_shape, bool)
    assert float(network.layers[0].known_norm(*nothing)) == 0

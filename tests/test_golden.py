"""Against reference numbers: the published implementation, run in float64 on fixed random networks.

Its forward pass, its exact norms and its worst logits and losses for a given region must come out again; its boxes and
masks, which ignore zero padding at borders and use global radii, are never to be looser than ours.

The data is looked for in the folder named by LIPJAX_GOLDEN, else in shared/golden beside the checkout.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lipjax import (
    ClippedReLUActivation,
    Estimate,
    Region,
    ReLUActivation,
    box_and_ball,
    chain,
    convolution,
    cross_entropy,
    dense,
    gloro,
    l2_ball,
    propagate,
    whole_norms,
    worst_logits,
)

FOLDER = Path(os.environ.get("LIPJAX_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
SMALL = ["case1_toy", "case1b_toy2class", "case2_mlp_relutheta", "case3_cnn_relutheta", "case4_cnn_relu"]
ALL = [*SMALL, "case6_4c3f_mnist"]


def nhwc(array):
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def layer_of(golden, k, shape):
    """Layer k on inputs of ``shape``: OIHW to HWIO; a dense layer on images takes them channel by channel."""
    weights, bias = golden[f"W{k}"], jnp.asarray(golden[f"b{k}"], jnp.float32)
    if weights.ndim == 4:
        s, p = int(golden[f"stride{k}"]), int(golden[f"pad{k}"])
        kernel = jnp.asarray(weights.transpose(2, 3, 1, 0), jnp.float32)
        return convolution(kernel, bias, shape, (s, s), ((p, p), (p, p)))
    if len(shape) == 3:
        height, width, channels = shape
        weights = weights.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(weights), -1)
    return dense(jnp.asarray(weights.T, jnp.float32), bias, shape)


@functools.cache
def load(case):
    """``(golden, x, network)`` of a case."""
    path = FOLDER / f"{case}.npz"
    if not path.is_file():
        pytest.skip(f"the reference numbers {case}.npz are not in {FOLDER}; set LIPJAX_GOLDEN to their folder")
    with np.load(path) as file:
        golden = {name: file[name] for name in file.files if not name.startswith(("g_", "n1", "n2", "n5", "u0"))}
    x = jnp.asarray(nhwc(golden["x"]), jnp.float32)
    shape, operations = x.shape[1:], []
    last = int(golden["n_weight_layers"]) - 1
    for k in range(last):
        affine = layer_of(golden, k, shape)
        shape = affine.out_shape
        theta = golden.get(f"theta{k}")
        activation = (
            ReLUActivation() if theta is None else ClippedReLUActivation(jnp.asarray(nhwc(theta)[0], jnp.float32))
        )
        operations += [affine, activation]
    return golden, x, chain(*operations, layer_of(golden, last, shape))


@functools.cache
def bounds_of(case):
    golden, x, network = load(case)
    norm = Estimate(jax.random.key(3), tol=1e-6, max_iters=20000)
    if case not in SMALL:
        norm = Estimate(jax.random.key(3), tol=1e-3, max_iters=LARGE_ITERS)
    eps = float(golden["eps"])
    return oracles.jit(lambda x: propagate(network, l2_ball(x, eps), norm))(x)


LARGE_ITERS = 60


def tolerance(array):
    return 1e-5 * (1 + np.abs(array).max())


@pytest.mark.parametrize("case", ALL)
def test_forward_pass(case):
    golden, x, network = load(case)
    np.testing.assert_allclose(network(x), golden["logits"], rtol=0, atol=tolerance(golden["logits"]))
    bounds = bounds_of(case)
    for k, before in enumerate(bounds.before):
        expected = nhwc(golden[f"mu_pre{k}"])
        np.testing.assert_allclose(before.center, expected, rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("case", ALL)
def test_boxes_are_never_looser_than_the_reference(case):
    golden, *_ = load(case)
    for k, before in enumerate(bounds_of(case).before):
        lower, upper = nhwc(golden[f"pre_lb{k}"]), nhwc(golden[f"pre_ub{k}"])
        slack = tolerance(np.concatenate([lower.ravel(), upper.ravel()]))
        assert np.all(np.asarray(before.lower) >= lower - slack)
        assert np.all(np.asarray(before.upper) <= upper + slack)
        # the interval part does not depend on norms: the box is not cut where the ball does not cut it
        assert np.all(np.asarray(before.lower) <= np.asarray(before.center) + slack)
        assert np.all(np.asarray(before.upper) >= np.asarray(before.center) - slack)


def test_the_first_box_of_a_dense_network_is_the_reference_s():
    for case in ("case1_toy", "case1b_toy2class", "case2_mlp_relutheta"):
        golden, *_ = load(case)
        before = bounds_of(case).before[0]
        np.testing.assert_allclose(before.lower, golden["pre_lb0"], atol=tolerance(golden["pre_lb0"]))
        np.testing.assert_allclose(before.upper, golden["pre_ub0"], atol=tolerance(golden["pre_ub0"]))


@pytest.mark.parametrize("case", SMALL)
def test_boxes_hold_sampled_points(case):
    golden, x, network = load(case)
    bounds, exact, rng = bounds_of(case), oracles.DenseNetwork(network), np.random.default_rng(0)
    for i in range(len(x)):
        center = np.asarray(x[i], np.float64).ravel()
        points = oracles.ball_points(rng, center, float(golden["eps"]), 100, exact.jacobian(center))
        before, after = exact.activations(points)
        still = exact.activations(center)[1]
        for k, region in enumerate(bounds.before):
            slack = tolerance(before[k])
            assert np.all(before[k] >= np.asarray(region.lower[i], np.float64).ravel() - slack)
            assert np.all(before[k] <= np.asarray(region.upper[i], np.float64).ravel() + slack)
            dead = ~np.asarray(bounds.live[k][i]).ravel()
            assert np.all(np.abs(after[k] - still[k])[:, dead] <= slack)


def test_boxes_of_the_large_network_hold_sampled_points():
    golden, x, network = load("case6_4c3f_mnist")
    bounds, rng = bounds_of("case6_4c3f_mnist"), np.random.default_rng(0)
    points = oracles.ball_points(rng, np.asarray(x[0], np.float64).ravel(), float(golden["eps"]), 16)
    z = jnp.asarray(points.reshape(-1, *x.shape[1:]), jnp.float32)
    for layer, activation, region in zip(network.layers, network.activations, bounds.before, strict=True):
        z = oracles.jit(jax.vmap(layer))(z.reshape(-1, *layer.in_shape))
        slack = tolerance(np.asarray(z))
        assert np.all(np.asarray(z) >= np.asarray(region.lower[0]) - slack)
        assert np.all(np.asarray(z) <= np.asarray(region.upper[0]) + slack)
        z = activation(z) if isinstance(activation, ReLUActivation) else jax.vmap(activation)(z)


@pytest.mark.parametrize("case", ALL)
def test_what_is_live_is_live_in_the_reference(case):
    golden, *_ = load(case)
    bounds = bounds_of(case)
    for k, (live, before) in enumerate(zip(bounds.live, bounds.before, strict=True)):
        reference = nhwc(golden[f"mask{k}"]).astype(bool)
        extra = np.asarray(live) & ~reference
        theta = nhwc(golden[f"theta{k}"]) if f"theta{k}" in golden else np.inf
        upper, lower = np.asarray(before.upper), np.asarray(before.lower)
        ties = (np.abs(upper) <= tolerance(upper)) | (np.abs(lower - theta) <= tolerance(lower))
        assert not np.any(extra & ~ties)
        assert np.asarray(live).any() == reference.any()


@pytest.mark.parametrize("case", SMALL)
def test_norms_are_those_of_our_own_masked_matrices(case):
    _, x, network = load(case)
    bounds, matrices = bounds_of(case), [matrix for matrix, _ in oracles.DenseNetwork(network).layers]
    for i in range(len(x)):
        columns = np.ones(x[i].size, bool)
        for k, matrix in enumerate(matrices):
            rows = np.asarray(bounds.live[k][i]).ravel()
            left = matrix[rows][:, columns]
            # Much faster than the SVD, and exact to far more digits than are compared.
            sigma = np.sqrt(max(0, np.linalg.eigvalsh(left.T @ left)[-1])) if left.size else 0
            assert float(bounds.sigmas[i, k]) == pytest.approx(sigma, rel=1e-4, abs=1e-6)
            assert float(bounds.sigmas[i, k]) <= sigma * (1 + 1e-5)
            columns = rows


@pytest.mark.parametrize("case", ALL)
def test_local_constants_are_never_above_the_reference(case):
    golden, *_ = load(case)
    bounds = bounds_of(case)
    reference = golden["sigma_local_exact"].T
    assert np.all(np.asarray(bounds.sigmas) <= reference * (1 + 1e-5))
    assert np.all(np.asarray(bounds.features.radius) <= golden["r_tight"] * (1 + 1e-4))
    # where the masks are those of the reference, so are the norms
    rows_before = np.ones(len(reference), bool)
    for k, live in enumerate(bounds.live):
        same = np.all(np.asarray(live) == nhwc(golden[f"mask{k}"]).astype(bool), axis=tuple(range(1, live.ndim)))
        for i in np.flatnonzero(same & rows_before):
            assert float(bounds.sigmas[i, k]) == pytest.approx(reference[i, k], rel=1e-4 if case in SMALL else 0.05)
        rows_before = same


@pytest.mark.parametrize("case", ["case1_toy", "case3_cnn_relutheta"])
def test_global_norms(case):
    golden, _, network = load(case)
    norm = Estimate(jax.random.key(3), tol=1e-6, max_iters=20000)
    sigmas = oracles.jit(lambda layers: whole_norms(layers, norm)[0])(network.layers)
    np.testing.assert_allclose(sigmas, golden["sigma_global_exact"], rtol=1e-4)


@pytest.mark.parametrize("case", ALL)
def test_worst_logits_and_losses_for_the_region_of_the_reference(case):
    golden, x, network = load(case)
    k = len(network.activations) - 1
    lower, upper, center = (
        jnp.asarray(nhwc(golden[f"{name}{k}"]), jnp.float32) for name in ("post_lb", "post_ub", "mu_post")
    )
    radius, true = jnp.asarray(golden["r_tight"], jnp.float32), jnp.ones(len(x), bool)
    region = Region(lower, upper, center, radius, upper > lower, true)
    label = jnp.asarray(golden["y"], jnp.int32)

    @oracles.jit
    def evaluate(head, region, label):
        margins = jax.vmap(lambda region, label: box_and_ball(head, region, label))(region, label)
        logits = jax.vmap(lambda region: head(region.center))(region)
        worst = jax.vmap(worst_logits)(logits, margins, label)
        return worst, jax.vmap(gloro)(logits, worst, label).mean(), cross_entropy(worst, label).mean()

    worst, gloro_loss, bcp_loss = evaluate(network.head, region, label)
    expected = golden["worst_bcp_it100"]
    np.testing.assert_allclose(worst, expected, rtol=0, atol=tolerance(expected))
    assert float(bcp_loss) == pytest.approx(float(golden["loss_bcp_it100"]), abs=1e-5, rel=1e-5)
    if "loss_gloro_it100" in golden:  # there is no rival in the network with one class
        assert float(gloro_loss) == pytest.approx(float(golden["loss_gloro_it100"]), abs=1e-5, rel=1e-5)
    assert float(cross_entropy(network(x), label).mean()) == pytest.approx(float(golden["loss_ce"]), abs=1e-5)

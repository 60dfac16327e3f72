"""Activations with weights in place of masks: boxes, weights, minima and rounding, by grids, samples and attacks."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import (
    ClipActivation,
    ELUActivation,
    GELUActivation,
    LeakyReLUActivation,
    Preactivation,
    SigmoidActivation,
    SiLUActivation,
    SoftplusActivation,
    TanhActivation,
    TanhGELUActivation,
    chain,
    dense,
)
from lipjax.certification import packing
from lipjax.networks.regions import Region

SMOOTH = {
    "tanh": TanhActivation(),
    "sigmoid": SigmoidActivation(),
    "softplus": SoftplusActivation(),
    "elu": ELUActivation(),
    "silu": SiLUActivation(),
    "gelu": GELUActivation(),
    "tanh gelu": TanhGELUActivation(),
}
ALL = {
    **SMOOTH,
    "leaky relu": LeakyReLUActivation(jnp.float32(0.1)),
    "prelu": LeakyReLUActivation(jnp.asarray([0.25, -0.5, 1.5, 0.0, -2.0], jnp.float32)),
    "abs": LeakyReLUActivation(jnp.float32(-1)),
    "hard tanh": ClipActivation(jnp.float32(-1), jnp.float32(1)),
    "maximum": ClipActivation(jnp.asarray([-1, 0, 0.5, 1, 2], jnp.float32), jnp.float32(jnp.inf)),
    "crossed clips": ClipActivation(jnp.float32(1), jnp.float32(-1)),
}
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
POINTS = 2001
KEY = jax.random.key(0)
ends = st.tuples(*[st.floats(-6, 6, width=32, allow_subnormal=False)] * 5).map(np.array)  # XLA flushes subnormals
known = functools.partial(Preactivation, finite=jnp.asarray(True))


@functools.partial(jax.jit, static_argnames="name")
def _facts(name, lower, upper, points):
    activation = jax.tree.map(lambda leaf: leaf.astype(lower.dtype), ALL[name])
    box, weights = activation.box(lower, upper), activation.row_weights(lower, upper)
    live = activation.live_outputs(lower, upper)
    return (
        jax.vmap(activation)(points),
        box,
        weights.astype(lower.dtype),
        live,
        jnp.asarray(activation.lipschitz, lower.dtype),
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60)
@given(first=ends, second=ends, narrow=st.booleans())
def test_values_lie_in_the_box_and_move_no_more_than_the_weights(name, first, second, narrow):
    lower, upper = np.minimum(first, second), np.maximum(first, second)
    if narrow:
        upper = lower + (upper - lower) / 1000
    points = np.linspace(lower, upper, POINTS)
    with jax.enable_x64(True):
        facts = _facts(name, *map(jnp.asarray, (lower, upper, points)))
        values, box, weights, live, lipschitz = jax.tree.map(np.asarray, facts)
    assert (box[0] <= values + 1e-12).all()
    assert (values <= box[1] + 1e-12).all()
    # The box is tight: its ends are attained, but for the grid.
    step = (upper - lower) / (POINTS - 1)
    assert (values.min(axis=0) <= box[0] + lipschitz * step + 1e-9).all()
    assert (values.max(axis=0) >= box[1] - lipschitz * step - 1e-9).all()
    moved = np.abs(np.diff(values, axis=0))
    assert (moved <= lipschitz * weights * np.diff(points, axis=0) + 1e-12).all()
    assert (weights <= 1).all()
    assert (values[:, ~live] == values[0, ~live]).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_weights_are_the_largest_slopes(name):
    """Not only bounds: the largest slope between two neighbours of a dense grid comes close to each."""
    rng = np.random.default_rng(0)
    first, second = rng.uniform(-4, 4, (2, 500))
    lower, upper = np.minimum(first, second), np.maximum(first, second)
    points = np.linspace(lower, upper, POINTS)
    with jax.enable_x64(True):
        facts = _facts(name, *map(jnp.asarray, (lower, upper, points)))
        values, _, weights, _, lipschitz = jax.tree.map(np.asarray, facts)
        everywhere = np.asarray(SMOOTH[name](jnp.arange(-8, 8, 1e-4)))
    slopes = np.abs(np.diff(values, axis=0) / np.diff(points, axis=0)).max(axis=0)
    assert (lipschitz * weights <= slopes + 2e-3).all()
    assert lipschitz <= np.abs(np.diff(everywhere)).max() / 1e-4 * (1 + 5e-4)  # that of softplus is attained nowhere


@functools.partial(jax.jit, static_argnames="name")
def _minimum(name, c, g, weight, lower, upper, center):
    activation = jax.tree.map(lambda leaf: leaf.astype(c.dtype), ALL[name])
    region = known(lower, upper, center, jnp.ones(center.shape, bool), jnp.ones(()))
    return activation.minimum(c, g, weight, region)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60)
@given(first=ends, second=ends, c=ends, g=ends, share=st.floats(0, 1), weight=st.just(0.0) | st.floats(1e-3, 30))
def test_the_minimum_is_below_a_dense_grid_and_near_it(name, first, second, c, g, share, weight):
    lower, upper = np.minimum(first, second), np.maximum(first, second)
    center = np.clip(lower + share * (upper - lower), lower, upper)
    weights = weight * np.linspace(0, 1, 5)  # one per row
    points = np.linspace(lower, upper, POINTS)
    with jax.enable_x64(True):
        found, z = (np.asarray(a) for a in _minimum(name, *map(jnp.asarray, (c, g, weights, lower, upper, center))))
        values = np.asarray(_facts(name, *map(jnp.asarray, (lower, upper, points)))[0])
        curvature = getattr(ALL[name], "curvature", 0.0)
    objective = c * values - g * points + weights / 2 * (points - center) ** 2
    assert found <= objective.min(axis=0).sum() + 1e-9
    steepest = 2 * np.abs(c) + np.abs(g) + weights * (upper - lower)
    grid = (steepest * (upper - lower) / (POINTS - 1)).sum()
    tangents = (np.abs(c) * curvature * ((upper - lower) / lipjax.networks.smooth.PARTS) ** 2).sum()
    assert found >= objective.min(axis=0).sum() - grid - tangents - 1e-6
    assert (lower <= z + 1e-300).all()  # XLA takes numbers below the smallest normal one for zero
    assert (z <= upper + 1e-300).all()


def points(z):
    """What is known of numbers that are known."""
    return Region(z, z, z, None, jnp.ones(z.shape, bool), jnp.asarray(True))


@pytest.mark.parametrize("name", SMOOTH)
def test_float32_is_within_an_eighth_of_what_is_declared(name):
    rng = np.random.default_rng(0)
    far = np.geomspace(1e-30, 1e4, 10_000)
    z = np.concatenate([np.linspace(-20, 20, 200_001), 3 * rng.normal(size=200_000), far, -far]).astype(np.float32)
    ours = np.asarray(jax.jit(lambda z: SMOOTH[name](z))(z), np.float64)
    with jax.enable_x64(True):
        exact = np.asarray(SMOOTH[name](jnp.asarray(z, jnp.float64)))
        declared = np.asarray(SMOOTH[name].errors(points(jnp.asarray(z, jnp.float64))))
    assert (8 * np.abs(ours - exact) <= declared).all()


def test_leaky_slopes_are_rounded_by_no_more_than_is_declared():
    z = -np.geomspace(1e-40, 1e30, 100_000).astype(np.float32)
    for slope in (0.1, 0.3, -0.7, 1e-20, 0.0, 1.0, -1.0):
        activation = LeakyReLUActivation(jnp.float32(slope))
        with jax.enable_x64(True):
            wide, inputs = LeakyReLUActivation(jnp.float64(np.float32(slope))), jnp.asarray(z, jnp.float64)
            exact, bounds = np.asarray(wide(inputs)), np.asarray(wide.errors(points(inputs)))
        ours = np.asarray(jax.jit(lambda activation: activation(z))(activation), np.float64)
        assert (np.abs(ours - exact) <= bounds).all()


@functools.cache
def network_of(name, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    operations = []
    for inputs, outputs in ((6, 5), (5, 5), (5, 3)):
        kernel, bias = rng.normal(size=(inputs, outputs)) * scale / np.sqrt(inputs), rng.normal(size=outputs) / 4
        operations += [dense(jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32), (inputs,)), ALL[name]]
    return chain(*operations[:-1])


SHORT = ("silu", "prelu")  # one that is smooth and one of pieces
LONG = [pytest.param(name, "deterministic", marks=pytest.mark.slow) for name in ALL if name not in SHORT]


@pytest.mark.parametrize(("name", "level"), [*itertools.product(SHORT, ("deterministic", "probabilistic")), *LONG])
def test_jacobians_and_samples_obey_constants_and_margins(name, level):
    network, eps = network_of(name), 0.3
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(size=(4, 6)), jnp.float32)
    label = jnp.argmax(network(x), axis=1)
    found = lipjax.certify(network, x, label, eps, level=level, key=KEY)
    assert np.isfinite(found.worst_margin).all()
    with jax.enable_x64(True):
        wide = network.astype(jnp.float64)
        for i in range(4):
            points = jnp.asarray(oracles.ball_points(rng, np.asarray(x[i], np.float64), eps, 300))
            largest = np.linalg.norm(np.asarray(jacobians_of(wide, points)), ord=2, axis=(1, 2)).max()
            assert largest <= float(found.lipschitz[i])
            logits = np.asarray(logits_of(wide, points))
            rivals = np.delete(logits, int(label[i]), axis=1).max(axis=1)
            assert (logits[:, int(label[i])] - rivals >= float(found.worst_margin[i])).all()
    broken = lipjax.attack(network, x, label, found_radii(network, x, label, level), jax.random.key(0))
    assert not np.asarray(jnp.argmax(network(jnp.asarray(broken)), axis=1) != label).any()


logits_of = jax.jit(lambda network, x: network(x))
jacobians_of = jax.jit(lambda network, x: jax.vmap(jax.jacobian(network.features))(x))


def found_radii(network, x, label, level):
    return np.asarray(lipjax.certified_radius(network, x, label, level=level, dual_steps=30, key=KEY)) * (1 - 1e-6)


@pytest.mark.parametrize("name", ["tanh", "leaky relu", "silu"])
def test_weights_of_rows_give_the_norm_of_the_weighted_matrix(name):
    """The local constant is the product of the norms of diag(w) W, by SVD; and less than without weights."""
    network, eps = network_of(name, scale=3.0), 0.05
    x = jnp.asarray(np.random.default_rng(2).uniform(size=(3, 6)), jnp.float32)
    local = np.asarray(lipjax.local_lipschitz(network, x, eps, level="deterministic"))
    whole = float(lipjax.global_lipschitz(network, level="deterministic"))
    for i in range(3):
        center, low, high = (np.asarray(x[i], np.float64) + shift for shift in (0, -eps, eps))
        radius, product = eps, 1.0
        for layer, activation in zip(network.layers, network.activations, strict=True):
            matrix, bias = oracles.layer_matrix(layer)
            mid, half = matrix @ (low + high) / 2 + bias, np.abs(matrix) @ (high - low) / 2
            center = matrix @ center + bias
            ball = radius * np.linalg.norm(matrix, axis=1)
            low, high = np.maximum(mid - half, center - ball), np.minimum(mid + half, center + ball)
            grid = np.linspace(low, high, 20_001)
            with jax.enable_x64(True):
                wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), activation)
                values, center = np.asarray(jax.vmap(wide)(jnp.asarray(grid))), np.asarray(wide(jnp.asarray(center)))
            slopes = np.abs(np.diff(values, axis=0) / np.diff(grid, axis=0)).max(axis=0)
            sigma = oracles.spectral_norm(slopes[:, None] * matrix)
            radius, product, low, high = radius * sigma, product * sigma, values.min(axis=0), values.max(axis=0)
        assert product * (1 - 1e-3) <= local[i] <= product * 1.03  # weights are kept in 128 steps
        assert local[i] < 0.9 * whole


def test_the_dual_proves_more_than_the_forward_pass_and_no_more_than_an_attack():
    network = network_of("gelu", scale=2.0)
    x = jnp.asarray(np.random.default_rng(3).uniform(size=(12, 6)), jnp.float32)
    label = jnp.argmax(network(x), axis=1)
    options = {"level": "deterministic", "dual_steps": 30}
    local = np.asarray(lipjax.certified_radius(network, x, label, stages=("local",), **options))
    dual = np.asarray(lipjax.certified_radius(network, x, label, stages=("local", "dual"), **options))
    assert (dual >= local).all()
    assert dual.mean() > 1.1 * local.mean()


OLD_XLA = pytest.mark.xfail(
    jax.__version_info__ < (0, 11),
    reason="compiled by JAX 0.10 this gradient is off by a percent; op by op it is right",
)


@pytest.mark.parametrize("name", ["gelu", "prelu", pytest.param("tanh", marks=OLD_XLA)])
def test_gradients_of_a_pass_are_finite_and_those_of_differences(name):
    network, eps = network_of(name), 0.2
    x = jnp.asarray(np.random.default_rng(4).uniform(size=(2, 6)), jnp.float64 if jax.config.x64_enabled else None)

    @jax.jit
    def constant(network, x):
        ask = lipjax.Estimate(jax.random.key(0), tol=0.0, max_iters=300)
        return jnp.sum(lipjax.propagate(network, lipjax.l2_ball(x, eps), ask).lipschitz)

    with jax.enable_x64(True):
        wide, x = network.astype(jnp.float64), jnp.asarray(np.asarray(x), jnp.float64)
        gradient = jax.jit(jax.grad(constant))(wide, x)
        rng = np.random.default_rng(5)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), wide)
        slope = sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        ahead, behind = (
            constant(jax.tree.map(lambda leaf, d, h=h: leaf + h * d, wide, direction), x) for h in (1e-6, -1e-6)
        )
        assert np.isfinite(slope)
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=2e-3)


@pytest.mark.parametrize("name", oracles.slow_but(["gelu", "prelu"], "prelu"))
def test_a_run_trains_and_is_certified_with_an_activation_by_name(name, tmp_path):
    """Local norms and the dual, by the config key alone; slopes of PReLU are trained."""
    small = {"model__architecture": "mlp", "model__activation": name, "schedule__epochs": 3, "certify__limit": 0}
    config = lipjax.load_config(str(CONFIGS / "digits.py") + ":local_dual", probe__size=2, **small)
    run = lipjax.train(config, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["clean_accuracy"] > 0.5
    summary = lipjax.certify_run(tmp_path / "run", limit=40, batch_size=40, output=tmp_path / "out")
    assert 0 < summary["certified_accuracy"] <= summary["attack_accuracy"]
    if name == "prelu":
        assert all(float(activation.slope) != np.float32(0.01) for activation in run.network.activations)


def test_functions_of_jax_are_read_as_what_they_are():
    rngs = nnx.Rngs(0)
    functions = {
        nnx.gelu: TanhGELUActivation,
        functools.partial(nnx.gelu, approximate=False): GELUActivation,
        functools.partial(jax.nn.leaky_relu, negative_slope=0.3): LeakyReLUActivation,
        nnx.relu6: ClipActivation,
        nnx.swish: SiLUActivation,
        jnp.tanh: TanhActivation,
    }
    for function, expected in functions.items():
        model = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), function, nnx.Linear(6, 2, rngs=rngs))
        assert isinstance(lipjax.from_flax(model, (4,)).activations[0], expected)
    with pytest.raises(TypeError, match="ELU with alpha=2"):
        lipjax.from_flax(nnx.Sequential(functools.partial(nnx.elu, alpha=2.0), nnx.Linear(4, 2, rngs=rngs)), (4,))


def test_what_is_not_a_number_shows_and_drops_nothing():
    """In a minimum, in weights of rows, and in the bytes that keep them."""
    network, nan = network_of("gelu"), np.nan
    rows = tuple(np.full((2, *layer.out_shape), 0.3) for layer in network.layers)
    rows[0][1, 2] = nan
    back = packing.unpack(network, packing.pack(rows))
    assert back[0][1, 2] == 1
    assert all((each >= np.nan_to_num(given)).all() for each, given in zip(back, rows, strict=True))
    with jax.enable_x64(True):
        ones = jnp.ones(5)
        for c, lower in ((ones.at[1].set(nan), -ones), (ones, -ones.at[1].set(nan))):
            assert np.isnan(_minimum("gelu", c, ones, ones, lower, ones, 0 * ones)[0])
        assert np.isnan(np.asarray(_facts("gelu", -ones.at[1].set(nan), ones, ones[None])[2])[1])

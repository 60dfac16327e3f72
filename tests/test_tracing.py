"""Any model: classes, functions and Linen modules are read by what they compute, or refused by the name of it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from flax.training import train_state
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax

EPS = 0.05


class ResNet(nnx.Module):
    """Two blocks, the second with a projection shortcut and a stride."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.first, self.second = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2))
        self.third = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
        self.fourth = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.shortcut = nnx.Conv(4, 6, (1, 1), strides=2, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(x + self.second(nnx.relu(self.first(x))))
        x = nnx.relu(self.fourth(nnx.relu(self.third(x))) + self.shortcut(x))
        return self.head(x.mean((1, 2)))


class DenseBlock(nnx.Module):
    """Everything that came before, side by side."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(2 + 3 * k, 3, (3, 3), rngs=rngs) for k in range(3)])
        self.head = nnx.Linear(11, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.concatenate([x, jax.nn.relu(layer(x))], axis=-1)
        return self.head(jnp.mean(x, axis=(1, 2)))


class AllConvolutional(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 6, (3, 3), strides=(2, 2), padding="CIRCULAR", rngs=rngs)
        self.second = nnx.Conv(6, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.leaky_relu(self.first(x), 0.2)).mean(axis=(1, 2))


class Patches(nnx.Module):
    """A patch stem, mixing over tokens and over channels, with GELU."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 5, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.tokens = nnx.Linear(9, 9, rngs=rngs)
        self.channels = nnx.Linear(5, 5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + jnp.swapaxes(nnx.gelu(self.tokens(jnp.swapaxes(x, 1, 2))), 1, 2)
        x = x + nnx.gelu(self.channels(x), approximate=False)
        return self.head(x.mean(axis=1))


class Signal(nnx.Module):
    """A signal (n, channels) through 1-D convolutions and pooling."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (5,), strides=2, rngs=rngs)
        self.second = nnx.Conv(4, 4, (3,), kernel_dilation=2, feature_group_count=2, padding="VALID", rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.silu(self.first(x)), (2,), strides=(2,))
        return self.head(nnx.silu(self.second(jnp.pad(x, ((0, 0), (1, 1), (0, 0))))).reshape(x.shape[0], -1))


class Tabular(nnx.Module):
    """Columns are normalised, clipped and used twice; one layer is shared."""

    def __init__(self, rngs):
        self.shared = nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)
        self.slope = nnx.Param(jnp.full(6, 0.3))

    def __call__(self, x):
        x = (jnp.clip(x, 0.1, 0.9) - 0.5) / jnp.asarray([[0.3, 0.2, 0.5, 0.4, 0.25, 0.6]])
        for _ in range(2):
            x = self.shared(x)
            x = jnp.where(x > 0, x, self.slope[...][None] * x)
        return self.head(jnp.concatenate([x[:, ::-1], jnp.minimum(x, 1.0)], axis=1))


class Pairs(nnx.Module):
    """lipjax's own modules inside of a class."""

    def __init__(self, rngs):
        self.first, self.second, self.head = (nnx.Linear(6, n, rngs=rngs) for n in (6, 6, 3))
        self.pairs, self.clipped = lipjax.MaxMin(), lipjax.ClippedReLU((6,), 0.4)

    def __call__(self, x):
        return self.head(self.clipped(self.second(self.pairs(self.first(x)))))


class Ported(nnx.Module):
    """Weights of a network whose images were (channels, height, width): it flattens in that order."""

    def __init__(self, rngs):
        self.conv, self.head = nnx.Conv(2, 3, (3, 3), padding="VALID", rngs=rngs), nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.conv(x))
        return self.head(jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1))


class Stretches(nnx.Module):
    """Linear stretches: a separable convolution, a transposed one, and a head of two dense layers."""

    def __init__(self, rngs):
        self.depthwise = nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.pointwise = nnx.Conv(4, 6, (1, 1), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 3, (3, 3), strides=(2, 2), rngs=rngs)
        self.low, self.head = nnx.Linear(108, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.pointwise(self.depthwise(x)))
        return self.head(self.low(nnx.tanh(self.up(x)).reshape(x.shape[0], -1)))


class Normalised(nnx.Module):
    """Weights divided by their norms, which are constants when the model is read."""

    def __init__(self, rngs):
        self.conv = nnx.WeightNorm(nnx.Conv(2, 4, (3, 3), rngs=rngs), rngs=rngs)
        self.dense = nnx.SpectralNorm(nnx.Linear(144, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1)
        return self.head(nnx.relu(self.dense(x, update_stats=False)))


class OwnMaxMin(nnx.Module):
    """MaxMin and maxima as people write them, heads of their own (einsum), a clamp and a part under checkpoint."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)
        self.heads = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (2, 4, 3)))
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        a, b = jnp.split(self.first(x), 2, axis=-1)
        x = jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1) + jnp.maximum(self.second(x), 0.1)
        x = jax.checkpoint(lambda x: jax.lax.clamp(-0.5, jnp.maximum(x, -x[:, ::-1]), 0.9))(x)
        return self.head(jnp.einsum("bhc,hcd->bhd", x.reshape(-1, 2, 4), self.heads[...]).reshape(-1, 6))


IMAGE = (6, 6, 2)
MODELS = {
    **{"resnet": (ResNet, IMAGE), "densenet": (DenseBlock, IMAGE), "all convolutional": (AllConvolutional, IMAGE)},
    **{"patches": (Patches, IMAGE), "signal": (Signal, (12, 2)), "tabular": (Tabular, (6,)), "pairs": (Pairs, (6,))},
    **{"ported": (Ported, IMAGE), "stretches": (Stretches, IMAGE), "normalised": (Normalised, IMAGE)},
    "own MaxMin": (OwnMaxMin, (6,)),
}
SHORT = "tabular", "stretches", "normalised", "own MaxMin"


@functools.cache
def read(name):
    kind, shape = MODELS[name]
    model = kind(nnx.Rngs(0))
    return (
        model,
        lipjax.from_flax(model, shape),
        jnp.asarray(np.random.default_rng(1).uniform(size=(4, *shape)), jnp.float32),
    )


logits_of = jax.jit(lambda network, x: network(x))
jacobians_of = jax.jit(lambda network, x: jax.vmap(jax.jacobian(network.features))(x))


@pytest.mark.parametrize("name", MODELS)
def test_networks_compute_what_models_do(name):
    model, network, x = read(name)
    np.testing.assert_allclose(logits_of(network, x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", oracles.slow_but(MODELS, *SHORT))
def test_samples_and_jacobians_obey_bounds_and_attacks_break_nothing(name):
    _, network, x = read(name)
    label = jnp.argmax(network(x), axis=1)
    found = lipjax.certify(network, x, label, EPS, level="deterministic", stages=("local", "dual"))
    assert np.isfinite(found.worst_margin).all()
    assert (found.lipschitz <= lipjax.global_lipschitz(network, level="deterministic") * (1 + 1e-6)).all()
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        wide = network.astype(jnp.float64)
        for i in range(2):
            points = oracles.ball_points(rng, np.asarray(x[i], np.float64).ravel(), EPS, 60).reshape(-1, *x.shape[1:])
            jacobians = np.asarray(jacobians_of(wide, jnp.asarray(points))).reshape(len(points), -1, x[i].size)
            assert np.linalg.norm(jacobians, ord=2, axis=(1, 2)).max() <= float(found.lipschitz[i])
            logits = np.asarray(logits_of(wide, jnp.asarray(points)))
            rivals = np.delete(logits, int(label[i]), axis=1).max(axis=1)
            assert (logits[:, int(label[i])] - rivals >= float(found.worst_margin[i])).all()
    points = lipjax.attack(network, x, label, EPS, jax.random.key(0))
    broken = np.asarray(jnp.argmax(network(points), axis=1) != label)
    assert not (broken & np.asarray(found.certified)).any()


def test_linear_stretches_have_the_norms_of_their_matrices():
    """By SVD: what is linear between two activations is one layer, whatever it was written as."""
    for name, expected in {"ported": 1, "all convolutional": 1, "pairs": 2, "stretches": 2, "normalised": 2}.items():
        _, network, _ = read(name)
        assert len(network.layers) == expected, name
        for layer in (*network.layers, network.head):
            matrix, shape = np.asarray(layer.matrix(), np.float64), layer.in_shape
            units = np.eye(matrix.shape[1]).reshape(-1, *shape)
            images = np.stack(
                [np.asarray(layer.linear(jnp.asarray(unit, jnp.float32))).ravel() for unit in units], axis=1
            )
            np.testing.assert_allclose(images, matrix, atol=1e-6)
    _, network, _ = read("all convolutional")
    exact = oracles.spectral_norm(np.asarray(network.layers[0].matrix(), np.float64))
    assert exact <= lipjax.global_lipschitz(network, level="deterministic") <= exact * (1 + 1e-6)


STRETCHES = {
    "two convolutions": ((8, 8, 2), lambda x, w: conv(conv(x, w[:3, :3, :2, :4], 1), w[:2, :2, :4, :3], 2, "VALID")),
    "three convolutions": (
        (8, 8, 2),
        lambda x, w: conv(conv(conv(x, w[:1, :1, :2, :2], 2), w[:3, :2, :2, :2], 1), w[:1, :1, :2, :4], 1, "VALID"),
    ),
    "a convolution and its mean": ((6, 6, 2), lambda x, w: conv(x, w[:3, :3, :2, :4], 1).mean((1, 2))),
    "padded twice": ((5, 5, 1), lambda x, w: conv(conv(x, w[:3, :3, :1, :2], 1), w[:3, :3, :2, :2], 1)),
    "matrices on both sides": ((4, 3), lambda x, w: jnp.einsum("ij,bjk,kl->bil", w[0, 0], x, w[1, 1, :3, :3])),
    "blocks": ((2, 5, 4), lambda x, w: jnp.einsum("gio,bgpi->bpgo", w[0, :2], x)[:, 1:] * 2),
    "a low rank": ((40, 30), lambda x, w: x.reshape(-1, 1200) @ jnp.tile(w[0, 0], (300, 1)) @ jnp.tile(w[1, 1], 300)),
}


def conv(x, kernel, stride, padding="SAME"):
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", STRETCHES)
def test_a_linear_stretch_is_one_layer_with_the_norm_of_its_matrix(name):
    shape, function = STRETCHES[name]
    kernel = jnp.asarray(np.random.default_rng(6).normal(size=(4, 4, 4, 4)), jnp.float32)
    found = jax.eval_shape(lambda: function(jnp.zeros((2, *shape)), kernel))
    head = jnp.ones((np.prod(found.shape[1:]), 2))

    def whole(x):
        return jax.nn.relu(function(x, kernel) + 0.3).reshape(x.shape[0], -1) @ head

    network = lipjax.from_function(whole, shape)
    linear = jax.jacobian(lambda x: function(x[None], kernel)[0])(jnp.zeros(shape))
    matrix = np.asarray(linear, np.float64).reshape(-1, np.prod(shape))
    if name == "a low rank":  # the product is larger than both, and has no kernel
        assert len(network.layers) == 2
        return
    (layer,) = network.layers
    close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(matrix).max()}
    np.testing.assert_allclose(layer.matrix(), matrix, **close)
    live = np.random.default_rng(7).random(shape) < 0.6
    np.testing.assert_allclose(
        np.ravel(layer.row_norms(jnp.asarray(live))), np.linalg.norm(matrix * live.ravel(), axis=1), **close
    )
    exact = oracles.spectral_norm(matrix)
    constant = lipjax.global_lipschitz(network, level="deterministic")
    assert exact * (1 - 1e-6) <= constant <= exact * (1 + 1e-5)


# Rows whose parts cancel to zero: float32 does not, and revives a neuron that is dead in exact arithmetic.
C = np.float32(np.round(0.1 * 2**20) / 2**20)  # 3 C is exact
ROW = np.array([C, C, C, -3 * C], np.float32)
CANCELLING = {
    "a product with a sum": lambda x: (
        (x @ np.stack([[*ROW, *np.zeros(4)], [*np.zeros(4), *np.full(4, 0.5)]]).astype(np.float32))
        .reshape(-1, 2, 4)
        .sum(2)
    ),
    "copies and a convolution": lambda x: conv(
        x[:, jnp.array([0] * 4 + [1] * 4)].reshape(-1, 2, 4, 1), ROW.reshape(1, 4, 1, 1), 1, "VALID"
    ).reshape(-1, 2),
    "a sum of branches": lambda x: (
        conv(x.reshape(-1, 1, 2, 1), np.full((1, 1, 1, 3), C), 1).sum(3).reshape(-1, 2) - np.float32(3 * C) * x
    ),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_what_cancels_is_rounded_relative_to_its_parts(name):
    function, gain = CANCELLING[name], np.array([[0, 1e4], [0, 0]], np.float32)

    def whole(x):
        return jax.nn.relu(function(x) + np.float32([[-1e-12, 0]])) @ gain + np.float32([[1e-6, 0]])

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        network = lipjax.from_function(whole, (2,))
        x, label = jnp.zeros((1, 2)), jnp.array([0])
        for level in ("deterministic", "probabilistic"):
            radius = min(1.0, float(lipjax.certified_radius(network, x, label, key=jax.random.key(3), level=level)[0]))
            line = np.linspace(-radius, radius, 20001).astype(np.float32)
            points = jnp.asarray(np.stack([line, 0 * line], axis=1))
            assert (np.argmax(network(points), axis=1) == 0).all()


SCALARS = {
    "a centred input": lambda x, p: (x - jnp.mean(x, 1, keepdims=True) + 0.1) @ p,
    "a mean behind an activation": lambda x, p: jax.nn.relu(jnp.mean(x, 1, keepdims=True) - 0.1) @ p[:1],
    "one number of each": lambda x, p: jax.nn.relu(x @ p[:, 0])[:, None] @ p[:1],
    "two of them": lambda x, p: (x @ p[:, 1] + jnp.einsum("bi,i->b", x, p[:, 0]))[:, None] @ p[:1] + p[2],
}


@pytest.mark.parametrize("name", SCALARS)
def test_values_of_one_number_per_example(name):
    p = jnp.asarray(np.random.default_rng(8).normal(size=(4, 3)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(9).uniform(size=(5, 4)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        network = lipjax.from_function(lambda x: SCALARS[name](x, p), (4,))
        np.testing.assert_allclose(network(x), SCALARS[name](x, p), rtol=1e-5, atol=1e-6)
    label = jnp.argmax(network(x), axis=1)
    assert np.isfinite(lipjax.certify(network, x, label, 0.01, level="deterministic").worst_margin).all()


@pytest.mark.parametrize("kind", [jnp.int8, jnp.bfloat16])
def test_kernels_of_another_type_are_those_numbers(kind):
    rng = np.random.default_rng(10)
    first, second = (jnp.asarray(rng.integers(-100, 100, shape), kind) for shape in ((4, 4), (4, 2)))
    x = jnp.asarray(rng.uniform(size=(2, 4)), jnp.float32)

    def product(x, kernel):
        return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def function(first, second, x):
        return product(product(x, first), second)

    network = jax.jit(lambda *of: lipjax.from_function(functools.partial(function, *of), (4,)))(first, second)
    np.testing.assert_allclose(network(x), function(first, second, x), rtol=1e-5)


def test_a_product_over_nothing_is_refused():
    with pytest.raises(TypeError, match="a product over no entries"):
        lipjax.from_function(lambda x: x[:, :0] @ jnp.ones((0, 3)) + x @ jnp.ones((4, 3)), (4,))


def test_a_shared_value_is_one_node():
    _, network, _ = read("resnet")
    names = [type(node.operation).__name__ for node in network.nodes]
    assert names.count("Sum") == 2
    assert len(network.layers) == 6  # the batch norm is folded
    assert type(network.head).__name__ == "Dense"  # and so is the mean


def test_inside_of_a_traced_step_gradients_are_those_of_the_model():
    model, _, x = read("patches")
    graphdef, params = nnx.split(model, nnx.Param)

    def ours(params):
        return jnp.sum(jnp.sin(lipjax.from_flax(nnx.merge(graphdef, params), IMAGE)(x)))

    def theirs(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    mine, exact = jax.jit(jax.grad(ours))(params), jax.jit(jax.grad(theirs))(params)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(nn.gelu(x).reshape(x.shape[0], -1))


def test_a_linen_model_and_its_train_state():
    x = jnp.asarray(np.random.default_rng(3).uniform(size=(2, *IMAGE)), jnp.float32)
    variables = LinenNet().init(jax.random.key(0), x)
    state = train_state.TrainState.create(apply_fn=LinenNet().apply, params=variables["params"], tx=optax.sgd(0.1))
    whole = {"params": state.params, "batch_stats": variables["batch_stats"]}
    network = lipjax.from_flax(LinenNet(), whole, IMAGE)
    np.testing.assert_allclose(network(x), state.apply_fn(whole, x), rtol=1e-5, atol=1e-5)


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Conv(4, (3, 3)))(x))
        x = nn.relu(nn.SpectralNorm(nn.Conv(3, (3, 3)))(x, update_stats=False))
        x = nn.relu(nn.SpectralNorm(nn.Dense(5), n_steps=3)(x.reshape(x.shape[0], -1), update_stats=False))
        return nn.WeightNorm(nn.Dense(3), use_scale=False)(x)


def weight_normalised(kernel, scale=1.0):
    return scale * kernel / np.sqrt((kernel**2).sum(axis=tuple(range(kernel.ndim - 1))))


def spectrally_normalised(kernel, u, steps):
    """Divided by what power iteration from u finds."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    for _ in range(steps):
        v = u @ matrix.T
        u = (v / np.linalg.norm(v)) @ matrix
        sigma, u = np.linalg.norm(u), u / np.linalg.norm(u)
    return kernel / sigma


def test_linen_layers_with_normalised_weights_are_those_of_the_weights():
    """The constant as well, by SVD of kernels that NumPy normalises."""
    x = jnp.asarray(np.random.default_rng(13).uniform(size=(3, *IMAGE)), jnp.float32)
    model = LinenNormalised()
    variables = model.init(jax.random.key(0), x)
    scale = jnp.array([0.3, 1.0, 2.0, -1.5])
    variables["params"]["WeightNorm_0"]["Conv_0/kernel/scale"] = scale
    network = lipjax.from_flax(model, variables, IMAGE)
    np.testing.assert_allclose(logits_of(network, x), model.apply(variables, x), rtol=1e-5, atol=1e-5)

    params, stats = variables["params"], variables["batch_stats"]
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")]
    starts = [
        np.asarray(stats[name][f"{inner}/kernel/u"], np.float64)
        for name, inner in (("SpectralNorm_0", "Conv_1"), ("SpectralNorm_1", "Dense_0"))
    ]
    kernels = [
        *(weight_normalised(kernels[0], np.asarray(scale)), spectrally_normalised(kernels[1], starts[0], 1)),
        *(spectrally_normalised(kernels[2], starts[1], 3), weight_normalised(kernels[3])),
    ]
    norms = []
    for layer, kernel in zip((*network.layers, network.head), kernels, strict=True):
        matrix = kernel.T
        if kernel.ndim == 4:
            forward = functools.partial(conv, kernel=jnp.asarray(kernel, jnp.float32), stride=1)
            matrix = jax.jacobian(lambda x, forward=forward: forward(x[None])[0])(jnp.zeros(layer.in_shape))
        matrix = np.asarray(matrix, np.float64).reshape(np.prod(layer.out_shape), -1)
        np.testing.assert_allclose(layer.matrix(), matrix, atol=1e-6)
        norms.append(oracles.spectral_norm(matrix))
    exact = np.prod(norms[:-1])
    assert exact * (1 - 1e-6) <= lipjax.global_lipschitz(network, level="deterministic") <= exact * (1 + 1e-5)


def test_a_function_with_constants_of_numpy_and_einsum():
    rng = np.random.default_rng(4)
    first, second = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 2, 4), (4, 3)))

    def function(x):
        hidden = jnp.einsum("bhwc,wcd->bhd", x, first) / 4
        hidden = jax.nn.softplus(hidden).sum(1) - 1
        return jnp.matmul(jnp.abs(hidden), second) * np.float32(0.5)

    network = lipjax.from_function(function, IMAGE)
    x = jnp.asarray(rng.uniform(size=(3, *IMAGE)), jnp.float32)
    np.testing.assert_allclose(network(x), function(x), rtol=1e-5, atol=1e-5)
    assert [type(each).__name__ for each in network.activations] == ["SoftplusActivation", "LeakyReLUActivation"]


def attention(x):
    tokens = x.reshape(x.shape[0], 12, 6)
    weights = jax.nn.softmax(tokens @ jnp.swapaxes(tokens, 1, 2), axis=-1)
    return (weights @ tokens).reshape(x.shape[0], -1)[:, :3]


UNKNOWN = {
    "sin": (lambda x: jnp.sin(x).sum((1, 2))[:, :2], "sin at .*test_tracing"),
    "softmax inside": (lambda x: jax.nn.softmax(x.reshape(x.shape[0], -1))[:, :3] * 2.0, "reduce_max"),
    "attention": (attention, "dot_general .*several values that depend on the input"),
    "gating": (lambda x: (x[..., 0] * x[..., 1]).sum(1)[:, :3], "mul .*joins two values"),
    "scan": (
        lambda x: jax.lax.scan(lambda c, y: (c + y, None), x[:, 0, :, 0], x[:, 1:, :, 0].swapaxes(0, 1))[0],
        "scan",
    ),
    "control flow": (lambda x: x if x.sum() > 0 else -x, "cannot be traced: TracerBoolConversionError"),
    "half precision": (lambda x: x.astype(jnp.bfloat16).sum((1, 2)), "bfloat16"),
    "ELU whose slope jumps": (lambda x: nnx.elu(x, 0.5).sum((1, 2)), "ELU with alpha=0.5"),
    "ELU inside": (lambda x: jnp.sin(nnx.elu(x, alpha=2.0)).sum((1, 2)), "ELU with alpha=2"),
    "two results": (lambda x: (x, x), "gives 2 arrays"),
    "own batch": (lambda x: x.reshape(4, -1), "mixes the examples|cannot be traced"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_its_name_and_place(name):
    function, message = UNKNOWN[name]
    with pytest.raises(TypeError, match=message):
        lipjax.from_function(function, IMAGE)


def test_the_message_names_the_line_of_the_model():
    def third(x):
        return jnp.sin(x)  # this one

    with pytest.raises(TypeError, match=r"test_tracing.py:\d+.*third"):
        lipjax.from_function(lambda x: third(x).reshape(x.shape[0], -1), IMAGE)


# Random functions: any chain of these, on values of shape (4, 2)
STEPS = {
    "matmul": lambda w: lambda x: x @ w[:2, :2],
    "left": lambda w: lambda x: jnp.einsum("ij,bjk->bik", w / 2, x),
    "scale": lambda w: lambda x: x * w[None, :, :1] - 0.25,
    "divide": lambda w: lambda x: -x / (0.5 + np.abs(w[None, :1, :2])),
    "transpose": lambda w: lambda x: jnp.transpose(x, (0, 2, 1)).reshape(x.shape),
    "flip": lambda w: lambda x: x[:, ::-1],
    "pad": lambda w: lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 1)), constant_values=0.5)[:, :4, :2],
    "roll": lambda w: lambda x: jnp.roll(x, 1, axis=1),
    "halves": lambda w: lambda x: jnp.concatenate([x[:, 2:], jax.nn.relu(x[:, :2])], axis=1),
    "mean": lambda w: lambda x: x + x.mean(axis=1, keepdims=True) * jnp.ones((1, 4, 1)),
    "split": lambda w: lambda x: jnp.stack([a + b for a, b in (jnp.split(x, 2, axis=1),)] * 2, axis=1).reshape(x.shape),
    "residual": lambda w: lambda x: x + jnp.tanh(x @ w[:2, 2:]),
    "expand": lambda w: lambda x: x[..., None].squeeze(-1),
    "relu": lambda w: jax.nn.relu,
    "gelu": lambda w: nnx.gelu,
    "clip": lambda w: lambda x: jnp.clip(x, -0.5, 0.7),
    "maximum": lambda w: lambda x: jnp.maximum(x, 0.1) + jnp.minimum(x, 0.3),
    "own pairs": lambda w: lambda x: jnp.concatenate([jnp.maximum(x, x[:, ::-1]), jnp.minimum(x, w[0, 0])], 1)[:, 2:6],
    "blocks": lambda w: lambda x: jnp.einsum("bgi,gio->bgo", x, w[:, :2, None] * np.ones((1, 1, 2), np.float32)),
    "clamp": lambda w: lambda x: jax.lax.clamp(np.float32(-0.2), x, np.float32(0.6)),
    "group sort": lambda w: lambda x: jnp.sort(x.reshape(-1, 4, 1, 2), axis=-1).reshape(x.shape),
    "abs": lambda w: jnp.abs,
    "window": lambda w: lambda x: nnx.avg_pool(x, (2,), (1,), ((0, 1),)),
}


@settings(max_examples=20)  # each compiles its own operations
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_random_functions_are_read_as_what_they_compute_and_bounded(names, seed):
    rng = np.random.default_rng(seed)
    kernels, head = rng.normal(size=(len(names), 4, 4)).astype(np.float32), rng.normal(size=(8, 2))
    steps = [STEPS[name](w) for name, w in zip(names, kernels, strict=True)]

    def function(x):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            for step in steps:
                x = step(x)
            return x.reshape(x.shape[0], 8) @ head.astype(np.float32)

    network = lipjax.from_function(function, (4, 2))
    x = jnp.asarray(rng.uniform(size=(1, 4, 2)), jnp.float32)
    with jax.enable_x64(True):
        wide = network.astype(jnp.float64)
        sigmas = [oracles.spectral_norm(np.asarray(layer.matrix())) * (1 + 1e-9) for layer in wide.layers]
        region = lipjax.l2_ball(jnp.asarray(x, jnp.float64), EPS)
        bounds = lipjax.propagate(wide, region, lipjax.Given(jnp.asarray(sigmas or [1.0])))
        points = jnp.asarray(oracles.ball_points(rng, np.asarray(x[0], np.float64).ravel(), EPS, 50).reshape(-1, 4, 2))
        features = np.asarray(jax.vmap(wide.features)(points)).reshape(len(points), -1)
        np.testing.assert_allclose(logits_of(wide, points), function(points.astype(jnp.float32)), rtol=1e-4, atol=1e-4)
    lower, upper = (np.asarray(bound[0]).ravel() for bound in bounds.features.box)
    assert (lower - 1e-9 <= features).all()
    assert (features <= upper + 1e-9).all()
    moved = np.linalg.norm(features - np.asarray(bounds.features.center[0]).ravel(), axis=1)
    assert (moved <= float(bounds.features.radius[0]) + 1e-9).all()


def test_a_registered_module_inside_of_a_class_stands_for_itself():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Ripple(lipjax.Activation):
        def __call__(self, z):
            return z + jnp.sin(z)

        @property
        def lipschitz(self):
            return 2.0

        def box(self, lower, upper):
            return lower - 1, upper + 1

    class Wave(nnx.Module):
        def __call__(self, x):
            return x + jnp.sin(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.wave, self.head = nnx.Linear(4, 5, rngs=rngs), Wave(), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.wave(self.first(x)))

    model = Model(nnx.Rngs(0))
    with pytest.raises(TypeError, match="sin"):
        lipjax.from_flax(model, (4,))
    lipjax.register(Wave, lambda module, value, place: value.activation(Ripple()))
    assert isinstance(lipjax.from_flax(model, (4,)).activations[0], Ripple)


# Inside of a traced function nothing is compared: what cannot be read has to be seen from the equations alone


def _rows(z):
    return z.shape[0]


MIXING = {
    "a sum over the batch": lambda w, z: z @ (w * jnp.arange(_rows(z)).sum()),
    "a scalar of the batch": lambda w, z: z @ w * jnp.sum(jnp.ones_like(z[:, 0])),
    "places in the batch": lambda w, z: z * (w[0, 0] * jnp.arange(_rows(z))[:, None]),
    "a random mask": lambda w, z: z * (w[0][None] * jax.random.bernoulli(jax.random.key(0), 0.5, z.shape)),
    "random noise": lambda w, z: z + w[0][None] * jax.random.normal(jax.random.key(0), z.shape),
    "entries out of bounds": lambda w, z: z.at[:, jnp.array([0, 5, 2])].get(mode="fill", fill_value=-1.0) @ w,
    "more than four examples": lambda w, z: z @ w * np.full((1, 3), 1.0 + (_rows(z) > 4), np.float32),
}
MIXING["padding by the batch"] = lambda w, z: (
    jnp.pad(z[:, :2], ((0, 0), (0, 1)), constant_values=jnp.sum(jnp.ones(_rows(z)))) @ w
)
MIXING["as wide as the batch"] = lambda w, z: (
    (z @ w[:, :1] @ jnp.ones((1, _rows(z)))).sum(1, keepdims=True) * w[0][None]
)
READ = {
    "two paddings": lambda w, z: (
        jnp.pad(jnp.pad(z[:, :1], ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=w[0, 0]) @ w
    ),
    "a bias for each": lambda w, z: z @ w + jnp.broadcast_to(w[0], z.shape) * 2.0,
    "ones like": lambda w, z: z @ w * jnp.ones_like(z) + jnp.zeros_like(z),
    "an order": lambda w, z: z[:, jnp.array([2, 0, 1])] @ w,
}


def read_inside_of_jit(function, z):
    w, v = (jnp.asarray(np.random.default_rng(k).normal(size=(3, 3)), jnp.float32) for k in (0, 1))

    def whole(w, z):
        return jax.nn.relu(function(w, z)) @ v[:, :2]

    ours = jax.jit(lambda w: lipjax.from_function(functools.partial(whole, w), (3,))(z))
    return ours(w), whole(w, z)


@pytest.mark.parametrize("name", MIXING)
def test_what_depends_on_the_batch_is_seen_inside_of_a_traced_function(name):
    with pytest.raises(
        TypeError, match=r"depends on (the|their) number|differently|another number|out of bounds|mixes"
    ):
        read_inside_of_jit(MIXING[name], jnp.ones((5, 3)))


@pytest.mark.parametrize("name", READ)
def test_what_does_not_is_read_inside_of_a_traced_function(name):
    ours, theirs = read_inside_of_jit(
        READ[name], jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)), jnp.float32)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

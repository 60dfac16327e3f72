"""from_flax: a network computes what its model does, and nothing unknown passes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from lipjax import (
    ClippedMaxMinActivation,
    ClippedReLUActivation,
    Conv,
    ConvexPotentialActivation,
    Dense,
    MaxMinActivation,
    MaxPoolActivation,
    ReLUActivation,
    Sum,
    from_flax,
)
from lipjax.experiments import architectures
from lipjax.networks import layers
from lipjax.reading import modules

RNGS = nnx.Rngs(0)
RNG = np.random.default_rng(0)


def drawn(key, shape, dtype, **_):
    """An initialiser that NumPy draws: nothing is compiled."""
    return jnp.asarray(RNG.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[:-1]))), dtype)


def conv(channels_in, channels, kernel=(3, 3), **options):
    return nnx.Conv(channels_in, channels, kernel, rngs=RNGS, kernel_init=drawn, **options)


def linear(inputs, outputs, **options):
    return nnx.Linear(inputs, outputs, rngs=RNGS, kernel_init=drawn, **options)


def assert_same(model, shape):
    x = RNG.standard_normal((3, *shape)).astype(np.float32)
    graphdef, state = nnx.split(model)

    @oracles.jit
    def both(state, x):
        model = nnx.merge(graphdef, state)
        network = from_flax(model, shape)
        with jax.numpy_dtype_promotion("standard"):  # Flax's average pooling divides by an integer
            theirs = model(x)
        return network, network(x), theirs

    network, ours, theirs = both(state, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    assert network.input_shape == shape
    return network


COMPUTED = [
    ("4c3f", "clipped_relu"),
    *(("small_cnn", activation) for activation in ("relu", "clipped_relu", "maxmin", "clipped_maxmin")),
    *(("mlp", activation) for activation in architectures.ACTIVATIONS),
]
SMALL_CLIPS = {"theta": 0.3, "upper_clip": (0.3,), "lower_clip": (-0.1,)}


@pytest.mark.parametrize(("architecture", "activation"), COMPUTED)
def test_shipped_architectures_compute_the_same(architecture, activation):
    shape = (28, 28, 1)
    network = assert_same(
        architectures.classifier(architecture, activation, shape, 10, **SMALL_CLIPS, rngs=nnx.Rngs(1)), shape
    )
    assert network.num_classes == 10


KINDS = {
    "relu": ReLUActivation,
    "clipped_relu": ClippedReLUActivation,
    "maxmin": MaxMinActivation,
    "clipped_maxmin": ClippedMaxMinActivation,
}


@pytest.mark.parametrize("shape", [(28, 28, 1), (33, 40, 2), (64, 64, 3)])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("architecture", sorted(architectures.ARCHITECTURES))
def test_every_architecture_has_every_activation_and_input_shape(architecture, activation, shape):
    def read():
        return from_flax(architectures.classifier(architecture, activation, shape, 7, rngs=nnx.Rngs(0)), shape)

    network = jax.eval_shape(read)
    assert (network.num_classes, network.input_shape) == (7, shape)
    assert len(network.layers) == architectures.num_hidden_layers(architecture)
    own = [each for each in network.activations if not isinstance(each, ConvexPotentialActivation)]
    assert len(own) == architectures.num_activations(architecture)
    assert {type(each) for each in own} <= {KINDS[activation]}


def test_clips_are_those_of_each_layer_and_another_number_of_them_is_refused():
    build = functools.partial(architectures.classifier, "mlp", "clipped_maxmin", (8, 8, 1), 10, rngs=nnx.Rngs(0))
    activations = from_flax(build(upper_clip=(0.1, 0.2), lower_clip=(-0.3,)), (8, 8, 1)).activations
    assert [float(each.upper_clip[0]) for each in activations] == pytest.approx([0.1, 0.2])
    assert [float(each.lower_clip[0]) for each in activations] == pytest.approx([-0.3, -0.3])
    assert activations[0].upper_clip.shape == (128,)
    with pytest.raises(ValueError, match=r"3 clips .* for 2 hidden layers; give one, or one for each"):
        build(upper_clip=(1.0, 1.0, 1.0))


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"images \(8, 8, 1\) are too small for 8c2f"):
        architectures.classifier("8c2f", "relu", (8, 8, 1), 10, rngs=nnx.Rngs(0))


def test_neuron_counts_are_those_of_the_paper():
    def thetas(architecture, shape, classes=10):
        def read():
            return from_flax(
                architectures.classifier(architecture, "clipped_relu", shape, classes, rngs=nnx.Rngs(0)), shape
            )

        network = jax.eval_shape(read)
        sizes = [activation.theta.size for activation in network.activations]
        return sum(sizes), round((sum(leaf.size for leaf in jax.tree.leaves(network)) - sum(sizes)) / 1e6, 3)

    assert thetas("4c3f", (28, 28, 1)) == (48064, 1.975)
    assert thetas("4c3f", (32, 32, 3)) == (62464, 2.467)
    assert thetas("6c2f", (32, 32, 3)) == (111104, 2.250)
    assert thetas("8c2f", (64, 64, 3), 200) == (916544, 4.343)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": "VALID"},
        {"padding": "SAME", "strides": 2},
        {"padding": 2, "strides": (1, 2)},
        {"padding": ((0, 2), (1, 3)), "strides": (3, 2)},
        {"padding": (1, 2), "use_bias": False},
        {"padding": 1, "strides": 3},
        {"padding": 2, "kernel_dilation": 2},
        {"padding": "SAME", "kernel_dilation": (1, 2), "strides": 2},
    ],
)
def test_convolutions_of_flax(options):
    flat = nnx.Sequential(conv(2, 3, (3, 4), **options), nnx.relu, architectures.flatten)
    width = flat(jnp.zeros((1, 9, 8, 2))).shape[1]
    assert_same(nnx.Sequential(*flat.layers, linear(width, 4)), (9, 8, 2))


def test_dense_without_bias_and_without_activation():
    assert_same(nnx.Sequential(linear(5, 7, use_bias=False), linear(7, 6), nnx.relu, linear(6, 3)), (5,))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: jnp.reshape(x, (x.shape[0], -1)),
        lambda x: x.reshape(x.shape[0], 2, -1).reshape(x.shape[0], -1),
        lambda x: jax.lax.collapse(x, 1),
        lambda x: jnp.ravel(x).reshape(x.shape[0], -1),
    ],
)
def test_a_reshape_is_known_by_what_it_does(reshape):
    assert_same(nnx.Sequential(conv(1, 2, padding=1), nnx.relu, reshape, linear(50, 3)), (5, 5, 1))


def test_images_may_come_out_of_a_reshape():
    model = nnx.Sequential(
        linear(4, 18), nnx.relu, lambda x: x.reshape(-1, 3, 3, 2), conv(2, 2), architectures.flatten, linear(18, 3)
    )
    assert_same(model, (4,))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sine", jnp.sin),
        ("mixes examples", lambda x: x.reshape(1, -1)),
        ("flip of the batch", lambda x: x[::-1].reshape(x.shape[0], -1)),
        ("constant", lambda x: jnp.zeros((x.shape[0], 50))),
        ("raises", lambda x: x.reshape(x.shape[0], 7)),
        ("dropout", nnx.Dropout(0.5, rngs=RNGS)),
        ("batch norm", nnx.BatchNorm(2, rngs=RNGS)),
        ("not callable", 3),
    ],
)
def test_unknown_layers_raise_a_type_error_that_names_the_place(name, module):
    model = nnx.Sequential(conv(1, 2, padding=1), nnx.relu, linear(50, 3))
    model.layers = nnx.List([*list(model.layers)[:2], module, list(model.layers)[2]])
    with pytest.raises(TypeError, match="layer 2"):
        from_flax(model, (5, 5, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "CIRCULAR"},
        {"padding": "REFLECT"},
        {"mask": jnp.asarray(RNG.integers(0, 2, (3, 3, 2, 2)), jnp.float32), "padding": 1},
    ],
)
def test_convolutions_that_are_known_by_their_trace(options):
    assert_same(nnx.Sequential(conv(2, 2, **options), architectures.flatten, linear(50, 3)), (5, 5, 2))


def test_zeros_between_pixels_are_read():
    layer = conv(2, 2, input_dilation=(2, 1), padding=1)
    model = nnx.Sequential(layer, nnx.relu, architectures.flatten, linear(90, 3))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 5, 5, 2)), jnp.float32)
    np.testing.assert_allclose(from_flax(model, (5, 5, 2))(x), model(x), rtol=1e-5, atol=1e-5)


def test_convolutions_of_volumes_are_refused():
    layer = nnx.Conv(2, 2, (3, 3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="a convolution with 3 dimensions"):
        from_flax(nnx.Sequential(layer, architectures.flatten, linear(250, 3)), (5, 5, 5, 2))


def test_structures_that_are_no_classifier_are_refused():
    with pytest.raises(TypeError, match="last layer of the model must be a dense one"):
        from_flax(nnx.Sequential(linear(3, 4), nnx.relu), (3,))
    with pytest.raises(TypeError, match="last layer of the model must be a dense one"):
        from_flax(nnx.Sequential(linear(3, 4)), (2, 3))
    with pytest.raises(TypeError, match="not dict; from_function reads functions"):
        from_flax({}, (3,))
    with pytest.raises(ValueError, match="takes 3 inputs, but its input has shape"):
        from_flax(nnx.Sequential(linear(3, 4)), (5,))
    with pytest.raises(ValueError, match="theta of shape"):
        from_flax(nnx.Sequential(linear(3, 4), modules.ClippedReLU((5,)), linear(4, 2)), (3,))


def test_unknown_names_of_models_are_named():
    with pytest.raises(ValueError, match="unknown architecture '9c9f'; known are"):
        architectures.classifier("9c9f", "relu", (28, 28, 1), 10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown activation 'sine'"):
        architectures.classifier("4c3f", "sine", (28, 28, 1), 10, rngs=nnx.Rngs(0))


def test_gradients_reach_the_flax_parameters():
    model = architectures.classifier("small_cnn", "clipped_relu", (8, 8, 1), 10, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))

    def through_network(params):
        return jnp.sum(jnp.sin(from_flax(nnx.merge(graphdef, params), (8, 8, 1))(x)))

    def through_model(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    ours, theirs = jax.jit(jax.grad(through_network))(params), jax.jit(jax.grad(through_model))(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_network_is_a_pytree_with_a_static_structure():
    network = from_flax(nnx.Sequential(linear(3, 4), nnx.relu, linear(4, 2)), (3,))
    leaves, structure = jax.tree.flatten(network)
    assert len(leaves) == 4
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again.activations[0], ReLUActivation)
    assert again.input_shape == (3,)


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Reversed(nnx.Sequential):
    def __call__(self, x):
        return -super().__call__(x)


def doubled_product(*arguments, **options):
    return 2 * jax.lax.dot_general(*arguments, **options)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (linear(3, 4, dot_general=doubled_product), "its own dot_general"),
        (linear(3, 4, dtype=jnp.bfloat16), "computes in"),
        (linear(3, 4, param_dtype=jnp.float16), "kernel of float16"),
    ],
)
def test_layers_that_compute_something_else_are_refused(module, word):
    with pytest.raises(TypeError, match=word):
        from_flax(nnx.Sequential(module, nnx.relu, linear(4, 2)), (3,))


def test_subclasses_are_read_by_what_they_compute():
    assert_same(Reversed(linear(3, 4), nnx.relu, linear(4, 2)), (3,))
    for layer in (Doubled(3, 4, rngs=RNGS), nnx.LoRALinear(3, 4, lora_rank=2, rngs=RNGS)):
        assert_same(nnx.Sequential(layer, nnx.relu, linear(4, 2)), (3,))


def test_clips_after_a_flatten_are_those_of_the_layer_before():
    assert_same(
        nnx.Sequential(conv(1, 2), architectures.flatten, modules.ClippedReLU((50,), 0.2), linear(50, 3)),
        (5, 5, 1),
    )


# What is folded and what else is read


def normalise(x):
    return (x - jnp.array([0.1, 0.4]).reshape(1, 1, 1, 2)) / jnp.array([0.3, 0.02]).reshape(1, 1, 1, 2)


def trained_norm(channels, seed=0):
    """A batch norm in inference mode, with statistics of its own."""
    norm = nnx.BatchNorm(channels, use_running_average=True, rngs=RNGS)
    rng = np.random.default_rng(seed)
    norm.mean[...], norm.bias[...] = jnp.asarray(rng.normal(size=(2, channels)), jnp.float32)
    norm.var[...], norm.scale[...] = jnp.asarray(rng.uniform(0.1, 2, (2, channels)), jnp.float32)
    return norm


def pool_max(x):
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


def pool_average(x):
    return nnx.avg_pool(x, (2, 3), strides=(2, 1))


def tail(width):
    return [architectures.flatten, linear(width, 4)]


FOLDED = {
    "normalised input": [normalise, conv(2, 3, padding=1), nnx.relu, *tail(108)],
    "batch norm after a convolution": [conv(2, 3, padding=1), trained_norm(3), nnx.relu, *tail(108)],
    "batch norm before a padded convolution": [
        *(conv(2, 3), nnx.relu, trained_norm(3), conv(3, 2, (4, 4), strides=2, padding=1), nnx.relu, *tail(18))
    ],
    "batch norm before a dense layer": [conv(2, 3), nnx.relu, trained_norm(3), *tail(108)],
    "batch norm after a dense layer": [architectures.flatten, linear(72, 5), trained_norm(5), nnx.relu, linear(5, 4)],
    "two shifts and a scale": [normalise, lambda x: 2 * (x + 1), conv(2, 3, padding=1), lambda x: x - 1, *tail(108)],
    "average pooling": [conv(2, 3, padding=1), nnx.relu, pool_average, *tail(36)],
    "max pooling that overlaps": [conv(2, 3, padding=1), nnx.relu, pool_max, *tail(27)],
    "max pooling before the activation": [conv(2, 3, padding=1), pool_max, nnx.relu, *tail(27)],
    "feature groups": [conv(2, 4, padding=1, feature_group_count=2), nnx.relu, *tail(144)],
    "MaxMin": [
        *(conv(2, 4, padding=1), modules.MaxMin(), architectures.flatten),
        *(linear(144, 6), modules.MaxMin(), linear(6, 4)),
    ],
    "clipped MaxMin": [
        *(conv(2, 4, padding=1), modules.ClippedMaxMin((6, 6, 4), 0.3, -0.2), architectures.flatten, linear(144, 6)),
        *(modules.ClippedMaxMin((6,), 0.1, -0.1), linear(6, 4)),
    ],
    "a residual sum": [modules.Residual(conv(2, 2, padding=1), nnx.relu, conv(2, 2, padding=1)), nnx.relu, *tail(72)],
    "a residual sum in another": [
        modules.Residual(modules.Residual(conv(2, 2, padding=1)), nnx.relu, trained_norm(2)), nnx.relu, *tail(72)
    ],
    "inactive dropout": [conv(2, 3), nnx.Dropout(0.5, deterministic=True), nnx.relu, *tail(108)],
    "activations without a layer between": [nnx.relu, nnx.relu, *tail(72)],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_folded_networks_compute_the_same(name):
    assert_same(nnx.Sequential(*FOLDED[name]), (6, 6, 2))


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("normalised input", [Conv, ReLUActivation]),
        ("batch norm after a convolution", [Conv, ReLUActivation]),
        ("batch norm before a padded convolution", [Conv, ReLUActivation, Conv, ReLUActivation]),
        ("batch norm before a dense layer", [Conv, ReLUActivation]),
        ("two shifts and a scale", []),  # all of it is the last layer
        ("inactive dropout", [Conv, ReLUActivation]),
        ("activations without a layer between", [ReLUActivation, ReLUActivation]),
        ("a residual sum", [Conv, ReLUActivation, Conv, Sum, ReLUActivation]),
    ],
)
def test_what_is_affine_is_folded_into_as_few_layers_as_can_be(name, operations):
    network = from_flax(nnx.Sequential(*FOLDED[name]), (6, 6, 2))
    assert [type(node.operation) for node in network.nodes[1:]] == operations
    assert isinstance(network.head, Dense)


def test_a_residual_sum_around_affine_layers_alone_is_one_layer():
    residual = modules.Residual(conv(2, 2, padding=1, use_bias=False), trained_norm(2))
    network = assert_same(nnx.Sequential(residual, nnx.relu, *tail(72)), (6, 6, 2))
    assert [type(node.operation) for node in network.nodes[1:]] == [Conv, ReLUActivation]


def test_the_shift_before_a_padded_convolution_is_a_bias_that_differs_at_the_borders():
    network = from_flax(nnx.Sequential(lambda x: x + 1, conv(2, 3, padding=1), nnx.relu, *tail(108)), (6, 6, 2))
    bias = np.asarray(network.layers[0].bias)
    assert bias.shape == (6, 6, 3)
    np.testing.assert_allclose(bias[1:-1, 1:-1], np.broadcast_to(bias[2, 2], (4, 4, 3)), rtol=1e-6)
    assert np.abs(bias[0] - bias[2]).max() > 0.01


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nnx.BatchNorm(2, rngs=RNGS), "BatchNorm, is in training mode"),
        (nnx.Dropout(0.5, rngs=RNGS), "Dropout, is active"),
        (lambda x: 2.0 / x, "div at .*test_reading"),
        (lambda x: x * x, "mul at .*test_reading"),
        (lambda x: x / (1 + 1e-4 * (x.shape[0] - 1)), "for another number of examples"),
        (lambda x: x * (1.0 if x.shape[0] <= 4 else -1.0), "for another number of examples"),
        (nnx.BatchNorm(2, use_running_average=True, dtype=jnp.bfloat16, rngs=RNGS), "computes in"),
        (lambda x: x - x.mean(axis=0, keepdims=True), "mixes the examples|another number"),
        (lambda x: x + jnp.arange(x.shape[0]).reshape(-1, 1, 1, 1), "treats the examples"),
        (lambda x: x + x[:1], "mixes the examples|another number"),
        (lambda x: jnp.cumsum(x, axis=0), "cumsum"),
        (lambda x: jnp.roll(x, 1, axis=0), "mixes the examples|another number"),
        (lambda x: x[:, ::2][:, jnp.argsort(x[0, :, 0, 0])[:3]], "is not supported|depend on the input"),
    ],
)
def test_what_mixes_or_distinguishes_examples_is_refused(layer, word):
    with pytest.raises(TypeError, match=word):
        from_flax(nnx.Sequential(conv(2, 2), layer, *tail(32)), (6, 6, 2))


def test_linen_models_are_read_with_their_variables():
    def shrink(x):
        return x.reshape(x.shape[0], -1)

    model = nn.Sequential([
        nn.Conv(4, (3, 3), strides=2, kernel_dilation=1), nn.BatchNorm(use_running_average=True), nn.relu,
        lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), shrink, nn.Dense(5, use_bias=False), nn.relu, nn.Dense(3),
    ])  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, model.init(jax.random.key(1), x))
    network = from_flax(model, variables, input_shape=(8, 8, 2))
    np.testing.assert_allclose(network(x), model.apply(variables, x), atol=1e-5)
    with pytest.raises(TypeError, match="needs its variables"):
        from_flax(model, input_shape=(8, 8, 2))


def test_variables_that_a_linen_module_does_not_use_are_not_read():
    model = nn.Sequential([nn.Dense(3, use_bias=False)])
    variables = {"params": {"layers_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    assert not np.any(from_flax(model, variables, input_shape=(2,)).head.bias)


def test_a_network_that_computes_something_else_than_its_model_is_refused(monkeypatch):
    monkeypatch.setattr(layers.Dense, "form", lambda self, kernel, a: 1.1 * (a.ravel() @ kernel))
    with pytest.raises(ValueError, match="does not compute what the model does"):
        from_flax(nnx.Sequential(linear(3, 4), nnx.relu, linear(4, 2)), (3,))


def test_max_pooling_has_the_constant_of_its_overlap():
    assert MaxPoolActivation((8, 8, 1), (2, 2), (2, 2), ((0, 0), (0, 0))).lipschitz == 1.0
    assert MaxPoolActivation((9, 9, 1), (3, 3), (2, 2), ((0, 0), (0, 0))).lipschitz == 2.0
    assert MaxPoolActivation((9, 9, 1), (3, 3), (1, 2), ((0, 0), (0, 0))).lipschitz == pytest.approx(np.sqrt(6))
    # one bright input that wins in four windows: the change is exactly twice as long
    pool, bright = (
        MaxPoolActivation((5, 5, 1), (3, 3), (2, 2), ((1, 1), (1, 1))),
        jnp.zeros((5, 5, 1)).at[1, 1].set(1.0),
    )
    assert float(jnp.linalg.norm(pool(bright))) == pool.lipschitz == 2.0

"""from_flax: a network computes what its model does, and nothing unknown passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipjax import from_flax, layers, models

RNGS = nnx.Rngs(0)


def conv(channels_in, channels, kernel=(3, 3), **options):
    return nnx.Conv(channels_in, channels, kernel, rngs=RNGS, **options)


def linear(inputs, outputs, **options):
    return nnx.Linear(inputs, outputs, rngs=RNGS, **options)


def assert_same(model, shape):
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    network = from_flax(model, shape)
    np.testing.assert_allclose(network(x), model(x), atol=2e-5)
    assert network.input_shape == shape
    return network


@pytest.mark.parametrize("architecture", sorted(models.ARCHITECTURES))
@pytest.mark.parametrize("activation", ["relu", "clipped_relu"])
def test_shipped_architectures_compute_the_same(architecture, activation):
    shape = (32, 32, 3) if architecture == "6c2f" else (28, 28, 1)
    network = assert_same(models.classifier(architecture, activation, shape, 10, theta=0.3, rngs=nnx.Rngs(1)), shape)
    assert network.num_classes == 10


def test_neuron_counts_are_those_of_the_paper():
    def thetas(architecture, shape):
        model = models.classifier(architecture, "clipped_relu", shape, 10, rngs=nnx.Rngs(0))
        sizes = [b.activation.theta.size for b in from_flax(model, shape).blocks]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        return sum(sizes), round((parameters - sum(sizes)) / 1e6, 3)

    assert thetas("4c3f", (28, 28, 1)) == (48064, 1.975)
    assert thetas("4c3f", (32, 32, 3)) == (62464, 2.467)
    assert thetas("6c2f", (32, 32, 3)) == (111104, 2.250)


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
    ],
)
def test_convolutions_of_flax(options):
    flat = nnx.Sequential(conv(2, 3, (3, 4), **options), nnx.relu, models.flatten)
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
        linear(4, 18), nnx.relu, lambda x: x.reshape(-1, 3, 3, 2), conv(2, 2), models.flatten, linear(18, 3)
    )
    assert_same(model, (4,))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("tanh", jnp.tanh),
        ("gelu", nnx.gelu),
        ("scale", lambda x: 2 * x),
        ("transpose", lambda x: x.transpose(0, 2, 1, 3).reshape(x.shape[0], -1)),
        ("mixes examples", lambda x: x.reshape(1, -1)),
        ("flip of the batch", lambda x: x[::-1].reshape(x.shape[0], -1)),
        ("constant", lambda x: jnp.zeros((x.shape[0], 50))),
        ("fortran order", lambda x: jax.lax.reshape(x, (x.shape[0], 50), (0, 3, 2, 1))),
        ("raises", lambda x: x.reshape(x.shape[0], 7)),
        ("dropout", nnx.Dropout(0.5, rngs=RNGS)),
        ("batch norm", nnx.BatchNorm(2, rngs=RNGS)),
        ("not callable", 3),
    ],
)
def test_unknown_layers_raise_a_type_error_that_names_the_place(name, module):
    model = nnx.Sequential(conv(1, 2, padding=1), nnx.relu, linear(50, 3))
    model.layers = nnx.List([*list(model.layers)[:2], module, list(model.layers)[2]])
    with pytest.raises(TypeError, match="layer 2 of the model, .* is not supported; supported are nnx.Conv"):
        from_flax(model, (5, 5, 1))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"padding": "CIRCULAR"}, "padding='CIRCULAR'"),
        ({"padding": "REFLECT"}, "padding='REFLECT'"),
        ({"kernel_dilation": 2, "padding": 1}, "kernel_dilation=2"),
        ({"input_dilation": (2, 1), "padding": 1}, "input_dilation"),
        ({"feature_group_count": 2, "padding": 1}, "feature_group_count=2"),
        ({"mask": jnp.ones((3, 3, 2, 2)), "padding": 1}, "masked kernel"),
    ],
)
def test_unsupported_options_of_convolutions_are_named(options, word):
    with pytest.raises(TypeError, match=word):
        from_flax(nnx.Sequential(conv(2, 2, **options), models.flatten, linear(50, 3)), (5, 5, 2))


def test_structures_that_are_no_classifier_are_refused():
    with pytest.raises(TypeError, match="last layer of the model must be nnx.Linear"):
        from_flax(nnx.Sequential(linear(3, 4), nnx.relu), (3,))
    with pytest.raises(TypeError, match="activation with no affine layer before it"):
        from_flax(nnx.Sequential(nnx.relu, linear(3, 4)), (3,))
    with pytest.raises(TypeError, match="directly follows another one"):
        from_flax(nnx.Sequential(linear(3, 4), nnx.relu, nnx.relu, linear(4, 2)), (3,))
    with pytest.raises(TypeError, match="flatten them first"):
        from_flax(nnx.Sequential(linear(3, 4)), (2, 3))
    with pytest.raises(TypeError, match="not Linear"):
        from_flax(linear(3, 4), (3,))
    with pytest.raises(ValueError, match="takes 3 inputs, but its input has shape"):
        from_flax(nnx.Sequential(linear(3, 4)), (5,))
    with pytest.raises(ValueError, match="theta of shape"):
        from_flax(nnx.Sequential(linear(3, 4), models.ClippedReLU((5,)), linear(4, 2)), (3,))


def test_unknown_names_of_models_are_named():
    with pytest.raises(ValueError, match="unknown architecture '9c9f'; known are"):
        models.classifier("9c9f", "relu", (28, 28, 1), 10, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        models.classifier("4c3f", "gelu", (28, 28, 1), 10, rngs=nnx.Rngs(0))


def test_gradients_reach_the_flax_parameters():
    model = models.classifier("small_cnn", "clipped_relu", (8, 8, 1), 10, rngs=nnx.Rngs(0))
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
    assert isinstance(again.blocks[0].activation, layers.ReLU)
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
        (Doubled(3, 4, rngs=RNGS), "Doubled, is not supported"),
        (nnx.LoRALinear(3, 4, lora_rank=2, rngs=RNGS), "LoRALinear, is not supported"),
        (linear(3, 4, dot_general=doubled_product), "its own dot_general"),
        (linear(3, 4, dtype=jnp.bfloat16), "computes in"),
        (linear(3, 4, param_dtype=jnp.float16), "kernel of float16"),
    ],
)
def test_layers_that_compute_something_else_are_refused(module, word):
    with pytest.raises(TypeError, match=word):
        from_flax(nnx.Sequential(module, nnx.relu, linear(4, 2)), (3,))


def test_models_that_compute_something_else_are_refused():
    with pytest.raises(TypeError, match="not Reversed"):
        from_flax(Reversed(linear(3, 4), nnx.relu, linear(4, 2)), (3,))


def test_clips_after_a_flatten_are_those_of_the_layer_before():
    assert_same(nnx.Sequential(conv(1, 2), models.flatten, models.ClippedReLU((50,), 0.2), linear(50, 3)), (5, 5, 1))

"""Affine layers of any kind, folded: against their dense matrices, and what a layer says of its own norm."""

import dataclasses
import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_parts import Cayley

import lipjax
from lipjax import convolution, dense, from_flax
from lipjax.networks import composing, folding
from lipjax.networks.blocks import blocks
from lipjax.networks.layers import Conv, identity
from lipjax.networks.rearranging import gather

IMAGE = (5, 4, 2)
RNG = np.random.default_rng


def cayley(rng, size, kind=Cayley):
    weight, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((size, size), (size,)))
    return kind(bias=bias, in_shape=(size,), out_shape=(size,), weight=weight)


def conv_layer(rng, channels=2, kernel=3, stride=1, padding=1, shape=IMAGE):
    weights = jnp.asarray(rng.standard_normal((kernel, kernel, shape[-1], channels)), jnp.float32)
    return convolution(
        weights, jnp.asarray(rng.standard_normal(channels), jnp.float32), shape, *strided(stride, padding)
    )


def strided(stride, padding):
    return (stride, stride), ((padding, padding), (padding, padding))


def dense_layer(rng, inputs, outputs, shape=None):
    kernel = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
    return dense(kernel, jnp.asarray(rng.standard_normal(outputs), jnp.float32), shape or (inputs,))


def scales(rng, layer, which):
    """Scales before and after a layer: of each channel, of each entry, or none."""
    shapes = {"channel": lambda side: (1,) * (len(side) - 1) + side[-1:], "entry": lambda side: side}
    sides = layer.in_shape, layer.out_shape
    arrays = [
        None if kind == "none" else jnp.asarray(rng.standard_normal(shapes[kind](s)), jnp.float32)
        for kind, s in zip(which, sides, strict=True)
    ]
    dense_ones = [np.ones(s) if a is None else np.broadcast_to(a, s) for a, s in zip(arrays, sides, strict=True)]
    return arrays, [np.asarray(a, np.float64).ravel() for a in dense_ones]


LAYERS = {
    "dense": lambda rng: dense_layer(rng, 40, 6, IMAGE),
    "convolution": conv_layer,
    "strided convolution": lambda rng: conv_layer(rng, 3, 4, 2),
    "identity": lambda rng: identity(IMAGE),
    "Cayley": lambda rng: cayley(rng, 6),
    "blocks": lambda rng: blocks(jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32), jnp.zeros(4), places=5),
}


def matrix_of(layer):
    """By its columns, in float64."""
    eye = jnp.eye(int(np.prod(layer.in_shape)), dtype=layer.dtype).reshape(-1, *layer.in_shape)
    return np.asarray(jax.vmap(layer.linear)(eye), np.float64).reshape(len(eye), -1).T


def check_facts(layer, expected, rng, exact=True):
    """Everything that a layer says of its matrix; where it is not ``exact``, bounds may be larger."""
    scale = np.abs(expected).max()
    close = {"rtol": 1e-4, "atol": 1e-5 * scale}
    np.testing.assert_allclose(matrix_of(layer), expected, **close)
    np.testing.assert_allclose(layer.matrix(), expected, **close)
    z = rng.standard_normal(layer.out_shape).astype(np.float32)
    np.testing.assert_allclose(
        np.ravel(layer.adjoint()(jnp.asarray(z))), z.ravel() @ expected, rtol=1e-3, atol=1e-4 * scale
    )
    np.testing.assert_allclose(layer.row(1), expected[1], **close)
    positive = [rng.uniform(size=side).astype(np.float32) for side in (layer.in_shape, layer.out_shape)]
    live = rng.random(layer.in_shape) < 0.5
    facts = (
        (layer.absolute(jnp.asarray(positive[0])), np.abs(expected) @ positive[0].ravel()),
        (layer.absolute_adjoint(jnp.asarray(positive[1])), np.abs(expected).T @ positive[1].ravel()),
        (layer.row_norms(jnp.asarray(live)), np.linalg.norm(expected * live.ravel(), axis=1)),
        (layer.row_norms(jnp.asarray(positive[0])), np.linalg.norm(expected * positive[0].ravel(), axis=1)),
    )
    magnitudes = np.asarray(
        jax.vmap(layer.absolute, out_axes=-1)(
            jnp.asarray(np.eye(expected.shape[1], dtype=np.float32)).reshape(-1, *layer.in_shape)
        )
    )
    of_magnitudes = np.linalg.norm(magnitudes.reshape(expected.shape) * live.ravel(), axis=1)
    assert (np.ravel(layer.magnitude_row_norms(jnp.asarray(live))) >= of_magnitudes * (1 - 1e-5)).all()
    for found, truth in facts:
        found = np.asarray(found, np.float64).ravel()
        assert (found >= truth - 1e-4 * (scale + truth)).all()
        if exact:
            np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("which", [("none", "none"), ("channel", "none"), ("none", "channel"), ("entry", "entry")])
@pytest.mark.parametrize("name", LAYERS)
def test_a_rescaled_layer_is_its_dense_matrix(name, which):
    rng = RNG(0)
    layer = LAYERS[name](rng)
    arrays, (before, after) = scales(rng, layer, which)
    folded = folding.rescaled(layer, *arrays)
    check_facts(folded, after[:, None] * matrix_of(layer) * before, rng)
    again = folding.rescaled(folded, *arrays)
    check_facts(again, (after**2)[:, None] * matrix_of(layer) * before**2, rng)


PAIRS = {
    "two convolutions": lambda rng: (conv_layer(rng, 2, 3, 1, 1), conv_layer(rng, 2, 5, 1, 2)),
    "two strided ones of other sizes": lambda rng: (conv_layer(rng, 3, 4, 2, 1), conv_layer(rng, 3, 2, 2, 0)),
    "two dense ones": lambda rng: (dense_layer(rng, 6, 4), dense_layer(rng, 6, 4)),
    "dense and Cayley": lambda rng: (dense_layer(rng, 6, 6), cayley(rng, 6)),
    "Cayley and dense": lambda rng: (cayley(rng, 6), dense_layer(rng, 6, 6)),
    "convolution and what differs over the image": lambda rng: (
        conv_layer(rng),
        folding.diagonal(jnp.asarray(rng.standard_normal(IMAGE), jnp.float32), conv_layer(rng)),
    ),
    "convolution and identity": lambda rng: (conv_layer(rng), folding.diagonal(None, conv_layer(rng))),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_sum_of_layers_is_the_sum_of_their_dense_matrices(name, large, monkeypatch):
    if large:  # no matrix may be made: |W| and row norms are those of both layers, added
        monkeypatch.setattr(folding, "SMALL", 0)
    rng = RNG(1)
    first, second = PAIRS[name](rng)
    joined = folding.added(first, second)
    check_facts(joined, matrix_of(first) + matrix_of(second), rng, exact=not isinstance(joined, folding.Added))
    if name in ("two convolutions", "two strided ones of other sizes", "convolution and identity"):
        assert type(joined) is type(first)


BEHIND = {
    "two convolutions": (lambda rng: conv_layer(rng, 4, 3, 2, 1), lambda rng, s: conv_layer(rng, 3, 2, 1, 0, s)),
    "two strided ones": (lambda rng: conv_layer(rng, 4, 2, 1, 1), lambda rng, s: conv_layer(rng, 3, 2, 2, 0, s)),
    "two that both pad": (lambda rng: conv_layer(rng, 4, 3, 2, 1), lambda rng, s: conv_layer(rng, 3, 3, 1, 1, s)),
    "convolution and dense": (conv_layer, lambda rng, s: dense_layer(rng, math.prod(s), 4, s)),
    "Cayley and dense": (lambda rng: cayley(rng, 6), lambda rng, s: dense_layer(rng, 6, 4)),
    "dense and blocks": (lambda rng: dense_layer(rng, 7, 30), lambda rng, s: LAYERS["blocks"](rng)),
    "two rearrangements": (
        lambda rng: gather(rng.integers(-1, 40, (3, 8)), IMAGE),
        lambda rng, s: gather(rng.integers(-1, 24, (5,)), s),
    ),
    "padding and convolution": (
        lambda rng: gather(np.pad(np.arange(40).reshape(IMAGE), ((1, 1), (0, 0), (0, 0)), mode="wrap"), IMAGE),
        lambda rng, s: conv_layer(rng, shape=s),
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_layers_behind_each_other_are_the_product_of_their_dense_matrices(name):
    rng = RNG(3)
    of_first, of_second = BEHIND[name]
    first = of_first(rng)
    second = of_second(rng, first.out_shape)
    whole = composing.composed(first, second)
    check_facts(whole, matrix_of(second) @ matrix_of(first), rng, exact=not isinstance(whole, composing.Composed))
    np.testing.assert_array_equal(whole.shift + jnp.zeros(whole.out_shape), second.shift + jnp.zeros(second.out_shape))
    assert type(whole) is {"two convolutions": Conv, "two strided ones": Conv}.get(name, type(whole))


def test_large_products_without_a_kernel_are_left_alone(monkeypatch):
    rng = RNG(4)
    monkeypatch.setattr(composing, "SMALL", 0)
    for first in (conv_layer(rng), cayley(rng, 40)):
        assert composing.composed(first, conv_layer(rng)) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 5), st.sampled_from(["scale", "Cayley"]))
def test_a_norm_that_is_known_by_construction_is_at_least_that_of_the_svd(seed, size, name):
    rng = RNG(seed)
    layer = (
        cayley(rng, 5)
        if name == "Cayley"
        else folding.rescaled(identity((5,)), jnp.asarray(size * rng.standard_normal(5), jnp.float32))
    )
    rows, columns = rng.random(5) < 0.7, rng.random(5) < 0.7
    exact = oracles.spectral_norm(matrix_of(layer) * np.outer(rows, columns))
    known = float(layer.known_norm(jnp.asarray(rows), jnp.asarray(columns)))
    assert known >= exact * (1 - 1e-5)
    if name == "scale":
        assert known == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_a_frozen_layer_is_its_matrix_in_its_own_precision():
    layer = cayley(RNG(2), 5)
    frozen = layer.frozen()
    assert frozen.dtype == jnp.float32
    np.testing.assert_array_equal(frozen.matrix(), layer.matrix())
    np.testing.assert_array_equal(frozen.bias, layer.bias)


class Boastful(Cayley):
    """It says a norm that it does not have."""

    def known_norm(self, rows, columns):
        return jnp.full((), 0.9, self.dtype)


jax.tree_util.register_dataclass(Boastful, ["bias", "weight"], ["in_shape", "out_shape"])


def orthogonal_network(kind):
    rng = RNG(3)
    rules = (
        cayley(rng, 6, kind),
        lipjax.ClippedReLUActivation(jnp.full(6, 0.7)),
        cayley(rng, 6, kind),
        lipjax.ReLUActivation(),
    )
    return lipjax.chain(*rules, dense_layer(rng, 6, 3)), jnp.asarray(rng.uniform(size=(4, 6)), jnp.float32)


@pytest.mark.parametrize("level", ["probabilistic", "deterministic", "estimate"])
def test_a_network_of_layers_that_are_not_linear_in_their_parameters_is_certified(level):
    network, x = orthogonal_network(Cayley)
    label = jnp.argmax(network(x), axis=1)
    constant = lipjax.global_lipschitz(network, level=level, key=jax.random.key(0))
    assert float(constant) == pytest.approx(1, rel=1e-3)
    result = lipjax.certify(network, x, label, 0.01, level=level, key=jax.random.key(0))
    assert np.asarray(result.certified).any()
    rows = np.asarray(network.head.matrix(), np.float64)
    gaps = np.linalg.norm(rows[np.asarray(label)][:, None] - rows[None], axis=2).max(axis=1)
    clean = np.sort(np.asarray(network(x)), axis=1)
    assert (np.asarray(result.worst_margin) >= clean[:, -1] - clean[:, -2] - 0.01 * gaps * 1.01).all()


def test_a_norm_that_is_not_true_is_refused():
    network, x = orthogonal_network(Boastful)
    with pytest.raises(ValueError, match=r"layer 0, Boastful, says that its norm is at most 0\.9, but it is at least"):
        lipjax.certify(network, x, jnp.zeros(4, jnp.int32), 0.01, key=jax.random.key(0))


# Models


def constant_of(model, shape):
    network = from_flax(model, shape)
    assert len(network.layers) == 1, [type(layer).__name__ for layer in network.layers]
    return network, oracles.spectral_norm(matrix_of(network.layers[0]))


def jacobian_norm(part, shape):
    """Of an affine function of a batch, by its matrix."""
    eye = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)
    zero = part(jnp.zeros((1, *shape)))
    return oracles.spectral_norm(np.asarray(part(jnp.asarray(eye)) - zero, np.float64).reshape(len(eye), -1))


def parts_of_affine(rngs):
    norm = nnx.BatchNorm(2, use_running_average=True, rngs=rngs)
    norm.mean[...], norm.var[...] = jnp.array([0.3, -0.2]), jnp.array([0.5, 2.0])
    norm.scale[...] = jnp.array([1.5, -0.7])
    return {
        "shift and scale": lambda x: (x - jnp.array([0.4, 0.5])[None, None, None]) / 0.3,
        "convolution": nnx.Conv(2, 2, (3, 3), padding=1, rngs=rngs),
        "batch norm": norm,
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_shift_scale_convolution_and_batch_norm_in_any_order_are_one_layer(order):
    rngs = nnx.Rngs(0)
    parts = [list(parts_of_affine(rngs).values())[k] for k in order]
    tail = nnx.relu, lambda x: x.reshape(len(x), -1), nnx.Linear(40, 3, rngs=rngs)
    _, sigma = constant_of(nnx.Sequential(*parts, *tail), IMAGE)
    assert sigma == pytest.approx(jacobian_norm(nnx.Sequential(*parts), IMAGE), rel=1e-4)


def test_a_linear_branch_is_one_layer_with_its_skip_connection():
    rngs = nnx.Rngs(0)
    residual = lipjax.Residual(nnx.Conv(2, 2, (3, 3), padding=1, rngs=rngs))
    tail = nnx.relu, lambda x: x.reshape(len(x), -1), nnx.Linear(40, 3, rngs=rngs)
    network, sigma = constant_of(nnx.Sequential(residual, *tail), IMAGE)
    assert sigma == pytest.approx(jacobian_norm(residual, IMAGE), rel=1e-4)
    assert type(network.layers[0]).__name__ == "Conv"
    both = nnx.Sequential(lipjax.Residual(nnx.Linear(4, 4, rngs=rngs)), lipjax.Residual(nnx.Linear(4, 4, rngs=rngs)))
    _again, sigma = constant_of(nnx.Sequential(both.layers[0], nnx.relu, nnx.Linear(4, 3, rngs=rngs)), (4,))
    assert sigma == pytest.approx(jacobian_norm(both.layers[0], (4,)), rel=1e-4)


class Orthogonal(nnx.Module):
    """A layer of a user: Cayley, as a module of Flax."""

    def __init__(self, size, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size, size)))
        self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x):
        layer = Cayley(bias=self.bias[...], in_shape=x.shape[1:], out_shape=x.shape[1:], weight=self.weight[...])
        return jax.vmap(layer)(x)


def test_a_type_of_module_can_be_taught_and_none_is_guessed():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(Orthogonal(4, rngs), nnx.relu, nnx.Linear(4, 3, rngs=rngs))
    with pytest.raises(
        TypeError, match=r"layer 0 of the model, Orthogonal, is not supported: custom_linear_solve.*lipjax\.register"
    ):
        from_flax(model, (4,))

    def read(module, value, place):
        shape = value.shape
        return value.affine(Cayley(bias=module.bias[...], in_shape=shape, out_shape=shape, weight=module.weight[...]))

    lipjax.register(Orthogonal, read)
    network = from_flax(model, (4,))
    x = jnp.asarray(RNG(0).uniform(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(network(x), model(x), rtol=1e-5, atol=1e-6)
    assert isinstance(network.layers[0], Cayley)
    with pytest.raises(TypeError, match="neither a type of module nor a function"):
        lipjax.register("Orthogonal", read)


# What cancels, overflows or is flushed inside of a folded layer


def cancelling():
    """``x - s x`` per pixel, s next to 1, then logits that amplify it: float32 may lose every digit of it."""
    scale, v = np.full((4, 4, 1), 1 - 2.0**-20, np.float32), np.float32(0.79166)
    scale[0, 0, 0] = 1 - 3 * 2.0**-22
    minus = convolution(-jnp.ones((1, 1, 1, 1)), jnp.zeros(1), (4, 4, 1), *strided(1, 0))
    minus = folding.rescaled(minus, before=jnp.asarray(scale))
    difference = folding.added(minus, folding.diagonal(None, minus))
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 0, 0] = v
    exact = float(v) * (1 - float(scale[0, 0, 0]))
    computed = float(v - np.float32(scale[0, 0, 0] * v))
    head = np.zeros((16, 2), np.float32)
    head[0, 0] = 2.0**20
    bias = jnp.asarray([64, 64 + (exact + computed) / 2 * 2**20], jnp.float32)
    return lipjax.chain(difference, dense(jnp.asarray(head), bias, (4, 4, 1))), jnp.asarray(x)


@pytest.mark.parametrize("level", ["probabilistic", "deterministic"])
def test_a_margin_that_float32_loses_where_branches_cancel_is_not_certified(level):
    network, x = cancelling()
    for label in (0, 1):
        result = lipjax.certify(network, x, jnp.array([label]), 1e-9, level=level, key=jax.random.key(0))
        assert not bool(result.certified[0])
    assert isinstance(network.layers[0], folding.Added)


@pytest.mark.parametrize("level", ["probabilistic", "deterministic"])
@pytest.mark.parametrize("ulps", [(1, 1, -2), (-1, 3, -2), (5, -2, -3)])
def test_the_norm_of_branches_that_cancel_is_a_bound(ulps, level):
    before, kernel, after = (np.float32(1 + k * 2.0**-23) for k in ulps)
    shape = (2, 1, 1)
    inner = convolution(jnp.full((1, 1, 1, 1), -kernel), jnp.zeros(1), shape, *strided(1, 0))
    scaled = folding.Rescaled(
        bias=jnp.zeros(1),
        in_shape=shape,
        out_shape=shape,
        inner=inner,
        before=jnp.full(shape, before),
        after=jnp.full(shape, after),
    )
    difference = folding.added(scaled, folding.diagonal(None, scaled))
    network = lipjax.chain(difference, dense(jnp.eye(2), jnp.zeros(2), shape))
    factors = (fractions.Fraction(float(factor)) for factor in (before, kernel, after))
    exact = abs(1 - math.prod(factors))
    with jax.enable_x64(True):
        found = float(lipjax.global_lipschitz(network, level=level, key=jax.random.key(1)))
    assert fractions.Fraction(found) >= exact > 0


@pytest.mark.parametrize(
    ("kernel", "before", "after", "scale"),
    [(3e38, None, [1e-38, 1.1e-38], 4.0), (1e30, [1e-30, 1.1e-30], None, 1e-14)],
    ids=["what overflows inside", "what is flushed inside"],
)
def test_what_float32_loses_inside_of_a_rescaled_layer_is_not_certified(kernel, before, after, scale):
    shape = (2, 1, 1)
    arrays = (None if values is None else jnp.asarray(values, jnp.float32).reshape(shape) for values in (before, after))
    layer = folding.rescaled(convolution(jnp.full((1, 1, 1, 1), kernel), jnp.zeros(1), shape, *strided(1, 0)), *arrays)
    first = folding.rescaled(identity((2,)), jnp.float32(scale))
    weights, bias = ([[-1.0, 1.0], [0, 0]], [8.0, 0.0]) if after else ([[1e16, 0], [0, 0]], [0.0, 60.0])
    head = dense(jnp.asarray(weights), jnp.asarray(bias), (2,))
    network = lipjax.chain(first, lipjax.ReLUActivation(), layer, lipjax.ReLUActivation(), head, input_shape=(2,))
    x = jnp.asarray([[0.9, 0.1]])
    for label in (0, 1):
        result = lipjax.certify(network, x, jnp.array([label]), 1e-6, level="deterministic")
        assert not bool(result.certified[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutTypes(Cayley):
    """It leaves the type of its matrix to the settings of JAX."""

    def linear(self, a):
        eye = jnp.eye(len(self.weight))
        skew = self.weight - self.weight.T
        return (eye - skew) @ jnp.linalg.solve(eye + skew, a.ravel())


def test_a_layer_is_frozen_in_the_precision_of_inference():
    network, _ = orthogonal_network(WithoutTypes)
    certifier = lipjax.Certifier(network, 0, level="deterministic")
    for mine, theirs in zip(certifier.network.layers, network.frozen().layers, strict=True):
        np.testing.assert_array_equal(np.asarray(mine.kernel), np.asarray(theirs.kernel, np.float64))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NearlyTrue(lipjax.Dense):
    """A dense layer that says a norm a little below its own, and under masks far below."""

    def known_norm(self, rows, columns):
        return jnp.where(jnp.all(rows) & jnp.all(columns), 1.0, 1e-6)


@pytest.mark.parametrize("level", ["probabilistic", "deterministic"])
def test_a_proof_does_not_rest_on_what_a_layer_says(level):
    kernel = 1.0009 * jnp.eye(4)
    layer = NearlyTrue(kernel=kernel, bias=jnp.array([-3.0, 1, 1, 1]), in_shape=(4,), out_shape=(4,))
    network = lipjax.chain(layer, lipjax.ReLUActivation(), dense_layer(RNG(0), 4, 2))
    x = jnp.full((1, 4), 0.5)
    assert float(lipjax.global_lipschitz(network, level=level, key=jax.random.key(0))) >= 1.0009
    assert float(lipjax.local_lipschitz(network, x, 0.1, level=level, key=jax.random.key(0))[0]) >= 1.0009


def test_branches_that_arrange_one_value_in_other_shapes_are_added_in_order():
    rng = RNG(4)
    first, second = (conv_layer(rng, 1, 3, 1, 1, shape) for shape in ((4, 4, 1), (2, 8, 1)))
    joined = folding.added(first, second)
    check_facts(joined, matrix_of(first) + matrix_of(second), rng, exact=False)


def test_a_layer_before_a_branch_with_an_activation_is_bounded_once():
    rngs = nnx.Rngs(0)
    branch = lipjax.Residual(nnx.relu, nnx.Linear(4, 4, rngs=rngs))
    network = from_flax(
        nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), branch, nnx.relu, nnx.Linear(4, 2, rngs=rngs)), (4,)
    )
    assert [type(node.operation).__name__ for node in network.nodes[1:]] == [
        *("Dense", "ReLUActivation", "Dense", "Sum", "ReLUActivation")
    ]


def test_a_convolution_that_crops_is_added_without_being_joined():
    rng = RNG(5)
    weights = jnp.asarray(rng.standard_normal((1, 1, 2, 2)), jnp.float32)
    crops = convolution(weights, jnp.zeros(2), IMAGE, (1, 1), ((-1, 0), (0, 0)))
    other = conv_layer(rng, 2, 2, 1, 0)
    other = dataclasses.replace(other, padding=((0, 0), (0, 1)), out_shape=crops.out_shape)
    joined = folding.added(crops, other)
    check_facts(joined, matrix_of(crops) + matrix_of(other), rng, exact=False)

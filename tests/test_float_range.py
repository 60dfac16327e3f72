"""Weights, inputs and radii outside the comfortable range never turn into a certificate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipjax
from lipjax.certification.certificates import certificate
from lipjax.networks import linear_maps

SOUND = {"key": jax.random.key(0)}


def chain(scales):
    """1-2-2-2 network with diagonal layers of the given scales; at scale 1 it tells x from 0.5."""
    model = nnx.Sequential(
        nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu,
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    )  # fmt: skip
    model.layers[0].kernel[...] = scales[0] * jnp.array([[1.0, -1.0]])
    model.layers[0].bias[...] = scales[0] * jnp.array([0.0, 1.0])
    model.layers[2].kernel[...] = scales[1] * jnp.eye(2)
    model.layers[4].kernel[...] = scales[2] * jnp.eye(2)
    return lipjax.from_flax(model, (1,))


@pytest.mark.parametrize("s", [1e-20, 1e-6, 1.0, 1e6, 1e20])
def test_tiny_and_huge_weights_do_not_certify_what_an_input_breaks(s):
    network = chain((s, s**-0.5, s**-0.5))
    assert int(jnp.argmax(network(jnp.array([[0.6]])))) == 0
    assert int(jnp.argmax(network(jnp.array([[0.4]])))) == 1
    wide = lipjax.certify(network, jnp.array([[0.6]]), jnp.array([0]), 0.3, **SOUND)
    assert not bool(wide.certified[0])
    assert float(wide.lipschitz[0]) > 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_unit_and_length_of_any_finite_vector(scale):
    vector = scale * jnp.array([3.0, -4.0, 0.0])
    np.testing.assert_allclose(linear_maps.unit(vector), [0.6, -0.8, 0.0], rtol=1e-5)
    np.testing.assert_allclose(linear_maps.length(vector) / scale, 5.0, rtol=1e-5)


def test_unit_of_zero_is_zero_and_of_nan_is_nan():
    assert not np.any(linear_maps.unit(jnp.zeros(3)))
    assert np.all(np.isnan(linear_maps.unit(jnp.array([1.0, jnp.nan]))))
    assert np.any(np.isnan(linear_maps.unit(jnp.array([1.0, jnp.inf]))))


def test_integer_pixels_are_refused_because_they_would_round_eps():
    network = chain((1.0, 1.0, 1.0))
    with pytest.raises(TypeError, match="x has type int32; expected floating-point pixels"):
        lipjax.certify(network, jnp.array([[1]]), jnp.array([0]), 0.9, **SOUND)
    with pytest.raises(TypeError, match="x has type int32; expected floating-point pixels"):
        lipjax.pgd(network, jnp.array([[1]]), jnp.array([0]), 0.9, jax.random.key(0))


def test_negative_eps_is_refused_and_a_traced_one_not_certified():
    network, x, label = chain((1.0, 1.0, 1.0)), jnp.array([[0.9]]), jnp.array([0])
    with pytest.raises(ValueError, match=r"eps is -5\.0; expected a finite radius of at least 0"):
        lipjax.certify(network, x, label, -5.0, **SOUND)
    traced = jax.jit(lambda eps: lipjax.propagate(network, lipjax.l2_ball(x, eps), lipjax.Given(jnp.ones(2))))
    bounds = jax.tree.map(lambda leaf: leaf[0], traced(jnp.float32(-5.0)))
    margins = lipjax.box_and_ball(network.head, bounds.features, label[0])
    assert not bool(certificate(network, bounds, margins, label[0], "estimate").certified)


def test_saturated_logits_are_attacked_all_the_same():
    network = chain((1.0, 1.0, 1e3))
    x, label = jnp.array([[0.6]]), jnp.array([0])
    found = lipjax.pgd(network, x, label, 0.3, jax.random.key(1), num_steps=20)
    assert int(jnp.argmax(network(found))) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_pixels_are_refused_because_they_would_round_eps(dtype):
    with pytest.raises(TypeError, match="float32 or wider"):
        lipjax.local_lipschitz(chain((1.0, 1.0, 1.0)), jnp.ones((1, 1), dtype), 1.58, **SOUND)


def test_one_radius_for_a_batch_or_one_per_input():
    batch = chain((1.0, 1.0, 1.0)), jnp.array([[0.9]]), jnp.array([0])
    with pytest.raises(ValueError, match=r"eps has shape \(2,\); expected one radius, or one per input \(1,\)"):
        lipjax.certify(*batch, jnp.array([0.1, 0.1]), **SOUND)
    assert lipjax.certify(*batch, np.array([0.1]), **SOUND) == lipjax.certify(*batch, 0.1, **SOUND)


def test_each_input_is_certified_at_its_own_radius():
    network, x, label = chain((1.0, 1.0, 1.0)), jnp.array([[0.9], [0.9]]), jnp.array([0, 0])
    found = lipjax.certify(network, x, label, np.array([0.1, 0.5]), level="deterministic")
    np.testing.assert_array_equal(found.certified, [True, False])
    for k, eps in enumerate((0.1, 0.5)):
        alone = lipjax.certify(network, x[:1], label[:1], eps, level="deterministic")
        np.testing.assert_allclose(found.worst_margin[k], alone.worst_margin[0], rtol=1e-6)


def test_float32_networks_work_where_float64_is_enabled():
    network, x = chain((1.0, 1.0, 1.0)), jnp.array([[0.9]])
    with jax.enable_x64(True):
        assert lipjax.local_lipschitz(network, x, 0.1, level="estimate").dtype == jnp.float32

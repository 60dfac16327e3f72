"""Bounds of every kind of network that can be read, against samples of the ball."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_reading import FOLDED

import lipjax

# One network of each kind of layer: every one costs some seconds of compilation.
KINDS = (
    *("normalised input", "batch norm before a padded convolution", "average pooling", "feature groups", "MaxMin"),
    *("max pooling that overlaps", "a residual sum in another"),
)


def points_of_ball(x, eps, count, seed):
    """Random points of the ball around one input, half of them on its boundary."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, *x.shape))
    lengths = eps * np.where(np.arange(count) % 2, 1.0, rng.uniform(size=count))
    norms = np.linalg.norm(directions.reshape(count, -1), axis=1)
    return np.asarray(x) + directions * (lengths / norms).reshape(-1, *(1,) * x.ndim)


@pytest.mark.parametrize("name", KINDS)
def test_samples_obey_margins_and_lipschitz_constants(name):
    eps = 0.1
    network = lipjax.from_flax(nnx.Sequential(*FOLDED[name]), (6, 6, 2))
    x = jax.random.uniform(jax.random.key(1), (2, 6, 6, 2))
    label = jnp.argmax(network(x), axis=1)
    sound = {"level": "deterministic"}
    found = lipjax.certify(network, x, label, eps, **sound)
    assert np.isfinite(found.worst_margin).all()
    assert np.all(np.asarray(found.lipschitz) <= float(lipjax.global_lipschitz(network, **sound)) * (1 + 1e-6))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network)
        for i in range(len(x)):
            points = jnp.asarray(points_of_ball(np.asarray(x[i], np.float64), eps, 200, i))
            logits = np.asarray(wide(points))
            rivals = np.delete(logits, int(label[i]), axis=1).max(axis=1)
            assert np.all(logits[:, int(label[i])] - rivals >= float(found.worst_margin[i]))
            features = np.asarray(jax.vmap(wide.features)(points)).reshape(len(points), -1)
            flat = np.asarray(points).reshape(len(points), -1)
            moved = np.linalg.norm(features[:-1] - features[1:], axis=1)
            assert np.all(moved <= float(found.lipschitz[i]) * np.linalg.norm(flat[:-1] - flat[1:], axis=1))


@pytest.mark.parametrize("name", ["MaxMin", "a residual sum in another", "max pooling that overlaps"])
def test_features_stay_in_their_region_and_dead_ones_do_not_move(name):
    network = lipjax.from_flax(nnx.Sequential(*FOLDED[name]), (6, 6, 2))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network)
        x = jax.random.uniform(jax.random.key(3), (6, 6, 2), jnp.float64)
        norm = lipjax.Estimate(jax.random.key(0), tol=1e-9, max_iters=20000)
        bounds = lipjax.propagate(wide, lipjax.l2_ball(x, 0.1), norm)
        features = np.asarray(jax.vmap(wide.features)(jnp.asarray(points_of_ball(np.asarray(x), 0.1, 300, 0))))
        region = bounds.features
        features = features.reshape(-1, *region.center.shape)
        assert np.all(features >= np.asarray(region.lower) - 1e-12)
        assert np.all(features <= np.asarray(region.upper) + 1e-12)
        away = np.linalg.norm((features - np.asarray(region.center)).reshape(len(features), -1), axis=1)
        assert np.all(away <= float(region.radius) * (1 + 1e-6))
        assert np.all(features[:, ~np.asarray(region.live)] == features[:1, ~np.asarray(region.live)])


def test_eps_is_in_pixels_whatever_the_model_divides_by():
    pixels = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    pixels.kernel[...] = jnp.eye(2)
    std = jnp.array([[0.1, 0.5]])
    network = lipjax.from_flax(nnx.Sequential(lambda x: x / std, pixels, nnx.relu, pixels), (2,))
    constant = lipjax.local_lipschitz(network, jnp.array([[0.5, 0.5]]), 0.01, level="deterministic")
    assert float(constant[0]) == pytest.approx(10.0, rel=1e-6)
    # Logits 10 x1 and 2 x2, a margin of 2: the boundary is 2 / hypot(10, 2) away, and the box alone proves 2 / 12.
    radius = lipjax.certified_radius(network, jnp.array([[0.3, 0.5]]), jnp.array([0]), level="deterministic", tol=1e-5)
    assert 2 / 12 - 1e-4 <= float(radius[0]) <= 2 / np.hypot(10, 2)

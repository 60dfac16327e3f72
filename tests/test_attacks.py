"""PGD: it stays where it may go, does harm, and never lets examples or NaN touch each other."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lipjax import cross_entropy, pgd

LABELS = jnp.array([0, 1, 2, 0, 1, 2])


@oracles.jit
def attack(network, x, label, eps, key, num_steps=30):
    return pgd(network, x, label, eps, key, num_steps=num_steps)


@pytest.mark.parametrize("kind", ["dense relu", "conv clipped"])
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.5, 3.0])
def test_it_stays_in_the_ball_and_in_the_pixel_range(kind, eps):
    network = oracles.random_network(kind, 0)
    x = oracles.random_inputs(network, 0, 6)
    x[0], x[1] = 0.0, 1.0
    for num_steps in (0, 30):
        attacked = np.asarray(attack(network, x, LABELS, eps, jax.random.key(0), num_steps), np.float64)
        assert attacked.shape == x.shape
        distance = np.linalg.norm((attacked - x).reshape(6, -1), axis=1)
        assert np.all(distance <= eps + 1e-5)
        assert attacked.min() >= 0
        assert attacked.max() <= 1


@pytest.mark.parametrize("kind", ["dense relu", "conv relu"])
def test_it_raises_the_loss(kind):
    network = oracles.random_network(kind, 1, shift=0.5)
    x = oracles.random_inputs(network, 1, 6)
    clean = cross_entropy(network(x), LABELS)
    start = cross_entropy(network(attack(network, x, LABELS, 0.3, jax.random.key(1), 0)), LABELS)
    attacked = cross_entropy(network(attack(network, x, LABELS, 0.3, jax.random.key(1))), LABELS)
    assert np.all(attacked > clean)
    assert np.all(attacked > start)


def test_it_finds_the_optimum_of_a_linear_classifier():
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((5, 2)).astype(np.float32)
    x = np.full((6, 5), 0.5, np.float32)
    attacked = np.asarray(
        attack(jax.tree_util.Partial(_linear, jnp.asarray(matrix)), x, LABELS % 2, 0.2, jax.random.key(2)), np.float64
    )
    for point, label in zip(attacked, np.asarray(LABELS % 2), strict=True):
        c = matrix[:, 1 - label] - matrix[:, label]
        assert c @ (point - 0.5) >= 0.2 * np.linalg.norm(c) * (1 - 1e-5)
        np.testing.assert_allclose(point, 0.5 + 0.2 * c / np.linalg.norm(c), atol=1e-3)


def _linear(matrix, x):
    return x @ matrix


def test_keys_per_example_make_the_result_independent_of_the_batch():
    network = oracles.random_network("dense relu", 3)
    x = oracles.random_inputs(network, 3, 6)
    keys = jax.random.split(jax.random.key(3), 6)
    together = attack(network, x, LABELS, 0.3, keys)
    order = np.array([4, 0, 2])
    some = attack(network, x[order], LABELS[order], 0.3, keys[order])
    np.testing.assert_allclose(some, np.asarray(together)[order], atol=1e-6)
    other = attack(network, x, LABELS, 0.3, jax.random.split(jax.random.key(4), 6), 0)
    assert np.abs(np.asarray(other) - np.asarray(attack(network, x, LABELS, 0.3, keys, 0))).max() > 1e-3


def test_starts_fill_the_ball_evenly_and_differ_between_examples():
    x = jnp.full((4000, 3), 0.5)
    start = attack(
        jax.tree_util.Partial(_linear, jnp.zeros((3, 2))), x, jnp.zeros(4000, int), 0.4, jax.random.key(5), 0
    )
    offsets = np.asarray(start, np.float64) - 0.5
    shares = np.linalg.norm(offsets, axis=1) / 0.4
    assert np.mean(shares**3) == pytest.approx(0.5, abs=0.03)  # uniform: the cube of the length is uniform in [0, 1]
    np.testing.assert_allclose(offsets.mean(0), 0, atol=0.02)
    assert len(np.unique(offsets[:, 0])) > 3990


def test_a_zero_gradient_gives_no_nan_and_no_move():
    network = oracles.random_network("dense relu", 4, shift=-100.0)  # everything is dead
    x = oracles.random_inputs(network, 4, 6)
    attacked = np.asarray(attack(network, x, LABELS, 0.3, jax.random.key(6)))
    assert np.isfinite(attacked).all()
    np.testing.assert_allclose(attacked, attack(network, x, LABELS, 0.3, jax.random.key(6), 0), atol=1e-6)


def test_a_nan_gradient_stays_where_it_is_and_does_not_touch_the_others():
    def broken(x):
        return jnp.stack([jnp.sum(x, axis=1), jnp.where(x[:, 0] > 0.9, jnp.nan, 1.0) * jnp.sum(x**2, axis=1)], axis=1)

    x = np.full((2, 3), 0.5, np.float32)
    x[1] = 1.0
    keys = jax.random.split(jax.random.key(7), 2)
    run = jax.jit(lambda n: pgd(broken, jnp.asarray(x), jnp.array([0, 0]), 0.05, keys, num_steps=n))
    attacked, start = np.asarray(run(10)), np.asarray(run(0))
    assert np.isfinite(attacked).all()
    np.testing.assert_allclose(attacked[1], start[1], atol=1e-6)
    assert np.linalg.norm(attacked[0] - 0.5) == pytest.approx(0.05, rel=1e-3)


def test_the_step_size_is_a_quarter_of_the_radius_unless_given():
    matrix = jnp.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    x, label = jnp.full((1, 3), 0.5), jnp.array([1])
    network = jax.tree_util.Partial(_linear, matrix)
    for step_size, expected in ((None, 0.025), (0.01, 0.01)):
        run = jax.jit(lambda key, n, s=step_size: pgd(network, x, label, 0.1, key, num_steps=n, step_size=s))
        starts = (run(jax.random.key(i), 0) for i in range(40))
        i, start = next(  # one so far inside that nothing is projected
            (i, start) for i, start in enumerate(starts) if np.linalg.norm(start - x) < 0.1 - expected
        )
        moved = run(jax.random.key(i), 1)
        np.testing.assert_allclose(moved - start, [[expected, 0, 0]], atol=1e-6)

"""Attacks: they stay where they may go, do harm, refuse what makes no sense, and keep examples and NaN apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lipjax import cross_entropy
from lipjax.certification.attacks import attack, attack_round, attack_rounds, pgd

LABELS = jnp.array([0, 1, 2, 0, 1, 2])
DOMAINS = ("ball", "pixels")


@oracles.jit
def run_pgd(network, x, label, eps, key, num_steps=30):
    return pgd(network, x, label, eps, key, num_steps=num_steps)


@pytest.mark.parametrize("kind", ["dense relu", "conv clipped"])
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.5, 3.0])
def test_it_stays_in_the_ball_and_in_the_pixel_range(kind, eps):
    network = oracles.random_network(kind, 0)
    x = oracles.random_inputs(network, 0, 6)
    x[0], x[1] = 0.0, 1.0
    for num_steps in (0, 30):
        attacked = np.asarray(run_pgd(network, x, LABELS, eps, jax.random.key(0), num_steps), np.float64)
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
    start = cross_entropy(network(run_pgd(network, x, LABELS, 0.3, jax.random.key(1), 0)), LABELS)
    attacked = cross_entropy(network(run_pgd(network, x, LABELS, 0.3, jax.random.key(1))), LABELS)
    assert np.all(attacked > clean)
    assert np.all(attacked > start)


def test_it_finds_the_optimum_of_a_linear_classifier():
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((5, 2)).astype(np.float32)
    x = np.full((6, 5), 0.5, np.float32)
    attacked = np.asarray(
        run_pgd(jax.tree_util.Partial(_linear, jnp.asarray(matrix)), x, LABELS % 2, 0.2, jax.random.key(2)), np.float64
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
    together = run_pgd(network, x, LABELS, 0.3, keys)
    order = np.array([4, 0, 2])
    some = run_pgd(network, x[order], LABELS[order], 0.3, keys[order])
    np.testing.assert_allclose(some, np.asarray(together)[order], atol=1e-6)
    other = run_pgd(network, x, LABELS, 0.3, jax.random.split(jax.random.key(4), 6), 0)
    assert np.abs(np.asarray(other) - np.asarray(run_pgd(network, x, LABELS, 0.3, keys, 0))).max() > 1e-3


def test_starts_fill_the_ball_evenly_and_differ_between_examples():
    x = jnp.full((4000, 3), 0.5)
    start = run_pgd(
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
    attacked = np.asarray(run_pgd(network, x, LABELS, 0.3, jax.random.key(6)))
    assert np.isfinite(attacked).all()
    np.testing.assert_allclose(attacked, run_pgd(network, x, LABELS, 0.3, jax.random.key(6), 0), atol=1e-6)


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


@functools.partial(oracles.jit, static_argnames="domain")
def run_attack(network, x, label, eps, keys, domain="ball", num_steps=30):
    points = attack(network, x, label, eps, keys, domain=domain, num_steps=num_steps, restarts=1)
    return points, margins(network(points), label)


@functools.partial(oracles.jit, static_argnames="domain")
def run_round(network, x, label, eps, keys, round_, num_steps=30, domain="ball"):
    return attack_round(network, x, label, eps, keys, round_, domain=domain, num_steps=num_steps)


def margins(logits, label):
    own = jnp.arange(logits.shape[1])[None] == label[:, None]
    return jnp.min(jnp.where(own, jnp.inf, jnp.sum(jnp.where(own, logits, 0), axis=1, keepdims=True) - logits), axis=1)


def keys_of(seed, count=6):
    return jax.random.split(jax.random.key(seed), count)


def affine(matrix, bias):
    """A linear classifier."""
    return jax.tree_util.Partial(_affine, jnp.asarray(matrix, jnp.float32), jnp.asarray(bias, jnp.float32))


def _affine(matrix, bias, x):
    return x.reshape(len(x), -1) @ matrix + bias[None]


def distances(points, x):
    return np.linalg.norm((np.asarray(points, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_attack_stays_in_the_ball_to_the_last_digit_and_reaches_its_surface(domain):
    network = oracles.random_network("conv clipped", 0)
    x = oracles.random_inputs(network, 0, 6)
    x[0], x[1] = 0.0, 1.0
    for eps in (np.array([0.0, 1e-6, 1e-3, 0.05, 0.5, 3.0]), np.array([3.0, 0.5, 0.05, 1e-3, 1e-6, 0.0])):
        points, _ = run_attack(network, x, LABELS, eps, keys_of(0), domain)
        assert points.shape == x.shape
        assert np.all(distances(points, x) <= eps)
        if domain == "pixels":
            assert np.min(points) >= 0
            assert np.max(points) <= 1
        else:
            reached = (eps >= 0.05) & (eps <= 0.5)
            assert np.all(distances(points, x)[reached] >= eps[reached] * (1 - 1e-4))


@pytest.mark.parametrize("domain", DOMAINS)
def test_many_pixels_do_not_lead_out_of_the_ball(domain):
    # Every pixel of a sum is rounded, and the errors of 12,288 of them add up.
    rng = np.random.default_rng(1)
    x = rng.uniform(0.4, 1, (6, 64, 64, 3)).astype(np.float32)
    x[:3] = 0.7
    network = affine(rng.choice([-1.0, 1.0], (64 * 64 * 3, 3)), np.zeros(3))
    eps = np.array([0.14, 1.0, 5.0, 0.14, 1.0, 5.0])
    points, _ = run_round(network, x, LABELS, eps, keys_of(1), 1, domain=domain)
    assert np.all(distances(points, x) <= eps)
    assert np.all(distances(points, x)[:3] >= eps[:3] * (1 - 1e-4))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_attack_finds_the_optimum_of_a_linear_classifier(domain):
    rng = np.random.default_rng(2)
    matrix, bias = rng.standard_normal((8, 5)) * rng.uniform(0.2, 2, 5), rng.standard_normal(5)
    x, label = rng.choice([0.0, 0.05, 0.5, 1.0], (6, 8)), np.array([0, 1, 2, 3, 4, 0])
    eps = np.array([0.1, 0.3, 0.6, 1.0, 0.2, 2.0])
    _, found = run_attack(affine(matrix, bias), jnp.asarray(x, jnp.float32), label, eps, keys_of(2), domain)
    for i, (one, own, radius) in enumerate(zip(x, label, eps, strict=True)):
        low, high = (-one, 1 - one) if domain == "pixels" else (np.full(8, -radius), np.full(8, radius))
        clean = one @ matrix + bias
        least = min(
            clean[own] - clean[j] + oracles.box_and_ball_minimum(matrix[:, own] - matrix[:, j], low, high, radius)
            for j in range(5)
            if j != own
        )
        assert found[i] == pytest.approx(least, rel=1e-3, abs=1e-4)


def test_the_attack_goes_for_the_rival_that_can_be_reached_where_the_cross_entropy_goes_for_the_nearest():
    # Rival 1 is near and cannot be reached; rival 2 is far, and its logit grows so fast that it can.
    matrix = np.zeros((8, 5))
    matrix[0, 1], matrix[1, 2] = 0.5, 100.0
    network = affine(matrix, [0.0, -1.0, -80.0, -100.0, -100.0])
    x, label, eps = jnp.zeros((6, 8)), np.zeros(6, int), np.ones(6)
    by_pgd = jax.jit(lambda keys: pgd(network, x, label, eps, keys, domain="ball"))(keys_of(3))
    assert np.all(margins(network(by_pgd), label) > 0.4)
    _, by_attack = run_attack(network, x, label, eps, keys_of(3))
    np.testing.assert_allclose(by_attack, -20, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dense relu", "conv clipped"])
def test_the_attack_is_never_worse_than_pgd(kind):
    broken, means = [], []
    for seed in range(6):
        network = oracles.random_network(kind, seed, scale=1.5)
        x = oracles.random_inputs(network, seed, 6)
        label = jnp.argmax(network(x), axis=1)
        by_pgd = margins(network(run_pgd(network, x, label, 0.7, keys_of(seed))), label)
        _, by_attack = run_attack(network, x, label, np.full(6, 0.7), keys_of(seed), "pixels")
        broken.append([np.sum(by_pgd < 0), np.sum(by_attack < 0)])
        means.append([np.mean(by_pgd), np.mean(by_attack)])
    broken, means = np.array(broken), np.array(means)
    assert np.all(broken[:, 1] >= broken[:, 0])
    assert np.all(means[:, 1] <= means[:, 0] + 1e-4)
    assert 0 < broken[:, 0].sum() < broken[:, 1].sum() < 36


def test_rounds_take_the_likely_rivals_in_turn_and_the_strongest_one_in_between():
    # Each rival has a coordinate of its own. By margin over slope they come in the order 3, 1, 2.
    slopes, bias = np.diag([0.0, 20.0, 8.0, 50.0]), np.array([0.0, -3.0, -2.0, -4.0])
    network, x, label, eps = affine(slopes, bias), np.zeros((2, 4), np.float32), np.zeros(2, int), np.array([1.0, 0.01])
    for round_, rival in {0: 3, 2: 1, 4: 2, 6: 3}.items():
        points, found = run_round(network, x, label, eps, keys_of(4, 2), round_)
        np.testing.assert_allclose(points[0], np.eye(4)[rival], atol=0.02)
        assert found[0] == pytest.approx(-bias[rival] - slopes[rival, rival], rel=1e-3)
    # Without steps the start is what is found: the example itself in round 0, another point of the ball in each round.
    starts = np.stack([run_round(network, x, label, eps, keys_of(4, 2), n, 0)[0] for n in range(4)])
    np.testing.assert_array_equal(starts[0], x)
    assert np.all(np.linalg.norm(starts[1:], axis=2) > 0.2 * eps)
    assert np.unique(starts[1:], axis=0).shape[0] == 3
    # Within 0.01 rival 2 is the strongest everywhere.
    points, _ = run_round(network, x, label, eps, keys_of(4, 2), 1)
    np.testing.assert_allclose(points[1], [0, 0, 0.01, 0], atol=1e-4)


def test_the_attack_is_the_best_of_its_rounds():
    network = oracles.random_network("dense relu", 5)
    x, eps = oracles.random_inputs(network, 5, 6), np.full(6, 0.3)
    assert (attack_rounds(1), attack_rounds()) == (5, 10)
    rounds = [run_round(network, x, LABELS, eps, keys_of(5), n) for n in range(5)]
    for points, found in rounds:
        np.testing.assert_allclose(margins(network(points), LABELS), found, atol=1e-5)
    _, best = run_attack(network, x, LABELS, eps, keys_of(5))
    found = np.stack([found for _, found in rounds])
    np.testing.assert_allclose(best, found.min(axis=0), atol=1e-4)
    assert len(np.unique(found.argmin(axis=0))) > 1
    assert np.all(best <= margins(network(x), LABELS))


def test_the_attack_of_an_example_depends_on_no_other_and_radii_may_differ():
    network = oracles.random_network("dense relu", 6)
    x, keys, eps = oracles.random_inputs(network, 6, 6), keys_of(6), np.linspace(0.1, 0.6, 6)
    together, _ = run_attack(network, x, LABELS, eps, keys)
    alone, _ = run_attack(network, x, LABELS, np.full(6, eps[3]), keys)
    np.testing.assert_allclose(alone[3], together[3], atol=1e-5)
    assert np.abs(alone[5] - together[5]).max() > 1e-2
    # Without steps the best of the starts is found, which is another one with another key.
    order = np.array([4, 0, 2, 2, 0, 4])
    for num_steps in (0, 30):
        together, _ = run_attack(network, x, LABELS, eps, keys, num_steps=num_steps)
        some, _ = run_attack(network, x[order], LABELS[order], eps[order], keys[order], num_steps=num_steps)
        np.testing.assert_allclose(some, np.asarray(together)[order], atol=1e-5)
    # One key gives each place its own, whatever the size of the batch.
    one = jax.random.key(6)
    first, _ = run_attack(network, x[:2], LABELS[:2], eps[:2], one, num_steps=0)
    by_place = jax.vmap(jax.random.fold_in, (None, 0))(one, jnp.arange(6))
    found, _ = run_attack(network, x, LABELS, eps, by_place, num_steps=0)
    np.testing.assert_allclose(first, found[:2], atol=1e-6)
    other, _ = run_attack(network, x, LABELS, eps, keys_of(7), num_steps=0)
    assert np.abs(other - found).max() > 1e-2


def test_pgd_takes_a_radius_per_example():
    network = oracles.random_network("dense relu", 6)
    x, keys, eps = oracles.random_inputs(network, 6, 6), keys_of(6), np.linspace(0.1, 0.6, 6)
    together = run_pgd(network, x, LABELS, eps, keys)
    np.testing.assert_allclose(run_pgd(network, x, LABELS, np.full(6, eps[3]), keys)[3], together[3], atol=1e-5)
    assert np.all(distances(together, x) <= eps + 1e-6)
    assert np.all(distances(together, x) > eps / 2)


def test_a_leap_onto_a_plateau_is_taken_back():
    # The margin falls to -0.5 at 0.3 and is 1 from 0.675 on, where there is no gradient. The first leap leads to 1.
    def hill(x):
        return jnp.concatenate([jnp.ones_like(x), jax.nn.relu(1.5 - 4 * jnp.abs(x - 0.3))], axis=1)

    run = jax.jit(lambda x: attack_round(hill, x, np.array([0, 0]), 1.0, keys_of(7, 2), 0))
    points, found = run(np.array([[0.0], [-0.05]], np.float32))
    np.testing.assert_allclose(points, 0.3, atol=0.02)
    np.testing.assert_allclose(found, -0.5, atol=0.08)


def test_not_a_number_is_never_chosen_and_does_not_touch_the_others():
    def broken(x):
        return jnp.stack([jnp.sum(x, axis=1), jnp.where(x[:, 0] > 0.9, jnp.nan, 1.0) * jnp.sum(x**2, axis=1)], axis=1)

    x = np.full((2, 3), 0.6, np.float32)
    x[1] = 1.0
    run = jax.jit(lambda eps: attack_round(broken, x, np.array([0, 0]), eps, keys_of(8, 2), 0))
    points, found = run(0.05)
    np.testing.assert_array_equal(points[1], x[1])
    assert np.isposinf(found[1])
    assert distances(points, x)[0] == pytest.approx(0.05, rel=1e-3)
    assert found[0] == pytest.approx(3 * 0.6289 * (1 - 0.6289), rel=1e-3)  # 0.6 + 0.05 / sqrt(3) in each pixel
    np.testing.assert_array_equal(run(np.nan)[0], x)  # a radius that nobody could check


def test_two_classes_are_attacked_as_well():
    network = affine([[1.0, -1.0]], np.zeros(2))
    points, found = run_round(network, np.full((2, 1), 0.5, np.float32), np.array([0, 1]), 0.7, keys_of(9, 2), 4)
    np.testing.assert_allclose(points, [[-0.2], [1.2]], atol=1e-4)
    np.testing.assert_allclose(found, [-0.4, -2.4], atol=1e-3)


def test_pgd_on_the_whole_ball_leaves_the_pixel_range():
    network = affine([[1.0, 0.0], [0.0, 0.0]], np.zeros(2))
    x, label = jnp.zeros((1, 2)), jnp.array([0])
    ball = jax.jit(lambda key: pgd(network, x, label, 0.3, key, domain="ball"))(jax.random.key(9))
    np.testing.assert_allclose(ball, [[-0.3, 0.0]], atol=2e-2)
    assert np.min(run_pgd(network, x, label, 0.3, jax.random.key(9))) == 0


REFUSED = {
    "a list": ({"x": [[0.5, 0.5]] * 3}, TypeError, "x is a list; expected a batch"),
    "integer pixels": ({"x": np.ones((3, 2), int)}, TypeError, "x has type int"),
    "no batch": ({"x": np.float32(0.5)}, ValueError, r"x has shape \(\); expected a batch"),
    "an empty batch": ({"x": np.zeros((0, 2), np.float32)}, ValueError, "at least one input"),
    "pixels that are NaN": (
        {"x": np.array([[0.5, 0.5], [0.5, np.nan], [0.5, 0.5]], np.float32)},
        ValueError,
        r"x\[1\]",
    ),
    "columns of labels": ({"label": np.zeros((3, 1), int)}, ValueError, r"label has shape \(3, 1\) and type int"),
    "too few labels": ({"label": np.zeros(2, int)}, ValueError, r"label has shape \(2,\)"),
    "floating-point labels": ({"label": np.zeros(3, np.float32)}, ValueError, "type float32; expected 3 integers"),
    "a list of labels": ({"label": [0, 1, 1]}, ValueError, "expected 3 integers in an array"),
    "a label too large": ({"label": np.array([0, 2, 1])}, ValueError, r"label\[1\] is 2; expected classes from 0 to 1"),
    "a negative label": ({"label": np.array([0, 1, -1])}, ValueError, r"label\[2\] is -1; expected classes"),
    "a negative radius": ({"eps": -0.1}, ValueError, r"eps is -0\.1; expected a finite radius of at least 0"),
    "a radius that is NaN": ({"eps": np.nan}, ValueError, "eps is nan; expected a finite radius"),
    "an infinite radius": ({"eps": jnp.array([0.1, np.inf, 0.1])}, ValueError, "expected a finite radius"),
    "a radius in words": ({"eps": "0.1"}, ValueError, r"eps is '0\.1'; expected a finite radius"),
    "too many radii": (
        {"eps": np.full(4, 0.1)},
        ValueError,
        r"eps has shape \(4,\); expected one radius, or one for each",
    ),
    "an unknown domain": ({"domain": "l1"}, ValueError, "domain='l1' is not known; give one of ball, pixels"),
    "inputs beyond [0, 1]": ({"x": np.full((3, 2), -0.4, np.float32)}, ValueError, r"x holds -0\.4, .* in \[0, 1\]"),
    "no logits": ({"network": lambda x: x[:, 0]}, ValueError, r"expected logits \(3, classes\)"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [pgd, attack, functools.partial(attack_round, round_=0)])
def test_what_makes_no_sense_is_refused_in_one_line(function, name):
    changes, error, message = REFUSED[name]
    arguments = {
        "network": lambda x: x @ jnp.eye(2, dtype=x.dtype),
        "x": np.full((3, 2), 0.5, np.float32),
        "label": np.array([0, 1, 1]),
        "eps": 0.1,
        "domain": "pixels",
        "keys" if isinstance(function, functools.partial) else "key": jax.random.split(jax.random.key(0), 3),
    }
    with pytest.raises(error, match=message) as raised:
        function(**{**arguments, **changes})
    assert "\n" not in str(raised.value)


def test_the_whole_ball_may_lie_around_any_input():
    x = np.full((6, 8), -3.0, np.float32)
    points, found = run_attack(affine(np.eye(8, 5), np.zeros(5)), x, np.arange(6) % 5, np.full(6, 0.5), keys_of(10))
    assert np.all(np.abs(distances(points, x) - 0.5) < 1e-4)
    np.testing.assert_allclose(found, -0.5 * np.sqrt(2), rtol=1e-3)

"""The dual: never above the truth for any multipliers, exact where that is known, and equal to what it generalises."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax import (
    ClippedReLUActivation,
    Concatenation,
    Graph,
    Multipliers,
    Preactivation,
    ReLUActivation,
    Sum,
    chain,
    dense,
)
from lipjax.bounds import ascent, dual

KINDS = (*oracles.KINDS, "residual", "graph")

CASES = oracles.slow_but(KINDS, "dense relu", "dense clipped", "dense pairs", "conv clipped", "residual", "graph")
SEEDS = st.integers(0, 10**6)
EPS = st.just(0.0) | st.floats(1e-3, 1.0)


def network_of(kind, seed):
    if kind in oracles.KINDS:
        return oracles.random_network(kind, seed, scale=1.3)
    rng, graph = np.random.default_rng(seed), Graph((5,))

    def affine(place, outputs):
        (inputs,) = graph.shape(place)
        kernel = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        bias = rng.normal(size=outputs) / 4
        return graph.add(dense(jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32), (inputs,)), place)

    def hidden(place, outputs):
        return graph.add(ReLUActivation(), affine(place, outputs))

    first = hidden(graph.input, 6)
    second = hidden(first, 7)
    if kind == "residual":
        graph.add(Sum(), first, hidden(graph.add(Sum(), second, hidden(second, 7)), 6))
    else:  # a layer behind a layer, one that two activations take, a sum of two branches, and values side by side
        third = affine(affine(first, 4), 7)
        clipped = graph.add(ClippedReLUActivation(jnp.asarray(rng.uniform(0.1, 0.5, 7), jnp.float32)), third)
        both = graph.add(ReLUActivation(), graph.add(Sum(), graph.add(ReLUActivation(), third), second))
        graph.add(Concatenation(), clipped, affine(first, 2), both)
    (features,) = graph.shape(len(graph.nodes) - 1)
    return graph.network(dense(jnp.asarray(rng.standard_normal((features, 3)), jnp.float32), jnp.zeros(3), (features,)))


def wide(network):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), network)


def norms_of(network):
    return np.array([oracles.spectral_norm(oracles.layer_matrix(each)[0]) for each in network.layers]) * (1 + 1e-12)


@functools.partial(jax.jit, static_argnames="domain")
def _bounds(network, x, eps, sigmas, domain):
    return lipjax.propagate(network, lipjax.l2_ball(x, eps, domain), lipjax.Given(sigmas))


def case(kind, seed, eps, count=2, domain="ball"):
    """A float64 network, inputs, labels, and bounds with exact norms of the whole layers. Call with x64 enabled."""
    network = network_of(kind, seed)
    x = jnp.asarray(oracles.random_inputs(network, seed, count), jnp.float64)
    sigmas = jnp.asarray(norms_of(network))
    network = wide(network)
    return network, x, jnp.argmax(logits_of(network, x), axis=1), _bounds(network, x, eps, sigmas, domain)


RIVALS = jnp.arange(3)[None].repeat(2, axis=0)  # all three classes of the random networks, for both inputs


def random_multipliers(network, bounds, seed):
    rng = np.random.default_rng(seed)
    shape = 2, 3
    g = tuple(jnp.asarray(rng.normal(size=(*shape, *b.center.shape[1:])) / 2) for b in bounds.before)
    weight = tuple(jnp.asarray(np.exp(rng.normal(size=shape) * 2) * (rng.random(shape) > 0.2)) for _ in g)
    return Multipliers(g, weight)


logits_of = jax.jit(lambda network, x: network(x))
margins_at = jax.jit(dual.dual_margins)
forward_margins = jax.jit(jax.vmap(dual.forward_margins, (None, 0, 0)))
ascended = jax.jit(lipjax.ascend, static_argnames="num_steps")  # of one number of steps wherever it can be


def samples(network, x, eps, seed, domain="ball"):
    """Least margins (3,) over many points of the ball of one input, and after descents from some of them."""
    rng = np.random.default_rng(seed)
    points = oracles.ball_points(rng, np.asarray(x).ravel(), eps, 400)
    if domain == "pixels":
        points = np.clip(points, 0, 1)
    return _least(network, jnp.asarray(points).reshape(-1, *x.shape), x, eps, domain == "pixels")


@jax.jit
def _least(network, points, x, eps, cut):
    label = jnp.argmax(network(x[None])[0])

    def margins(points):
        logits = network(points)
        return jnp.take(logits, label, axis=1)[:, None] - logits

    def descend(rival):
        def step(_, points):
            gradient = jax.grad(lambda points: jnp.sum(margins(points)[:, rival]))(points)
            size = jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, points.ndim)), keepdims=True))
            offset = points - x[None] - eps / 8 * gradient / jnp.maximum(size, 1e-12)
            length = jnp.sqrt(jnp.sum(offset**2, axis=tuple(range(1, points.ndim)), keepdims=True))
            points = x[None] + offset * jnp.minimum(1, eps / jnp.maximum(length, 1e-12))
            return jnp.where(cut, jnp.clip(points, 0, 1), points)

        return jnp.min(margins(jax.lax.fori_loop(0, 40, step, points[:60])), axis=0)

    return jnp.minimum(jnp.min(margins(points), axis=0), jnp.min(jax.vmap(descend)(jnp.arange(3)), axis=0))


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=15)
@given(seed=SEEDS, eps=EPS)
def test_no_multipliers_give_more_than_an_attack_finds(kind, seed, eps):
    with jax.enable_x64(True):
        network, x, label, bounds = case(kind, seed, eps)
        start = random_multipliers(network, bounds, seed)
        for found in (
            margins_at(network, bounds, label, start, RIVALS),
            ascended(network, bounds, label, rivals=RIVALS, num_steps=20)[0],
        ):
            for i in range(2):
                assert found[i, label[i]] == 0
                least = samples(network, x[i], eps, seed)
                assert np.all(np.asarray(found[i]) <= np.asarray(least) + 1e-9)


@pytest.mark.parametrize("kind", oracles.slow_but(["dense pairs", "conv clipped"], "conv clipped"))
@settings(max_examples=10)
@given(seed=SEEDS, eps=st.floats(1e-2, 1.5))
def test_on_pixels_it_is_never_above_an_attack_there_and_not_below_the_ball(kind, seed, eps):
    with jax.enable_x64(True):
        network, x, label, bounds = case(kind, seed, eps, domain="pixels")
        found = ascended(network, bounds, label, rivals=RIVALS, num_steps=20)[0]
        for i in range(2):
            least = samples(network, x[i], eps, seed, "pixels")
            assert np.all(np.asarray(found[i]) <= np.asarray(least) + 1e-9)
        whole = dataclasses.replace(bounds, input=dataclasses.replace(bounds.input, domain="ball"))
        start = random_multipliers(network, bounds, seed)
        on_pixels, on_ball = (margins_at(network, b, label, start, RIVALS) for b in (bounds, whole))
        assert np.all(np.asarray(on_pixels) >= np.asarray(on_ball) - 1e-9)


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=15)
@given(seed=SEEDS, eps=EPS)
def test_without_multipliers_it_is_box_and_ball_or_more(kind, seed, eps):
    with jax.enable_x64(True):
        network, _, label, bounds = case(kind, seed, eps)
        margins, _ = at_box_and_ball(network, bounds, label)
        forward = forward_margins(network, bounds, label)
        scale = 1 + np.abs(np.asarray(forward)).max()
        assert np.all(np.asarray(margins) >= np.asarray(forward) - 1e-3 * eps * scale - 1e-9)
        best, _ = ascended(network, bounds, label, rivals=RIVALS, num_steps=20)
        assert np.all(np.asarray(best) >= np.asarray(forward) - 1e-12)


@jax.jit
def at_box_and_ball(network, bounds, label):
    """No multiplier anywhere, and weights that were searched to the end."""

    def one(bounds, label, rival):
        def choose(place, activation, c, before):
            g = jnp.zeros_like(before.center)
            return g, dual.best_weight(activation, c, g, before, 40)

        trace = dual.pull(network, bounds, label, rival, choose)
        return dual.value(network, bounds, trace), trace.weight

    return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, 0))(bounds, label, RIVALS)


# What it generalises


def crown(matrices, x, eps, c, total, boxes, radii, slopes):
    """CROWN's backward bound of ReLU networks, in NumPy: lower lines ``alpha z``, upper lines of the box."""
    for (matrix, bias), (lower, upper), alpha in reversed(list(zip(matrices, boxes, slopes, strict=True))):
        unstable = (lower < 0) & (upper > 0)
        chord = np.where(unstable, upper / np.where(unstable, upper - lower, 1), upper > 0)
        slope = np.where(c >= 0, np.where(unstable, alpha, upper > 0), chord)
        intercept = np.where((c < 0) & unstable, -chord * lower, 0)
        total = total + (c * intercept).sum() + (c * slope) @ bias
        c = matrix.T @ (c * slope)
    return total + c @ x - eps * np.linalg.norm(c)


@settings(max_examples=25)
@given(SEEDS, st.floats(1e-2, 1.0))
def test_without_weights_and_with_its_slopes_it_is_crown(seed, eps):
    with jax.enable_x64(True):
        network, x, label, bounds = case("dense relu", seed, eps, count=1)
        exact = oracles.DenseNetwork(network)
        rng, y, rival = np.random.default_rng(seed), int(label[0]), (int(label[0]) + 1) % 3
        boxes = [tuple(np.asarray(bound[0]) for bound in before.box) for before in bounds.before]
        alphas = [rng.random(lower.shape) for lower, _ in boxes]
        c = exact.head[0][y] - exact.head[0][rival]
        expected = crown(
            *(exact.layers, np.asarray(x[0]), eps, c, exact.head[1][y] - exact.head[1][rival]), boxes, None, alphas
        )

        found = with_lines(network, bounds, label[0], rival, alphas)
        assert float(found) == pytest.approx(expected, abs=1e-9)


@jax.jit
def with_lines(network, bounds, label, rival, alphas):
    """The dual value of the first example with CROWN's lines as multipliers, and without weights."""

    def choose(place, activation, c, before):
        lower, upper = before.box
        unstable = (lower < 0) & (upper > 0)
        chord = jnp.where(unstable, upper / jnp.where(unstable, upper - lower, 1), (upper > 0).astype(upper.dtype))
        lower_line = jnp.where(unstable, alphas[place], (upper > 0).astype(upper.dtype))
        return c * jnp.where(c >= 0, lower_line, chord), jnp.zeros(())

    own = jax.tree.map(lambda leaf: leaf[0], bounds)
    return dual.value(network, own, dual.pull(network, own, label, rival, choose))


@settings(max_examples=50)
@given(SEEDS, st.floats(1e-2, 20.0))
def test_without_a_box_and_for_relu_it_is_the_bound_of_sdp_crown(seed, weight):
    # Theorem 4.1: - (lambda (rho^2 - ||x||^2) + ||phi||^2 / lambda) / 2, phi = min(c - g - lambda x, g + lambda x, 0).
    rng = np.random.default_rng(seed)
    c, g, center, radius = rng.normal(size=8), rng.normal(size=8), rng.normal(size=8), rng.uniform(0.1, 2)
    phi = np.minimum(np.minimum(c - g - weight * center, g + weight * center), 0)
    expected = -(weight * (radius**2 - center @ center) + phi @ phi / weight) / 2
    with jax.enable_x64(True):
        box = jnp.full(8, -1e6), jnp.full(8, 1e6)
        before = Preactivation(*box, jnp.asarray(center), jnp.ones(8, bool), jnp.float64(radius), jnp.asarray(True))
        least, _ = ReLUActivation().minimum(jnp.asarray(c), jnp.asarray(g), jnp.asarray(weight), before)
        assert float(least) - weight / 2 * radius**2 == pytest.approx(expected, rel=1e-9, abs=1e-9)


def exact_margin(network, x, eps, y, rival):
    """The least margin over the ball of a ReLU network of one hidden layer, by its patterns.

    On each of them the margin is linear, and its least value over the ball counts where it is attained in the pattern;
    a fine search covers the borders between them.
    """
    (matrix, bias), (head, head_bias) = network.layers[0], network.head
    c, best = head[y] - head[rival], np.inf
    rng = np.random.default_rng(0)
    points = oracles.ball_points(rng, x, eps, 20_000)
    for pattern in itertools.product((0, 1), repeat=len(bias)):
        on = np.array(pattern, float)
        slope, offset = (c * on) @ matrix, (c * on) @ bias + head_bias[y] - head_bias[rival]
        norm = np.linalg.norm(slope)
        if norm > 0:
            point = x - eps * slope / norm
            if np.array_equal((matrix @ point + bias > 0).astype(float), on):
                best = min(best, slope @ point + offset)
    values = network.logits(points)
    return min(best, (values[:, y] - values[:, rival]).min())


def test_tiny_networks_are_bounded_nearly_exactly():
    gaps, lipschitz_gaps = [], []
    with jax.enable_x64(True):
        for seed in range(8):
            rng = np.random.default_rng(seed)
            kernel, head = rng.standard_normal((2, 4)), rng.standard_normal((4, 3))
            hidden = dense(jnp.asarray(kernel, jnp.float32), jnp.asarray(rng.normal(size=4) / 3, jnp.float32), (2,))
            last = dense(jnp.asarray(head, jnp.float32), jnp.zeros(3), (4,))
            network = wide(chain(hidden, ReLUActivation(), last))
            x, eps = jnp.asarray(rng.random((2, 2))), 0.3
            label = jnp.argmax(network(x), axis=1)
            bounds = _bounds(network, x, eps, jnp.asarray(norms_of(network)), "ball")
            found, _ = ascended(network, bounds, label, rivals=RIVALS, num_steps=200)
            plain = jax.vmap(functools.partial(lipjax.pairwise_lipschitz, network.head))(bounds.features, label)
            oracle = oracles.DenseNetwork(network)
            for i, rival in np.ndindex(2, 3):
                if rival != label[i]:
                    truth = exact_margin(oracle, np.asarray(x[i]), eps, int(label[i]), rival)
                    assert float(found[i, rival]) <= truth + 1e-9
                    gaps.append(truth - float(found[i, rival]))
                    lipschitz_gaps.append(truth - float(plain[i, rival]))
    assert np.median(gaps) < 0.15 * np.median(lipschitz_gaps)


# Edges


@pytest.mark.parametrize("kind", KINDS)
def test_at_radius_zero_it_is_the_margin_itself(kind):
    with jax.enable_x64(True):
        network, x, label, bounds = case(kind, 1, 0.0)
        start = random_multipliers(network, bounds, 1)
        logits = logits_of(network, x)
        clean = jnp.take_along_axis(logits, label[:, None], axis=1) - logits
        np.testing.assert_allclose(margins_at(network, bounds, label, start, RIVALS), clean, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense clipped", "dense pairs", "graph"])
def test_at_radius_zero_gradients_are_finite(kind):
    with jax.enable_x64(True):
        network, _, label, bounds = case(kind, 1, 0.0)
        start = random_multipliers(network, bounds, 1)
        gradient = jax.jit(jax.grad(lambda start, *given: jnp.sum(dual.dual_margins(*given, start, RIVALS))))(
            start, network, bounds, label
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", oracles.slow_but(["dense pairs", "graph"], "graph"))
def test_gradients_in_the_network_and_the_multipliers_are_those_of_differences(kind):
    with jax.enable_x64(True):
        network, x, label, bounds = case(kind, 4, 0.2)
        start, sigmas = random_multipliers(network, bounds, 4), jnp.asarray(norms_of(network))

        def total(network, start):
            bounds = _bounds(network, x, 0.2, sigmas, "ball")
            return jnp.sum(dual.dual_margins(network, bounds, label, start, RIVALS))

        point = network, start
        total = jax.jit(total)
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(*point)
        rng = np.random.default_rng(0)
        # A weight of 0 has a derivative to one side alone.
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * np.asarray(leaf != 0)), point)
        ends = [total(*jax.tree.map(lambda a, d, step=step: a + step * d, point, direction)) for step in (1e-6, -1e-6)]
        slope = sum(jnp.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_multipliers_of_rows_that_do_not_matter_count_for_nothing():
    with jax.enable_x64(True):
        network, _, label, bounds = case("dense relu", 2, 0.05)
        start = random_multipliers(network, bounds, 2)
        dead = [~np.asarray(before.rows)[:, None] for before in bounds.before]
        assert any(mask.any() for mask in dead)
        wild = tuple(jnp.where(mask, 1e6, g) for mask, g in zip(dead, start.g, strict=True))
        found = [margins_at(network, bounds, label, Multipliers(g, start.weight), RIVALS) for g in (start.g, wild)]
        np.testing.assert_array_equal(*found)


def test_classes_that_are_not_asked_for_keep_their_forward_margin():
    with jax.enable_x64(True):
        network, _, label, bounds = case("dense clipped", 5, 0.3)
        asked = ((label + 1) % 3)[:, None]
        start = jax.tree.map(lambda leaf: leaf[:, :1], random_multipliers(network, bounds, 5))
        found = np.asarray(margins_at(network, bounds, label, start, asked))
        forward = np.asarray(forward_margins(network, bounds, label))
        for i in range(2):
            other = (int(label[i]) + 2) % 3
            assert found[i, other] == forward[i, other]
            assert found[i, int(asked[i, 0])] != forward[i, int(asked[i, 0])]


def test_nan_and_infinity_show():
    with jax.enable_x64(True):
        network, _, label, bounds = case("dense relu", 6, 0.1)
        start = random_multipliers(network, bounds, 6)
        for bad in (jnp.nan, jnp.inf):
            first = bounds.before[0]
            lower, upper, center = (value * bad for value in (*first.box, first.center))
            poisoned = dataclasses.replace(first, lower=lower, upper=upper, center=center)
            spoiled = dataclasses.replace(bounds, before=(poisoned, *bounds.before[1:]))
            found = np.asarray(margins_at(network, spoiled, label, start, RIVALS))
            own = np.arange(3)[None] == np.asarray(label)[:, None]
            assert not np.any(found[~own] > 0)


# Ascent


# In float32 rounding may decide at a kink to which side an ascent goes on.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float64, 1e-9), (jnp.float32, 1e-2)])
def test_a_pair_does_not_depend_on_its_batch(dtype, atol):
    with jax.enable_x64(True):
        network, _, label, bounds = case("dense clipped", 0, 0.3, count=6)
        network, bounds = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, (network, bounds)
        )
        together, _ = ascended(network, bounds, label, rivals=RIVALS[:1].repeat(6, axis=0), num_steps=20)
        assert together.dtype == dtype
        for some in (slice(0, 2), slice(4, 6)):
            part = jax.tree.map(lambda leaf, some=some: leaf[some], (bounds, label))
            apart, _ = ascended(network, *part, rivals=RIVALS, num_steps=20)
            np.testing.assert_allclose(apart, together[some], atol=atol)


def test_batches_of_pairs_are_cut_and_give_the_same(monkeypatch):
    with jax.enable_x64(True):
        network, _, label, bounds = case("dense relu", 3, 0.3)
        whole = ascended(network, bounds, label, rivals=RIVALS, num_steps=20)
        monkeypatch.setattr(ascent, "MEMORY", ascent.MEMORY // ascent.pairs_at_once(network))
        assert ascent.pairs_at_once(network) < RIVALS.size
        again = jax.jit(lambda *given: lipjax.ascend(*given, rivals=RIVALS, num_steps=20))  # traced anew
        cut = again(network, bounds, label)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), whole, cut)


@pytest.mark.parametrize("kind", oracles.slow_but(["dense pairs", "graph"], "graph"))
def test_an_ascent_goes_on_from_its_multipliers(kind):
    with jax.enable_x64(True):
        network, _, label, bounds = case(kind, 8, 0.4)
        margins, found = ascended(network, bounds, label, rivals=RIVALS, num_steps=3)  # which leaves something to win
        again, _ = ascended(network, bounds, label, found, rivals=RIVALS, num_steps=0)
        np.testing.assert_allclose(again, margins, atol=1e-6)
        more, _ = ascended(network, bounds, label, found, rivals=RIVALS, num_steps=20)
        assert np.all(np.asarray(more) >= np.asarray(margins) - 1e-6)
        assert np.sum(more) > np.sum(margins)


def test_pairs_and_weights_behind_one_layer():
    """MaxMin takes whole rows and tanh weights of them: each has its own, and the dual is below every sample."""
    for seed in range(4):
        rng, graph = np.random.default_rng(seed), Graph((3,))

        def affine(inputs, outputs, rng=rng):
            kernel, bias = rng.standard_normal((inputs, outputs)), rng.standard_normal(outputs)
            return dense(jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32), (inputs,))

        both = graph.add(affine(3, 4), graph.input)
        graph.add(Sum(), graph.add(lipjax.MaxMinActivation(), both), graph.add(lipjax.TanhActivation(), both))
        network = graph.network(affine(4, 3))
        x = jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)
        label = jnp.argmax(network(x), axis=1)
        found = lipjax.certify(network, x, label, 0.3, level="deterministic", stages=("local", "dual"))
        with jax.enable_x64(True):
            wide_network = network.astype(jnp.float64)
            for i in range(2):
                least = samples(wide_network, jnp.asarray(x[i], jnp.float64), 0.3, seed)
                rivals = np.arange(3) != int(label[i])
                assert float(found.worst_margin[i]) <= np.asarray(least)[rivals].min() + 1e-9

"""Training through the dual: its margins are bounds, the rule learns, and a run resumes with it bit for bit."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lipjax
from lipjax.bounds import ascent, dual
from lipjax.bounds.rule import initial_rule
from lipjax.experiments import certifying, recipe, runs
from lipjax.experiments import settings as configs
from lipjax.training import methods
from lipjax.training.checkpoints import Checkpoints

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
SEEDS = st.integers(0, 10**6)


@jax.jit
def rule_margins(network, x, label, eps, sigmas, rule):
    """Margins of each example, against the strongest rival alone and against all."""
    bounds = lipjax.propagate(network, lipjax.l2_ball(x, eps), lipjax.Given(sigmas))

    def one(bounds, label):
        lipschitz = lipjax.pairwise_lipschitz(network.head, bounds.features, label)
        found = [methods.DualMargins(rivals)(network, bounds, label, rule) for rivals in (1, None)]
        return lipschitz, found

    return jax.vmap(one)(bounds, label)


def case(kind, seed):
    network = oracles.random_network(kind, seed)
    x = jnp.asarray(oracles.random_inputs(network, seed, 3))
    sigmas = [oracles.spectral_norm(oracles.layer_matrix(layer)[0]) * (1 + 1e-6) for layer in network.layers]
    rng = np.random.default_rng(seed)
    rule = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), initial_rule(network)
    )
    return network, x, jnp.argmax(network(x), axis=1), jnp.asarray(sigmas, jnp.float32), rule


@pytest.mark.parametrize("kind", ["dense clipped", "dense pairs"])
@settings(max_examples=15)
@given(SEEDS, st.floats(0.01, 0.5))
def test_margins_of_any_rule_are_bounds_and_never_below_lipschitz(kind, seed, eps):
    network, x, label, sigmas, rule = case(kind, seed)
    lipschitz, found = rule_margins(network, x, label, eps, sigmas, rule)
    exact, rng = oracles.DenseNetwork(network), np.random.default_rng(seed)
    for i in range(3):
        points = oracles.ball_points(rng, np.asarray(x[i], np.float64).ravel(), eps, 300)
        logits = exact.logits(points)
        least = (logits[:, [int(label[i])]] - logits).min(axis=0)
        for margins in found:
            asked = np.isfinite(margins[i])
            assert np.all(np.asarray(margins[i])[asked] <= least[asked] + 1e-4)
            assert np.all(np.asarray(margins[i]) >= np.asarray(lipschitz[i]) - 1e-6)
        # Of three classes one rival is asked, or both; the one with the least Lipschitz margin always.
        assert [int(np.isfinite(margins[i]).sum()) for margins in found] == [2, 3]
        strongest = np.argmin(np.where(np.arange(3) == int(label[i]), np.inf, np.asarray(lipschitz[i])))
        assert np.isfinite(found[0][i, strongest])


def test_gradients_flow_through_center_and_radius_and_not_through_the_boxes():
    network, x, label, sigmas, rule = case("dense pairs", 3)
    rivals = jnp.asarray([(int(label[0]) + 1) % 3])

    def bounds_of(network):
        bounds = lipjax.propagate(network, lipjax.l2_ball(x[:1], 0.3), lipjax.Given(sigmas))
        return jax.tree.map(lambda leaf: leaf[0], bounds)

    constant = bounds_of(network).before

    def with_fixed_boxes(network):
        bounds = bounds_of(network)
        before = tuple(
            dataclasses.replace(before, lower=fixed.lower, upper=fixed.upper)
            for before, fixed in zip(bounds.before, constant, strict=True)
        )
        bounds = dataclasses.replace(bounds, before=before)
        choose = ascent.free(rule.slopes(network, bounds), rule.log_weights)
        return dual.value(network, bounds, dual.pull(network, bounds, label[0], rivals[0], choose))

    def by_rule(network):
        return rule.margins(network, bounds_of(network), label[0], rivals)[0]

    value, gradient = oracles.jit(jax.value_and_grad(by_rule))(network)
    expected_value, expected = oracles.jit(jax.value_and_grad(with_fixed_boxes))(network)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in (gradient.head.kernel, gradient.layers[0].kernel))


def shrunk(method, *more):
    return configs.parse(
        [
            f"--config={FOLDER / 'digits.py'}:{method}",
            "--config.model.architecture=mlp",
            "--config.schedule.epochs=2",
            "--config.data.validation=1037",
            "--config.probe.size=0",
            "--config.checkpoint.every=1",
            *more,
        ]
    )


def log(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dual") / "run"
    runs.train(shrunk("local_dual"), workdir, resume=False)
    return workdir


def test_the_rule_is_trained_and_lies_in_both_checkpoints(finished):
    found = {}
    for which in ("best", "last"):
        run = lipjax.load_run(finished, which)
        rule, start = run.rule, initial_rule(run.network)
        assert jax.tree.structure(rule) == jax.tree.structure(start)
        moved = jax.tree.map(lambda now, then: float(np.abs(now - then).max()), rule, start)
        assert all(value > 1e-4 for value in jax.tree.leaves(moved))
        found[which] = rule
    assert len(jax.tree.leaves(found["last"])) == 5


def test_a_run_through_the_dual_resumes_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "resumed"

    class Killed(BaseException):
        pass

    def dying(row):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.reports, "print_row", dying)  # after the first epoch's checkpoint
        with pytest.raises(Killed):
            runs.train(shrunk("local_dual"), workdir, resume=False)
    runs.train(shrunk("local_dual"), workdir, resume=True)
    assert log(workdir) == log(finished)
    for item in ("params", "rule"):
        both = [
            Checkpoints(folder / "checkpoints" / "last").restore((item,))[0][item] for folder in (workdir, finished)
        ]
        assert both[0].keys() == both[1].keys()
        assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])


def test_validation_asks_all_rivals_however_many_training_asks():
    two, five = (shrunk("local_dual", f"--config.dual.num_rivals={number}") for number in (2, 5))
    assert recipe.objective_of(two) != recipe.objective_of(five)
    assert recipe.method_of(two, 1).validation == recipe.method_of(five, 1).validation
    assert recipe.validation_of(two).margins.num_rivals is None


def test_certification_starts_from_the_rule(finished, tmp_path, monkeypatch):
    given = []
    evaluate = certifying.evaluate

    def watched(*arguments, rule, **options):
        given.append(rule)
        return evaluate(*arguments, rule=rule, **options)

    monkeypatch.setattr(certifying, "evaluate", watched)
    options = {"limit": 6, "batch_size": 6, "eps": 0.05, "stages": ("global", "dual"), "dual_steps": 3}
    certifying.certify_run(finished, output=tmp_path, **options)
    assert isinstance(given[0], lipjax.Rule)


def test_configs_of_runs_before_the_dual_still_load(tmp_path):
    config = shrunk("local_gloro")
    configs.save(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["dual"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert configs.load(tmp_path).to_dict() == config.to_dict()


def test_every_method_of_the_dual_is_what_its_name_says():
    for method in ("local_dual", "local_dual_b", "dual", "dual_b"):
        config = shrunk(method)
        assert config.method.margins == "dual"
        assert configs.has_box(config.method)
        assert config.method.loss == ("cross_entropy" if method.endswith("_b") else "gloro")
        assert config.method.norms == ("local" if method.startswith("local") else "global")


def test_the_key_of_the_dual_is_checked():
    with pytest.raises(
        configs.InputError, match="--config.dual.num_rivals=0 cannot be used; give a finite number at least 1"
    ):
        shrunk("dual", "--config.dual.num_rivals=0")

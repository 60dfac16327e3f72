"""The ladder of a certification: what each stage is asked, domains, and a killed certification that goes on."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import lipjax
from lipjax.certification import stages
from lipjax.experiments import data, evaluation
from lipjax.experiments.evaluation import evaluate
from lipjax.experiments.reports import print_table
from lipjax.norms import solvers

COUNT, EPS = 60, 0.085
OPTIONS = {"batch_size": 20, "dual_steps": 21}
EXACT_COLUMNS = ("prediction", "certified", "attacked", "broken_by_pgd", "stage", "products", "dual_steps")


@functools.cache
def subject():
    """A network on small images and a data set of its own predictions, some of them wrong."""
    network = oracles.random_network("conv relu", 5, scale=1.5)
    images = oracles.random_inputs(network, 5, COUNT)
    labels = np.array(jnp.argmax(network(jnp.asarray(images)), axis=1), np.int32)
    labels[:2] = (labels[:2] + 1) % 3
    return network, data.Dataset(images, labels, 1, 3)


@functools.cache
def evaluated(**options):
    return evaluate(*subject(), EPS, **OPTIONS, **options)


def test_each_stage_is_asked_for_what_is_left_and_decides_something():
    found = evaluated()
    stage = found.columns["stage"]
    assert set(stage) == {"prediction", "global", "attack", "dual", "undecided"} | ({"local"} & set(stage))
    assert np.all(stage[:2] == "prediction")
    correct = found.columns["prediction"] == found.columns["label"]
    assert np.all((stage == "prediction") == ~correct)
    assert np.all(found.columns["attacked"] == (stage == "attack"))
    assert np.all(found.columns["certified"] == np.isin(stage, ("global", "local", "dual")))
    assert np.all(found.columns["worst_margin"][found.columns["certified"]] > 0)
    late = np.isin(stage, ("dual", "undecided"))
    climbed = found.columns["dual_steps"] > 0  # where the start of an ascent did not do
    assert np.all(late[climbed])
    assert np.all(climbed[stage == "undecided"])
    assert np.all((found.columns["products"] > 0) <= np.isin(stage, ("local", "dual", "undecided")))
    assert np.all(found.columns["seconds"] > 0)
    after = found.summary["certified_accuracy_after"]
    assert after["global"] <= after["local"] < after["dual"] == found.summary["certified_accuracy"]


def test_without_triage_all_stages_see_all_and_the_same_are_certified():
    found, triaged = evaluated(triage=False), evaluated()
    np.testing.assert_array_equal(found.columns["certified"], triaged.columns["certified"])
    assert found.summary["counts"]["certified_but_attacked"] == 0
    assert triaged.summary["counts"]["certified_but_attacked"] is None
    assert len(found.local) == COUNT


def test_a_shorter_ladder_certifies_fewer_and_says_nothing_of_what_was_not_asked():
    found = evaluated(stages=("global", "local"))
    assert found.summary["stages"] == ["global", "local"]
    assert found.summary["attack_accuracy"] is found.summary["pgd_accuracy"] is None
    assert "dual" not in found.summary["certified_accuracy_after"]
    assert found.columns["certified"].sum() < evaluated().columns["certified"].sum()
    assert np.all(found.columns["certified"] <= evaluated().columns["certified"])


def test_the_dual_alone_uses_global_norms():
    found = evaluated(stages=("dual",))
    assert found.summary["ledger"]["starts_drawn"] <= len(subject()[0].layers)
    assert evaluated(stages=("global",)).columns["certified"].sum() < found.columns["certified"].sum()


def test_level_estimate_stays_at_the_stages_of_the_paper():
    found = evaluated(level="estimate")
    assert found.summary["stages"] == ["global", "attack", "local"]
    np.testing.assert_array_equal(found.columns["attacked"], found.columns["broken_by_pgd"])
    with pytest.raises(ValueError, match="name 'dual', which is a proof, but level='estimate' is none"):
        evaluate(*subject(), EPS, **OPTIONS, level="estimate", stages=("global", "dual"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("local", "global"), "stages=local,global are not in order; give each once, in the order global,attack,"),
        (("global", "global"), "stages=global,global are not in order"),
        (("attack",), "stages=attack certify nothing; give at least one of global, local, dual"),
        (("lirpa",), "stages name 'lirpa', which is not known; give some of global, attack, local, dual"),
    ],
)  # fmt: skip
def test_ladders_that_are_none_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        stages.chosen_stages(names, solvers.Lanczos.claim)


# Domains


def test_on_pixels_more_is_certified_and_every_output_says_so(capsys):
    ball, pixels = evaluated(), evaluated(domain="pixels")
    assert pixels.summary["domain"] == "pixels"
    assert np.all(pixels.columns["certified"] >= ball.columns["certified"])
    assert np.all(pixels.columns["attacked"] <= ball.columns["attacked"])
    facts = {"dataset": "mine", "split": "file", "checkpoint": "last", "checkpoint_epoch": 1}
    print_table(pixels.summary | facts)
    assert "on the l2 ball within the pixel range [0, 1]" in capsys.readouterr().out


FORWARD, ALL = ("global", "local"), ("global", "local", "dual")


@functools.cache
def radii(domain, names):
    """Of four examples: each size that a search comes down to is compiled."""
    network, dataset = subject()
    x, label = jnp.asarray(dataset.images[2:6]), jnp.asarray(dataset.labels[2:6])
    options = {"level": "deterministic", "tol": 1e-3, "dual_steps": 15}
    return x, label, np.asarray(lipjax.certified_radius(network, x, label, domain=domain, stages=names, **options))


def test_radii_on_pixels_are_not_smaller():
    assert np.all(radii("pixels", FORWARD)[-1] >= radii("ball", FORWARD)[-1] - 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["ball", "pixels"])
def test_radii_withstand_attacks(domain):
    network, (x, label, radius) = subject()[0], radii(domain, ALL)
    attack = oracles.jit(functools.partial(lipjax.attack, domain=domain))
    points = attack(network, x, label, radius * 0.999, jax.random.key(0))
    assert np.all((np.asarray(jnp.argmax(network(points), axis=1)) == np.asarray(label)) | (radius == 0))


def test_the_dual_makes_radii_larger():
    without, dual = radii("ball", FORWARD)[-1], radii("ball", ALL)[-1]
    assert np.all(dual >= without - 2e-3)
    assert np.median(dual) > 1.05 * np.median(without)


def test_inputs_outside_of_the_pixel_range_are_refused_on_pixels_alone():
    network, dataset = subject()
    x, label = jnp.asarray(dataset.images[2:4]) * 3 - 1, jnp.asarray(dataset.labels[2:4])
    options = {"level": "deterministic", "stages": ("global",)}
    lipjax.certify(network, x, label, 0.1, **options)
    with pytest.raises(
        ValueError, match=r"but domain='pixels' is about inputs in \[0, 1\]; give images as pixels / 255"
    ):
        lipjax.certify(network, x, label, 0.1, domain="pixels", **options)
    with pytest.raises(ValueError, match="domain='sphere' is not known; give one of ball, pixels"):
        lipjax.certify(network, x, label, 0.1, domain="sphere", **options)


def test_a_certificate_names_its_domain():
    network, dataset = subject()
    x, label = jnp.asarray(dataset.images[2:4]), jnp.asarray(dataset.labels[2:4])
    for domain in ("ball", "pixels"):
        found = lipjax.certify(network, x, label, 0.1, level="deterministic", domain=domain, stages=("global",))
        assert found.domain == domain


# A killed certification


class Killed(BaseException):
    """What no code catches."""


def killed_after(monkeypatch, batches):
    """Evaluations save after each batch and die after so many."""
    lap, seen = evaluation.ProgressFile.lap, []

    def dying(self, *arguments):
        lap(self, *arguments)
        seen.append(1)
        if len(seen) == batches:
            raise Killed

    monkeypatch.setattr(evaluation, "SAVE_SECONDS", 0)
    monkeypatch.setattr(evaluation.ProgressFile, "lap", dying)


def number_of_batches(monkeypatch):
    """Of a whole evaluation."""
    seen = []
    monkeypatch.setattr(evaluation.ProgressFile, "lap", lambda *arguments: seen.append(1))
    evaluate(*subject(), EPS, **OPTIONS)
    monkeypatch.undo()
    return len(seen)


@pytest.mark.parametrize("batches", [1, 4, 7, "all"])
def test_a_killed_evaluation_goes_on_to_the_same_results(monkeypatch, tmp_path, batches):
    file = tmp_path / "progress.npz"
    with monkeypatch.context() as patch:
        if batches == "all":
            batches = number_of_batches(patch)
        killed_after(patch, batches)
        with pytest.raises(Killed):
            evaluate(*subject(), EPS, **OPTIONS, progress=file)
    assert file.exists()
    asked = []
    attack = evaluation.Attack.__call__
    monkeypatch.setattr(evaluation.Attack, "__call__", lambda *arguments: (asked.append(1), attack(*arguments)))
    found, whole = evaluate(*subject(), EPS, **OPTIONS, progress=file), evaluated()
    for name in EXACT_COLUMNS:
        np.testing.assert_array_equal(found.columns[name], whole.columns[name], err_msg=name)
    np.testing.assert_allclose(found.columns["worst_margin"], whole.columns["worst_margin"], rtol=1e-9)
    assert found.summary["ledger"] == whole.summary["ledger"]
    assert batches < 10 or not asked  # what was done is not done again


def test_progress_of_another_certification_or_none_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "progress.npz"
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            evaluate(*subject(), EPS, **OPTIONS, progress=file)
    with pytest.raises(ValueError, match=r"is of a certification with eps=0.085, not 0.2: give the same options"):
        evaluate(*subject(), 0.2, **OPTIONS, progress=file)
    network, dataset = subject()
    other = dataclasses.replace(dataset, labels=np.roll(dataset.labels, 1))
    with pytest.raises(ValueError, match="is of a certification with data="):
        evaluate(network, other, EPS, **OPTIONS, progress=file)
    other = dataclasses.replace(dataset, scale=2)
    with pytest.raises(ValueError, match="is of a certification with scale=1, not 2"):
        evaluate(network, other, EPS, **OPTIONS, progress=file)
    # The same parameters in another graph are another network.
    last, shape = len(network.nodes) - 1, network.nodes[-1].shape
    twice = lipjax.Node(lipjax.Sum(), (last, last), (shape, shape), shape)
    other = dataclasses.replace(network, nodes=(*network.nodes, twice))
    with pytest.raises(ValueError, match="is of a certification with network="):
        evaluate(other, dataset, EPS, **OPTIONS, progress=file)
    with np.load(file) as whole:
        arrays = {name: whole[name] for name in whole.files}
    np.savez(file, **{name: array for name, array in arrays.items() if name != "rows"})
    with pytest.raises(ValueError, match="lacks rows; delete it and certify from the beginning"):
        evaluate(*subject(), EPS, **OPTIONS, progress=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read: .*; delete it and certify from the beginning"):
        evaluate(*subject(), EPS, **OPTIONS, progress=file)


def test_certify_py_resumes_or_begins_anew(monkeypatch, tmp_path):
    from lipjax.experiments import certifying

    run = pathlib.Path(__file__).parents[1] / "results" / "digits"
    options = {"limit": 12, "batch_size": 6, "output": tmp_path, "stages": ("global",), "level": "estimate"}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            certifying.certify_run(run, **options)
    assert (tmp_path / certifying.PROGRESS).exists()
    seen = []
    lap = evaluation.ProgressFile.lap
    monkeypatch.setattr(evaluation.ProgressFile, "lap", lambda *arguments: (seen.append(1), lap(*arguments)))
    summary = certifying.certify_run(run, resume=True, **options)
    assert len(seen) == 1  # of two batches
    assert not (tmp_path / certifying.PROGRESS).exists()
    assert json.loads((tmp_path / "summary.json").read_text())["counts"] == summary["counts"]

"""Whole runs on a shrunken digits config: log, checkpoints, resumption after a kill, certification."""

import csv
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lipjax
from lipjax.errors import InputError
from lipjax.experiments import certifying, commands, data, runs, settings

ROOT = pathlib.Path(__file__).parents[1]
SHRUNK = [
    "--config.model.architecture=mlp",  # compiles in no time
    "--config.schedule.epochs=3",
    "--config.data.validation=1037",
    "--config.certify.limit=12",
    "--config.certify.batch_size=6",  # so are all certifications here: compiled once
    "--config.probe.size=4",
    "--config.probe.max_iters=50",
    "--config.checkpoint.every=1",
]
TIMINGS = ("seconds", "training_seconds", "images_per_second")


def shrunk(method="local_gloro", *more):
    return settings.parse([f"--config={ROOT / 'configs' / 'digits.py'}:{method}", *SHRUNK, *more])


def script(name, *arguments, **options):
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, made by the script."""
    workdir = tmp_path_factory.mktemp("run") / "straight"
    process = script("train.py", "--config", "configs/digits.py:local_gloro", *SHRUNK, "--workdir", str(workdir))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return workdir, output


def rows_without_timings(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def test_train_ends_with_the_table_the_curves_and_the_path(finished):
    workdir, output = finished
    assert (workdir / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    for word in ("clean", "PGD", "certified", "level probabilistic", "delta", str(workdir)):
        assert word in output


def test_log_has_a_row_per_epoch_in_both_files(finished):
    workdir, _ = finished
    rows = rows_without_timings(workdir)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected = {"loss", "clean_accuracy", "certified_accuracy", "local_lipschitz", "global_lipschitz", "live_1", "eps"}
    expected |= {"validation_certified_accuracy", "probe_lipschitz_ratio", "probe_sigma_ratio_1", "learning_rate"}
    assert expected <= set(rows[-1])
    with (workdir / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in table] == [row["loss"] for row in rows]
    assert rows[-1]["probe_lipschitz_ratio"] <= 1 + 1e-3


def params_sha256(workdir):
    return lipjax.load_run(workdir).checkpoint["params_sha256"]


def test_a_killed_run_resumes_to_the_same_metrics_bit_for_bit(finished, tmp_path, monkeypatch, capsys):
    straight, _ = finished
    workdir = tmp_path / "killed"
    arguments = ("--config", "configs/digits.py:local_gloro", *SHRUNK, "--workdir", str(workdir))
    process = script("train.py", *arguments, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(workdir.glob("checkpoints/last/1")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (workdir / "checkpoints" / "last" / "3").exists(), "the kill came too late to test anything"
    monkeypatch.chdir(ROOT)
    commands.train_command(commands.Parser(), [*arguments, "--config.certify.limit=0", "--resume"])
    assert re.search(rf"{workdir}: goes on after epoch [12]\b", capsys.readouterr().out)
    assert rows_without_timings(workdir) == rows_without_timings(straight)
    assert params_sha256(workdir) == params_sha256(straight)


# Orbax leaves coroutines of the failed read behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_corrupt_checkpoint_is_refused_and_the_one_before_it_used(finished, tmp_path, capsys):
    straight, _ = finished
    workdir = tmp_path / "corrupt"
    shutil.copytree(straight, workdir)
    for path in (workdir / "checkpoints" / "last" / "3").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    runs.train(shrunk(), workdir, resume=True)
    assert f"refusing checkpoint {workdir / 'checkpoints' / 'last' / '3'}" in capsys.readouterr().err
    assert rows_without_timings(workdir) == rows_without_timings(straight)
    assert rows_without_timings(workdir)[-1]["epoch"] == 3


def test_resuming_with_another_config_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"--config\.eps_train=0\.7 differs from the run to resume"):
        runs.train(shrunk("local_gloro", "--config.eps_train=0.7"), workdir, resume=True)


def test_a_used_folder_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(InputError, match="is not empty; go on with --resume"):
        runs.train(shrunk(), workdir, resume=False)


def test_certify_reads_the_run_and_writes_all_files(finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["certify.py", "--workdir", str(workdir), "--eps", "0.1", "--limit", "30",
                                      "--batch-size", "7", "--output", str(output)])  # fmt: skip
    runpy.run_path(str(ROOT / "certify.py"), run_name="__main__")
    printed = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    columns = ["index", "label", "prediction", "worst_margin", "lipschitz", "certified", "attacked"]
    columns += ["broken_by_pgd", "stage", "products", "dual_steps", "seconds"]
    with (output / "certificates.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == columns
    assert len(lines) == 31
    with np.load(output / "certificates.npz") as arrays:
        assert set(columns) <= set(arrays.files)
        assert json.loads(str(arrays["summary"])) == summary
        assert summary["level"] == "probabilistic"
        certified, correct = arrays["certified"], arrays["prediction"] == arrays["label"]
        attacked, by_pgd, worst = arrays["attacked"], arrays["broken_by_pgd"], arrays["worst_margin"]
    assert summary["certified_accuracy"] == certified.mean()
    assert summary["clean_accuracy"] == correct.mean()
    assert summary["pgd_accuracy"] == (correct & ~by_pgd).mean()
    assert summary["attack_accuracy"] == (correct & ~attacked).mean() <= summary["pgd_accuracy"]
    assert (certified == (correct & (worst > 0))).all()
    assert summary["eps"] == 0.1
    assert summary["counts"]["examples"] == 30
    assert "level probabilistic: norms bounded from above but for a probability delta of 1e-06" in printed
    for key in ("checkpoint_step", "params_sha256", "versions", "seconds", "products_per_norm", "live_share"):
        assert summary[key]


def test_results_do_not_depend_on_the_batch_size(finished, tmp_path):
    workdir, _ = finished
    found = certifying.certify_run(workdir, limit=12, batch_size=5, output=tmp_path)["counts"]
    assert found == json.loads((workdir / "summary.json").read_text())["counts"]  # in batches of 6
    with np.load(workdir / "certificates.npz") as a, np.load(tmp_path / "certificates.npz") as b:
        np.testing.assert_allclose(a["worst_margin"], b["worst_margin"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(a["attacked"], b["attacked"])


def test_restored_model_is_an_ordinary_flax_model(finished):
    workdir, _ = finished
    run = lipjax.load_run(workdir, "last")
    images = data.load("digits", "test").images[:5].astype(np.float32) / 16
    np.testing.assert_allclose(run.model(images), run.network(images), atol=1e-5)
    assert run.checkpoint["epoch"] == 3


@pytest.mark.parametrize("method", ["local_gloro", pytest.param("local_dual", marks=pytest.mark.slow)])
def test_steps_compile_once_in_a_whole_run(method, tmp_path):
    run = runs.Run(shrunk(method), tmp_path)
    state = run.spread(run.initial_state())
    compiled = []
    listener = lambda event, _, **facts: compiled.append(facts.get("fun_name")) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for epoch in range(2):
            state, _ = run.epoch(state, epoch)
    finally:
        jax.monitoring.clear_event_listeners()
    steps = [name for name in compiled if name and "_fun" in name]
    assert len(steps) == 2, f"train and validation step, once each; compiled were {compiled}"


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    workdir = tmp_path / "diverging"
    config = shrunk("gloro", "--config.schedule.learning_rate=1e18", "--config.schedule.learning_rate_end=1e18")
    with pytest.raises(InputError, match="no longer finite.*last good checkpoint is kept"):
        runs.train(config, workdir, resume=False)
    assert not list(workdir.glob("checkpoints/*/[0-9]*"))


def test_without_a_validation_split_best_is_last(tmp_path):
    config = shrunk("gloro", "--config.data.validation=0", "--config.schedule.epochs=1")
    run = lipjax.train(config, tmp_path / "run")
    assert run.checkpoint["checkpoint"] == "last"
    assert run.checkpoint["epoch"] == 1


def test_eps_is_the_exact_fraction_and_not_three_digits_of_it(finished, tmp_path, capsys):
    workdir, _ = finished
    certifying.certify_run(workdir, eps=36 / 255, limit=6, output=tmp_path, stages=("global",))
    assert json.loads((tmp_path / "summary.json").read_text())["eps"] == 36 / 255 != 0.141
    assert "eps 0.141176" in capsys.readouterr().out


def test_the_shipped_digits_run_is_read_at_once():
    shipped = ROOT / "results" / "digits"
    assert params_sha256(shipped) == json.loads((shipped / "summary.json").read_text())["params_sha256"]


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not a run to resume: it has no config\.json"):
        runs.train(shrunk(), tmp_path, resume=True)


# From Python


def test_a_run_goes_on_for_more_epochs_and_not_for_fewer(finished, tmp_path):
    straight, _ = finished
    workdir = tmp_path / "longer"
    shutil.copytree(straight, workdir)
    run = lipjax.train(shrunk("local_gloro", "--config.schedule.epochs=5"), workdir, resume=True)
    rows = rows_without_timings(workdir)
    assert rows[:3] == rows_without_timings(straight)
    assert [row["epoch"] for row in rows[3:]] == [4, 5]
    # The schedules are those of the new number, from the step where the run is.
    assert rows[3]["learning_rate"] > rows[2]["learning_rate"]
    assert rows[4]["learning_rate"] < rows[3]["learning_rate"]
    assert run.config.schedule.epochs == 5
    with pytest.raises(InputError, match=r"schedule\.epochs=3 differs from the run to resume, which has 5"):
        lipjax.train(shrunk(), workdir, resume=True)


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path):
    straight, _ = finished
    still = ("--config.schedule.epochs=1", f"--config.init={straight}", "--config.schedule.learning_rate=1e-12")
    still = (*still, "--config.schedule.learning_rate_end=1e-12")
    run, origin = lipjax.train(shrunk("gloro", *still), tmp_path / "run"), lipjax.load_run(straight)
    for found, given in zip(jax.tree.leaves(run.network), jax.tree.leaves(origin.network), strict=True):
        np.testing.assert_allclose(found, given, atol=1e-9)
    with pytest.raises(
        InputError, match=r"--config\.init=\S* has nothing for \S*, where the model has \(.*same architecture"
    ):
        lipjax.train(shrunk("gloro", *still, "--config.model.architecture=small_cnn"), tmp_path / "other")


def test_a_config_is_read_and_overridden_from_python():
    config = lipjax.load_config(str(ROOT / "configs" / "digits.py") + ":gloro", schedule__epochs=7, eps=0.25)
    assert (config.method.name, config.schedule.epochs, config.eps) == ("gloro", 7, 0.25)
    config.schedule.batch_size = 0
    with pytest.raises(InputError, match=r"schedule\.batch_size=0 cannot be used"):
        lipjax.train(config, "nowhere")


def test_arrays_are_evaluated_like_the_data_set_of_a_run(finished, tmp_path):
    workdir, _ = finished
    run, test = lipjax.load_run(workdir), data.load("digits", "test")
    summary = lipjax.certify_run(workdir, limit=12, output=tmp_path)
    mine = lipjax.Dataset.of(test.images[:12].astype(np.float32) / test.scale, test.labels[:12])
    found = lipjax.evaluate(run.network, mine, run.config.eps, batch_size=6, seed=run.config.seed, rule=run.rule)
    assert found.summary["counts"] == summary["counts"]
    with np.load(tmp_path / "certificates.npz") as file:
        np.testing.assert_array_equal(found.columns["worst_margin"], file["worst_margin"])
    with pytest.raises(InputError, match=r"Dataset\.of: images are int64 .* expected uint8, or floating-point"):
        lipjax.Dataset.of(test.images.astype(int), test.labels)


# Of older versions


def test_runs_of_0_3_and_0_4_load_and_go_on(tmp_path):
    shipped = ROOT / "results" / "digits"  # trained by 0.3: its config knows nothing of the dual
    old, config = lipjax.load_run(shipped), json.loads((shipped / "config.json").read_text())
    assert not {"dual", "init"} & config.keys()
    later = tmp_path / "later"
    shutil.copytree(shipped, later)
    (later / "config.json").write_text(json.dumps({**config, "dual": {"num_rivals": 1}}))
    for found, given in zip(jax.tree.leaves(lipjax.load_run(later).network), jax.tree.leaves(old.network), strict=True):
        np.testing.assert_array_equal(found, given)
    longer = lipjax.load_config(str(ROOT / "configs" / "digits.py") + ":local_gloro", schedule__epochs=101)
    assert lipjax.train(longer, later, resume=True).checkpoint["epoch"] == 101


def test_certificates_of_older_versions_are_refused_with_the_reason():
    shipped = ROOT / "results" / "digits"
    with pytest.raises(InputError, match=r"was written by lipjax 0\.4\.0, which described networks in another way"):
        lipjax.load_certificates(shipped / "certificates.npz", lipjax.load_run(shipped).network)

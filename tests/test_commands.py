"""Bad input to the scripts: one line, exit status 2, no traceback."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from lipjax.errors import InputError
from lipjax.experiments import settings

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"
MNIST = f"--config={ROOT / 'configs' / 'mnist_4c3f.py'}"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([f"--config={ROOT / 'configs' / 'nothing.py'}"], ["nothing.py", "configs/digits.py"]),
        ([DIGITS + ":magic"], ["unknown method 'magic'", "local_bcp", "local_gloro"]),
        ([DIGITS, "--config.schedule.epoch=3"], ["epoch", "epochs"]),
        ([DIGITS, "--config.schedule.epochs=many"], ["many"]),
        ([DIGITS, "--config.schedule.epochs=0"], ["--config.schedule.epochs=0", "at least 1"]),
        ([DIGITS, "--config.eps=nan"], ["--config.eps=nan", "more than 0"]),
        ([DIGITS, "--config.eps_train=-1"], ["--config.eps_train=-1", "more than 0"]),
        ([DIGITS, "--config.eps=inf"], ["--config.eps=inf", "finite"]),
        ([DIGITS, "--config.schedule.ramp=1.5"], ["--config.schedule.ramp=1.5", "at most 1"]),
        ([DIGITS, "--config.schedule.warmup=0.9"], ["ramp=0.5", "warm-up"]),
        ([DIGITS, "--config.data.name=imagenet"], ["imagenet", "mnist"]),
        ([DIGITS, "--config.model.activation=sine"], ["sine", "clipped_relu"]),
        ([DIGITS, "--config.model.architecture=resnet"], ["resnet", "4c3f"]),
        ([DIGITS, "--config.method.loss=hinge"], ["hinge", "gloro"]),
        ([DIGITS, "--config.power_iteration.num_iters=0"], ["num_iters=0", "at least 1"]),
        ([DIGITS + ":local_gloro", "--config.method.margins=none"], ["loss=gloro", "needs margins"]),
        ([DIGITS + ":ibp", "--config.method.margins=pairwise_lipschitz"], ["norms=none", "the box alone"]),
        ([DIGITS + ":standard", "--config.method.norms=local"], ["loss=clean", "without bounds"]),
        ([DIGITS, "--config.power_iteration.global_layers=(7,)"], ["names layer 7", "from 0 to 3"]),
        ([DIGITS, "--config.power_iteration.start=zero"], ["start='zero'", "saved, random"]),
        ([DIGITS, "--config.model.upper_clip=(1.0,2.0)"], ["upper_clip=(1.0, 2.0)", "3 activations of small_cnn"]),
        ([DIGITS, "--config.sparsity.weight=-1.0"], ["sparsity.weight=-1.0", "at least 0"]),
        ([DIGITS, "--config.data.crop_padding=-1"], ["crop_padding=-1", "at least 0"]),
        ([DIGITS, "more"], ["unexpected argument 'more'"]),
        ([DIGITS, "--epochs=3"], ["epochs"]),
    ],
)
def test_bad_configs_are_one_line_that_names_the_value(arguments, parts):
    with pytest.raises(InputError) as caught:
        settings.parse(arguments)
    message = str(caught.value)
    for noise in ("\n", "\\n", "Traceback", "^^"):
        assert noise not in message
    for part in parts:
        assert part in message


def test_a_config_of_version_0_2_is_read_as_what_it_was(tmp_path):
    config = settings.parse([DIGITS + ":local_gloro"])
    values = config.to_dict()
    for name, later in settings.SINCE.items():
        for key in later:
            del values[name][key]
    del values["sparsity"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings.check_same(config, settings.load(tmp_path))


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("train.py", [], "--config"),
        ("train.py", ["--config", "configs/digits.py", "--config.schedule.epocs=3"], "config.schedule.epocs=3"),
        (
            "train.py",
            ["--config", "configs/mnist_4c3f.py", "--config.data.dir={tmp}", "--config.data.cache={tmp}"],
            "{tmp}",
        ),
        ("train.py", ["--config", "configs/digits.py", "--resume"], "--workdir"),
        ("certify.py", [], "give --workdir, the folder of a run, or --model"),
        ("certify.py", ["--model", "a:b", "--eps", "1"], "--model needs --weights, --data, --output"),
        ("certify.py", ["--model", "a:b", "--workdir", "{tmp}"], "two models"),
        ("certify.py", ["--workdir", "{tmp}", "--weights", "w.npz"], "--weights are of --model"),
        ("certify.py", ["--workdir", "{tmp}"], "is not a run"),
        ("certify.py", ["--workdir", "{tmp}", "--eps", "wide"], "wide"),
        ("certify.py", ["--workdir", "{tmp}", "--split", "val"], "val"),
        (
            "certify.py",
            ["--workdir", "{tmp}", "--data", "x.npz", "--split", "train"],
            "not allowed with argument --data",
        ),
        ("paper.py", ["table3", "--workdir", "{tmp}"], "table3"),
        ("paper.py", ["table2", "--workdir", "{tmp}", "--scale", "-1"], "--scale=-1"),
        ("paper.py", ["table2", "--workdir", "{tmp}", "--scale", "5"], "at most 1"),
        ("paper.py", ["table2", "--workdir", "{tmp}", "--only", "mnist_4c3f-standrd"], "mnist_4c3f-standard, "),
    ],
)
def test_scripts_exit_with_2_and_one_line(name, arguments, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(tmp=tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(name, run_name="__main__")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{name}: ")
    assert part.format(tmp=tmp_path) in lines[0]
    assert out == ""


@pytest.mark.parametrize("name", ["train.py", "certify.py", "paper.py"])
def test_help_shows_examples(name):
    command = [sys.executable, str(ROOT / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0
    assert "Examples:" in done.stdout
    assert f"python {name}" in done.stdout


def test_config_survives_the_run_folder(tmp_path):
    config = settings.parse([MNIST, "--config.data.dir=somewhere"])
    settings.save(config, tmp_path)
    assert settings.load(tmp_path).to_dict() == config.to_dict()

"""Models of others: one command from a function that builds one, weights in a file and images to certificates."""

import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lipjax
from lipjax.errors import InputError
from lipjax.experiments import models

ROOT = pathlib.Path(__file__).parents[1]


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)])

    def __call__(self, x):
        x = nnx.gelu(self.drop(self.norm(self.conv(x))))
        first, second = self.layers
        return second(nnx.silu(first(x.reshape(x.shape[0], -1))))


class LinenClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.tanh(nn.Dense(6)(x.reshape(x.shape[0], -1))))


def build():
    return Classifier(nnx.Rngs(1))


def logits(weights, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ weights["first"]["kernel"]) @ weights["second"]


def trained():
    """A model with other weights than that of ``build``, and with statistics that are not the initial ones."""
    model = Classifier(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    model.norm.mean[...], model.norm.var[...] = rng.normal(size=4) / 10, rng.uniform(0.5, 2, 4)
    model.eval()
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return model, state


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    np.savez(path, images=x, labels=np.asarray(jnp.argmax(trained()[0](x / np.float32(255)), axis=1)))
    return path


def named(tree, separator="."):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator=separator): np.asarray(leaf) for p, leaf in leaves}


@pytest.mark.parametrize("kind", ["npz", "slashes", "orbax", "orbax of a state"])
def test_weights_come_back_from_any_file(kind, tmp_path):
    model, state = trained()
    path = tmp_path / "weights.npz"
    if kind in ("npz", "slashes"):
        np.savez(path, **named(state, "." if kind == "npz" else "/"))
    else:
        path = tmp_path / "orbax"
        with ocp.StandardCheckpointer() as checkpointer:
            whole = nnx.state(model, (nnx.Param, nnx.BatchStat))
            checkpointer.save(path, state if kind == "orbax" else whole)
    network, _ = models.load_model(build, path, (8, 8, 1))
    x = np.random.default_rng(2).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(network(x), model(x), rtol=1e-5, atol=1e-5)


def test_linen_variables_and_functions_of_weights(tmp_path):
    x = np.random.default_rng(2).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    variables = LinenClassifier().init(jax.random.key(0), x)
    for tree in (variables, variables["params"]):
        np.savez(tmp_path / "linen.npz", **named(tree))
        network, _ = models.load_model(LinenClassifier, tmp_path / "linen.npz", (8, 8, 1))
        np.testing.assert_allclose(network(x), LinenClassifier().apply(variables, x), rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(3)
    weights = {"first": {"kernel": rng.normal(size=(64, 5)) / 8}, "second": rng.normal(size=(5, 10))}
    weights = jax.tree.map(np.float32, weights)
    np.savez(tmp_path / "function.npz", **named(weights))
    network, _ = models.load_model(lambda: logits, tmp_path / "function.npz", (8, 8, 1))
    np.testing.assert_allclose(network(x), logits(weights, x), rtol=1e-5, atol=1e-5)


def test_one_command_certifies_and_its_certificates_hold(tmp_path, images):
    model, state = trained()
    np.savez(tmp_path / "weights.npz", **named(state))
    command = [sys.executable, str(ROOT / "certify.py"), "--model", "test_models:build"]
    command += ["--weights", str(tmp_path / "weights.npz"), "--data", str(images), "--eps", "0.1"]
    command += ["--output", str(tmp_path / "out"), "--level", "deterministic", "--batch-size", "12"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["clean_accuracy"] == 1
    assert summary["certified_accuracy"] > 0
    assert (summary["model"], summary["weights"], summary["eps"]) == ("test_models:build", "weights.npz", 0.1)
    with np.load(images) as file:
        x = file["images"] / np.float32(255)
    network = lipjax.from_flax(model, (8, 8, 1))
    found, _ = lipjax.load_certificates(tmp_path / "out" / "certificates.npz", network)
    points = lipjax.attack(network, x, found["label"], 0.1, jax.random.key(0))
    wrong = np.asarray(jnp.argmax(model(points), axis=1)) != found["label"]
    assert not (wrong & found["certified"]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv.bias"), r"conv\.bias is missing"),
        (lambda w: w.update(other=np.ones(3)), "other has no place in the model"),
        (lambda w: w.update({"conv.bias": np.ones(5)}), r"conv\.bias has shape \(5,\), not \(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(change, message, tmp_path):
    weights = named(trained()[1])
    change(weights)
    np.savez(tmp_path / "weights.npz", **weights)
    with pytest.raises(InputError, match=message):
        models.load_model(build, tmp_path / "weights.npz", (8, 8, 1))


def test_files_and_models_that_are_none_are_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", **named(trained()[1]))
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(InputError, match="text cannot be read.*give an .npz"):
        models.load_model(build, tmp_path / "text", (8, 8, 1))
    with pytest.raises(InputError, match="--model gives int"):
        models.load_model(lambda: 3, tmp_path / "weights.npz", (8, 8, 1))
    with pytest.raises(InputError, match=r"--model cannot be read for inputs of shape \(8, 8, 1\): .*sin"):
        models.load_model(lambda: lambda weights, x: jnp.sin(x), tmp_path / "weights.npz", (8, 8, 1))

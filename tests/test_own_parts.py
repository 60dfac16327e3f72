"""Parts of a user, added without editing lipjax: named in configs, trained, certified, checked by SVD and samples."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import lipjax
from lipjax.errors import InputError
from lipjax.experiments import commands, data, references, settings
from lipjax.networks.pieces import Piece

ROOT = pathlib.Path(__file__).parents[1]
HERE = pathlib.Path(__file__).stem


# An activation: zero between -width and width, beyond it the identity moved towards zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftThreshold(lipjax.Elementwise):
    """``z - clip(z, -width, width)``."""

    width: float = dataclasses.field(metadata={"static": True})

    def __call__(self, z):
        return z - jnp.clip(z, -self.width, self.width)

    def live_rows(self, lower, upper):
        return ~((lower >= -self.width) & (upper <= self.width))

    live_outputs = live_rows

    def pieces(self):
        low, high = -self.width, self.width
        return Piece(1, self.width, -jnp.inf, low), Piece(0, 0, low, high), Piece(1, -self.width, high, jnp.inf)


class SoftThresholdModule(nnx.Module):
    """The same as a module of Flax."""

    def __call__(self, z):
        return z - jnp.clip(z, -0.05, 0.05)


# A layer: an orthogonal matrix that is not linear in its parameters, by Cayley's transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cayley(lipjax.Affine):
    """``(I - A) (I + A)^-1`` for the skew part A of a weight."""

    weight: jax.Array

    def linear(self, a):
        skew, eye = self.weight - self.weight.T, jnp.eye(len(self.weight), dtype=self.weight.dtype)
        return (eye - skew) @ jnp.linalg.solve(eye + skew, a.ravel())

    def known_norm(self, rows, columns):
        return jnp.ones((), self.dtype)


class CayleyModule(nnx.Module):
    """The same as a module of Flax."""

    def __init__(self, size, rngs):
        self.weight = nnx.Param(0.1 * jax.random.normal(rngs.params(), (size, size)))
        self.bias = nnx.Param(jnp.zeros(size))

    def layer(self, shape):
        return Cayley(bias=self.bias[...], in_shape=shape, out_shape=shape, weight=self.weight[...])

    def __call__(self, x):
        return jax.vmap(self.layer(x.shape[1:]))(x)


lipjax.register(CayleyModule, lambda module, value, place: value.affine(module.layer(value.shape)))
lipjax.register(SoftThresholdModule, lambda module, value, place: value.activation(SoftThreshold(0.05)))


def own_network(input_shape, num_classes, *, rngs):
    """An architecture."""
    return nnx.Sequential(
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(int(np.prod(input_shape)), 24, rngs=rngs),
        SoftThresholdModule(),
        CayleyModule(24, rngs),
        nnx.relu,
        nnx.Linear(24, num_classes, rngs=rngs),
    )


def hinge(outcome):
    """A loss: how far the least margin is below 0.3."""
    return jnp.maximum(0.3 - lipjax.worst_margin(outcome.margins, outcome.label), 0)


def small_digits(split):
    """A data set: digits of every second column and row, of three classes."""
    whole = data.load("digits", split)
    kept = whole.labels < 3
    return whole.images[kept][:, ::2, ::2].astype(np.float32) / 16, whole.labels[kept]


ARGUMENTS = [
    f"--config={ROOT / 'configs' / 'digits.py'}",
    f"--config.model.architecture={HERE}:own_network",
    f"--config.method.loss={HERE}:hinge",
    f"--config.data.name={HERE}:small_digits",
    "--config.schedule.epochs=12",
    "--config.schedule.batch_size=50",
    "--config.eps=0.2",
    "--config.eps_train=0.2",
    "--config.certify.limit=0",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    commands.train(commands.Parser(), [*ARGUMENTS, f"--workdir={folder}"])
    return folder


def test_own_parts_train_and_certify_through_the_commands(workdir, tmp_path):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["worst_loss"] < rows[5]["worst_loss"]
    commands.certify(commands.Parser(), [f"--workdir={workdir}", f"--output={tmp_path}", "--no-triage"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dataset"] == f"{HERE}:small_digits"
    assert summary["certified_accuracy"] > 0.5
    assert summary["counts"]["certified_but_attacked"] == 0


def test_the_script_finds_them_where_python_does(tmp_path):
    arguments = [*ARGUMENTS, "--config.schedule.epochs=1", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "config.json").exists()


def test_a_data_set_may_be_a_file(tmp_path):
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = small_digits(split)
    np.savez(tmp_path / "own.npz", **arrays)
    loaded = data.load(str(tmp_path / "own.npz"), "test")
    np.testing.assert_array_equal(loaded.images, small_digits("test")[0])
    assert loaded.num_classes == 3
    arrays.pop("test_labels")
    np.savez(tmp_path / "part.npz", **arrays)
    with pytest.raises(InputError, match=r"part\.npz cannot be read.*test_labels.*give an \.npz with train_images"):
        data.load(str(tmp_path / "part.npz"), "test")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("no_such_module:name", ("no_such_module", "package.module:name")), (f"{HERE}:nothing", ("'nothing'", HERE))],
)
def test_what_is_not_there_is_named(name, parts):
    with pytest.raises(InputError) as caught:
        references.find(name, "method.loss")
    assert all(part in str(caught.value) for part in ("--config.method.loss", *parts))
    with pytest.raises(InputError, match=r"method\.loss"):
        settings.parse([f"--config={ROOT / 'configs' / 'digits.py'}", f"--config.method.loss={name}"])


# What they are


def test_the_layer_is_orthogonal_and_the_activation_has_its_minimum_on_a_grid():
    module = CayleyModule(6, nnx.Rngs(0))
    singular = np.linalg.svd(np.asarray(module.layer((6,)).matrix(), np.float64), compute_uv=False)
    np.testing.assert_allclose(singular, 1, atol=1e-5)
    rng, activation = np.random.default_rng(0), SoftThreshold(0.3)
    for _ in range(200):
        c, g, center = rng.standard_normal(3)
        lower, upper, weight = (
            center - rng.exponential(),
            center + rng.exponential(),
            rng.choice([0.0, rng.exponential()]),
        )
        box = (jnp.asarray([bound], jnp.float32) for bound in (lower, upper, center))
        before = lipjax.Preactivation(*box, jnp.ones(1, bool), jnp.float32(1), jnp.asarray(True))
        slopes = jnp.asarray([c], jnp.float32), jnp.asarray([g], jnp.float32)
        value, z = activation.minimum(*slopes, jnp.float32(weight), before)
        grid = np.linspace(lower, upper, 2001)
        values = c * (grid - np.clip(grid, -0.3, 0.3)) - g * grid + weight / 2 * (grid - center) ** 2
        assert float(value) <= values.min() + 1e-4
        assert float(value) >= values.min() - 1e-2 * (1 + np.abs(values).max())
        assert lower - 1e-5 <= float(z[0]) <= upper + 1e-5


def test_bounds_of_own_parts_contain_samples():
    model = own_network((2, 2, 1), 3, rngs=nnx.Rngs(1))
    network = lipjax.from_flax(model, (2, 2, 1))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 2, 2, 1)), jnp.float32)
    label = jnp.argmax(model(x), axis=1)
    for eps in (0.05, 0.5):
        result = lipjax.certify(network, x, label, eps, key=jax.random.key(0))
        for i in range(2):
            points = oracles.ball_points(np.random.default_rng(i), np.asarray(x[i], np.float64).ravel(), eps, 500)
            logits = np.asarray(model(jnp.asarray(points.reshape(-1, 2, 2, 1), jnp.float32)))
            margins = logits[:, [int(label[i])]] - np.delete(logits, int(label[i]), axis=1)
            assert (margins >= float(result.worst_margin[i]) - 1e-5).all()
            assert float(result.lipschitz[i]) > 0

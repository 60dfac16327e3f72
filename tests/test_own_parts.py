"""Parts of a user, added without editing lipjax: named in configs and options, trained, certified and checked."""

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
from lipjax.certification import stages
from lipjax.errors import InputError
from lipjax.experiments import commands, data, references, settings
from lipjax.networks.pieces import Piece
from lipjax.norms import cohorts
from lipjax.training import methods

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


def halfway(head, region, label):
    """Margins: half of the ball's and half of those of box and ball, lower bounds like both."""
    return (lipjax.pairwise_lipschitz(head, region, label) + lipjax.box_and_ball(head, region, label)) / 2


def own_method(iterations):
    """A method: local norms, halfway margins, and the hinge loss."""
    margins = methods.forward(halfway)
    return methods.Bounded(iterations, local=True, box=True, ball=True, margins=margins, loss=hinge)


@jax.jit
def frobenius_norms(masked, part):
    """Of the masked matrices of some examples."""

    def one(rows, columns):
        kept = rows.ravel()[:, None] & columns.ravel()[None]
        return jnp.sqrt(jnp.sum(jnp.where(kept, masked.layer.matrix(), 0) ** 2)) * (1 + 1e-9)

    return jax.vmap(one)(masked.rows[part], masked.columns[part])


class Frobenius:
    """A solver of norms: at most the Frobenius norm, and more than it by more than rounding is."""

    claim = cohorts.Claim("frobenius", is_bound=True, draws_starts=False)
    batch_size = 8

    def init(self, masked, ceiling):
        return np.full(len(masked), np.inf)

    def advance(self, masked, part, state):
        real = part[part < len(masked)]
        state[real] = np.asarray(frobenius_norms(masked, part))[: len(real)]
        return state

    def enclose(self, masked, state):
        count = len(masked)
        return cohorts.Enclosure(np.full(count, np.nan), state, np.zeros(count, int), np.ones(count, bool))

    def tightened(self, factor):
        return self


def own_solver(delta, rtol):
    """A level."""
    return Frobenius()


class NearMisses(stages.Bounding):
    """A stage that certifies: norms of their own for examples that no stage before has found to be far off."""

    name = "near"

    def asks(self, evidence, triage):
        return evidence.undecided & ((evidence.prediction < 0) | (evidence.worst_margin > -0.1))

    def __call__(self, certifier, evidence, places, batch, round_):
        found = certifier.with_local_norms(batch.x, batch.label, self.radius(batch), batch.index)
        evidence.learn(self.name, places, found)


class RandomPoints(stages.Bounding):
    """A stage that attacks, with one random point of each sphere."""

    name = "random points"
    certifies = False

    def __call__(self, certifier, evidence, places, batch, round_):
        noise = np.random.default_rng(0).standard_normal(batch.x.shape).astype(np.float32)
        noise /= np.linalg.norm(noise.reshape(len(noise), -1), axis=1).reshape(-1, 1, 1, 1)
        logits = certifier.inference(jnp.asarray(batch.x + self.eps * noise))
        wrong = np.argmax(np.asarray(logits), axis=1) != np.asarray(batch.label)
        evidence.refute(self.name, places, wrong[: len(places)])


def small_digits(split):
    """A data set: digits of every second column and row, of three classes."""
    whole = data.load("digits", split)
    kept = whole.labels < 3
    return whole.images[kept][:, ::2, ::2].astype(np.float32) / 16, whole.labels[kept]


ARGUMENTS = [
    f"--config={ROOT / 'configs' / 'digits.py'}:local_gloro",
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
    """A run by the script, which finds the parts in the folder in which it is started, as Python does."""
    folder = tmp_path_factory.mktemp("own") / "run"
    command = [sys.executable, str(ROOT / "train.py"), *ARGUMENTS, f"--workdir={folder}"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_own_parts_are_found_by_the_script_train_and_are_certified(workdir, tmp_path):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["worst_loss"] < rows[5]["worst_loss"]
    commands.certify_command(
        commands.Parser(), [f"--workdir={workdir}", f"--output={tmp_path}", "--no-triage", "--limit=40"]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dataset"] == f"{HERE}:small_digits"
    assert summary["certified_accuracy"] > 0.5
    assert summary["counts"]["certified_but_attacked"] == 0


def test_a_solver_and_stages_are_named_in_options(workdir, tmp_path):
    chosen = f"{HERE}:NearMisses,{HERE}:RandomPoints"
    arguments = [f"--workdir={workdir}", f"--output={tmp_path}", f"--level={HERE}:own_solver", f"--stages={chosen}"]
    commands.certify_command(commands.Parser(), [*arguments, "--eps=0.03"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["level"], summary["claim"]) == ("frobenius", "norms bounded from above")
    assert summary["stages"] == ["near", "random points"]
    assert summary["counts"]["decided"]["near"] > 0
    assert summary["certified_accuracy_after"]["near"] == summary["certified_accuracy"]
    with np.load(tmp_path / "certificates.npz") as file:
        assert set(file["stage"]) <= {"prediction", "near", "random points", "undecided"}


def test_what_a_stage_refutes_is_entered_under_its_name(workdir):
    run, (images, labels) = lipjax.load_run(workdir), small_digits("test")
    dataset = lipjax.Dataset.of(images[:20], labels[:20])
    found = lipjax.evaluate(
        run.network, dataset, 20.0, batch_size=20, level=own_solver, stages=(RandomPoints, "global")
    )
    refuted = found.columns["stage"] == "random points"
    assert refuted.any()
    np.testing.assert_array_equal(refuted, found.columns["attacked"])
    assert found.summary["counts"]["decided"]["random points"] == refuted.sum()
    assert not found.columns["certified"][refuted].any()


class Pretender(Frobenius):
    """A solver that says of itself what it is not."""

    claim = cohorts.Claim("probabilistic", is_bound=True, draws_starts=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": lambda delta, rtol: Pretender()}, "level 'probabilistic' has another claim than this solver"),
        (
            {"level": "own"},
            "level='own' is not known; give one of probabilistic, deterministic, estimate",
        ),
        ({"stages": (lambda eps: dataclasses.replace(NearMisses(eps)), "local", "global")}, "are not in order"),
        ({"stages": (NearMisses, NearMisses)}, "a stage is called 'near'; give it a name of its own"),
    ],
)
def test_levels_and_stages_that_are_none_are_named(options, message):
    network = lipjax.chain(lipjax.dense(jnp.eye(2), jnp.zeros(2), (2,)))
    with pytest.raises(ValueError, match=message):
        lipjax.certify(network, jnp.ones((1, 2)), jnp.zeros(1, int), 0.1, key=jax.random.key(0), **options)


def test_a_method_is_named_in_place_of_one_of_lipjax(tmp_path):
    arguments = [f"--config={ROOT / 'configs' / 'digits.py'}:{HERE}:own_method", f"--workdir={tmp_path / 'run'}"]
    rest = [argument for argument in ARGUMENTS[1:] if "method" not in argument and "epochs" not in argument]
    commands.train_command(commands.Parser(), [*arguments, *rest, "--config.schedule.epochs=2"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["worst_loss"] > 0
    assert lipjax.load_run(tmp_path / "run").config.method.name == f"{HERE}:own_method"
    with pytest.raises(InputError, match=r"method\.norms=local: \S*own_method says that itself; leave it out"):
        settings.parse([arguments[0], "--config.method.norms=local"])


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
        references.find(name, "--config.method.loss")
    assert all(part in str(caught.value) for part in ("--config.method.loss", *parts))
    with pytest.raises(InputError, match=r"method\.loss"):
        settings.parse([f"--config={ROOT / 'configs' / 'digits.py'}", f"--config.method.loss={name}"])


# What they are


def test_the_solver_is_never_below_the_svd():
    rng = np.random.default_rng(0)
    layer = lipjax.dense(jnp.asarray(rng.standard_normal((5, 7)), jnp.float32), jnp.zeros(7), (5,))
    rows, columns = rng.random((20, 7)) < 0.5, rng.random((20, 5)) < 0.5
    with jax.enable_x64(True):
        masked = cohorts.MaskedLayer(jax.tree.map(jnp.float64, layer), jnp.asarray(rows), jnp.asarray(columns), None)
        found = cohorts.norms(Frobenius(), masked)
    matrix = np.asarray(layer.matrix(), np.float64)
    exact = [oracles.spectral_norm(matrix * np.outer(r, c)) for r, c in zip(rows, columns, strict=True)]
    assert np.all(found.sigma >= np.array(exact))


def test_the_layer_is_orthogonal_and_the_activation_has_its_minimum_on_a_grid():
    module = CayleyModule(6, nnx.Rngs(0))
    singular = np.linalg.svd(np.asarray(module.layer((6,)).matrix(), np.float64), compute_uv=False)
    np.testing.assert_allclose(singular, 1, atol=1e-5)
    rng, activation = np.random.default_rng(0), SoftThreshold(0.3)
    minimum = jax.jit(activation.minimum)
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
        value, z = minimum(*slopes, jnp.float32(weight), before)
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

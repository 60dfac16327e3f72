"""Every config with every method: it trains, lowers its loss, goes on after a stop, and certifies.

Shrunk to 8x8 images and a small network. The suite runs some pairs; all of them:
``python -m pytest -n 2 --dist load tests/test_configs.py -m matrix``.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lipjax.errors import InputError
from lipjax.experiments import architectures, certifying, data, defaults, recipe, reports, runs, settings
from lipjax.training import training_step

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")
SOME = [
    ("cifar10_6c2f_maxmin", "local_bcp"),
    ("tiny_imagenet_8c2f", "at"),
    ("cayley_6c2f", "gloro"),
    ("sll_s", "gloro"),
]
AS_THEY_ARE = ("liresnet_s", "sll_s")  # small enough for 8x8 images
PAIRS = [(name, method) for name in CONFIGS for method in defaults.METHODS]
EXAMPLES, EPOCHS = 48, 5


def shrunk(name, method):
    """The config with a small network and a constant radius, so that the loss has one thing to do."""
    config = settings.parse([f"--config={FOLDER / name}.py:{method}"])
    if name not in AS_THEY_ARE:
        config.model.architecture = "mlp"
    config.model.upper_clip, config.model.lower_clip = config.model.upper_clip[:1], config.model.lower_clip[:1]
    config.power_iteration.global_layers = ()
    config.data.crop_padding = min(1, config.data.crop_padding)
    config.data.validation = 8
    config.eps_train = config.eps = 0.05
    config.schedule.epochs, config.schedule.batch_size = EPOCHS, 16
    config.schedule.warmup = config.schedule.ramp = 0.0
    config.schedule.learning_rate = 1e-3
    config.probe.size, config.probe.max_iters, config.checkpoint.every = 2, 20, 1
    return config


def dataset_of(name, seed):
    """Images that a small network can tell apart: one random pattern per class, with noise."""
    channels, classes = data.SPECS[name][0][2], data.SPECS[name][1]
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (classes, 8, 8, channels))
    labels = np.random.default_rng(seed).integers(0, min(classes, 5), EXAMPLES).astype(np.int32)
    noise = np.random.default_rng(seed).normal(0, 20, (EXAMPLES, 8, 8, channels))
    return data.Dataset(np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels, 255, classes)


class StoppedError(Exception):
    pass


def check(name, method, folder, monkeypatch, *, interrupted):
    config = shrunk(name, method)
    for module in (data, certifying):
        monkeypatch.setattr(module, "load", lambda name, split, *_: dataset_of(name, 1 if split == "train" else 2))

    monkeypatch.setattr(data, "spec", lambda name: (dataset_of(name, 1).images.shape[1:], data.SPECS[name][1]))

    def stop(row):
        if row["epoch"] == 2:
            raise StoppedError

    if interrupted:
        monkeypatch.setattr(reports, "print_row", stop)
        with pytest.raises(StoppedError):
            runs.train(config, folder, resume=False)
    monkeypatch.setattr(reports, "print_row", lambda row: None)
    runs.train(config, folder, resume=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    first = next(row for row in rows if row.get("eps") == rows[-1].get("eps"))  # in the mean of epoch 1 eps still grows
    assert rows[-1]["loss"] < first["loss"]
    summary = certifying.certify_run(folder, limit=8, batch_size=8, level="estimate")
    assert summary["method"] == method
    assert 0 <= summary["certified_accuracy"] <= summary["pgd_accuracy"] <= summary["clean_accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), SOME)
def test_a_config_trains_resumes_and_certifies(name, method, tmp_path, monkeypatch):
    check(name, method, tmp_path / "run", monkeypatch, interrupted=method == "at")


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_every_config_has_every_method(name, method, tmp_path, monkeypatch):
    check(name, method, tmp_path / "run", monkeypatch, interrupted=True)
    jax.clear_caches()  # a process with the programs of some forty runs crashes inside of jaxlib


@pytest.mark.parametrize("method", defaults.METHODS)
def test_a_config_with_sparsity_can_take_a_step_with_every_method(method):
    config = settings.parse([f"--config={FOLDER / 'tiny_imagenet_8c2f.py'}:{method}"])
    assert config.sparsity.weight == (0.01 if method.startswith("local") else 0)
    objective, mlp = recipe.objective_of(config), oracles.network_of((8,), [6, 6], "clipped", seed=0)
    vectors = jax.eval_shape(training_step.initial_vectors, objective.layers(mlp), jax.random.key(0))
    kept = tuple(
        jax.ShapeDtypeStruct((2, *vectors[place].shape), vectors[place].dtype) for place in objective.kept(mlp)
    )
    x, label = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32)
    rule = objective.rule(mlp)
    loss, *_ = jax.eval_shape(objective, mlp, x, label, 0.1, 0.5, kept, vectors, jax.random.key(0), rule)
    assert loss.shape == (2,)


def test_the_sparsity_loss_is_refused_without_bounds_of_neurons():
    with pytest.raises(InputError, match=r"sparsity.weight=0.1 needs bounds of each neuron, which method gloro"):
        settings.parse([f"--config={FOLDER / 'digits.py'}:gloro", "--config.sparsity.weight=0.1"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_to_run_it_and_what_to_expect(name):
    text = (FOLDER / f"{name}.py").read_text()
    for word in ("Command:", f"python train.py --config configs/{name}.py", "Hardware:", "Expected:"):
        assert word in text
    config = settings.parse([f"--config={FOLDER / name}.py"])
    activated = architectures.num_activations(config.model.architecture)
    assert len(config.model.upper_clip) == len(config.model.lower_clip)
    assert len(config.model.upper_clip) in (1, activated)


# The paper's Table 3: method, network, activation, eps_train, learning rates, batch, epochs at the end of warm-up, ramp
# constant learning rate and run, iterations, sparsity weights
TABLE_3 = {
    "mnist_4c3f": ("local_gloro", "4c3f", "clipped_relu", 1.58, 1e-3, 5e-6, 256, (0, 150, 150, 300), 5, 0.0, 1.0),
    "cifar10_4c3f": ("local_bcp", "4c3f", "clipped_relu", 0.1551, 1e-3, 1e-6, 256, (20, 400, 400, 800), 2, 0.0, 1.0),
    "cifar10_6c2f": ("local_bcp", "6c2f", "clipped_relu", 0.1551, 1e-3, 1e-6, 256, (20, 400, 400, 800), 2, 0.0, 1.0),
    "cifar10_6c2f_maxmin": (
        *("local_bcp", "6c2f", "clipped_maxmin", 0.1551, 1e-3, 1e-6, 256, (20, 400, 400, 800), 2, 0.0, 1.0),
    ),
    "tiny_imagenet_8c2f": (
        *("local_bcp", "8c2f", "clipped_relu", 0.16, 2.5e-4, 5e-7, 128, (0, 125, 150, 250), 1, 0.01, 0.1),
    ),
    "tiny_imagenet_8c2f_maxmin": (
        *("local_bcp", "8c2f", "clipped_maxmin", 0.16, 1e-4, 5e-7, 128, (0, 125, 150, 250), 3, 0.01, 1.0),
    ),
}


# What a config trains without a method: the paper's, or what certified more (results/methods)
DEFAULTS = {
    "digits": ("dual", "crm"),
    "mnist_4c3f": ("dual", "la"),
    "cifar10_6c2f": ("local_bcp", "cross_entropy"),
    "cayley_6c2f": ("gloro", "gloro"),
    "liresnet_s": ("gloro", "emma"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_may_have_a_loss_of_its_own(name):
    method, loss = DEFAULTS[name]
    for suffix, expected in (("", loss), (f":{method}", defaults.METHODS[method]["loss"])):
        found = settings.parse([f"--config={FOLDER / name}.py{suffix}"]).method
        assert (found.name, found.loss) == (method, expected)
    assert settings.parse([f"--config={FOLDER / name}.py:local_bcp"]).method.margins == "box_and_ball"


@pytest.mark.parametrize("name", TABLE_3)
def test_configs_hold_the_numbers_of_table_3(name):
    config = settings.parse([f"--config={FOLDER / name}.py:{TABLE_3[name][0]}"])
    plan = config.schedule
    epochs = tuple(round(plan.epochs * part, 6) for part in (plan.warmup, plan.ramp, plan.constant, 1))
    found = (
        *(config.method.name, config.model.architecture, config.model.activation, config.eps_train),
        *(plan.learning_rate, plan.learning_rate_end, plan.batch_size, epochs),
        *(config.power_iteration.num_iters, config.sparsity.weight, config.sparsity.weight_theta),
    )
    assert found == TABLE_3[name]
    assert config.eps == (1.58 if name == "mnist_4c3f" else 36 / 255)  # and not 0.141
    assert config.data.crop_padding == (0 if name == "mnist_4c3f" else 4)
    assert (config.data.validation, config.seed) == (5000, 0)
    assert config.model.theta == (2.0 if name == "cifar10_6c2f" else 1.0)

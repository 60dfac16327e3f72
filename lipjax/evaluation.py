"""Evaluation: clean, PGD and certified accuracy on a data set, example by example, and of a whole run, in files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lipjax import bounds, reports, runs, settings
from lipjax.attacks import pgd
from lipjax.certificates import Certificate, certificate
from lipjax.data import Dataset, load
from lipjax.errors import InputError
from lipjax.networks import Network, from_flax
from lipjax.regions import l2_ball

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation.

    Attributes:
        columns: per example: index, label, prediction, worst_margin, lipschitz, certified, attacked.
        summary: the figures of the whole, ready for JSON.
    """

    columns: Columns
    summary: dict[str, Any]


def evaluate(network: Network, dataset: Dataset, eps: float, *, batch_size: int, seed: int = 0) -> Evaluation:
    """Attack and certify every example.

    The result of an example depends on its place in the data set and on the seed alone, not on the batch size.

    Args:
        network: the classifier.
        dataset: the examples.
        eps: l2 radius, in [0, 1] pixels.
        batch_size: examples per call.
        seed: of the starts of attacks and norms.

    Returns:
        Columns and summary, at level ``estimate``. ``attacked`` means that PGD found a wrong prediction in the ball.
    """
    norm_key, attack_key = jax.random.split(jax.random.key(seed))
    norm = bounds.Estimate(norm_key)
    batch_size = min(batch_size, len(dataset))
    started = time.perf_counter()
    sigmas, _ = jax.jit(bounds.global_norms)(network, norm)
    bound = jax.jit(_bound)
    found = _in_batches(
        lambda x, label, index: bound(network, x, label, eps, norm, sigmas), dataset, batch_size, "bounds"
    )
    bounded = time.perf_counter()
    attack = jax.jit(_attack)
    attacked = _in_batches(
        lambda x, label, index: {"attacked": attack(network, x, label, eps, attack_key, index)},
        dataset,
        batch_size,
        "attack",
    )["attacked"]
    finished = time.perf_counter()
    correct = found["prediction"] == dataset.labels
    columns = {
        "index": np.arange(len(dataset)),
        "label": dataset.labels,
        **{name: found[name] for name in ("prediction", "worst_margin", "lipschitz", "certified")},
        "attacked": attacked,
    }
    lipschitz = float(np.prod(np.asarray(sigmas, np.float64)))
    counts = {
        "examples": len(dataset),
        "correct": int(correct.sum()),
        "correct_after_pgd": int((correct & ~attacked).sum()),
        "certified": int(found["certified"].sum()),
        "certified_with_global_norms": int(found["certified_globally"].sum()),
        "certified_but_attacked": int((found["certified"] & attacked).sum()),
    }
    summary = {
        "clean_accuracy": counts["correct"] / len(dataset),
        "pgd_accuracy": counts["correct_after_pgd"] / len(dataset),
        "certified_accuracy": counts["certified"] / len(dataset),
        "certified_accuracy_with_global_norms": counts["certified_with_global_norms"] / len(dataset),
        "eps": eps,
        "level": norm.level,
        "norms": f"power iteration per example until the vector moves by <= {norm.tol:g}, at most {norm.max_iters}",
        "counts": counts,
        "global_lipschitz": lipschitz,
        "mean_local_lipschitz": float(found["lipschitz"].mean()),
        "mean_local_to_global_ratio": float((found["lipschitz"] / lipschitz).mean()) if lipschitz > 0 else 1.0,
        "live_share": [float(share) for share in found["live"].mean(axis=0)],
        "power_iterations": [float(mean) for mean in found["num_iters"].mean(axis=0)],
        "seconds": {"bounds": round(bounded - started, 2), "attack": round(finished - bounded, 2)},
    }
    return Evaluation(columns, summary)


def certify(
    workdir: pathlib.Path,
    *,
    eps: float | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    which: str = "best",
    output: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Certify a trained model of a run, print the table and write certificates and summary.

    Args:
        workdir: the run's folder.
        eps: l2 radius; default the config's.
        split: ``"test"`` or ``"train"``.
        limit: only the first so many examples.
        batch_size: examples per call; default the config's.
        which: ``"best"`` or ``"last"`` checkpoint.
        output: folder of the files; default the run's.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        InputError: no run, no checkpoint, no data or a value that cannot be used.
    """
    config = settings.load(workdir)
    eps = float(config.eps if eps is None else eps)
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"--eps={eps} cannot be used; give a finite number more than 0, in [0, 1] pixels")
    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} cannot be used; give at least 1")
    dataset = load(config.data.name, split, config.data.dir, config.data.cache)
    model, facts = runs.restore_model(workdir, config, dataset, which)
    network = from_flax(model, dataset.images.shape[1:])
    chosen = dataset.take(slice(limit))
    found = evaluate(network, chosen, eps, batch_size=batch_size or config.certify.batch_size, seed=config.seed)
    summary = {
        "dataset": config.data.name,
        "split": split,
        **found.summary,
        "checkpoint": facts["checkpoint"],
        "checkpoint_step": facts["step"],
        "checkpoint_epoch": facts["epoch"],
        "params_sha256": facts["params_sha256"],
        "method": config.method.name,
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    reports.write_certificates(output or workdir, found.columns, summary)
    reports.print_table(summary)
    return summary


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("lipjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _bound(
    network: Network, x: Array, label: Array, eps: float, norm: bounds.Estimate, sigmas: Array
) -> dict[str, Array]:
    """Certificates of a batch with local norms, and whether global norms certify the same."""

    def one(x: Array, label: Array) -> tuple[Certificate, Certificate, bounds.Bounds]:
        region = l2_ball(x, eps)
        local = bounds.propagate(network, region, norm)
        shared = bounds.propagate(network, region, bounds.Given(sigmas))
        return certificate(network, local, label, norm.level), certificate(network, shared, label, norm.level), local

    local, shared, found = jax.vmap(one)(x, label)
    return {
        "prediction": local.prediction,
        "worst_margin": local.worst_margin,
        "lipschitz": local.lipschitz,
        "certified": local.certified,
        "certified_globally": shared.certified,
        "live": jnp.stack([jnp.mean(live.reshape(live.shape[0], -1), axis=1) for live in found.live], axis=1),
        "num_iters": jnp.stack(found.norm_results, axis=1),
    }


def _attack(network: Network, x: Array, label: Array, eps: float, key: Array, index: Array) -> Array:
    """Whether PGD finds a wrong prediction, for each example of a batch; its start comes from its own index."""
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(index)
    return jnp.argmax(network(pgd(network, x, label, eps, keys)), axis=1) != label


def _in_batches(
    function: Callable[[Array, Array, Array], dict[str, Array]], dataset: Dataset, batch_size: int, name: str
) -> Columns:
    """Apply a function of a batch to the whole data set; the short last batch is padded, and cut off again."""
    parts: list[dict[str, np.ndarray]] = []
    with tqdm(total=len(dataset), desc=name, unit=" images", disable=None, leave=False) as bar:
        for places in _places(len(dataset), batch_size):
            padded = np.resize(places, batch_size)
            x = dataset.images[padded].astype(np.float32) / dataset.scale
            result = function(jnp.asarray(x), jnp.asarray(dataset.labels[padded]), jnp.asarray(padded))
            parts.append({key: np.asarray(value)[: len(places)] for key, value in result.items()})
            bar.update(len(places))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _places(num_examples: int, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, num_examples, batch_size):
        yield np.arange(start, min(start + batch_size, num_examples))

"""Certification of a run, or of a model of somebody else: to a table, certificates and a summary in files."""

from __future__ import annotations

import importlib.metadata
import math
import pathlib
import platform
from typing import Any

import jax

from lipjax.certification.records import FORMAT, fingerprint, save_certificates
from lipjax.errors import InputError
from lipjax.experiments import figures, references, reports, settings
from lipjax.experiments.data import Dataset, any_file, from_file, load
from lipjax.experiments.evaluation import evaluate
from lipjax.experiments.models import load_model
from lipjax.experiments.trained import load_run
from lipjax.networks.graph import Network

PROGRESS = "certification.partial.npz"  # what is known of one that is under way


def certify_run(
    workdir: str | pathlib.Path,
    *,
    eps: float | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    which: str = "best",
    output: str | pathlib.Path | None = None,
    file: pathlib.Path | None = None,
    seed: int | None = None,
    resume: bool = False,
    **options: Any,
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
        file: certify the images of this ``.npz`` in place of a split; see :func:`lipjax.experiments.data.from_file`.
        seed: of the starts of norms and attacks; default the config's.
        resume: go on with a certification of the same options into the same folder that was killed.
        **options: ``level``, ``delta``, ``rtol``, ``stages``, ``dual_steps``, ``domain``, ``triage`` and ``radius`` as
            of :func:`lipjax.evaluate`.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        InputError: no run, no checkpoint, no data or a value that cannot be used.
    """
    workdir = pathlib.Path(workdir)
    config = settings.load(workdir)
    eps = float(config.eps if eps is None else eps)
    _check(eps, limit, batch_size)
    if file is None:
        dataset = load(config.data.name, split, config.data.dir, config.data.cache)
    else:
        dataset = from_file(file, config.data.name)
    run = load_run(workdir, which)
    origin = {
        "dataset": config.data.name if file is None else file.name,
        "split": split if file is None else "file",
        "checkpoint": run.checkpoint["checkpoint"],
        "checkpoint_step": run.checkpoint["step"],
        "checkpoint_epoch": run.checkpoint["epoch"],
        "params_sha256": run.checkpoint["params_sha256"],
        "method": config.method.name,
    }
    options |= {"rule": run.rule, "batch_size": batch_size or config.certify.batch_size}
    options["seed"] = config.seed if seed is None else seed
    return _certify(run.network, dataset, eps, limit, pathlib.Path(output or workdir), resume, origin, options)


def certify_model(
    model: str,
    weights: str | pathlib.Path,
    file: str | pathlib.Path,
    *,
    eps: float,
    output: str | pathlib.Path,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Certify a trained model of somebody else, print the table and write certificates and summary.

    Args:
        model: ``package.module:build``; see :func:`lipjax.experiments.models.load_model`.
        weights: an ``.npz`` of arrays, or a folder that Orbax has written.
        file: an ``.npz`` with ``images`` (n, ...), uint8 or floating-point in [0, 1], and ``labels`` (n,).
        eps: l2 radius, in [0, 1] pixels.
        output: folder of the files.
        limit, batch_size, seed, resume, **options: as of :func:`certify_run`; 250 examples per call by default.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        InputError: a model, weights, images or a value that cannot be used.
    """
    _check(eps, limit, batch_size)
    if not references.is_reference(model):
        raise InputError(f"--model={model} names no function; give package.module:build")
    images = any_file(pathlib.Path(file))
    network, sha256 = load_model(references.find(model, "--model"), weights, images.images.shape[1:])
    if network.num_classes < images.num_classes:
        raise InputError(
            f"--data={file}: labels reach to {images.num_classes - 1}, but the model has {network.num_classes} classes"
        )
    origin = {
        "dataset": pathlib.Path(file).name,
        "split": "file",
        "model": model,
        "weights": pathlib.Path(weights).name,
        "params_sha256": sha256,
    }
    options |= {"seed": seed, "batch_size": batch_size or 250}
    return _certify(network, images, eps, limit, pathlib.Path(output), resume, origin, options)


def _check(eps: float, limit: int | None, batch_size: int | None) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"--eps={eps} cannot be used; give a finite number more than 0, in [0, 1] pixels")
    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} cannot be used; give at least 1")


def _certify(
    network: Network,
    dataset: Dataset,
    eps: float,
    limit: int | None,
    folder: pathlib.Path,
    resume: bool,
    origin: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Certify a network, with where it is from, and write what is found."""
    chosen = dataset.take(slice(limit))
    progress = folder / PROGRESS
    if not resume:
        progress.unlink(missing_ok=True)
    try:
        found = evaluate(network, chosen, eps, progress=progress, **options)
    except ValueError as error:
        raise InputError(str(error)) from None
    summary = {
        **origin,
        "split_size": len(dataset),
        **found.summary,
        "network_sha256": fingerprint(network),
        "format": FORMAT,
        "seed": options["seed"],
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    save_certificates(folder, found.columns, summary)
    reports.print_table(summary)
    figures.write_report(folder, found, chosen, summary)
    progress.unlink(missing_ok=True)
    return summary


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("lipjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}

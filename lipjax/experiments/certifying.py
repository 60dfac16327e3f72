"""Certification of a run: from its folder to a table, certificates and a summary in files."""

from __future__ import annotations

import importlib.metadata
import math
import pathlib
import platform
from typing import Any

import jax

from lipjax.certification.records import FORMAT, fingerprint, save_certificates
from lipjax.errors import InputError
from lipjax.experiments import figures, reports, settings
from lipjax.experiments.data import from_file, load
from lipjax.experiments.evaluation import evaluate
from lipjax.experiments.trained import load_run

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
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"--eps={eps} cannot be used; give a finite number more than 0, in [0, 1] pixels")
    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} cannot be used; give at least 1")
    if file is None:
        dataset = load(config.data.name, split, config.data.dir, config.data.cache)
    else:
        dataset = from_file(file, config.data.name)
    run = load_run(workdir, which)
    chosen = dataset.take(slice(limit))
    seed = config.seed if seed is None else seed
    size = batch_size or config.certify.batch_size
    folder = pathlib.Path(output or workdir)
    progress = folder / PROGRESS
    if not resume:
        progress.unlink(missing_ok=True)
    try:
        found = evaluate(
            *(run.network, chosen, eps),
            batch_size=size,
            seed=seed,
            rule=run.rule,
            progress=progress,
            **options,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    summary = {
        "dataset": config.data.name if file is None else file.name,
        "split": split if file is None else "file",
        "split_size": len(dataset),
        **found.summary,
        "checkpoint": run.checkpoint["checkpoint"],
        "checkpoint_step": run.checkpoint["step"],
        "checkpoint_epoch": run.checkpoint["epoch"],
        "params_sha256": run.checkpoint["params_sha256"],
        "network_sha256": fingerprint(run.network),
        "format": FORMAT,
        "method": config.method.name,
        "seed": seed,
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

"""Compare trained runs: certified accuracy against eps, stage by stage, and against the time that training took.

Each run is certified again with the radius of each image, by the stages up to each one that bounds. The curve over time
is that of the validation split in the log, by the bound that the run trains through, whose norms are estimates.

Usage:
  python -m benchmarks.twins --run "dual=RUN" --run "Lipschitz=RUN" [--limit 500] [--output results/twins]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipjax.certification.stages import BOUNDING
from lipjax.experiments.certifying import certify_run
from lipjax.experiments.reports import read_rows

STYLES = (":", "--", "-")  # of the curves of the stages
SCORE = "validation_certified_accuracy"


def main(arguments: list[str] | None = None) -> None:
    """Certify and write ``radii.json``, ``radii.png`` and ``time.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="a trained run")
    parser.add_argument("--limit", type=int, default=500, help="test images; default: 500")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/twins"), help="folder")
    options = parser.parse_args(arguments)
    runs = {name: pathlib.Path(folder) for name, _, folder in (text.partition("=") for text in options.run)}
    options.output.mkdir(parents=True, exist_ok=True)
    found = {
        f"{name}, {stage}": curve(folder, BOUNDING[:count], options.limit)
        for name, folder in runs.items()
        for count, stage in enumerate(BOUNDING, 1)
    }
    (options.output / "radii.json").write_text(json.dumps(found, indent=2) + "\n")
    plot_radii(options.output / "radii.png", found, list(runs))
    plot_time(options.output / "time.png", runs)


def curve(folder: pathlib.Path, stages: tuple[str, ...], limit: int) -> dict[str, Any]:
    """Certified accuracy against eps by some stages; the certificates themselves are not kept."""
    with tempfile.TemporaryDirectory() as output:
        summary = certify_run(folder, limit=limit, stages=stages, radius=True, output=pathlib.Path(output))
    keys = ("certified_accuracy", "certified_accuracy_at", "median_radius", "level", "delta", "domain", "method")
    return {"images": summary["counts"]["examples"], "eps": summary["eps"], **{key: summary[key] for key in keys}}


def plot_radii(path: pathlib.Path, found: dict[str, Any], runs: list[str]) -> None:
    """One curve per run and stage."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for color, run in enumerate(runs):
        for stage, style in zip(BOUNDING, STYLES, strict=True):
            eps, accuracy = np.transpose(found[f"{run}, {stage}"]["certified_accuracy_at"])
            panel.plot(eps, accuracy, style, color=f"C{color}", label=f"{run}, up to stage {stage}")
    panel.axvline(found[f"{runs[0]}, {BOUNDING[-1]}"]["eps"], color="0.7", linewidth=0.8)
    panel.set(xlabel="eps", ylabel="certified accuracy", ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def plot_time(path: pathlib.Path, runs: dict[str, pathlib.Path]) -> None:
    """Certified accuracy of the validation split after each epoch, against the time of as many epochs like the fastest.

    What an epoch took beside other work on the machine is not what it takes.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for run, folder in runs.items():
        rows = read_rows(folder, before=sys.maxsize)
        seconds = np.arange(1, len(rows) + 1) * min(row["training_seconds"] for row in rows)
        panel.plot(seconds, [row[SCORE] for row in rows], marker=".", label=run)
    panel.set(xlabel="seconds of training", ylabel="certified on the validation split (estimate)", ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()

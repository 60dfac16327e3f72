"""Reports: the log of a run, and tables for the terminal."""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

from lipjax.files import replace_text

Row = dict[str, Any]
# What a domain is, said wherever it is printed.
DOMAIN_WORDS = {"ball": "on the whole l2 ball", "pixels": "on the l2 ball within the pixel range [0, 1]"}


def read_rows(workdir: pathlib.Path, before: int) -> list[Row]:
    """The rows of the log up to an epoch, in order; a line cut off by a kill is dropped."""
    path = workdir / "metrics.jsonl"
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["epoch"] <= before:
            rows.append(row)
    return rows


def write_rows(workdir: pathlib.Path, rows: list[Row]) -> None:
    """Write the log, ``metrics.jsonl`` and ``metrics.csv``, one row per epoch."""
    replace_text(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with (workdir / "metrics.csv.partial").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    (workdir / "metrics.csv.partial").replace(workdir / "metrics.csv")


def print_row(row: Row) -> None:
    """One line about one epoch."""
    line = f"epoch {row['epoch']:4d}  {short(row)}"
    if "validation_clean_accuracy" in row:
        scores = [row[key] for key in row if key.startswith("validation_") and key.endswith("_accuracy")]
        line += f"  validation {'/'.join(f'{score:.3f}' for score in scores)}"
    if "probe_lipschitz_ratio" in row:
        line += f"  estimate/converged {row['probe_lipschitz_ratio']:.3f}"
    print(f"{line}  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s", flush=True)


def short(row: Row) -> str:
    """The numbers to watch, as in the progress bar."""
    parts = [f"loss {row['loss']:.3f}"]
    names = {"clean": "clean_accuracy", "attacked": "pgd_accuracy", "certified": "certified_accuracy"}
    parts += [f"{name} {row[key]:.3f}" for name, key in names.items() if key in row]
    parts.append(f"eps {row.get('eps', 0.0):.3g}")
    constants = [f"{row[key]:.3g}" for key in ("local_lipschitz", "global_lipschitz") if key in row]
    parts.append(f"lipschitz {'/'.join(constants)}")
    if live := [f"{100 * row[key]:.0f}" for key in row if key.startswith("live_")]:
        parts.append(f"live% {' '.join(live)}")
    return "  ".join(parts)


def _origin(summary: dict[str, Any]) -> str:
    """Where the weights are from."""
    if "checkpoint" in summary:
        return f"checkpoint {summary['checkpoint']} of epoch {summary['checkpoint_epoch']}"
    return f"{summary['model']} with {summary['weights']}"


def print_table(summary: Row) -> None:
    """The accuracies of an evaluation, with what they rest on."""
    domain = DOMAIN_WORDS[summary["domain"]]
    counts = summary["counts"]
    claim = f"level {summary['level']}: {summary['claim']}"
    rows = [
        ("clean", summary["clean_accuracy"], counts["correct"], ""),
        ("PGD", summary["pgd_accuracy"], counts["correct_after_pgd"], "l2, 100 steps, cut to [0, 1], the paper's"),
        ("attack", summary["attack_accuracy"], counts["correct_after_attack"], f"that or the stronger, {domain}"),
        ("certified", summary["certified_accuracy"], counts["certified"], claim),
    ]
    data = f"{summary['dataset']} {summary['split']}, {counts['examples']} images"
    print(f"\n{data}, eps {summary['eps']:.6g}, {domain}, {_origin(summary)}")
    print(f"{'accuracy':<12}{'fraction':>10}{'images':>10}   remark")
    for name, fraction, images, remark in rows:
        if fraction is None:
            continue  # it was not asked for
        print(f"{name:<12}{fraction:>10.4f}{images:>10}   {remark}")
    local = f"local {summary['mean_local_lipschitz']:.4g} on average, " if "mean_local_lipschitz" in summary else ""
    print(f"Lipschitz constant of the feature map: {local}global {summary['global_lipschitz']:.4g}")
    if "median_radius" in summary:
        print(f"certified radius: median {summary['median_radius']:.4g}, 0 for what is wrong")
    print(f"images by the stage that decided: {by_stage(summary)}")
    cost = summary["cost_per_image"]
    print(
        f"cost per image: {cost['products']:.0f} products, {cost['dual_steps']:.0f} dual steps, {cost['seconds']:.2f} s"
    )
    verdict = "is no proof" if not summary["is_bound"] else "is a bound: this is a bug, please report it"
    for attacked, what in (
        (counts["certified_but_attacked"], "count as certified, but an attack broke them"),
        (summary.get("radii_but_attacked"), "were broken by PGD inside of their certified radii"),
    ):
        if attacked:
            print(f"WARNING: {attacked} examples {what}: level {summary['level']} {verdict}")


def by_stage(summary: Row) -> str:
    """How many images each stage that was asked for has decided, in words."""
    words, asked = {"prediction": "wrong prediction"}, ("prediction", *summary["stages"], "undecided")
    decided = summary["counts"]["decided"].items()
    return ", ".join(f"{words.get(stage, stage)} {number}" for stage, number in decided if number or stage in asked)

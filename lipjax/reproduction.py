"""Reproduction: train and certify what a table or figure of the paper needs, and set it beside the paper's numbers."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import json
import pathlib
import shutil
import statistics
import sys
from typing import Any

from lipjax import certification, figures, published, reports, runs, settings
from lipjax.errors import InputError
from lipjax.published import Cell, Row, Table


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the paper is run, and where.

    Attributes:
        workdir: folder of the runs and of what is written.
        configs: folder of the configs.
        scale: fraction of the epochs.
        seeds: runs per cell; None for the table's own.
        limit: test images that are certified; None for all.
        only: pattern of names of cells that may be run; others are shown where they are finished.
        overrides: entries of the config for every run.
    """

    workdir: pathlib.Path
    configs: pathlib.Path
    scale: float = 1.0
    seeds: int | None = None
    limit: int | None = None
    only: str = "*"
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measured:
    """A finished run of a cell.

    Attributes:
        folder: of the run.
        summary: of its certification.
        rows: its log.
        config: its config.
    """

    folder: pathlib.Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    config: settings.Config

    def value(self, quantity: str) -> float | None:
        """A quantity of a table, in the units that the paper prints."""
        if quantity == "seconds":
            return statistics.median(row["seconds"] for row in self.rows)
        key, factor = {
            "clean": ("clean_accuracy", 100),
            "PGD": ("pgd_accuracy", 100),
            "certified": ("certified_accuracy", 100),
            "global Lipschitz bound": ("global_lipschitz", 1),
            "local Lipschitz bound": ("mean_local_lipschitz", 1),
        }[quantity]
        return factor * self.summary[key] if key in self.summary else None


def table(name: str, options: Options) -> pathlib.Path:
    """Run the cells of a table that are missing, and write the table after each of them.

    Returns:
        The Markdown file; a CSV file of the same name lies beside it.

    Raises:
        InputError: there is no such table.
    """
    chosen = _named(name, published.TABLES)
    seeds = options.seeds or chosen.seeds
    path, problems = _write(name, chosen, options, seeds, {}), {}
    for row in chosen.rows:
        for seed in range(seeds) if row.cell else ():
            if row.cell and fnmatch.fnmatch(row.cell.name, options.only):
                _finish(row.cell, seed, options, problems)
                path = _write(name, chosen, options, seeds, problems)
    return path


def figure(name: str, options: Options) -> pathlib.Path:
    """Run what a figure needs where it is missing, and draw it.

    Raises:
        InputError: there is no such figure, or a run of it could not be made.
    """
    title = _named(name, published.FIGURES)
    needed = published.FIGURE_CELLS if name == "figure2" else {"Local-Lip-B": published.FIGURE_CELLS["Local-Lip-B"]}
    found = {}
    for label, cell in needed.items():
        problems: dict[str, str] = {}
        _finish(cell, 0, options, problems)
        measured = _measured(cell, 0, options)
        if measured is None:
            raise InputError(f"{name}: the run {cell.name} could not be made: {', '.join(problems.values())}")
        found[label] = measured
    local = found["Local-Lip-B"]
    path = options.workdir / f"{name}.png"
    curves = {label: measured.rows for label, measured in found.items()}
    if name == "figure2":
        figures.plot_training(path, title, curves, {"Lipschitz constant": "lipschitz", "loss": "loss"})
    elif name in ("figure6", "figure7"):
        figures.plot_layers(path, title, local.rows, "live" if name == "figure6" else "sigma")
    elif name == "figure3":
        figures.plot_bars(path, title, {"ours": local.summary["live_share"]}, "share of varying neurons")
    else:
        _plot_iterations(name, title, local, options)
    return path


def _plot_iterations(name: str, title: str, run: Measured, options: Options) -> None:
    """Figures 4 and 5 are about power iteration: the run is certified again at level estimate."""
    folder, path = run.folder / "estimate", options.workdir / f"{name}.png"
    summary = _summary(folder)
    if summary is None or "products_per_norm" not in summary:
        limit = min(options.limit or 1000, 1000)
        summary = certification.certify(run.folder, limit=limit, level="estimate", triage=False, output=folder)
    if name == "figure5":
        shutil.copy(folder / "report_products.png", path)
        return
    means = [products / 2 for products in summary["products_per_norm"]]
    bars = {"ours": means, "paper, 6C2F": published.ITERATIONS_TO_CONVERGENCE}
    figures.plot_bars(path, title, bars, "power iterations")


def _named(name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(f"{name!r} is unknown; give one of {', '.join([*published.TABLES, *published.FIGURES])}")
    return known[name]


def _folder(cell: Cell, seed: int, options: Options) -> pathlib.Path:
    return options.workdir / f"{cell.name}-seed{seed}"


def _config(cell: Cell, seed: int, options: Options) -> settings.Config:
    overrides = {**cell.overrides, "seed": seed}
    arguments = [f"--config={options.configs / cell.config}.py:{cell.method}"]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    config = settings.parse([*arguments, *options.overrides])
    config.schedule.epochs = max(1, round(options.scale * config.schedule.epochs))
    return config


def _finish(cell: Cell, seed: int, options: Options, problems: dict[str, str]) -> None:
    """Train and certify a cell, or what is left of it; what cannot be used is printed and kept in ``problems``."""
    folder = _folder(cell, seed, options)
    if _measured(cell, seed, options) is not None:
        return
    print(f"\n== {folder.name}", flush=True)
    try:
        runs.train(_config(cell, seed, options), folder, resume=True)
        certification.certify(folder, limit=options.limit)
    except InputError as error:
        problems[folder.name] = str(error)
        print(f"{folder.name}: {error}", file=sys.stderr, flush=True)


def _measured(cell: Cell, seed: int, options: Options) -> Measured | None:
    """The run of a cell, if it is finished at this scale and as many images are certified as are asked for."""
    folder = _folder(cell, seed, options)
    summary = _summary(folder)
    if summary is None:
        return None
    config, rows = settings.load(folder), reports.read_rows(folder, before=sys.maxsize)
    epochs = _config(cell, seed, options).schedule.epochs
    enough = options.limit is None or summary["counts"]["examples"] >= options.limit
    whole = len(rows) == config.schedule.epochs == epochs
    return Measured(folder, summary, rows, config) if whole and enough else None


def _summary(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write(name: str, chosen: Table, options: Options, seeds: int, problems: dict[str, str]) -> pathlib.Path:
    """The table as Markdown and CSV, with what is finished so far."""
    head = ["setting", "method"]
    for quantity in chosen.quantities:
        head += [f"{quantity}, paper", f"{quantity}, ours", f"{quantity}, difference"]
    lines = [[*head, "epochs", "seeds", "test images", "device", "remark"]]
    lines += [_line(row, chosen, options, seeds, problems) for row in chosen.rows]
    options.workdir.mkdir(parents=True, exist_ok=True)
    with (options.workdir / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    marks = ["|".join(["", *cells, ""]) for cells in [lines[0], ["---"] * len(lines[0]), *lines[1:]]]
    text = [
        f"# {chosen.title}",
        "",
        f"Accuracies in percent; {options.scale:g} of the paper's epochs. Our certificates are true bounds (level",
        "probabilistic), the paper's rest on estimates from below. Empty: the paper has no such value, or it is not",
        "known to us, or the run is not made.",
        "",
        *marks,
    ]
    path = options.workdir / f"{name}.md"
    reports.replace_text(path, "\n".join(text) + "\n")
    return path


def _line(row: Row, chosen: Table, options: Options, seeds: int, problems: dict[str, str]) -> list[str]:
    found, remark = [], ""
    if row.cell is None:
        remark = "method not in lipjax"
    else:
        found = [one for seed in range(seeds) if (one := _measured(row.cell, seed, options)) is not None]
        named = [problem for seed in range(seeds) if (problem := problems.get(_folder(row.cell, seed, options).name))]
        remark = named[0] if named else "" if len(found) == seeds else "not run" if not found else "seeds are missing"
    line = [row.setting, row.method]
    for place, quantity in enumerate(chosen.quantities):
        values = [value for one in found if (value := one.value(quantity)) is not None]
        theirs, ours = row.paper[place], statistics.mean(values) if values else None
        difference = "" if theirs is None or ours is None else f"{ours - theirs:+.4g}"
        spread = statistics.stdev(values) if len(values) > 1 else None
        line += [_number(theirs, row.deviation[place] if row.deviation else None), _number(ours, spread), difference]
    if not found:
        return [*line, "", "", "", "", remark]
    one = found[0]
    images = f"{one.summary['counts']['examples']} of {one.summary['dataset']}"
    return [*line, str(len(one.rows)), str(len(found)), images, one.summary["device"], remark]


def _number(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if deviation is None else f"{value:.4g} +- {deviation:.2g}"

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

from lipjax.errors import InputError
from lipjax.experiments import certifying, figures, reports, runs, settings
from lipjax.files import replace_text
from reproduction import published
from reproduction.published import Asked, Cell, Row, Table

SAMPLE = 1000  # images


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the paper is run, and where.

    Attributes:
        workdir: folder of the runs and of what is written.
        configs: folder of the configs.
        scale: fraction of the epochs.
        seeds: runs per cell; None for the table's own.
        limit: test images that are certified; None for all.
        only: pattern of names of cells that may be run, empty for none; others are shown where they are finished.
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
        rows: its log.
        summary: of its certification.
        sample: of the certification of some images with norms of their own for every one; see :func:`_sample`.
    """

    folder: pathlib.Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    sample: dict[str, Any]

    def value(self, quantity: str) -> float:
        """A quantity of a table, in the units that the paper prints."""
        if quantity == "seconds":
            later = self.rows[1:] or self.rows  # the first epoch compiles
            return statistics.median(row["training_seconds"] for row in later)
        if quantity == "local Lipschitz bound":
            return self.sample["mean_local_lipschitz"]
        after = {"certified": "local", "certified by the dual": "dual"}.get(quantity)
        if after:
            return 100 * self.summary["certified_accuracy_after"][after]
        key, factor = {
            "clean": ("clean_accuracy", 100),
            "PGD": ("pgd_accuracy", 100),
            "global Lipschitz bound": ("global_lipschitz", 1),
        }[quantity]
        return factor * self.summary[key]


def table(name: str, options: Options) -> pathlib.Path:
    """Run the cells of a table that are missing, and write the table after each of them.

    Returns:
        The Markdown file; a CSV file of the same name lies beside it.

    Raises:
        InputError: there is no such table, no cell of it is meant, or one could not be made; the table is whole
            but for that.
    """
    chosen = _named(name, published.TABLES)
    seeds = options.seeds or chosen.seeds
    cells = [row.cell for row in chosen.rows if row.cell]
    meant = [cell for cell in cells if fnmatch.fnmatch(cell.name, options.only)]
    if options.only and not meant:
        known = ", ".join(cell.name for cell in cells)
        raise InputError(f"--only={options.only!r} is none of the cells of {name}; they are {known}")
    path, problems = _write(name, chosen, options, seeds, {}), {}
    for cell in meant:
        for seed in range(seeds):
            _finish(cell, seed, options, problems, chosen.asked)
            path = _write(name, chosen, options, seeds, problems)
    if problems:
        raise InputError(f"{', '.join(problems)} could not be made; the reasons are above, the others are in {path}")
    return path


def figure(name: str, options: Options) -> pathlib.Path:
    """Run what a figure needs where it is missing, and draw it.

    Raises:
        InputError: there is no such figure, or a run of it could not be made.
    """
    title = _named(name, published.FIGURES)
    needed = published.FIGURE_CELLS if name == "figure2" else {"Local-Lip-B": published.FIGURE_CELLS["Local-Lip-B"]}
    found = {}
    sample = published.FIGURE_SAMPLES.get(name)
    asked = published.Asked(sample)
    for label, cell in needed.items():
        problems: dict[str, str] = {}
        _finish(cell, 0, options, problems, asked)
        measured = _measured(cell, 0, options, asked)
        if measured is None:
            raise InputError(f"{name}: the run {cell.name} could not be made: {', '.join(problems.values())}")
        found[label] = measured
    local = found["Local-Lip-B"]
    title = f"{title} ({local.summary['dataset']}, {len(local.rows)} epochs)"
    path = options.workdir / f"{name}.png"
    curves = {label: measured.rows for label, measured in found.items()}
    if name == "figure2":
        figures.plot_training(path, title, curves, {"Lipschitz constant": "lipschitz", "loss": "loss"})
    elif name in ("figure6", "figure7"):
        figures.plot_layers(path, title, local.rows, "live" if name == "figure6" else "sigma")
    elif name == "figure3":
        figures.plot_bars(path, title, {"ours": local.sample["live_share"]}, "share of varying neurons")
    elif name == "figure4":
        bars = {"ours": _iterations(local.sample), "paper, 6C2F": published.ITERATIONS_TO_CONVERGENCE}
        figures.plot_bars(path, title, bars, "power iterations")
    else:
        shutil.copy(_sample_folder(local.folder, sample) / "report_products.png", path)
    return path


def _iterations(sample: dict[str, Any]) -> list[float]:
    """Mean iterations, two products each, of every layer over images whose norm was iterated; 0 where none was."""
    pairs = zip(sample["products_per_norm"], sample["iterated_share"], strict=True)
    return [products / share / 2 if share else 0.0 for products, share in pairs]


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


def _finish(cell: Cell, seed: int, options: Options, problems: dict[str, str], asked: Asked) -> None:
    """Train and certify a cell, or what is left of it; what cannot be used is printed and kept in ``problems``."""
    folder, sample, stages = _folder(cell, seed, options), asked.sample, asked.stages
    if _measured(cell, seed, options, asked) is not None:
        return
    print(f"\n== {folder.name}", flush=True)
    try:
        config = _config(cell, seed, options)
        _check_begun(config, folder, options)
        if not runs.is_finished(config, folder):
            runs.train(config, folder, resume=folder.exists())
        figures.plot_learning_curves(folder)
        if _summary(_certified(folder), options.limit, stages) is None:
            certifying.certify_run(folder, limit=options.limit, output=_certified(folder), stages=stages)
        if sample and _summary(_sample_folder(folder, sample), _sample(options), stages) is None:
            output = _sample_folder(folder, sample)
            certifying.certify_run(
                folder, limit=_sample(options), level=sample, triage=False, output=output, stages=stages
            )
    except InputError as error:
        problems[folder.name] = str(error)
        print(f"{folder.name}: {error}", file=sys.stderr, flush=True)


def _check_begun(config: settings.Config, folder: pathlib.Path, options: Options) -> None:
    """Raises InputError where a run was begun with another config; if that is one of another scale, in those words."""
    if not (folder / "config.json").exists():
        return
    begun = settings.load(folder)
    if begun.schedule.epochs != config.schedule.epochs:
        raise InputError(
            f"--scale={options.scale:g} makes {config.schedule.epochs} epochs of it, but the run there was begun with "
            f"{begun.schedule.epochs}; give its scale, or another --workdir"
        )
    settings.check_same(config, begun)


def _measured(cell: Cell, seed: int, options: Options, asked: Asked) -> Measured | None:
    """The run of a cell, if it has this config at this scale, is finished and certified as far as is asked for."""
    folder = _folder(cell, seed, options)
    if not (folder / "config.json").exists():
        return None
    config = _config(cell, seed, options)
    try:
        settings.check_same(config, settings.load(folder))
    except InputError:
        return None
    rows = reports.read_rows(folder, before=sys.maxsize)
    summary, sample = _summary(_certified(folder), options.limit, asked.stages), asked.sample
    extra = _summary(_sample_folder(folder, sample), _sample(options), asked.stages) if sample else {}
    if len(rows) < config.schedule.epochs or summary is None or extra is None:
        return None
    return Measured(folder, rows, summary, extra)


def _certified(folder: pathlib.Path) -> pathlib.Path:
    """Where the certification of a cell lies: apart, so that certifying the run in other ways does not replace it."""
    return folder / "certified"


def _sample_folder(folder: pathlib.Path, level: str) -> pathlib.Path:
    return folder / f"sample-{level}"


def _sample(options: Options) -> int:
    """How many images have norms of their own, whatever else decides them: means over images are theirs."""
    return min(options.limit or SAMPLE, SAMPLE)


def _summary(folder: pathlib.Path, limit: int | None, stages: tuple[str, ...]) -> dict[str, Any] | None:
    """What is in a folder, if it is about so many images, or about all there are, and all of these stages."""
    path = folder / "summary.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found is None or found["counts"]["examples"] < min(limit or sys.maxsize, found["split_size"]):
        return None
    if not set(stages) <= set(found["stages"]):
        return None
    return found


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
        f"Accuracies in percent; {', '.join([f'{options.scale:g} of the epochs of the configs', *options.overrides])}.",
        "Our certificates are true bounds (level probabilistic), those of the paper rest on estimates from below. We",
        "certify every network in the same way, box and ball with global norms first and with local ones for what is",
        "left; the paper certifies each with the bound of its own method. Local Lipschitz bounds are means over",
        f"{_sample(options)} images. Unknown: the paper does not say, or we do not know. Empty: there is no run.",
        "",
        *marks,
    ]
    path = options.workdir / f"{name}.md"
    replace_text(path, "\n".join(text) + "\n")
    return path


def _line(row: Row, chosen: Table, options: Options, seeds: int, problems: dict[str, str]) -> list[str]:
    found, remark = [], ""
    if row.cell is None:
        remark = "method not in lipjax"
    else:
        every = [_measured(row.cell, seed, options, chosen.asked) for seed in range(seeds)]
        found = [one for one in every if one is not None]
        named = [problem for seed in range(seeds) if (problem := problems.get(_folder(row.cell, seed, options).name))]
        missing = "seeds are missing" if found else _not_run(row, row.cell, options)
        remark = named[0] if named else "" if len(found) == seeds else missing
    line = [row.setting, row.method]
    for place, quantity in enumerate(chosen.quantities):
        values = [one.value(quantity) for one in found]
        theirs, ours = row.paper[place], statistics.mean(values) if values else None
        difference = "" if theirs is None or ours is None else f"{ours - theirs:+.4g}"
        spread = statistics.stdev(values) if len(values) > 1 else None
        paper = _number(theirs, row.deviation[place] if row.deviation else None) or "unknown"
        line += [paper, _number(ours, spread), difference]
    if not found:
        return [*line, "", "", "", "", remark]
    one = found[0]
    images = f"{one.summary['counts']['examples']} of {one.summary['dataset']}"
    return [*line, str(len(one.rows)), str(len(found)), images, one.summary["device"], remark]


def _not_run(row: Row, cell: Cell, options: Options) -> str:
    """What the whole run would take, by the paper's seconds where there are some."""
    epochs = _config(cell, 0, dataclasses.replace(options, scale=1.0)).schedule.epochs
    if row.seconds is None:
        return f"not run; at full scale {epochs} epochs"
    devices = "4 V100s" if "tiny" in cell.config else "1 V100"
    return f"not run; at full scale {epochs} epochs, {row.seconds * epochs / 3600:.2g} hours of the paper's {devices}"


def _number(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if deviation is None else f"{value:.4g} +- {deviation:.2g}"

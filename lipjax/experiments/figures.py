"""Figures: learning curves of a run, and the report of a certification."""

from __future__ import annotations

import csv
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipjax.experiments.data import Dataset
from lipjax.experiments.evaluation import Evaluation
from lipjax.experiments.reports import DOMAIN_WORDS, Row, by_stage, read_rows
from lipjax.files import replace_text

# Means of the paper: power iterations to convergence of 6C2F, [H21] appendix.
PAPER_DENSE, PAPER_CONVOLUTIONS = 137, (355, 928)
SHOWN = 8  # images at each end


def plot_learning_curves(workdir: pathlib.Path) -> None:
    """``learning_curves.png`` of a run: accuracies, Lipschitz constants, varying neurons and the gap of the norms."""
    rows = read_rows(workdir, before=sys.maxsize)
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    blocks = [key.removeprefix("live_") for key in rows[0] if key.startswith("live_")]
    accuracies = ("clean_accuracy", "certified_accuracy", "validation_clean_accuracy", "validation_certified_accuracy")
    curves = {
        "accuracy": {key: key.removesuffix("_accuracy").replace("_", " ") for key in accuracies},
        "Lipschitz constant (estimate)": {"local_lipschitz": "local", "global_lipschitz": "global"},
        "share of varying neurons": {f"live_{k}": f"block {k}" for k in blocks},
        "training norm / converged norm": {
            "probe_lipschitz_ratio": "product",
            **{f"probe_sigma_ratio_{k}": f"block {k}" for k in blocks},
        },
    }
    for panel, (title, keys) in zip(panels.ravel(), curves.items(), strict=True):
        for key, label in keys.items():
            if key in rows[0]:
                panel.plot(epochs, [row[key] for row in rows], label=label, marker=".")
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
        if panel.lines:  # methods without bounds log no shares
            panel.legend(fontsize="small")
    figure.savefig(workdir / "learning_curves.png", dpi=120)


def write_report(folder: pathlib.Path, found: Evaluation, dataset: Dataset, summary: dict[str, Any]) -> None:
    """Write ``report.md`` and its figures into a folder, and the curves as ``curves.csv`` where there are some.

    What an earlier report left there and this one does not have is removed.

    Args:
        folder: where to.
        found: what was certified.
        dataset: the examples, in the same order.
        summary: the whole summary.
    """
    for stale in (*folder.glob("report_*.png"), folder / "curves.csv"):
        stale.unlink(missing_ok=True)
    images = [
        ("What each stage decides", _plot_stages(folder, found, summary)),
        ("The most and the least robust images", _plot_images(folder, found, dataset)),
    ]
    if "certified_accuracy_at" in summary:
        _write_curves(folder, summary)
        images.insert(0, ("Accuracy against eps", _plot_curves(folder, summary)))
    if len(found.local):
        images.append(("Local / global Lipschitz constant", _plot_ratio(folder, found, summary)))
        images.append(("Share of varying neurons", _plot_live(folder, found)))
        images.append(("Products to convergence", _plot_products(folder, found)))
    counts = summary["counts"]
    delta = f", delta {summary['delta']:g}" if summary["delta"] else ""
    cost = summary["cost_per_image"]
    shown = [
        ("clean", summary["clean_accuracy"]),
        ("PGD, the paper's, cut to [0, 1]", summary["pgd_accuracy"]),
        ("PGD or the stronger attack", summary["attack_accuracy"]),
        *((f"certified after stage {name}", value) for name, value in summary["certified_accuracy_after"].items()),
    ]
    lines = [
        f"# {summary['dataset']} {summary['split']}, eps {summary['eps']:.6g}",
        "",
        f"{counts['examples']} images, {DOMAIN_WORDS[summary['domain']]}, level `{summary['level']}`{delta}, relative "
        f"gap of the norms at most {summary['rtol']:g}.",
        "",
        "| accuracy | fraction | images |",
        "|---|---|---|",
        *(
            f"| {name} | {fraction:.4f} | {round(fraction * counts['examples'])} |"
            for name, fraction in shown
            if fraction is not None
        ),
        "",
        f"Cost per image: {cost['products']:.0f} products, {cost['dual_steps']:.0f} steps of the dual, "
        f"{cost['seconds']:.2f} s.",
        "",
        f"Images by the stage that decided: {by_stage(summary)}.",
    ]
    for title, name in images:
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    replace_text(folder / "report.md", "\n".join(lines) + "\n")


def _write_curves(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("accuracy", "eps", "fraction"))
        for name in ("certified", "pgd"):
            writer.writerows((name, *pair) for pair in summary[f"{name}_accuracy_at"])


def _plot_curves(folder: pathlib.Path, summary: dict[str, Any]) -> str:
    figure, panel = _panel("eps", "accuracy")
    for name, label in (("pgd", "PGD"), ("certified", f"certified ({summary['level']})")):
        eps, accuracy = np.transpose(summary[f"{name}_accuracy_at"])
        panel.plot(eps, accuracy, label=label, marker="." if name == "pgd" else None)
    panel.legend()
    return _save(figure, folder, "report_accuracy.png")


def _plot_stages(folder: pathlib.Path, found: Evaluation, summary: dict[str, Any]) -> str:
    """One bar per stage: the share of the images that it decides, and the certified ones of all those so far."""
    figure, panel = _panel("stage", "share of images")
    stages, certified = found.columns["stage"], found.columns["certified"]
    shares = {name: np.mean(stages == name) for name in summary["counts"]["decided"]}
    panel.bar(
        list(shares),
        list(shares.values()),
        color=["C0" if name in summary["certified_accuracy_after"] else "0.7" for name in shares],
    )
    total = np.cumsum([np.mean(certified & (stages == name)) for name in shares])
    panel.plot(list(shares), total, drawstyle="steps-mid", color="C1", label="certified so far")
    panel.set_ylim(0, 1)
    panel.legend()
    return _save(figure, folder, "report_stages.png")


def _plot_ratio(folder: pathlib.Path, found: Evaluation, summary: dict[str, Any]) -> str:
    figure, panel = _panel("local / global Lipschitz constant", "images")
    whole = summary["global_lipschitz"]
    panel.hist(found.columns["lipschitz"][found.local] / (whole if whole > 0 else 1), bins=40)
    return _save(figure, folder, "report_ratio.png")


def _plot_live(folder: pathlib.Path, found: Evaluation) -> str:
    figure, panel = _panel("block", "share of varying neurons")
    panel.boxplot(found.live, whis=(0, 100))
    panel.set_ylim(0, 1.02)
    return _save(figure, folder, "report_varying.png")


def _plot_products(folder: pathlib.Path, found: Evaluation) -> str:
    figure, panel = _panel("block", "products with W or its transpose")
    iterated = [column[column > 0] for column in found.products.T]  # the others are norms of whole layers
    panel.boxplot(iterated, whis=(0, 100))
    panel.set_yscale("log")
    for iterations, name in ((PAPER_DENSE, "dense"), *((n, "convolutions") for n in PAPER_CONVOLUTIONS)):
        panel.axhline(2 * iterations, linestyle="--", linewidth=0.8, color="gray")
        panel.text(0.55, 2 * iterations, f"paper, 6C2F, {name}", fontsize="x-small", va="bottom", color="gray")
    return _save(figure, folder, "report_products.png")


def _plot_images(folder: pathlib.Path, found: Evaluation, dataset: Dataset) -> str:
    """The examples with the largest and the smallest radius, or worst-case margin where no radii were found."""
    name = "radius" if "radius" in found.columns else "worst_margin"
    order = np.argsort(-found.columns[name], kind="stable")
    count = min(SHOWN, len(order))
    figure = Figure(figsize=(1.3 * count, 3.6), layout="constrained")
    panels = figure.subplots(2, count, squeeze=False)
    for row, places in zip(panels, (order[:count], order[::-1][:count]), strict=True):
        for panel, place in zip(row, places, strict=True):
            image = np.squeeze(dataset.images[place] / dataset.scale)
            panel.imshow(image, cmap="gray", vmin=0, vmax=1)
            label, prediction = found.columns["label"][place], found.columns["prediction"][place]
            panel.set_title(f"{label} as {prediction}\n{found.columns[name][place]:.3g}", fontsize="x-small")
            panel.axis("off")
    figure.suptitle(f"largest and smallest {name.replace('_', ' ')}", fontsize="small")
    return _save(figure, folder, "report_images.png")


def plot_training(path: pathlib.Path, title: str, runs: dict[str, list[Row]], panels: dict[str, str]) -> None:
    """Draw columns of the logs of several runs against the epoch: one panel for those whose names end alike."""
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for panel, (ylabel, ending) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, rows in runs.items():
            for key in rows[0]:
                if key.endswith(ending) and not key.startswith(("probe", "validation")):
                    epochs = [row["epoch"] for row in rows]
                    panel.plot(epochs, [row[key] for row in rows], label=f"{label}, {key.replace('_', ' ')}")
        panel.set(xlabel="epoch", ylabel=ylabel, yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def plot_layers(path: pathlib.Path, title: str, rows: list[Row], prefix: str) -> None:
    """Draw one column of a log per layer, ``prefix_1`` and so on, against the epoch."""
    figure, panel = _panel("epoch", prefix)
    for key in rows[0]:
        if key.startswith(f"{prefix}_"):
            panel.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=f"layer {key.split('_')[1]}")
    panel.set_title(title, fontsize="small")
    panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def plot_bars(path: pathlib.Path, title: str, series: dict[str, Sequence[float]], ylabel: str) -> None:
    """Draw one bar per layer and series."""
    figure, panel = _panel("layer", ylabel)
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        panel.bar(np.arange(1, len(values) + 1) + width * place, values, width, label=label)
    panel.set_title(title, fontsize="small")
    panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.grid(alpha=0.3)
    return figure, panel


def _save(figure: Figure, folder: pathlib.Path, name: str) -> str:
    figure.savefig(folder / name, dpi=100)
    return name

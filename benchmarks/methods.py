"""All methods of training on one data set, one budget for all: what norms, the dual, and the dual on pixels certify.

Every run that is missing is trained and certified; a killed command goes on where it was. Certified are all test
images, by the ladder global, attack, local, dual, so that one certification says what each stage adds; then the ball
cut to [0, 1]. Networks trained with Gaussian noise are certified by randomized smoothing as well, which holds for each
image with a chance of 0.999.

Usage:
  python -m benchmarks.methods --workdir runs/methods
  python -m benchmarks.methods --workdir runs/mnist --config configs/mnist_4c3f.py --seeds 2 --limit 500
      --only gloro,local_gloro,local_bcp,dual --config.model.architecture=small_cnn --config.schedule.epochs=4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from lipjax import smoothing
from lipjax.experiments import certifying, data, defaults, reports, runs, settings
from lipjax.experiments.trained import load_run
from lipjax.files import replace_text

LOSSES = ("emma", "la", "offset", "crm", "cll")  # each on a method of regions, and on one through the dual
ON = ("local_gloro", "dual")
STAGES = ("global", "attack", "local", "dual")
SAMPLES, DELTA = 10_000, 1e-3  # of randomized smoothing
COLUMNS = ("clean", "attack", "global norms", "local norms", "dual", "dual on pixels", "smoothing")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, and where.

    Attributes:
        workdir: folder of the runs and of the table.
        config: file.
        seeds: how many.
        limit: test images that are certified, None for all.
        overrides: entries of the config for every run.
    """

    workdir: pathlib.Path
    config: str
    seeds: int
    limit: int | None
    overrides: list[str]


def names() -> list[str]:
    """The methods, and their losses: ``method`` or ``method:loss``."""
    return [*defaults.METHODS, *(f"{method}:{loss}" for method in ON for loss in LOSSES)]


def main() -> None:
    """Train and certify what is missing, seed after seed, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--only", help="comma-separated; default: all methods and losses")
    given, overrides = parser.parse_known_args()
    options = Options(given.workdir, given.config, given.seeds, given.limit, overrides)
    chosen = given.only.split(",") if given.only else names()
    unknown = set(chosen) - set(names())
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}; known are {', '.join(names())}")
    for seed in range(options.seeds):
        for name in chosen:
            finish(name, seed, options)
            write(chosen, options)
            jax.clear_caches()  # the compiled programs of dozens of runs leave no memory maps to the next
    print((options.workdir / "methods.md").read_text())


def folder_of(name: str, seed: int, options: Options) -> pathlib.Path:
    """Of one run."""
    return options.workdir / f"{name.replace(':', '-')}-seed{seed}"


def finish(name: str, seed: int, options: Options) -> None:
    """Train and certify one run, or what is left of it."""
    folder, (method, _, loss) = folder_of(name, seed, options), name.partition(":")
    arguments = [f"--config={options.config}:{method}", f"--config.seed={seed}", "--config.certify.limit=0"]
    arguments += [f"--config.method.loss={loss}"] if loss else []
    config = settings.parse([*arguments, *options.overrides])
    print(f"\n== {folder.name}", flush=True)
    if not runs.is_finished(config, folder):
        runs.train(config, folder, resume=folder.exists())
    for domain in ("ball", "pixels"):
        if not (folder / domain / "summary.json").exists():
            certifying.certify_run(
                folder, output=folder / domain, domain=domain, stages=STAGES, limit=options.limit, resume=True
            )
    if loss or method != "gaussian" or (folder / "smoothing.json").exists():
        return
    run = load_run(folder)
    test = data.load(config.data.name, "test", config.data.dir, config.data.cache).take(slice(options.limit))
    x = jnp.asarray(test.images, jnp.float32) / test.scale
    found = smoothing.smoothed_radius(run.model, x, config.gaussian.noise, SAMPLES, DELTA, jax.random.key(seed))
    certified = (found.prediction == test.labels) & (found.radius >= config.eps)
    replace_text(folder / "smoothing.json", json.dumps({"certified_accuracy": float(certified.mean())}) + "\n")


def measured(name: str, seed: int, options: Options) -> dict[str, Any] | None:
    """The numbers of a finished run, in percent and seconds."""
    folder = folder_of(name, seed, options)
    paths = [folder / domain / "summary.json" for domain in ("ball", "pixels")]
    if not all(path.exists() for path in paths):
        return None
    ball, pixels = (json.loads(path.read_text()) for path in paths)
    after = ball["certified_accuracy_after"]
    smoothed = folder / "smoothing.json"
    values = {
        "clean": ball["clean_accuracy"],
        "attack": ball["attack_accuracy"],
        "global norms": after["global"],
        "local norms": after["local"],
        "dual": after["dual"],
        "dual on pixels": pixels["certified_accuracy"],
    }
    if smoothed.exists():
        values["smoothing"] = json.loads(smoothed.read_text())["certified_accuracy"]
    rows = reports.read_rows(folder, before=10**9)
    later = rows[1:] or rows
    seconds = statistics.median(row["training_seconds"] for row in later)
    return {**{key: 100 * value for key, value in values.items()}, "seconds": seconds, "images": ball["counts"]}


def write(chosen: list[str], options: Options) -> None:
    """The table with what is finished, best first by what the dual certifies."""
    found = {}
    for name in chosen:
        every = [one for seed in range(options.seeds) if (one := measured(name, seed, options)) is not None]
        if every:
            found[name] = every
    order = sorted(found, key=lambda name: -statistics.mean(one["dual"] for one in found[name]))
    lines = ["| method | " + " | ".join(COLUMNS) + " | s per epoch | seeds |", "|---" * (len(COLUMNS) + 3) + "|"]
    for name in order:
        cells = [_cell([one[column] for one in found[name] if column in one]) for column in COLUMNS]
        seconds = statistics.median(one["seconds"] for one in found[name])
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {seconds:.2g} | {len(found[name])} |")
    images = next(iter(found.values()))[0]["images"]["examples"] if found else 0
    text = [
        f"{options.config} {' '.join(options.overrides)}: {images} test images, percent, mean +- deviation over seeds.",
        f"Smoothing: {SAMPLES} samples, a chance of {DELTA} to be wrong for each image.",
        "",
        *lines,
    ]
    options.workdir.mkdir(parents=True, exist_ok=True)
    replace_text(options.workdir / "methods.md", "\n".join(text) + "\n")


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()

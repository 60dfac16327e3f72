"""Settings: the configuration of a run, read from a file and the command line, checked, saved with the run."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lipjax.errors import InputError
from lipjax.experiments import architectures, data, defaults, references
from lipjax.files import replace_text
from lipjax.training import unbounded, worst_case

Config = Any  # an ml_collections.ConfigDict, whose entries are known at run time only
NORMS = ("local", "global", "none")
MARGINS = ("pairwise_lipschitz", "box_and_ball", "lipschitz_margin", "dual", "crown", "none")
LOSSES = (*worst_case.WORST_CASE, *unbounded.UNBOUNDED)
STARTS = ("saved", "random")
# What configs of earlier versions do not say, as it was then.
SINCE = {
    "data": {"crop_padding": 0},
    "model": {"upper_clip": (1.0,), "lower_clip": (-1.0,), "layers": "plain"},
    "power_iteration": {"start": "saved", "global_layers": ()},
    "dual": {"num_rivals": 1},
    "sparsity": {"weight": 0.0, "weight_theta": 1.0},
    **defaults.NUMBERS,
}


def load_config(name: str, **overrides: Any) -> Config:
    """The config of a file of Python, as for ``train.py --config``.

    Args:
        name: ``FILE`` or ``FILE:METHOD``.
        **overrides: entries, dots written as two underscores: ``schedule__epochs=8``.

    Raises:
        InputError: as of :func:`parse`.
    """
    entries = {key.replace("__", "."): value for key, value in overrides.items()}
    return parse([f"--config={name}", *(f"--config.{key}={value}" for key, value in entries.items())])


def parse(arguments: list[str]) -> Config:
    """The config named by ``--config FILE[:METHOD]`` with its ``--config.KEY=VALUE`` overrides.

    Raises:
        InputError: a missing file, an unknown method or key, or a value of another type, in one line.
    """
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
        config = values["config"].value
        if config is not None:
            config.keys()  # a config file that could not be loaded raises at the first use
    except Exception as error:  # absl, ml_collections and the config file itself raise many kinds
        raise InputError(_explain(error, arguments)) from error
    if config is None:
        raise InputError("no config given; use --config configs/digits.py")
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; overrides look like --config.schedule.epochs=8")
    check(config)
    return config


def load(workdir: pathlib.Path) -> Config:
    """The config of a run.

    Raises:
        InputError: the folder holds no readable config.
    """
    path = workdir / "config.json"
    try:
        values = _tuples(json.loads(path.read_text()))
        config = ConfigDict({"init": None} | values | {name: new | values.get(name, {}) for name, new in SINCE.items()})
        check(config)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        message = f"{workdir} is not a run: cannot read {path}: {reason}; name a folder made by train.py"
        raise InputError(message) from error
    return config


def save(config: Config, workdir: pathlib.Path) -> None:
    """Write the config into the run's folder."""
    replace_text(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def check(config: Config) -> None:
    """Raises InputError, in one line, for the first value that cannot be used."""
    schedule = config.schedule
    if not data.is_own(config.data.name):
        _one_of("data.name", config.data.name, data.NAMES)
    _known_or_found("model.architecture", config.model.architecture, sorted(architectures.ARCHITECTURES))
    _one_of("model.activation", config.model.activation, architectures.ACTIVATIONS)
    _one_of("model.layers", config.model.layers, tuple(architectures.LAYERS))
    _check_method(config.method)
    _check_sparsity(config)
    _one_of("power_iteration.start", config.power_iteration.start, STARTS)
    _check_layers(config)
    for key, least in (
        ("seed", 0),
        ("data.validation", 0),
        ("data.crop_padding", 0),
        ("sparsity.weight", 0),
        ("sparsity.weight_theta", 0),
        ("crm.weight", 0),
        ("cll.weight", 0),
        ("stability.weight", 0),
        ("schedule.epochs", 1),
        ("schedule.batch_size", 1),
        ("power_iteration.num_iters", 1),
        ("power_iteration.global_iters", 1),
        ("dual.num_rivals", 1),
        ("probe.size", 0),
        ("probe.max_iters", 1),
        ("checkpoint.every", 1),
        ("certify.limit", 0),
        ("certify.batch_size", 1),
    ):
        _within(key, _lookup(config, key), least, math.inf)
    own = ("crm.temperature", "crm.radius", "cll.radius", "gaussian.noise")
    for key in (*own, "eps", "eps_train", "schedule.learning_rate", "schedule.learning_rate_end", "model.theta"):
        _within(key, _lookup(config, key), 0, math.inf, open_below=True)
    for key in ("crown.start", "crown.end"):
        _within(key, _lookup(config, key), 0, 1)
    _within("cll.violation", config.cll.violation, 1e-6, 0.999)
    _within("power_iteration.noise", config.power_iteration.noise, 0, 1)
    for key in ("warmup", "ramp", "constant", "kappa", "kappa_end"):
        _within(f"schedule.{key}", schedule[key], 0, 1)
    if schedule.ramp < schedule.warmup:
        raise InputError(
            f"--config.schedule.ramp={schedule.ramp} ends before the warm-up does (schedule.warmup={schedule.warmup}); "
            "give a fraction of the run between it and 1"
        )


def has_box(method: Config) -> bool:
    """Whether a method of a config bounds each neuron."""
    return method.norms == "local" or method.margins in ("box_and_ball", "dual", "crown")


def check_same(config: Config, before: Config, *, more_epochs: bool = False) -> None:
    """Raises InputError where a run cannot go on because what it computes was changed.

    Where it reads may change, and with ``more_epochs`` their number may grow.
    """
    used = (config.method.loss, config.method.margins)
    unused = (f"{section}." for section in defaults.NUMBERS if section not in used)
    free: tuple[str, ...] = ("data.dir", "data.cache", "certify.", "checkpoint.", *unused)
    if more_epochs and config.schedule.epochs > before.schedule.epochs:
        free = (*free, "schedule.epochs")
    now, then = _flat(config.to_dict()), _flat(before.to_dict())
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key) and not key.startswith(free):
            raise InputError(
                f"--config.{key}={now.get(key)} differs from the run to resume, which has {then.get(key)}; "
                "give the same config, or train into another --workdir"
            )


def _check_method(method: Config) -> None:
    """Raises InputError for parts of a method that are unknown, or do not go together."""
    if references.is_reference(method.name):
        references.find(method.name, "--config.method.name")
        for part, value in defaults.OWN.items():
            if method[part] != value:
                raise InputError(f"--config.method.{part}={method[part]}: {method.name} says that itself; leave it out")
        return
    _one_of("method.norms", method.norms, NORMS)
    _one_of("method.margins", method.margins, MARGINS)
    _known_or_found("method.loss", method.loss, LOSSES)
    bounded = method.loss in worst_case.WORST_CASE or references.is_reference(method.loss)
    wrong = ""
    if bounded and method.margins == "none":
        wrong = "needs margins: box_and_ball, say"
    elif bounded and method.norms == "none" and method.margins not in ("box_and_ball", "crown"):
        wrong = "without norms there is the box alone: give margins=box_and_ball, or crown"
    elif method.margins == "crown" and method.norms != "none":
        wrong = "CROWN-IBP has no norms: give norms=none"
    elif not bounded and (method.margins, method.norms) != ("none", "none"):
        wrong = "is without bounds: give norms=none and margins=none"
    if wrong:
        parts = f"norms={method.norms} and margins={method.margins}"
        raise InputError(f"--config.method.loss={method.loss} with {parts}: {wrong}")


def _check_sparsity(config: Config) -> None:
    """Raises InputError for a sparsity loss of a method that does not bound neurons."""
    if config.sparsity.weight and not has_box(config.method):
        raise InputError(
            f"--config.sparsity.weight={config.sparsity.weight} needs bounds of each neuron, which method "
            f"{config.method.name} does not have; give 0, or a method with local norms or margins=box_and_ball"
        )


def _check_layers(config: Config) -> None:
    """Raises InputError for entries about layers that the architecture does not have."""
    if references.is_reference(config.model.architecture):
        return  # its layers are known when it is made
    name = config.model.architecture
    activated, hidden = architectures.num_activations(name), architectures.num_hidden_layers(name)
    for key in ("upper_clip", "lower_clip"):
        clips = config.model[key]
        if len(clips) not in (1, activated) or not all(isinstance(clip, int | float) for clip in clips):
            raise InputError(
                f"--config.model.{key}={tuple(clips)} does not fit; give one number, or one for each of the "
                f"{activated} activations of {name}"
            )
    for place in config.power_iteration.global_layers:
        if not isinstance(place, int) or not 0 <= place <= hidden:
            raise InputError(
                f"--config.power_iteration.global_layers names layer {place}; the weight layers of "
                f"{name} are counted from 0 to {hidden}"
            )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries by dotted name."""
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        entries |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return entries


def _one_of(key: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"--config.{key}={value!r} is unknown; use one of {', '.join(known)}")


def _known_or_found(key: str, value: str, known: Any) -> None:
    """Raises InputError unless it is one of those known, or a reference to what is there."""
    if references.is_reference(value):
        references.find(value, f"--config.{key}")
    elif value not in known:
        raise InputError(
            f"--config.{key}={value!r} is unknown; use one of {', '.join(known)}, or package.module:name of your own"
        )


def _within(key: str, value: float, least: float, most: float, open_below: bool = False) -> None:
    if not (least < value if open_below else least <= value) or not value <= most or math.isinf(value):
        bound = f"{'more than' if open_below else 'at least'} {least}"
        bound += f" and at most {most}" if most < math.inf else ""
        raise InputError(f"--config.{key}={value} cannot be used; give a finite number {bound}")


def _lookup(config: Config, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _explain(error: Exception, arguments: list[str]) -> str:
    """One line about what absl or ml_collections could not read."""
    named = next((a for a in arguments if a.startswith("--config") and "." not in a.split("=")[0]), "--config")
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    lines = str(error.args[0] if isinstance(error, KeyError) else error).strip().splitlines()
    if isinstance(error, OSError | ModuleNotFoundError):
        return f"cannot read the config ({named}): {lines[-1].strip()}; try --config configs/digits.py"
    if isinstance(error, AttributeError | KeyError):
        key = lines[0].strip("'")
        override = next((a for a in arguments if key in a.split("=")[0].split(".")), f"--config.{key}")
        return f"unknown config key in {override}: {'; '.join(lines)}"
    if any(line.startswith("Traceback") for line in lines):  # the config file itself has raised
        return f"bad config argument: {named}: {lines[-1].split(': ', 1)[-1]}"
    return f"bad config argument: {' '.join(' '.join(lines).split())}"

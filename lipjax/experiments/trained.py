"""Trained runs: the model of a run, back from its checkpoint."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from flax import nnx

from lipjax.bounds.rule import Rule
from lipjax.errors import InputError
from lipjax.experiments import data, recipe, settings
from lipjax.experiments.settings import Config
from lipjax.networks.graph import Network
from lipjax.reading.flax import from_flax
from lipjax.training.checkpoints import Checkpoints, unflat


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run has come to.

    Attributes:
        folder: of the run.
        config: an ``ml_collections.ConfigDict``.
        model: the Flax model, with its trained parameters.
        network: what bounds are computed for.
        rule: trained slopes that the dual may start from, where the run was trained through it; else None.
        checkpoint: where the parameters come from: ``checkpoint`` ("best" or "last"), ``epoch``, ``step`` and
            ``params_sha256``.
    """

    folder: pathlib.Path
    config: Config
    model: nnx.Module
    network: Network
    rule: Rule | None
    checkpoint: dict[str, Any]


def load_run(folder: str | pathlib.Path, which: str = "best") -> TrainedRun:
    """The trained model of a run of ``train.py``.

    Args:
        folder: of the run.
        which: ``"best"`` (by the validation split; the last one where there is none) or ``"last"``.

    Raises:
        InputError: the folder is no run, or has no whole checkpoint.
    """
    folder = pathlib.Path(folder)
    if which not in ("best", "last"):
        raise InputError(f"checkpoint {which!r} is not known; give 'best' or 'last'")
    config = settings.load(folder)
    input_shape, num_classes = data.spec(config.data.name)
    for name in ["best", "last"] if which == "best" else ["last"]:
        checkpoints = folder / "checkpoints" / name
        try:
            found = Checkpoints(checkpoints).restore(("params", "rule")) if checkpoints.exists() else None
        except InputError:
            if name == "last":
                raise
            found = None  # said on the way; the last one may be whole
        if found is not None:
            arrays, facts = found
            model = nnx.eval_shape(lambda: recipe.model_of(config, input_shape, num_classes))  # nothing is drawn
            state = nnx.state(model, nnx.Param)
            nnx.replace_by_pure_dict(state, unflat(nnx.to_pure_dict(state), arrays["params"]))
            nnx.update(model, state)
            network = from_flax(model, input_shape)
            like = recipe.objective_of(config).rule(network)
            rule = None if like is None else unflat(like, arrays["rule"])
            return TrainedRun(folder, config, model, network, rule, {**facts, "checkpoint": name})
    raise InputError(f"no checkpoint in {folder / 'checkpoints'}; train with --workdir {folder} first")

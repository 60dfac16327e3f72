"""Runs: from a config to a trained model in a folder, with a log, checkpoints and exact resumption."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from lipjax.errors import InputError
from lipjax.experiments import data, recipe, reports, settings
from lipjax.experiments.settings import Config
from lipjax.experiments.trained import TrainedRun, load_run
from lipjax.norms import estimates
from lipjax.reading import flax
from lipjax.training import methods, objectives, sharding, training_step
from lipjax.training.checkpoints import Checkpoints, flat, unflat
from lipjax.training.objectives import Metrics
from lipjax.training.training_step import Batch, Images, TrainState
from lipjax.training.unbounded import UNBOUNDED

SCORES = ("certified_accuracy", "pgd_accuracy", "clean_accuracy")  # the first that a method has chooses its best epoch
IN_FLIGHT = 4  # steps that are dispatched before the metrics of the first are read; forced CPU devices allow at most 8


def train(config: Config, workdir: str | pathlib.Path, *, resume: bool = False) -> TrainedRun:
    """Train a model and write config, log and checkpoints into ``workdir``.

    Args:
        config: see :func:`lipjax.load_config`.
        workdir: the run's folder; new or empty unless ``resume``.
        resume: go on from the last checkpoint of the folder, if there is one. The config may have more epochs than
            before: the schedules are those of the new number, from the step where the run is.

    Returns:
        The run, with its best checkpoint.

    Raises:
        InputError: a config or a folder that cannot be used, or a loss that is not finite (the last good checkpoint is
            kept).
    """
    settings.check(config)
    workdir = pathlib.Path(workdir)
    used = workdir.exists() and any(workdir.iterdir())
    if used and not resume:
        raise InputError(f"{workdir} is not empty; go on with --resume, or name another --workdir")
    if used and not (workdir / "config.json").exists():
        raise InputError(f"{workdir} is not a run to resume: it has no config.json; name another --workdir")
    if resume and (workdir / "config.json").exists():
        settings.check_same(config, settings.load(workdir), more_epochs=True)
    run = Run(config, workdir)
    state, first = run.restored() if resume else (run.initial_state(), 0)
    if resume:
        print(f"{workdir}: {f'goes on after epoch {first}' if first else 'nothing to go on from, starts at epoch 1'}")
    state = run.spread(state)
    rows = reports.read_rows(workdir, before=first)
    for epoch in range(first, config.schedule.epochs):
        started = time.perf_counter()
        state, row = run.epoch(state, epoch)
        row = {"epoch": epoch + 1, **row, "seconds": round(time.perf_counter() - started, 3)}
        rows.append(row)
        reports.write_rows(workdir, rows)
        if run.is_best(rows):
            run.save_best(state, epoch + 1)
        if (epoch + 1) % config.checkpoint.every == 0 or epoch + 1 == config.schedule.epochs:
            run.save_last(state, epoch + 1)
        reports.print_row(row)
    return load_run(workdir)


def is_finished(config: Config, workdir: pathlib.Path) -> bool:
    """Whether a run has its last row and its last checkpoint: nothing of its state, which may be large, is read."""
    epochs = config.schedule.epochs
    rows = reports.read_rows(workdir, before=epochs)
    return len(rows) == epochs and (workdir / "checkpoints" / "last" / str(epochs)).exists()


class Run:
    """One run: what a config describes, on the devices of this process."""

    def __init__(self, config: Config, workdir: pathlib.Path) -> None:
        self.config, self.workdir = config, workdir
        self.devices = jax.local_device_count()
        if config.schedule.batch_size % self.devices:
            raise InputError(
                f"--config.schedule.batch_size={config.schedule.batch_size} cannot be split over {self.devices} "
                f"devices; give a multiple of {self.devices}"
            )
        whole = data.load(config.data.name, "train", config.data.dir, config.data.cache)
        self.train, self.validation = data.train_and_validation(whole, config.data.validation, config.seed)
        input_shape = self.train.images.shape[1:]
        self.model = recipe.model_of(config, input_shape, self.train.num_classes)
        self.graphdef, self.params = nnx.split(self.model, nnx.Param)
        self.origin = None if config.init is None else load_run(config.init)
        if self.origin is not None:
            self.params = _weights(self.origin, self.params)
        self.batches = sharding.Batches(config.schedule.batch_size, self.devices, config.seed)
        self.method = recipe.method_of(config, self.batches.steps(len(self.train)) * config.schedule.epochs)
        self.train_step = training_step.mapped(training_step.train_step, self.method, self.graphdef)
        self.validation_step = training_step.mapped(
            training_step.validation_step, self.method, self.graphdef, config.eps
        )
        self.probe = jax.jit(self._probe)
        self.train_images = self._images(self.train)
        self.validation_images = self._images(self.validation)
        # The config first: a folder with checkpoints but without it could not be resumed after a kill.
        workdir.mkdir(parents=True, exist_ok=True)
        settings.save(config, workdir)
        self.last = Checkpoints(workdir / "checkpoints" / "last", keep=2)
        self.best = Checkpoints(workdir / "checkpoints" / "best", keep=2)

    def initial_state(self) -> TrainState:
        """The state before the first step, for one device; with one row of vectors for each example that keeps them."""
        key = jax.random.key(self.config.seed)
        network = flax.from_flax(self.model, self.train.images.shape[1:])
        objective = self.method.objective
        vectors = jax.jit(training_step.initial_vectors)(objective.layers(network), jax.random.fold_in(key, 0))
        rule = objective.rule(network)
        if rule is not None and self.origin is not None and self.origin.rule is not None:
            rule = self.origin.rule
        own = tuple(vectors[place] for place in objective.kept(network))

        def rows(num_examples: int) -> tuple[np.ndarray, ...]:
            return tuple(np.broadcast_to(np.asarray(v)[None], (num_examples, *v.shape)) for v in own)

        return TrainState(
            jnp.int32(0),
            self.params,
            self.method.optimizer.init(self.params),
            jax.random.key_data(jax.random.fold_in(key, 1)),
            vectors,
            rows(len(self.train)),
            rows(len(self.validation)),
            rule,
            None if rule is None else self.method.optimizer.init(rule),
        )

    def spread(self, state: TrainState) -> TrainState:
        """A state on all devices: everything replicated, but the vectors, which are dealt out with the examples."""
        dealt = {name: self._deal_all(getattr(state, name)) for name in ("vectors", "validation_vectors")}
        replicated = dataclasses.replace(state, vectors=(), validation_vectors=())
        replicated = jax.tree.map(lambda leaf: np.broadcast_to(leaf[None], (self.devices, *leaf.shape)), replicated)
        return training_step.placed(dataclasses.replace(replicated, **dealt))

    def gathered(self, state: TrainState) -> TrainState:
        """The inverse of :meth:`spread`, on the host."""
        replicated = jax.tree.map(sharding.first_shard, dataclasses.replace(state, vectors=(), validation_vectors=()))
        vectors = tuple(sharding.collect(table, len(self.train)) for table in state.vectors)
        validation = tuple(sharding.collect(table, len(self.validation)) for table in state.validation_vectors)
        return dataclasses.replace(replicated, vectors=vectors, validation_vectors=validation)

    def epoch(self, state: TrainState, epoch: int) -> tuple[TrainState, dict[str, Any]]:
        """All steps of one epoch, then validation and the probe: the state and a row of the log."""
        started = time.perf_counter()
        name = f"epoch {epoch + 1}/{self.config.schedule.epochs}"
        with tqdm(total=len(self.train), desc=name, unit=" images", disable=None, leave=False) as bar:
            batches = self.batches.shuffled(len(self.train), epoch)
            state, row = self._sweep(self.train_step, state, self.train_images, batches, bar)
        row["training_seconds"] = round(time.perf_counter() - started, 3)
        row["images_per_second"] = round(len(self.train) / row["training_seconds"], 1)
        if len(self.validation):
            batches = self.batches.in_order(len(self.validation))
            state, found = self._sweep(self.validation_step, state, self.validation_images, batches, None)
            row |= {f"validation_{key}": found[key] for key in ("loss", *reversed(SCORES)) if key in found}
        return state, row | self._probe_row(state)

    def is_best(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the newest row has the highest score on the validation split so far.

        That is its certified accuracy; without bounds its accuracy under the attack, or else the clean one. Only epochs
        that end at the full eps count: before, the norms are underestimated the most.
        """
        if not len(self.validation):
            return False
        bounded = self.config.method.loss not in UNBOUNDED
        full = math.ceil(self.config.schedule.ramp * self.config.schedule.epochs) if bounded else 0
        ramped = [row for row in rows if row["epoch"] >= full]
        score = next(f"validation_{name}" for name in SCORES if f"validation_{name}" in rows[-1])
        scores = [row[score] for row in ramped]
        return bool(ramped) and rows[-1] is ramped[-1] and scores[-1] > max(scores[:-1], default=-1.0)

    def save_last(self, state: TrainState, epoch: int) -> None:
        """Write the checkpoint to resume from."""
        whole = self.gathered(state)
        items = {
            "params": flat(nnx.to_pure_dict(whole.params)),
            "training": flat(dataclasses.replace(whole, params=None, rule=None)),
            "rule": flat(whole.rule),
        }
        self.last.save(epoch, items, {"step": int(whole.step), "devices": self.devices})

    def save_best(self, state: TrainState, epoch: int) -> None:
        """Write the parameters that are the best so far."""
        params, rule = jax.tree.map(sharding.first_shard, (state.params, state.rule))
        items = {"params": flat(nnx.to_pure_dict(params)), "rule": flat(rule)}
        self.best.save(epoch, items, {"step": int(sharding.first_shard(state.step))})

    def restored(self) -> tuple[TrainState, int]:
        """The state of the last whole checkpoint and its epoch, or the initial state and 0."""
        state = self.initial_state()
        found = self.last.restore(("params", "training", *(() if state.rule is None else ("rule",))))
        if found is None:
            return state, 0
        arrays, facts = found
        if facts.get("devices", self.devices) != self.devices:
            print(
                f"the run was on {facts['devices']} devices and goes on on {self.devices}: examples are shuffled "
                "within each device's share, so the metrics will differ from those of an uninterrupted run",
                file=sys.stderr,
            )
        self.best.drop_after(int(facts["epoch"]))
        params = unflat(nnx.to_pure_dict(state.params), arrays["params"])
        nnx.replace_by_pure_dict(state.params, params)
        rest = unflat(dataclasses.replace(state, params=None, rule=None), arrays["training"])
        rule = None if state.rule is None else unflat(state.rule, arrays["rule"])
        return dataclasses.replace(rest, params=state.params, rule=rule), int(facts["epoch"])

    def _sweep(self, step, state: TrainState, images: Images, batches: Iterator[Batch], bar: tqdm | None):
        """Run a step over batches: the state and the metrics averaged over the examples."""
        sums: dict[str, np.ndarray] = {}
        count, in_flight = 0.0, collections.deque()
        for batch in batches:
            state, metrics = step(state, images, batch)
            in_flight.append((metrics, float(batch.weight.sum())))
            if len(in_flight) == IN_FLIGHT:
                count += self._add(*in_flight.popleft(), sums, bar)
        for each in in_flight:
            count += self._add(*each, sums, bar)
        return state, _row({key: value / count for key, value in sums.items()})

    def _add(self, metrics: Metrics, weight: float, sums: dict[str, np.ndarray], bar: tqdm | None) -> float:
        """Bring the metrics of a step to the host and add them to sums over examples; gives their number."""
        values = {key: np.asarray(sharding.first_shard(value), np.float64) for key, value in metrics.items()}
        if not values.pop("finite", np.ones(())):
            raise InputError(
                f"the loss or the parameters are no longer finite (loss {float(values['loss'])}); the last good "
                f"checkpoint is kept in {self.workdir}: lower --config.schedule.learning_rate and train again"
            )
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + weight * value
        if bar is not None and not bar.disable:
            bar.set_postfix_str(reports.short(_row(values)), refresh=False)
            bar.update(round(weight))
        return weight

    def _probe_row(self, state: TrainState) -> dict[str, Any]:
        """Norms of a fixed sample of training examples, as training estimates them and converged."""
        size = min(self.config.probe.size, len(self.train))
        if not size:
            return {}
        rest = dataclasses.replace(state, vectors=(), validation_vectors=(), opt_state=())
        replicated = jax.tree.map(sharding.first_shard, rest)
        vectors = tuple(sharding.first_shard(table)[:size] for table in state.vectors)
        # The first device's share comes first in the data set, so its first vectors are those of the first images.
        size = min(size, *(len(table) for table in vectors)) if vectors else size
        x = self.train.images[:size].astype(np.float32) / self.train.scale
        estimated, converged, whole = (np.asarray(a, np.float64) for a in self.probe(replicated, vectors, x))
        # A layer that is dead altogether has norm 0 in both.
        ratios = np.where(converged > 0, estimated / np.where(converged > 0, converged, 1), 1)
        return {
            "probe_lipschitz": float(converged.prod(axis=1).mean()),
            "probe_lipschitz_ratio": float(ratios.prod(axis=1).mean()),
            "probe_global_lipschitz": float(whole.prod()),
            **{f"probe_sigma_ratio_{k + 1}": float(ratio) for k, ratio in enumerate(ratios.mean(axis=0))},
        }

    def _probe(self, state: TrainState, vectors: tuple[Array, ...], x: Array) -> tuple[Array, Array, Array]:
        network = flax.from_flax(nnx.merge(self.graphdef, state.params), x.shape[1:])
        key, objective = jax.random.key(self.config.seed), self.method.objective
        eps = self.method.eps(state.step)
        converging = estimates.Estimate(key, max_iters=self.config.probe.max_iters)
        norms, global_vectors = objectives.warm_whole_norms(
            objective.layers(network), state.global_vectors, objective.iterations, key
        )
        norms = norms[: len(network.layers)]
        converged_norms, _ = estimates.whole_norms(network.layers, converging)
        if not (isinstance(objective, methods.Bounded) and objective.local):
            return norms[None], converged_norms[None], converged_norms
        keys = jax.random.split(key, len(x))
        ask = objective.ask(network, vectors, global_vectors, norms, key, keys)
        estimated, converged = (objective.propagate(network, x, eps, each).sigmas for each in (ask, converging))
        return estimated, converged, converged_norms

    def _images(self, dataset: data.Dataset) -> Images:
        images, labels = (sharding.deal(array, self.devices) for array in (dataset.images, dataset.labels))
        images = Images(images, labels, dataset.scale)
        return training_step.placed(images) if len(dataset) else images

    def _deal_all(self, tables: tuple) -> tuple:
        return tuple(sharding.deal(np.asarray(table), self.devices) for table in tables)


def _weights(origin: TrainedRun, params: Any) -> Any:
    """The parameters of a run, for a model with these parameters."""
    found = nnx.state(origin.model, nnx.Param)
    theirs, ours = (flat(nnx.to_pure_dict(each)) for each in (found, params))
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [each[name].shape if name in each else None for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--config.init={origin.folder} has {shapes[0] or 'nothing'} for {name}, where the model has "
                f"{shapes[1] or 'nothing'}; give a run of the same architecture and data"
            )
    return found


def _row(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Scalars by name; an array of one value per block becomes one entry per block."""
    row: dict[str, float] = {}
    for key, value in values.items():
        if np.ndim(value):
            row |= {f"{key}_{k + 1}": float(entry) for k, entry in enumerate(value)}
        else:
            row[key] = float(value)
    return row


def default_workdir(config: Config, name: str) -> pathlib.Path:
    """A new folder under runs/, named after config, method and time."""
    method = config.method.name.replace(":", ".")
    return pathlib.Path("runs") / f"{name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"

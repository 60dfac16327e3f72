"""Attack certified radii: train two CNNs on digits, certify a radius for each image, and look for wrong predictions.

A point is the last iterate of one attack from its own random start, within 0.999 of the certified radius of its image;
it may leave the pixel range, because certificates are about the whole ball. One wrong prediction is a bug: then the
exit status is 1 and the points are saved.

Usage:
  python -m benchmarks.breaker [--points 1000000] [--output results/breaker]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

import lipjax
from lipjax.experiments import architectures, data
from lipjax.reading import modules
from lipjax.training import training_step

ACTIVATIONS = ("relu", "clipped_relu")
SHAPE, CLASSES = (8, 8, 1), 10
TRAIN_EPS, EPOCHS, BATCH = 0.4, 20, 100
DELTA, ROUNDS, TOLERANCE = 1e-6, 4, 0.01  # of the certified radii
EXAMPLES = 540  # images per network that are certified, those of the test split first
LEAST_RADIUS = 1e-3  # of an image that is attacked: float32 resolves its last thousandth
INSIDE = 0.999
STEPS = 10

# Shares of all points. The first two are PGD: against all rivals at once, and against one of them.
SHARES = {"pgd": 0.4, "pgd_one_rival": 0.2, "single_step": 0.2, "sphere": 0.1, "towards_images": 0.1}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network and images that it classifies correctly within a certified radius.

    Attributes:
        name: the network's.
        network: what is attacked.
        x: images (N, H, W, C) in [0, 1], float32.
        label: integers (N,).
        radius: certified l2 radii (N,), more than 0.
    """

    name: str
    network: lipjax.Network
    x: np.ndarray
    label: np.ndarray
    radius: np.ndarray


def main(arguments: list[str] | None = None) -> None:
    """Train, certify, attack and write ``breaker.json`` and ``breaker.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000, help="at least so many points, over both networks")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/breaker"), help="folder")
    options = parser.parse_args(arguments)
    started, found, broken = time.perf_counter(), {}, {}
    for subject in subjects():
        found[subject.name], broken[subject.name] = attack(subject, options.points / len(ACTIVATIONS))
    report = {"asked_for": options.points, **summarise(found, round(time.perf_counter() - started))}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "breaker.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "breaker.md").write_text(table(report))
    print(table(report))
    if report["violations"]:
        path = options.output / "violations.npz"
        np.savez_compressed(path, **{f"{name}_{key}": v for name, some in broken.items() for key, v in some.items()})
        print(f"{report['violations']} certified predictions are wrong: {path}", file=sys.stderr)
        raise SystemExit(1)


def subjects() -> list[Subject]:
    """The two networks, trained and certified."""
    return [certified(name, train(name, seed)) for seed, name in enumerate(ACTIVATIONS)]


def train(activation: str, seed: int) -> lipjax.Network:
    """A CNN of four layers, by the GloRo loss with the norms of the whole layers and eps ramped up."""
    dataset = data.load("digits", "train")
    model = small_cnn(activation, seed)
    graphdef, params = nnx.split(model, nnx.Param)
    optimizer, key = training_step.adam(optax.constant_schedule(2e-3)), jax.random.key(seed)

    def objective(params: Any, vectors: tuple, x: Array, label: Array, eps: Array) -> tuple[Array, tuple]:
        network = lipjax.from_flax(nnx.merge(graphdef, params), SHAPE)
        own = {place: vector[None] for place, vector in enumerate(vectors)}
        sigmas, vectors = lipjax.whole_norms(network.layers, lipjax.WarmStarted(own, None, key, num_iters=3))
        features = lipjax.propagate(network, lipjax.l2_ball(x, eps).without_box(), lipjax.Given(sigmas)).features

        def loss(features: lipjax.Region, label: Array) -> Array:
            logits = network.head(features.center)
            margins = lipjax.pairwise_lipschitz(network.head, features, label)
            return lipjax.gloro(logits, lipjax.worst_logits(logits, margins, label), label)

        return jnp.mean(jax.vmap(loss)(features, label)), vectors

    @jax.jit
    def step(params: Any, state: Any, vectors: tuple, x: Array, label: Array, eps: Array) -> tuple:
        gradient, vectors = jax.grad(objective, has_aux=True)(params, vectors, x, label, eps)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of its counts
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, vectors

    layers = lipjax.from_flax(model, SHAPE).layers
    like = jax.eval_shape(training_step.initial_vectors, layers, key)
    vectors = tuple(jnp.zeros(vector.shape) for vector in like)  # the first step starts from its noise
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        eps = jnp.float32(TRAIN_EPS * min(1, 2 * epoch / EPOCHS))
        order = rng.permutation(len(dataset))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            x, label = pixels(dataset.take(order[start : start + BATCH]))
            params, state, vectors = step(params, state, vectors, x, label, eps)
    return lipjax.from_flax(nnx.merge(graphdef, params), SHAPE)


def small_cnn(activation: str, seed: int) -> nnx.Sequential:
    """Two convolutions and two dense layers."""
    rng = np.random.default_rng(seed)

    def normal(_: Array, shape: tuple[int, ...], dtype: Any, **__: Any) -> Array:
        return jnp.asarray(rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[:-1])), dtype)

    def active(*shape: int) -> Any:
        return modules.ClippedReLU(shape) if activation == "clipped_relu" else nnx.relu

    options = {"kernel_init": normal, "rngs": nnx.Rngs(seed)}
    return nnx.Sequential(
        *(nnx.Conv(1, 8, (3, 3), padding=1, **options), active(8, 8, 8)),
        *(nnx.Conv(8, 16, (4, 4), strides=2, padding=1, **options), active(4, 4, 16)),
        architectures.flatten,
        *(nnx.Linear(256, 48, **options), active(48)),
        nnx.Linear(48, CLASSES, **options),
    )


def certified(name: str, network: lipjax.Network) -> Subject:
    """The first images that the network classifies correctly, with radii of level ``"probabilistic"``."""
    parts = zip(*(pixels(data.load("digits", split)) for split in ("test", "train")), strict=True)
    x, label = (np.concatenate(part) for part in parts)
    correct = np.flatnonzero(np.asarray(jnp.argmax(network(x), axis=1)) == label)[:EXAMPLES]
    x, label, key = x[correct], label[correct], jax.random.key(1)
    radius = lipjax.certified_radius(network, x, label, delta=DELTA, key=key, tol=TOLERANCE, max_rounds=ROUNDS)
    kept = np.asarray(radius) >= LEAST_RADIUS
    return Subject(name, network, x[kept], label[kept], np.asarray(radius, np.float32)[kept])


def pixels(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1] and labels."""
    return dataset.images.astype(np.float32) / dataset.scale, dataset.labels


def attack(subject: Subject, points: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """At least so many points: the figures, and the points that were wrongly classified with their images and labels.

    Every image is attacked equally often by each kind.
    """
    kinds, broken = {}, []
    for place, (kind, share) in enumerate(SHARES.items()):
        counts = {"points": 0, "violations": 0, "smallest_margin": math.inf}
        for round_ in range(math.ceil(points * share / len(subject.x))):
            key = jax.random.fold_in(jax.random.key(place), round_)
            candidates, margins = (np.asarray(a) for a in points_of(kind, subject, key, round_))
            check_inside(subject, candidates)
            wrong = ~(margins > 0)  # a tie, or not a number, is no certified prediction either
            counts["points"] += len(margins)
            counts["violations"] += int(wrong.sum())
            counts["smallest_margin"] = float(np.fmin(counts["smallest_margin"], margins.min()))
            broken.append((candidates[wrong], subject.x[wrong], subject.label[wrong], subject.radius[wrong]))
        kinds[kind] = counts
    figures = {
        "layers": len(subject.network.layers) + 1,
        "images": len(subject.x),
        "radius": {
            name: float(f(subject.radius)) for name, f in (("least", min), ("median", np.median), ("most", max))
        },
        "kinds": kinds,
    }
    columns = (np.concatenate(column) for column in zip(*broken, strict=True))
    return figures, dict(zip(("point", "x", "label", "radius"), columns, strict=True))


def points_of(kind: str, subject: Subject, key: Array, round_: int) -> tuple[Array, Array]:
    """One point for each image: the points, and their margins."""
    x, label, radius = jnp.asarray(subject.x), jnp.asarray(subject.label), jnp.asarray(subject.radius)
    rivals = jnp.arange(CLASSES)[None] != label[:, None]
    if kind == "pgd_one_rival":
        rivals = (label[:, None] + 1 + round_ % (CLASSES - 1)) % CLASSES == jnp.arange(CLASSES)[None]
    steps = {"pgd": STEPS, "pgd_one_rival": STEPS, "single_step": 1}.get(kind, 0)
    size = {"single_step": 2.0}.get(kind, 2.5 / STEPS)  # two radii lead from anywhere in the ball to its far side
    return _attack(subject.network, x, label, radius, rivals, key, kind == "towards_images", steps, size)


@jax.jit
def _attack(
    network: lipjax.Network,
    x: Array,
    label: Array,
    radius: Array,
    rivals: Array,
    key: Array,
    towards: bool,
    steps: int,
    size: float,
) -> tuple[Array, Array]:
    """Ascent on log sum exp of some rivals' logits minus the label's, from the sphere; sizes in radii."""
    own = jnp.arange(rivals.shape[1])[None] == label[:, None]
    limit = (INSIDE * radius)[:, None, None, None]

    def excess(points: Array) -> Array:
        logits = network(points)
        return jax.nn.logsumexp(jnp.where(rivals, logits, -jnp.inf), axis=1) - jnp.sum(
            jnp.where(own, logits, 0), axis=1
        )

    def ascend(_: int, points: Array) -> Array:
        gradient = jax.grad(lambda points: jnp.sum(excess(points)))(points)
        offset = points - x + size * limit * _unit(gradient)
        length = _length(offset)
        return x + jnp.where(length > limit, limit * _unit(offset), offset)

    direction_key, image_key = jax.random.split(key)
    random = jax.random.normal(direction_key, x.shape)
    other = x[jax.random.randint(image_key, label.shape, 0, len(label))] - x
    direction = _unit(jnp.where(towards, _unit(other) + 0.5 * _unit(random), random))
    points = lax.fori_loop(0, steps, ascend, x + limit * direction)
    logits = network(points)
    margins = jnp.sum(jnp.where(own, logits, 0), axis=1) - jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)
    return points, margins


def _length(vectors: Array) -> Array:
    return jnp.sqrt(jnp.sum(vectors**2, axis=(1, 2, 3), keepdims=True))


def _unit(vectors: Array) -> Array:
    """Each of length 1, or 0 where it is 0."""
    length = _length(vectors)
    return jnp.where(length > 0, vectors / jnp.where(length > 0, length, 1), 0)


def check_inside(subject: Subject, points: np.ndarray) -> None:
    """Raises AssertionError where float32 has put a point outside of the certified ball, where nothing is claimed."""
    offsets = (points.astype(np.float64) - subject.x).reshape(len(points), -1)
    if not (np.linalg.norm(offsets, axis=1) <= subject.radius).all():
        raise AssertionError("a point is outside of the certified ball")


def summarise(found: dict[str, dict[str, Any]], seconds: int) -> dict[str, Any]:
    """The figures of all networks, and their sums."""
    counts = list(itertools.chain.from_iterable(one["kinds"].values() for one in found.values()))
    return {
        "points": sum(count["points"] for count in counts),
        "violations": sum(count["violations"] for count in counts),
        "level": "probabilistic",
        "delta": DELTA,
        "share_of_radius": INSIDE,
        "steps": STEPS,
        "networks": found,
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "lipjax": lipjax.__version__},
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"# {report['points']:,} attacks on certified radii: {report['violations']} violations",
        "",
        f"Level {report['level']}, delta {report['delta']:g} per network; points within {report['share_of_radius']} of "
        f"the radius; PGD of {report['steps']} steps. Made by",
        f"`python -m benchmarks.breaker --points {report['asked_for']}` in {report['seconds']} s.",
        "",
        "| network | images | median radius | attack | points | smallest margin | violations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in report["networks"].items():
        for kind, count in one["kinds"].items():
            lines.append(
                f"| {name} | {one['images']} | {one['radius']['median']:.3f} | {kind} | {count['points']:,} | "
                f"{count['smallest_margin']:.4g} | {count['violations']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

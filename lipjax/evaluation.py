"""Evaluation: clean, PGD and certified accuracy on a data set, example by example."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lipjax.attacks import pgd
from lipjax.certifier import Certifier, Found
from lipjax.data import Dataset
from lipjax.networks import Network
from lipjax.radius import certified_radii

Columns = dict[str, np.ndarray]
STAGES = ("prediction", "global", "attack", "local")
ATTACK_STEPS, ATTACK_ROUNDS = 25, 4  # the paper's 100 steps; who is broken after a round leaves
ATTACK_SHARES = (0.25, 0.5, 0.75, 1, 1.5, 2)  # of eps, where the PGD curve is measured
CURVE_POINTS = 51
CERTIFICATION = 0x63657274  # folded into the seed
RADIUS_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation.

    Attributes:
        columns: per example: index, label, prediction, worst_margin, lipschitz, certified, attacked and stage, the
            one that decided: "prediction" (it is wrong), "global", "attack" or "local".
        summary: the figures of the whole, ready for JSON.
        local: places of the examples that were bounded with their own norms (M,).
        live: share of varying neurons of those (M, blocks).
        products: products that each of their norms took (M, blocks).
    """

    columns: Columns
    summary: dict[str, Any]
    local: np.ndarray
    live: np.ndarray
    products: np.ndarray


def evaluate(
    network: Network,
    dataset: Dataset,
    eps: float,
    *,
    batch_size: int,
    seed: int = 0,
    level: str = "probabilistic",
    delta: float = 1e-6,
    rtol: float = 1e-3,
    triage: bool = True,
    radius: bool = False,
) -> Evaluation:
    """Attack and certify every example.

    In three stages: certificates with global norms; PGD on those that are not certified by then; certificates with
    local norms for those that PGD did not break. The norms of an example depend on its place in the data set and on
    the seed alone, not on the batch size or on what the stages before decided.

    Args:
        network: the classifier.
        dataset: the examples.
        eps: l2 radius, in [0, 1] pixels.
        batch_size: examples per cohort.
        seed: of the starts of attacks and norms.
        level: what the norms are worth.
        delta: total probability that any certificate is wrong.
        rtol: relative gap at which a norm is tight enough.
        triage: leave out what an earlier stage has decided; without it every example goes through all stages, and
            the same ones are certified.
        radius: find the certified radius of each example as well, and attack at multiples of eps.

    Returns:
        Columns and summary. ``attacked`` means that PGD found a wrong prediction in the ball.

    Reference:
        [H21] section 5.
    """
    # A stream of its own: training, which made the network, has drawn from the same seed.
    norm_key, attack_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), CERTIFICATION))
    count = len(dataset)
    watch = Stopwatch()
    rounds = 1 + (RADIUS_ROUNDS if radius else 0)
    certifier = Certifier(network, count, level=level, delta=delta, key=norm_key, rounds=rounds, rtol=rtol)
    blocks = len(network.blocks)
    columns: Columns = {
        "index": np.arange(count),
        "label": dataset.labels,
        "prediction": np.zeros(count, np.int32),
        "worst_margin": np.zeros(count),
        "lipschitz": np.zeros(count),
        "certified": np.zeros(count, bool),
        "attacked": np.zeros(count, bool),
        "stage": np.full(count, "prediction", "U10"),
    }
    live, products = np.zeros((count, blocks)), np.zeros((count, blocks))

    def keep(found: Found, part: np.ndarray) -> None:
        for name in ("prediction", "worst_margin", "lipschitz", "certified"):
            columns[name][part] = getattr(found.certificate, name)[: len(part)]
        live[part], products[part] = found.live[: len(part)], found.products[: len(part)]

    for part, batch in _cohorts(dataset, np.arange(count), batch_size, "global bounds"):
        keep(certifier.globally(batch.x, batch.label, eps), part)
    correct = columns["prediction"] == dataset.labels
    with_global_norms = columns["certified"].copy()
    columns["stage"][with_global_norms] = "global"
    watch.lap("global")

    left = np.flatnonzero(correct & ~with_global_norms) if triage else np.arange(count)
    columns["attacked"] = _broken(network, dataset, left, eps, attack_key, batch_size)
    columns["stage"][correct & ~with_global_norms & columns["attacked"]] = "attack"
    watch.lap("attack")

    local = left[~columns["attacked"][left]] if triage else left
    for part, batch in _cohorts(dataset, local, batch_size, "local bounds"):
        keep(certifier.locally(batch.x, batch.label, eps, batch.index), part)
    columns["stage"][local[correct[local] & ~with_global_norms[local] & ~columns["attacked"][local]]] = "local"
    watch.lap("local")

    curves: dict[str, Any] = {}
    if radius:
        columns["radius"] = _radii(certifier, dataset, np.flatnonzero(correct), columns["certified"], eps, batch_size)
        watch.lap("radius")
        curves["median_radius"] = float(np.median(columns["radius"]))
        curves["certified_accuracy_at"] = _certified_curve(columns["radius"])
        curves["pgd_accuracy_at"], broken_at = _pgd_curve(
            network, dataset, np.flatnonzero(correct), columns["attacked"], eps, attack_key, batch_size
        )
        curves["radii_but_attacked"] = int((correct & (columns["radius"] >= broken_at)).sum())
        watch.lap("pgd curve")
    summary = {
        **_accuracies(columns, with_global_norms, len(local), triage),
        "eps": eps,
        "level": certifier.level.name,
        "delta": delta if level == "probabilistic" else None,
        "rtol": rtol,
        "triage": triage,
        "dtype": np.dtype(certifier.level.dtype).name,
        "ledger": certifier.ledger.facts(),
        "global_lipschitz": certifier.global_lipschitz,
        **_local_figures(columns["lipschitz"][local], certifier.global_lipschitz, live[local], products[local]),
        **curves,
        "seconds": watch.laps,
    }
    return Evaluation(columns, summary, local, live[local], products[local])


def _accuracies(columns: Columns, with_global_norms: np.ndarray, bounded_locally: int, triage: bool) -> dict[str, Any]:
    """Fractions of all examples, and the counts behind them."""
    correct = columns["prediction"] == columns["label"]
    certified, attacked = columns["certified"], columns["attacked"]
    found = {
        "clean_accuracy": correct,
        "pgd_accuracy": correct & ~attacked,
        "certified_accuracy": certified,
        "certified_accuracy_with_global_norms": with_global_norms,
    }
    counts = {
        "examples": len(correct),
        "correct": int(correct.sum()),
        "correct_after_pgd": int((correct & ~attacked).sum()),
        "certified": int(certified.sum()),
        "certified_with_global_norms": int(with_global_norms.sum()),
        # With triage nobody is attacked who is certified, or bounded who is attacked: nothing is compared.
        "certified_but_attacked": None if triage else int((certified & attacked).sum()),
        "decided": {stage: int((columns["stage"] == stage).sum()) for stage in STAGES},
        "bounded_locally": bounded_locally,
    }
    return {**{name: float(which.mean()) for name, which in found.items()}, "counts": counts}


def _local_figures(lipschitz: np.ndarray, whole: float, live: np.ndarray, products: np.ndarray) -> dict[str, Any]:
    """Means over the examples that were bounded with their own norms."""
    if not len(lipschitz):
        return {}
    return {
        "mean_local_lipschitz": float(lipschitz.mean()),
        "mean_local_to_global_ratio": float((lipschitz / whole).mean()) if whole > 0 else 1.0,
        "live_share": live.mean(axis=0).tolist(),
        "products_per_norm": products.mean(axis=0).tolist(),
        "iterated_share": (products > 0).mean(axis=0).tolist(),  # the others are norms of whole layers, at no cost
    }


class Stopwatch:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.started = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap goes under this name."""
        now = time.perf_counter()
        self.laps[name], self.started = round(now - self.started, 2), now


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some examples of a data set: inputs (B, ...) in [0, 1], labels (B,) and their places (B,)."""

    x: Array
    label: Array
    index: Array


def _cohorts(dataset: Dataset, places: np.ndarray, batch_size: int, name: str) -> Iterator[tuple[np.ndarray, Batch]]:
    """The examples at some places in batches of one size, with a progress bar.

    The size is that of the whole data set in as few batches as ``batch_size`` allows, whatever the places: functions of
    batches are compiled once. The last one is filled up by repeating: yields the places without and the batch with the
    repetition.
    """
    cohorts = max(1, -(-len(dataset) // batch_size))
    size = max(1, -(-len(dataset) // cohorts))
    with tqdm(total=len(places), desc=name, unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(places), size):
            part = places[start : start + size]
            padded = np.resize(part, size)
            x = dataset.images[padded].astype(np.float32) / dataset.scale
            yield part, Batch(jnp.asarray(x), jnp.asarray(dataset.labels[padded]), jnp.asarray(padded))
            bar.update(len(part))


def _broken(
    network: Network, dataset: Dataset, places: np.ndarray, eps: float, key: Array, batch_size: int
) -> np.ndarray:
    """For which examples of the data set PGD finds a wrong prediction; False for those that are not attacked."""
    broken = np.zeros(len(dataset), bool)
    points = np.zeros((len(dataset), *dataset.images.shape[1:]), np.float32)
    for round_ in range(ATTACK_ROUNDS):
        left = places[~broken[places]]
        for part, batch in _cohorts(dataset, left, batch_size, f"attack, round {round_ + 1} of {ATTACK_ROUNDS}"):
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch.index)
            start = jnp.asarray(points[np.asarray(batch.index)]) if round_ else None
            found, wrong = _attack(network, batch.x, batch.label, eps, keys, start)
            points[part], broken[part] = found[: len(part)], wrong[: len(part)]
    return broken


@jax.jit
def _attack(
    network: Network, x: Array, label: Array, eps: float, keys: Array, start: Array | None
) -> tuple[Array, Array]:
    """Some steps of PGD: the points, and whether their prediction is wrong."""
    points = pgd(network, x, label, eps, keys, num_steps=ATTACK_STEPS, step_size=eps / 4, start=start)
    return points, jnp.argmax(network(points), axis=1) != label


def _radii(
    certifier: Certifier, dataset: Dataset, places: np.ndarray, certified: np.ndarray, eps: float, batch_size: int
) -> np.ndarray:
    """Certified radii of all examples (N,); those at ``places`` are searched, from what is known at eps; others are 0.

    An example that the test refused at eps, or that was attacked there, has a smaller radius.
    """
    radii = np.zeros(len(dataset))
    low, high = np.where(certified, eps, 0.0), np.where(certified, np.inf, eps)
    for part, batch in _cohorts(dataset, places, batch_size, "radii"):
        index = np.asarray(batch.index)
        found = certified_radii(
            certifier,
            np.asarray(batch.x),
            np.asarray(batch.label),
            index,
            low=low[index],
            high=high[index],
            first_round=1,
        )
        radii[part] = found[: len(part)]
    return radii


def _certified_curve(radii: np.ndarray) -> list[list[float]]:
    """Pairs of eps and the share of examples with at least that radius, up to the largest radius."""
    grid = np.linspace(0, radii.max() if radii.max() > 0 else 1, CURVE_POINTS)
    # At eps 0 it is the clean accuracy; beyond, a radius of 0 certifies nothing.
    return [[float(eps), float(((radii >= eps) & (radii > 0)).mean())] for eps in grid]


def _pgd_curve(
    network: Network,
    dataset: Dataset,
    correct: np.ndarray,
    attacked: np.ndarray,
    eps: float,
    key: Array,
    batch_size: int,
) -> tuple[list[list[float]], np.ndarray]:
    """Pairs of eps and PGD accuracy, and the least eps at which each example was broken (N,), or infinity.

    An example that is broken at one eps is broken at every larger one.
    """
    broken_at = np.full(len(dataset), np.inf)
    curve = [[0.0, len(correct) / len(dataset)]]
    for share in ATTACK_SHARES:
        left = correct[np.isinf(broken_at[correct])]
        broken = attacked if share == 1 else _broken(network, dataset, left, share * eps, key, batch_size)
        broken_at[broken & np.isinf(broken_at)] = share * eps
        curve.append([share * eps, float(np.isinf(broken_at[correct]).sum() / len(dataset))])
    return curve, broken_at

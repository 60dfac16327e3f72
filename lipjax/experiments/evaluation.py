"""Evaluation: clean, PGD and certified accuracy on a data set, example by example."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lipjax.bounds.rule import Rule
from lipjax.certification.branching import branching_of
from lipjax.certification.certifier import Certifier
from lipjax.certification.evidence import Evidence, Examples, no_evidence
from lipjax.certification.pairs import Ascent
from lipjax.certification.progress import ProgressFile, digest
from lipjax.certification.radius import Radius
from lipjax.certification.records import fingerprint
from lipjax.certification.stages import (
    NAMES,
    OF_RADII,
    Branch,
    Cohorts,
    Dual,
    Global,
    Local,
    Stage,
    StageOf,
    chosen_stages,
    climb,
    ladder_of,
)
from lipjax.certification.triage import Attack
from lipjax.experiments.data import Dataset
from lipjax.networks.graph import Network
from lipjax.networks.regions import check_domain
from lipjax.norms.solvers import Level

Columns = dict[str, np.ndarray]
ATTACK_SHARES = (0.25, 0.5, 0.75, 1, 1.5, 2)  # of eps, where the PGD curve is measured
CURVE_POINTS = 51
CERTIFICATION = 0x63657274  # folded into the seed
RADIUS_ROUNDS = 20
SAVE_SECONDS = 60  # between two saves of the progress
COSTS = ("products", "dual_steps", "seconds")
COLUMNS = (
    *("label", "prediction", "worst_margin", "lipschitz", "certified", "attacked", "broken_by_pgd", "stage"),
    *COSTS,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation.

    Attributes:
        columns: per example: index, label, prediction, worst_margin, lipschitz, certified, attacked, broken_by_pgd,
            stage (the one that decided, or "undecided"), and the cost: products, dual_steps and seconds.
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
    level: str | Level = "probabilistic",
    delta: float = 1e-6,
    rtol: float = 1e-3,
    stages: Sequence[str | StageOf] | None = None,
    dual_steps: int = 60,
    branch_seconds: float = 10.0,
    rule: Rule | None = None,
    domain: str = "ball",
    triage: bool = True,
    radius: bool = False,
    progress: pathlib.Path | None = None,
) -> Evaluation:
    """Attack and certify every example, stage by stage: see :mod:`lipjax.certification.stages`.

    Each stage is asked for what those before have left undecided: certificates with global norms; attacks; certificates
    with local norms; the dual. The norms of an example depend on its place in the data set and on the seed alone, not
    on the batch size or on what the stages before decided.

    Args:
        network: the classifier.
        dataset: the examples.
        eps: l2 radius, in [0, 1] pixels.
        batch_size: examples per cohort.
        seed: of the starts of attacks and norms.
        level: what the norms are worth, as of :func:`lipjax.certify`.
        delta: total probability that any certificate is wrong.
        rtol: relative gap at which a norm is tight enough.
        stages: some of ``("global", "attack", "local", "dual", "branch")``, in this order; default the first four, at
            level ``"estimate"`` the first three. Functions of your own may stand anywhere (:func:`lipjax.certify`).
        dual_steps: steps of ascent for each rival.
        branch_seconds: of branch and bound, for each example.
        rule: trained slopes that the dual may start from.
        domain: what is certified and attacked: the whole ``"ball"``, or ``"pixels"``, what of it lies in [0, 1].
        triage: leave out what an earlier stage has decided; without it every example goes through all stages, and
            the same ones are certified.
        radius: find the certified radius of each example as well, and attack at multiples of eps.
        progress: a file of what is known so far; the evaluation goes on from it where it exists, and keeps it up to
            date.

    Returns:
        Columns and summary. ``attacked`` means that an attack found a wrong prediction: the paper's PGD, which stays in
        [0, 1], or at levels that are bounds the stronger one in the domain (:func:`lipjax.attack`).

    Raises:
        ValueError: an option that cannot be used, inputs outside of the domain, or progress of another evaluation.

    Reference:
        [H21] section 5.
    """
    check_domain(dataset.images / dataset.scale, domain)
    # A stream of its own: training, which made the network, has drawn from the same seed.
    norm_key, attack_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), CERTIFICATION))
    count, options = len(dataset), Ascent(dual_steps, rule)
    rounds = 1 + (RADIUS_ROUNDS if radius else 0)
    certifier = Certifier(
        network, count, level=level, delta=delta, key=norm_key, rounds=rounds, rtol=rtol, domain=domain
    )
    claim = certifier.claim
    known = {
        "global": Global(eps),
        "attack": Attack(network, eps, domain, attack_key, strong=claim.is_bound),
        "local": Local(eps),
        "dual": Dual(eps, options),
        "branch": Branch(eps, branching_of(branch_seconds)),
    }
    chosen = chosen_stages(stages, claim)
    ladder = ladder_of(chosen, known, eps)
    names = tuple(stage.name for stage in ladder)
    climbed = (
        (*ladder, Radius(eps, options, tuple(name for name in chosen if name in ("attack", *OF_RADII))))
        if radius
        else ladder
    )
    evidence = no_evidence(certifier, dataset.labels, dataset.images.shape[1:])
    facts = {
        "eps": eps,
        "seed": seed,
        "level": claim.name,
        "delta": delta,
        "rtol": rtol,
        "stages": names,
        "domain": domain,
    }
    facts |= {"dual_steps": dual_steps, "branch_seconds": branch_seconds, "triage": triage, "radius": radius}
    facts |= {"network": fingerprint(network), "rule": digest(rule), "scale": dataset.scale}
    facts |= {"data": digest((dataset.images, dataset.labels)), "version": importlib.metadata.version("lipjax")}
    file = ProgressFile(progress, facts, SAVE_SECONDS)
    reached = file.restore(evidence, certifier)
    cohorts = functools.partial(_cohorts, dataset, batch_size)
    lap = functools.partial(file.lap, evidence, certifier)
    climb(climbed, certifier, evidence, cohorts, triage=triage, progress=reached, lap=lap)
    file.write(evidence, certifier, reached)

    columns: Columns = {"index": np.arange(count), **{name: getattr(evidence, name) for name in COLUMNS}}
    curves: dict[str, Any] = {}
    if radius:
        columns["radius"] = evidence.radius
        curves["median_radius"] = float(np.median(evidence.radius))
        curves["certified_accuracy_at"] = _certified_curve(evidence.radius)
        curves["pgd_accuracy_at"], broken_at = _pgd_curve(
            known["attack"], evidence, "attack" in names, cohorts, certifier
        )
        curves["radii_but_attacked"] = int((evidence.correct & (evidence.radius >= broken_at)).sum())
    local = np.flatnonzero(evidence.local)
    live, products = evidence.live[local], evidence.norm_products[local]
    summary = {
        **_accuracies(evidence, ladder, triage),
        "eps": eps,
        "domain": domain,
        "level": claim.name,
        "claim": claim.words(delta),
        "is_bound": claim.is_bound,
        "delta": delta if claim.may_fail else None,
        "rtol": rtol,
        "stages": list(names),
        "dual_steps": dual_steps if "dual" in names else None,
        "branch_seconds": branch_seconds if "branch" in names else None,
        "triage": triage,
        "dtype": np.dtype(claim.dtype).name,
        "ledger": certifier.ledger.facts(),
        "global_lipschitz": certifier.global_lipschitz,
        **_local_figures(evidence.lipschitz[local], certifier.global_lipschitz, live, products),
        **curves,
        "cost_per_image": {name: float(getattr(evidence, name).mean()) for name in COSTS},
        "seconds": {name: round(lap, 2) for name, lap in file.laps.items()},
    }
    return Evaluation(columns, summary, local, live, products)


def _accuracies(evidence: Evidence, ladder: tuple[Stage, ...], triage: bool) -> dict[str, Any]:
    """Fractions of all examples, and the counts behind them; None for what was not asked."""
    correct, certified, attacked = evidence.correct, evidence.certified, evidence.attacked
    names, certifying = [stage.name for stage in ladder], [stage.name for stage in ladder if stage.certifies]
    own = [name for name in names if name not in NAMES]
    decided = {name: int((evidence.stage == name).sum()) for name in ("prediction", *NAMES, *own, "undecided")}
    found = {
        "clean_accuracy": correct,
        "pgd_accuracy": correct & ~evidence.broken_by_pgd if "attack" in names else None,
        "attack_accuracy": correct & ~attacked if "attack" in names else None,
        "certified_accuracy": certified,
        "certified_accuracy_with_global_norms": evidence.stage == "global" if "global" in names else None,
    }
    counts = {
        "examples": len(correct),
        "correct": int(correct.sum()),
        "correct_after_pgd": int((correct & ~evidence.broken_by_pgd).sum()),
        "correct_after_attack": int((correct & ~attacked).sum()),
        "certified": int(certified.sum()),
        "certified_with_global_norms": decided["global"],
        # With triage nobody is attacked who is certified, or bounded who is attacked: nothing is compared.
        "certified_but_attacked": None if triage else int((certified & attacked).sum()),
        "decided": decided,
        "bounded_locally": int(evidence.local.sum()),
    }
    by_stage = np.cumsum([(certified & (evidence.stage == name)).mean() for name in certifying]).tolist()
    accuracies = {name: None if which is None else float(which.mean()) for name, which in found.items()}
    return {**accuracies, "certified_accuracy_after": dict(zip(certifying, by_stage, strict=True)), "counts": counts}


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


def _cohorts(
    dataset: Dataset, batch_size: int, places: np.ndarray, title: str
) -> Iterator[tuple[np.ndarray, Examples]]:
    """The examples at some places in batches of one size, with a progress bar.

    The size is that of the whole data set in as few batches as ``batch_size`` allows, whatever the places: functions of
    batches are compiled once. The last one is filled up by repeating: yields the places without and the batch with the
    repetition.
    """
    cohorts = max(1, -(-len(dataset) // batch_size))
    size = max(1, -(-len(dataset) // cohorts))
    with tqdm(total=len(places), desc=title, unit=" images", disable=None, leave=False) as bar:
        for start in range(0, len(places), size):
            part = places[start : start + size]
            padded = np.resize(part, size)
            x = dataset.images[padded].astype(np.float32) / dataset.scale
            yield part, Examples(jnp.asarray(x), jnp.asarray(dataset.labels[padded]), padded)
            bar.update(len(part))


def _certified_curve(radii: np.ndarray) -> list[list[float]]:
    """Pairs of eps and the share of examples with at least that radius, up to the largest radius."""
    grid = np.linspace(0, radii.max() if radii.max() > 0 else 1, CURVE_POINTS)
    # At eps 0 it is the clean accuracy; beyond, a radius of 0 certifies nothing.
    return [[float(eps), float(((radii >= eps) & (radii > 0)).mean())] for eps in grid]


def _pgd_curve(
    attack: Attack, evidence: Evidence, attacked: bool, cohorts: Cohorts, certifier: Certifier
) -> tuple[list[list[float]], np.ndarray]:
    """Pairs of eps and PGD accuracy, and the least eps at which each example was broken (N,), or infinity.

    An example that is broken at one eps is broken at every larger one.
    """
    count, correct = len(evidence.label), evidence.correct
    broken_at = np.full(count, np.inf)
    curve = [[0.0, float(correct.mean())]]
    for share in ATTACK_SHARES:
        eps = share * attack.eps
        left = correct & np.isinf(broken_at)
        if share == 1 and attacked:
            broken = evidence.broken_by_pgd
        else:
            scratch = no_evidence(certifier, evidence.label, evidence.points.shape[1:])
            scratch.stage = np.where(left, scratch.stage, "prediction")
            pgd_only = dataclasses.replace(attack, eps=eps, strong=False)
            climb((pgd_only,), certifier, scratch, cohorts)
            broken = scratch.attacked
        broken_at[left & broken] = eps
        curve.append([eps, float((correct & np.isinf(broken_at)).mean())])
    broken_at[evidence.attacked] = np.minimum(broken_at[evidence.attacked], attack.eps)
    return curve, broken_at

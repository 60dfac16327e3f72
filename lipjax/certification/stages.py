"""Stages: the ladder of a certification; each gets what those before, which are cheaper, left undecided.

A stage is a value with a name, the places that it asks for, and what it does with a batch of them: it writes what it
finds into the evidence. A ladder is a tuple of stages. docs/extending.md adds one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lipjax.certification.branching import Branching
from lipjax.certification.certifier import Certifier
from lipjax.certification.evidence import NAME_LENGTH, Evidence, Examples
from lipjax.certification.packing import pack, unpack
from lipjax.certification.pairs import Ascent, Prover
from lipjax.norms.cohorts import Claim

NAMES = ("global", "attack", "local", "dual", "branch")
BOUNDING = ("global", "local", "dual", "branch")  # those of them that certify
OF_RADII = ("global", "local", "dual")  # those of them that a search for a radius may ask again and again
PROOFS = ("dual", "branch")  # those that need norms that are bounds


class Stage(Protocol):
    """One rung of the ladder."""

    @property
    def name(self) -> str: ...

    @property
    def certifies(self) -> bool:
        """Whether it may certify; else it attacks, or adds to what is known."""
        ...

    @property
    def rounds(self) -> int:
        """How often the stage goes through the examples; who was decided in one round is not asked in the next."""
        ...

    def title(self, round_: int) -> str:
        """What the progress bar says."""
        ...

    def asks(self, evidence: Evidence, triage: bool) -> np.ndarray:
        """Which examples it wants to see (N,)."""
        ...

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        """Enter into the evidence what a batch shows about the examples at these places, the first of the batch."""
        ...


@dataclasses.dataclass
class Progress:
    """How far a ladder was climbed.

    Attributes:
        rung: place of the stage that is under way.
        round: of it.
        visited: the examples that were seen in this round (N,).
    """

    rung: int
    round: int
    visited: np.ndarray


# Batches of the examples at some places, under a title: the places, and the batch, filled up by repeating.
Cohorts = Callable[[np.ndarray, str], Iterator[tuple[np.ndarray, Examples]]]


def climb(
    ladder: tuple[Stage, ...],
    certifier: Certifier,
    evidence: Evidence,
    cohorts: Cohorts,
    *,
    triage: bool = True,
    progress: Progress | None = None,
    lap: Callable[[str, Progress], None] = lambda name, progress: None,
) -> None:
    """Take a ladder, from where it was left, and fill in the evidence.

    Args:
        ladder: the stages, in order.
        certifier: of at least as many examples as there are.
        evidence: what is known; changed in place.
        cohorts: makes batches.
        triage: ask for what is undecided alone.
        progress: where to go on; default the first stage. Changed in place.
        lap: called after each batch with the name of the stage.
    """
    count = len(evidence.label)
    progress = Progress(0, 0, np.zeros(count, bool)) if progress is None else progress
    while progress.rung < len(ladder):
        stage = ladder[progress.rung]
        while progress.round < stage.rounds:
            places = np.flatnonzero(stage.asks(evidence, triage) & ~progress.visited)
            for part, batch in cohorts(places, stage.title(progress.round)):
                started = time.perf_counter()
                stage(certifier, evidence, part, batch, progress.round)
                evidence.seconds[part] += (time.perf_counter() - started) / len(part)
                progress.visited[part] = True
                lap(stage.name, progress)
            progress.round, progress.visited = progress.round + 1, np.zeros(count, bool)
        progress.rung, progress.round = progress.rung + 1, 0


StageOf = Callable[[Any], Stage]  # of a user: from the radius, scalar or one per example (N,), to a stage


def chosen_stages(
    stages: str | Sequence[str | StageOf] | None, claim: Claim, known: Sequence[str] = NAMES
) -> tuple[str | StageOf, ...]:
    """The stages of a ladder, at least one of which certifies.

    Args:
        stages: names, in the order of the ladder, and functions of a user that make stages, anywhere. Default all that
            are known and that go with the claim, but for branching, which takes long: the dual is a proof, and needs
            norms that are bounds.
        claim: what norms are worth.
        known: the names there are.

    Raises:
        ValueError: an unknown stage, one twice or in another order, none that certifies, or a proof from estimates.
    """
    if stages is None:
        return tuple(name for name in known if name != "branch" and (name != "dual" or claim.is_bound))
    stages = (stages,) if isinstance(stages, str) or callable(stages) else tuple(stages)
    names, text = [stage for stage in stages if not callable(stage)], ",".join(map(str, stages))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"stages name {unknown[0]!r}, which is not known; give some of {', '.join(known)}, or a function "
            "from eps to a stage"
        )
    if names != [name for name in known if name in names]:
        raise ValueError(f"stages={text} are not in order; give each once, in the order {','.join(known)}")
    if len(names) == len(stages) and not set(names) & set(BOUNDING):
        raise ValueError(f"stages={text} certify nothing; give at least one of {', '.join(BOUNDING)}")
    proofs = [name for name in names if name in PROOFS]
    if proofs and not claim.is_bound:
        raise ValueError(
            f"stages={text} name {proofs[0]!r}, which is a proof, but level={claim.name!r} is none: leave it out, or "
            "give a level that is a bound"
        )
    return stages


def ladder_of(stages: Sequence[str | StageOf], known: dict[str, Stage], eps: Any) -> tuple[Stage, ...]:
    """The ladder of some stages, from the known ones by name.

    Raises:
        ValueError: a stage of a user whose name is taken, or too long.
    """
    ladder = tuple(stage(eps) if callable(stage) else known[stage] for stage in stages)
    own = [stage.name for stage, given in zip(ladder, stages, strict=True) if callable(given)]
    taken = ("prediction", "undecided", "radius", *NAMES)
    for place, name in enumerate(own):
        if name in (*taken, *own[:place]) or not 0 < len(name) <= NAME_LENGTH:
            raise ValueError(
                f"a stage is called {name!r}; give it a name of its own, of at most {NAME_LENGTH} letters, not one "
                f"of {', '.join(taken)}"
            )
    return ladder


@dataclasses.dataclass(frozen=True)
class Bounding:
    """What the stages that bound have in common.

    Attributes:
        eps: l2 radius, scalar or one per example (N,).
    """

    eps: float | np.ndarray
    name = "bounds"
    certifies = True
    rounds = 1

    def title(self, round_: int) -> str:
        return f"{self.name} bounds"

    def radius(self, batch: Examples) -> float | np.ndarray:
        """Of each example of a batch (B,), or of all."""
        return np.asarray(self.eps)[batch.index] if np.ndim(self.eps) else self.eps

    def asks(self, evidence: Evidence, triage: bool) -> np.ndarray:
        return evidence.undecided if triage else np.ones(len(evidence.label), bool)


@dataclasses.dataclass(frozen=True)
class Global(Bounding):
    """Certificates with the norms of the whole layers."""

    name = "global"

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        evidence.learn(self.name, places, certifier.with_global_norms(batch.x, batch.label, self.radius(batch)))


@dataclasses.dataclass(frozen=True)
class Local(Bounding):
    """Certificates with norms of each example's own."""

    name = "local"

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        found = certifier.with_local_norms(batch.x, batch.label, self.radius(batch), batch.index)
        evidence.learn(self.name, places, found)
        count = len(places)
        evidence.products[places] += found.products[:count].sum(axis=1)
        evidence.live[places], evidence.norm_products[places] = found.live[:count], found.products[:count]
        evidence.sigmas[places], evidence.local[places] = found.sigmas[:count], True
        evidence.rows[places] = pack(found.rows)[:count]


@dataclasses.dataclass(frozen=True)
class Dual(Bounding):
    """Certificates by the dual, with the norms that are known: those of the local stage, or of the whole layers.

    Attributes:
        options: of the ascent.
    """

    options: Prover = dataclasses.field(default_factory=Ascent)
    name = "dual"

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        asked = np.arange(len(batch.index)) < len(places)
        found = certifier.by_dual(
            *(batch.x, batch.label, self.radius(batch)),
            sigmas=evidence.sigmas[batch.index],
            rows=unpack(certifier.network, evidence.rows[batch.index]),
            options=self.options,
            asked=asked,
        )
        evidence.learn(self.name, places, found)
        if found.points is not None:
            points = found.points[: len(places)]
            broken = ~np.isnan(points.reshape(len(places), -1)).any(axis=1)
            if evidence.points.shape[1:] == points.shape[1:]:
                evidence.points[places[broken]] = points[broken]
            evidence.refute(self.name, places, broken)


@dataclasses.dataclass(frozen=True)
class Branch(Dual):
    """Certificates by branch and bound on the dual, and counterexamples found on the way.

    Attributes:
        options: of the branching.
    """

    options: Prover = dataclasses.field(default_factory=Branching)
    name = "branch"

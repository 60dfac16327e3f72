"""Certified radii: the largest eps of each example that passed a sound test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lipjax.certification.certifier import Certification, Certifier
from lipjax.certification.evidence import Evidence, Examples
from lipjax.certification.pairs import Ascent, Starts

# A test takes radii (N,), the places among N that are asked for, and the round; it says which of those pass.
Test = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
GLOBAL_ROUNDS = 12  # tests with global norms, which draw no starts


def largest_passing(
    test: Test, low: np.ndarray, high: np.ndarray, start: np.ndarray, *, max_eps: float, tol: float, rounds: range
) -> np.ndarray:
    """Doubling until refused, then bisection, for many examples at once.

    Args:
        test: see :data:`Test`.
        low: the largest radius known to pass (N,).
        high: the least radius known to be refused (N,), infinite where there is none.
        start: the first radius to try (N,) where ``low`` is 0.
        max_eps: no larger radius is tried.
        tol: stop when the interval between the largest that passed and the least that was refused is at most ``tol``
            times the former, or times 1 where it is larger, and times ``tol`` where it is smaller.
        rounds: one test per example each.

    Returns:
        The largest radius of each example that PASSED (N,), never a midpoint.
    """
    passed, refused = low.copy(), high.copy()
    for round_ in rounds:
        places = np.flatnonzero((refused - passed > tol * np.clip(passed, tol, 1)) & (passed < max_eps))
        if not places.size:
            break
        growing = np.where(passed > 0, 2 * passed, start)
        eps = np.minimum(np.where(np.isinf(refused), growing, (passed + refused) / 2), max_eps)
        ok = test(eps, places, round_)
        passed[places[ok]], refused[places[~ok]] = eps[places[ok]], eps[places[~ok]]
    return passed


def certified_radii(
    certifier: Certifier,
    x: np.ndarray,
    label: np.ndarray,
    index: np.ndarray,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    max_eps: float | None = None,
    tol: float = 1e-3,
    first_round: int = 0,
    stages: tuple[str, ...] = ("global", "local"),
    options: Ascent | None = None,
) -> np.ndarray:
    """The certified radii of a batch.

    The search begins at the radius that the global norms certify, which costs no start. Each round of an example draws
    fresh starts; a norm at a smaller eps is at most that at a larger one, so the least found so far is kept. Where the
    forward pass refuses, the dual is asked with the norms of that round, from where it was left at the radius before.

    Args:
        certifier: one that was made for at least this many examples, with the rounds that may be used.
        x: inputs (B, ...) in [0, 1] pixels.
        label: integers (B,).
        index: places of the examples among all of the certifier (B,).
        low: radii known to pass (B,); default 0.
        high: radii known to be refused (B,); default infinite. Wrong predictions need no mention.
        max_eps: no larger radius is tried; default the diameter of the pixel range [0, 1]^d.
        tol: see :func:`largest_passing`.
        first_round: rounds of the certifier that these examples have used before.
        stages: which of "global", "local" and "dual" may pass a radius. Without "local" the norms are global ones.
        options: of the dual's ascent.

    Returns:
        Radii (B,) in float64; 0 for a wrong prediction, and where nothing passed.
    """
    count = len(x)
    max_eps = math.sqrt(x[0].size) if max_eps is None else max_eps
    clean = certifier.with_global_norms(x, label, 0.0).certificate
    low = np.zeros(count) if low is None else low
    high = np.where(clean.prediction == label, np.inf if high is None else high, 0.0)
    slope = _steepest(certifier, label)
    with np.errstate(divide="ignore", invalid="ignore"):
        guess = np.where(slope > 0, clean.worst_margin / np.where(slope > 0, slope, 1), np.inf)
    guess = np.clip(np.where(np.isfinite(guess), guess, max_eps), tol**2, max_eps)

    def with_global_norms(eps: np.ndarray, places: np.ndarray, _: int) -> np.ndarray:
        return certifier.with_global_norms(x, label, eps).certificate.certified[places]

    limits = {"max_eps": max_eps, "tol": tol}
    if "global" in stages:
        low = largest_passing(with_global_norms, low, high, guess, **limits, rounds=range(GLOBAL_ROUNDS))
    # Norms found at a refused radius, and with them at every smaller one.
    ceilings = np.full((count, len(certifier.sigmas)), np.inf)
    known = np.full(count, np.inf)

    starts: Starts = {}

    def by_dual(eps: np.ndarray, asked: np.ndarray, wanted: np.ndarray, found: Certification) -> np.ndarray:
        arguments = {"sigmas": found.sigmas, "rows": found.rows, "options": options or Ascent()}
        batch = x[asked], label[asked], eps[asked]
        refined = certifier.by_dual(*batch, **arguments, asked=wanted, starts=starts, index=asked)
        return refined.certificate.certified

    def with_norms_of_a_round(eps: np.ndarray, places: np.ndarray, round_: int) -> np.ndarray:
        asked = np.resize(places, _padded(len(places), count))
        if "local" not in stages:
            found = certifier.with_global_norms(x[asked], label[asked], eps[asked])
            return _passed(found, eps, asked, len(places))
        nested = np.where((eps <= known)[:, None], ceilings, np.inf)
        found = certifier.with_local_norms(x[asked], label[asked], eps[asked], index[asked], round_, nested[asked])
        ok, (sigmas, finite) = _passed(found, eps, asked, len(places)), (found.sigmas, found.finite)
        kept = ~ok & finite[: len(places)] & (eps[places] <= known[places])
        ceilings[places[kept]], known[places[kept]] = sigmas[: len(places)][kept], eps[places[kept]]
        return ok

    def _passed(found: Certification, eps: np.ndarray, asked: np.ndarray, real: int) -> np.ndarray:
        ok = found.certificate.certified.copy()
        wanted = ~ok & (np.arange(len(asked)) < real)
        if "dual" in stages and wanted.any():
            ok |= by_dual(eps, asked, wanted, found)
        return ok[:real]

    rounds = range(first_round, certifier.rounds) if {"local", "dual"} & set(stages) else range(0)
    return largest_passing(with_norms_of_a_round, low, high, guess, **limits, rounds=rounds)


@dataclasses.dataclass(frozen=True)
class Radius:
    """The stage that finds the certified radius of each example that is predicted right, from what is known at eps.

    An example that was refused at eps, or attacked there, has a smaller radius.

    Attributes:
        eps: of the stages before.
        options: of the dual's ascent.
        names: of the stages that may pass a radius.
    """

    eps: float
    options: Ascent
    names: tuple[str, ...]
    name = "radius"
    certifies = False
    rounds = 1

    def title(self, round_: int) -> str:
        return "radii"

    def asks(self, evidence: Evidence, triage: bool) -> np.ndarray:
        return evidence.correct

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        certified = evidence.certified[batch.index]
        found = certified_radii(
            *(certifier, np.asarray(batch.x), np.asarray(batch.label), batch.index),
            low=np.where(certified, self.eps, 0.0),
            high=np.where(certified, np.inf, self.eps),
            first_round=1,
            stages=self.names,
            options=self.options,
        )
        evidence.radius[places] = found[: len(places)]


def _steepest(certifier: Certifier, label: np.ndarray) -> np.ndarray:
    """An upper bound of how fast any margin of each label can fall, by the global constant."""
    rows = np.asarray(certifier.network.head.matrix())
    distances = np.asarray([np.linalg.norm(rows - row, axis=1).max() for row in rows])
    return certifier.global_lipschitz * distances[label]


def _padded(count: int, whole: int) -> int:
    """A size of few: the whole, or a half, a quarter, ... of it, so that few sizes are compiled."""
    while whole > 1 and -(-whole // 2) >= count:
        whole = -(-whole // 2)
    return whole

"""Branch and bound on the dual: boxes are cut in two until every part is proven, or one holds a counterexample.

The root is one pair of example and rival with what the pass knows. In a child only the box of one row before one
activation is smaller; its center, ball, rows and norms stay those of the root, which contain every activation of the
child too. A row that was cut may have a multiplier though nothing passes it on: so the ascent of a child has offsets.
The proof of a child is the one of the dual, with its boxes; a child inherits the margin of its parent where that is
more. The domains with the least margins come first, many at once.

Reference:
    Bunel, Turkaslan, Torr, Kohli, Mudigonda, NeurIPS 2018; Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter, NeurIPS 2021
    (beta-CROWN: multipliers of splits; here they are the dual's own).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import ascent, dual
from lipjax.bounds.ascent import AscentState
from lipjax.bounds.propagation import Bounds
from lipjax.certification.pairs import Doubts, Proven, narrow, proven_margin
from lipjax.networks.graph import Network
from lipjax.networks.linear_maps import length
from lipjax.networks.masks import kept

AT_ONCE = 32  # domains that are cut together, at most
COMPILING = 2  # domains after which each program has been called: the root and two parts
# Steps of ascent, and the share of its rates: a child begins near to where it ends, and would be shaken off by more.
ROOT, CHILD = (60, 1.0), (40, 0.1)
TRIED, LEAST_WIN = 8, 1e-4  # cuts of a domain that are tried; what a part counts for that wins nothing

Boxes = tuple[tuple[np.ndarray, np.ndarray], ...]  # before each activation


@dataclasses.dataclass(frozen=True)
class Branching:
    """How branch and bound is asked.

    Attributes:
        seconds: per example, at most; a round that has begun is finished.
        max_domains: per example, at most: a limit that does not depend on the machine.
    """

    seconds: float = 10.0
    max_domains: float = math.inf

    def prove(self, doubts: Doubts) -> Proven:
        """Margins by branch and bound, the strongest rivals first, and counterexamples."""
        margins, steps, others = doubts.forward.copy(), np.zeros(len(doubts.label), int), doubts.others
        points = np.full(doubts.bounds.input.center.shape, np.nan, np.float32)
        briefly = dataclasses.replace(self, seconds=math.inf, max_domains=COMPILING)
        small, asked = narrow(doubts.network), doubts.asked if doubts.network.activations else ()  # nothing can be cut
        for place, k in enumerate(np.flatnonzero(asked)):
            own = jax.tree.map(lambda leaf, k=k: leaf[k], doubts.bounds)
            of = doubts.network, small, own, int(doubts.label[k])
            if place == 0:  # compiles everything before the clock runs
                _Tree(*of, briefly).margin(int(np.argmin(others[k])))
            tree = _Tree(*of, self)
            for rival in np.argsort(others[k]):
                if others[k, rival] > 0:
                    break
                margins[k, rival] = np.fmax(margins[k, rival], tree.margin(int(rival)))
                if not margins[k, rival] > 0:
                    break  # one rival that cannot be refuted is enough
            steps[k] = tree.steps
            if tree.point is not None:
                points[k] = tree.point
        return Proven(margins, steps, points)


def branching_of(seconds: float) -> Branching:
    """Branching for so long per example. Raises ValueError unless that is a finite number of at least 0."""
    if not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
        raise ValueError(f"branch_seconds={seconds!r} cannot be used; give seconds per example, at least 0")
    return Branching(float(seconds))


class _Tree:
    """Branch and bound of one example, rival by rival."""

    def __init__(self, network: Network, small: Network, bounds: Bounds, label: int, options: Branching) -> None:
        self.network, self.bounds, self.label, self.options = network, bounds, label, options
        self.narrow = small, narrow(bounds)
        self.size = max(1, min(AT_ONCE, ascent.pairs_at_once(network) // 2))
        self.started, self.steps, self.domains = time.monotonic(), 0, 0
        self.point: np.ndarray | None = None

    @property
    def is_spent(self) -> bool:
        """Whether the time or the number of domains is used up, or a counterexample is known."""
        late = time.monotonic() - self.started > self.options.seconds
        return late or self.domains >= self.options.max_domains or self.point is not None

    def margin(self, rival: int) -> float:
        """The margin against one rival that is proven on all parts together, net of rounding."""
        boxes: Boxes = tuple(
            (np.asarray(lower), np.asarray(upper)) for lower, upper in (before.box for before in self.bounds.before)
        )
        state = _root(*self.narrow, self.label, rival)
        proven, ties = math.inf, itertools.count()
        left: list[tuple[float, int, Boxes, Any]] = []

        def enter(parts: list[tuple[float, Boxes, Any]], climb: tuple[int, float]) -> None:
            nonlocal proven
            for value, of, grown in self._bounded(parts, rival, climb):
                if value > 0:
                    proven = min(proven, value)
                else:
                    heapq.heappush(left, (value, next(ties), of, grown))

        enter([(-math.inf, boxes, state)], ROOT)
        while left and not self.is_spent:
            chosen = [heapq.heappop(left) for _ in range(min(self.size, len(left)))]
            children, whole = [], []
            for (value, _, of, grown), cut in zip(chosen, self._cuts(chosen, rival), strict=True):
                halves = _halves(of, *cut)
                children += [(value, half, grown) for half in halves]
                if not halves:  # it is linear: all that is left is to climb on
                    whole.append((value, of, grown))
            enter(children, CHILD)
            enter(whole, ROOT)
        return min(proven, min((value for value, *_ in left), default=math.inf))

    def _bounded(
        self, parts: list[tuple[float, Boxes, Any]], rival: int, climb: tuple[int, float]
    ) -> list[tuple[float, Boxes, Any]]:
        """Some domains with their margins, and where their ascents ended; also looks for counterexamples."""
        found = []
        for start in range(0, len(parts), 2 * self.size):
            some = parts[start : start + 2 * self.size]
            values, boxes, states = zip(*some, strict=True)
            boxes_of, states_of = (_stacked(each, 2 * self.size) for each in (boxes, states))
            grown, multipliers, points = _ascend(*self.narrow, self.label, rival, boxes_of, states_of, *climb)
            proven = np.asarray(_prove(self.network, self.bounds, self.label, rival, boxes_of, multipliers))
            self._look(points)
            self.steps += climb[0] * len(some)
            self.domains += len(some)
            grown = jax.tree.map(np.asarray, grown)
            for k, value in enumerate(values):
                state = jax.tree.map(lambda leaf, k=k: leaf[k], grown)
                found.append((float(np.fmax(value, proven[k])), boxes[k], state))
        return found

    def _cuts(self, chosen: list[tuple[float, int, Boxes, Any]], rival: int) -> list[tuple[int, int, float, float]]:
        """For each domain the activation and the row to cut, where, and how much it may win."""
        boxes, states = (_stacked([each[k] for each in chosen], self.size) for k in (2, 3))
        found = [np.asarray(each) for each in _best_cuts(*self.narrow, self.label, rival, boxes, states)]
        return [tuple(each[k].item() for each in found) for k in range(len(chosen))]  # type: ignore[misc]

    def _look(self, points: Array) -> None:
        """Keep a point of the region that is predicted wrong, in float32 and by the parameters as they are."""
        x, eps = np.asarray(self.bounds.input.center, np.float64), float(self.bounds.input.ball)
        given = (self.narrow[0], points), (self.network, points.astype(jnp.float64))
        wrong = np.all([np.asarray(_predictions(*each)) != self.label for each in given], axis=0)
        for k in np.flatnonzero(wrong):
            point = np.asarray(points[k])
            inside = np.linalg.norm((np.asarray(point, np.float64) - x).ravel()) <= eps
            if self.bounds.input.domain == "pixels":
                inside = inside and bool(np.all((point >= 0) & (point <= 1)))
            if inside:
                self.point = point


def _stacked(trees: Any, size: int) -> Any:
    """Trees of arrays as one with a leading axis of a given size, filled up by repeating the first."""
    whole = [*trees, *[trees[0]] * (size - len(trees))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *whole)


def _halves(boxes: Boxes, place: int, row: int, at: float, gain: float) -> list[Boxes]:
    """Both parts of a domain; none where a cut wins nothing."""
    if not gain > 0:
        return []
    parts = []
    for side in (0, 1):
        ends = [bound.copy() for bound in boxes[place]]
        ends[1 - side].reshape(-1)[row] = at  # the upper end of the first part, the lower one of the second
        parts.append((*boxes[:place], tuple(ends), *boxes[place + 1 :]))
    return parts


def narrowed(bounds: Bounds, boxes: Any) -> Bounds:
    """Bounds of one example with other boxes before the activations."""
    before = tuple(
        dataclasses.replace(each, lower=lower, upper=upper)
        for each, (lower, upper) in zip(bounds.before, boxes, strict=True)
    )
    return dataclasses.replace(bounds, before=before)


@jax.jit
def _root(network: Network, bounds: Bounds, label: int, rival: int) -> AscentState:
    state = ascent.start(network, bounds, jnp.asarray(label), jnp.asarray(rival))
    return ascent.begin(state.slopes, state.log_weights, tuple(jnp.zeros_like(each.center) for each in bounds.before))


@functools.partial(jax.jit, static_argnames=("num_steps", "share"))
def _ascend(
    network: Network,
    bounds: Bounds,
    label: int,
    rival: int,
    boxes: Any,
    states: AscentState,
    num_steps: int,
    share: float,
) -> tuple[AscentState, dual.Multipliers, Array]:
    """Ascents of some domains: where they end, their multipliers, and the points where the last bound is attained."""

    def one(boxes: Any, state: AscentState) -> tuple[AscentState, dual.Multipliers, Array]:
        own = narrowed(bounds, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), boxes))
        pair = network, own, jnp.asarray(label), jnp.asarray(rival)
        begun = ascent.begin(state.slopes, state.log_weights, state.offsets)
        start = _farther(
            *(_Reached(each, *ascent.finish(*pair, each)) for each in (begun, _cut_slopes(network, own, bounds, state)))
        )
        ended = ascent.take_steps(*pair, start.state, num_steps, num_steps, share)
        best = _farther(start, _Reached(ended, *ascent.finish(*pair, ended)))
        c = dual.pull(*pair, dual.given(best.multipliers)).input.sum
        point = bounds.input.center - bounds.input.ball * (1 - 1e-6) * c / jnp.maximum(length(c), 1e-30)
        point = jnp.clip(point, 0, 1) if bounds.input.domain == "pixels" else point
        # With full rates a climb may first go down.
        return ended if share == 1 else best.state, best.multipliers, point

    return jax.vmap(one)(boxes, states)


class _Reached(NamedTuple):
    """Where an ascent is, and what is proven there."""

    state: AscentState
    value: Array
    multipliers: dual.Multipliers


def _farther(first: _Reached, second: _Reached) -> _Reached:
    """Of two ascents of one pair that which has come farther."""
    better = second.value > first.value
    return jax.tree.map(lambda one, other: jnp.where(better, other, one), first, second)


def _cut_slopes(network: Network, own: Bounds, root: Bounds, state: AscentState) -> AscentState:
    """The same with the slopes of all rows that were cut as they are in the middle of what is left of their boxes."""
    slopes = []
    for activation, before, whole, old in zip(network.activations, own.before, root.before, state.slopes, strict=True):
        (lower, upper), (first, last) = before.box, whole.box
        middle = activation.slopes(dataclasses.replace(before, center=(lower + upper) / 2))
        slopes.append(jnp.where(((lower > first) | (upper < last))[None], middle, old))
    return ascent.begin(tuple(slopes), state.log_weights, state.offsets)


@jax.jit
def _prove(
    network: Network, bounds: Bounds, label: int, rival: int, boxes: Any, multipliers: dual.Multipliers
) -> Array:
    """The margins that some multipliers prove for float32 inference, in float64, one per domain."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), multipliers)
    pair = jnp.asarray(label), jnp.asarray(rival)
    return jax.vmap(lambda boxes, one: proven_margin(network, narrowed(bounds, boxes), *pair, one))(boxes, wide)


@jax.jit
def _best_cuts(
    network: Network, bounds: Bounds, label: int, rival: int, boxes: Any, states: AscentState
) -> tuple[Array, Array, Array, Array]:
    """For each domain the activation, the row, the cut and the score of the cut that wins the most in both parts.

    Tried are those with the largest gaps. What a part wins is seen at the multipliers of the whole, with the slopes of
    the row as in the middle of the part; both are multiplied, as a cut that helps one part alone helps little.
    """

    def one(boxes: Any, state: AscentState) -> tuple[Array, Array, Array, Array]:
        small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), boxes)
        label_, rival_ = jnp.asarray(label), jnp.asarray(rival)
        own = narrowed(bounds, small)
        trace = dual.pull(network, own, label_, rival_, ascent.free(*state.moved))
        now, _ = ascent.finish(network, own, label_, rival_, state)
        places, rows, cuts, gaps = [], [], [], []
        pairs = zip(network.activations, bounds.before, trace.c, boxes, strict=True)
        for place, (activation, before, c, (lower, upper)) in enumerate(pairs):
            at = activation.cut(lower, upper)
            inside = kept(before.rows) & (lower < at) & (at < upper)
            gap = activation.gaps(c.sum, *(bound.astype(jnp.float32) for bound in (lower, upper)))
            largest, which = jax.lax.top_k(jnp.where(inside, gap, 0).ravel(), min(TRIED, gap.size))
            places.append(jnp.full_like(which, place))
            rows, cuts, gaps = [*rows, which], [*cuts, at.ravel()[which]], [*gaps, largest]
        places, rows, cuts, gaps = map(jnp.concatenate, (places, rows, cuts, gaps))
        gaps, tried = jax.lax.top_k(gaps, min(TRIED, gaps.size))
        places, rows, cuts = (each[tried] for each in (places, rows, cuts))

        def after(place: Array, row: Array, at: Array, side: int) -> Array:
            halves = []
            for k, (lower, upper) in enumerate(small):
                here = ((jnp.arange(lower.size, dtype=row.dtype) == row) & (place == k)).reshape(lower.shape)
                at_ = at.astype(lower.dtype)
                halves.append((jnp.where(here & (side == 1), at_, lower), jnp.where(here & (side == 0), at_, upper)))
            part = narrowed(bounds, tuple(halves))
            value, _ = ascent.finish(network, part, label_, rival_, _cut_slopes(network, part, own, state))
            return jnp.maximum(jnp.minimum(value, 0) - now, LEAST_WIN * jnp.abs(now))

        won = [jax.vmap(lambda *cut, side=side: after(*cut, side))(places, rows, cuts) for side in (0, 1)]
        score = jnp.where(gaps > 0, won[0] * won[1], 0)
        best = jnp.argmax(score)
        return places[best], rows[best], cuts[best], score[best]

    return jax.vmap(one)(boxes, states)


@jax.jit
def _predictions(network: Network, points: Array) -> Array:
    return jnp.argmax(network(points), axis=1)

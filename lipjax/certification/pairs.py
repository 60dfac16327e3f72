"""Pairs: dual margins of a cohort, proven in float64 pair by pair of example and rival; who is proven leaves.

The ascent is float32 and owes nothing to anybody: what it finds is evaluated once in float64, with all that rounding
may have added subtracted; see :func:`lipjax.bounds.dual.errors`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import ascent, dual
from lipjax.bounds.ascent import AscentState
from lipjax.bounds.propagation import Bounds
from lipjax.bounds.rule import Rule
from lipjax.networks.graph import Network
from lipjax.norms import cohorts

ROUNDS = 3  # looks at who is proven, per ascent
PAIRS = 64  # that are ascended together, at most
SUMMED_UP = 1 + 1e-9  # what the sums of error terms may round down

# Where an ascent of a pair of example and rival ended, to begin the next one of the same pair: slopes and log weights.
Starts = dict[tuple[int, int], tuple[tuple[np.ndarray, ...], np.ndarray]]


class Proven(NamedTuple):
    """What was proven of a batch.

    Attributes:
        margins: net of rounding (B, classes), never worse than those of the forward pass.
        steps: of ascent (B,).
        points: counterexamples (B, ...), not numbers where none was found; None of who looks for none.
    """

    margins: np.ndarray
    steps: np.ndarray
    points: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Doubts:
    """What is asked of a prover: margins of a batch, for those rivals whose forward margin is not positive.

    Attributes:
        network: float64.
        bounds: of the batch, with the rounding of float32 inference.
        label: integers (B,).
        forward: margins (B, classes) of the forward pass, net of rounding.
        asked: which examples (B,).
        starts: where ascents begin and are left, by index and rival; or None.
        index: places of the examples in ``starts`` (B,); or None.
    """

    network: Network
    bounds: Bounds
    label: np.ndarray
    forward: np.ndarray
    asked: np.ndarray
    starts: Starts | None = None
    index: np.ndarray | None = None

    @property
    def others(self) -> np.ndarray:
        """The forward margins, infinite for the labels themselves."""
        own = np.arange(self.forward.shape[1])[None] == self.label[:, None]
        return np.where(own, np.inf, self.forward)


class Prover(Protocol):
    """How margins are proven that the forward pass does not give, by norms that are known."""

    def prove(self, doubts: Doubts) -> Proven: ...


@dataclasses.dataclass(frozen=True)
class Ascent:
    """How the dual is asked.

    Attributes:
        num_steps: steps of Adam per pair.
        rule: trained slopes to start from where they are the better start, or None.
    """

    num_steps: int = 60
    rule: Rule | None = None

    def prove(self, doubts: Doubts) -> Proven:
        """Margins by the dual.

        The strongest rival of each example comes first: where it cannot be refuted, the others need not be.
        """
        margins, steps, others = doubts.forward.copy(), np.zeros(len(doubts.label), int), doubts.others
        doubtful = ~(others > 0) & doubts.asked[:, None]
        first = np.zeros_like(doubtful)
        first[np.arange(len(others)), np.argmin(others, axis=1)] = True
        cohort = _Cohort(doubts, self)
        for now in (first, ~first):
            hopeless = np.asarray(np.any(doubtful & first & ~(margins > 0), axis=1))
            wave = doubtful & now & (~hopeless[:, None] | first)
            examples, rivals = np.nonzero(wave)
            for start in range(0, len(examples), cohort.room):
                part = slice(start, start + cohort.room)
                found, taken = cohort.prove(examples[part], rivals[part])
                margins[examples[part], rivals[part]] = np.fmax(margins[examples[part], rivals[part]], found)
                np.add.at(steps, examples[part], taken)
        return Proven(margins, steps)


class _Cohort:
    """The pairs of one batch: ascent in float32, proof in float64."""

    def __init__(self, doubts: Doubts, options: Ascent) -> None:
        network, bounds = doubts.network, doubts.bounds
        self.network, self.bounds, self.options = network, bounds, options
        self.label, self.starts, self.index = jnp.asarray(doubts.label), doubts.starts, doubts.index
        self.narrow = narrow((network, bounds))
        count, classes = bounds.slack.logits.shape
        self.size = min(PAIRS, ascent.pairs_at_once(network), count * max(1, classes - 1))
        self.room = max(self.size, ascent.pairs_at_once(network) // self.size * self.size)

    def prove(self, examples: np.ndarray, rivals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The margins of some pairs, net of rounding, and the steps that each took."""
        count = len(examples)
        room = -(-count // self.size) * self.size
        at = tuple(jnp.asarray(np.resize(places, room)) for places in (examples, rivals))
        margins, taken = np.full(count, -np.inf), np.zeros(count, int)
        state, unproven = self._begin(at, count), np.arange(count)
        rounds = min(ROUNDS, self.options.num_steps)
        lengths = 0, *np.diff(np.linspace(0, self.options.num_steps, rounds + 1).astype(int))  # the start may do
        for length in lengths:
            for part in cohorts.parts(unproven, self.size, count):
                real = part[part < count]
                state, multipliers = _advance(
                    *self.narrow, self.label, *at, state, part, int(length), self.options.num_steps
                )
                found = _prove(self.network, self.bounds, self.label, *at, part, multipliers)
                margins[real] = np.fmax(margins[real], np.asarray(found)[: len(real)])
            taken[unproven] += length
            unproven = np.flatnonzero(~(margins > 0))
            if not unproven.size:
                break
        if self.starts is not None:
            self._keep(examples, rivals, state)
        return margins, taken

    def _begin(self, at: tuple[Array, Array], count: int) -> AscentState:
        """The start of each pair: from where it was left the last time, else the better of the default and the rule."""
        slopes, log_weights = [], []
        for start in range(0, len(at[0]), self.size):
            part = np.arange(start, start + self.size)
            some = _start(*self.narrow, self.label, *at, part, self.options.rule)
            slopes.append(some.slopes)
            log_weights.append(some.log_weights)
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *zip(slopes, log_weights, strict=True))
        if self.starts:
            joined = self._left(at, count, joined)
        return jax.vmap(ascent.begin)(*joined)

    def _left(self, at: tuple[Array, Array], count: int, joined: tuple) -> tuple:
        assert self.starts is not None
        slopes, log_weights = jax.tree.map(np.array, joined)
        for k, (example, rival) in enumerate(zip(*(np.asarray(places)[:count] for places in at), strict=True)):
            before = self.starts.get((int(self._places()[example]), int(rival)))
            if before is not None:
                for array, value in zip(slopes, before[0], strict=True):
                    array[k] = value
                log_weights[k] = before[1]
        # A copy: what is donated to the next step must not be memory of NumPy.
        return jax.tree.map(functools.partial(jnp.array, copy=True), (slopes, log_weights))

    def _keep(self, examples: np.ndarray, rivals: np.ndarray, state: AscentState) -> None:
        assert self.starts is not None
        slopes, log_weights = jax.tree.map(np.asarray, (state.slopes, state.log_weights))
        for k, (example, rival) in enumerate(zip(examples, rivals, strict=True)):
            kept = tuple(array[k] for array in slopes), log_weights[k]
            self.starts[int(self._places()[example]), int(rival)] = kept

    def _places(self) -> np.ndarray:
        return np.arange(len(self.label)) if self.index is None else self.index


def narrow(tree: Any) -> Any:
    """What is float64 as float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, tree)


@jax.jit
def _start(
    network: Network, bounds: Bounds, label: Array, examples: Array, rivals: Array, part: Array, rule: Rule | None
) -> AscentState:
    def one(example: Array, rival: Array) -> AscentState:
        own, chosen = jax.tree.map(lambda leaf: leaf[example], (bounds, label))
        states = [ascent.start(network, own, chosen, rival)]
        if rule is None:
            return states[0]
        states.append(ascent.begin(rule.slopes(network, own), rule.log_weights))
        values = [ascent.finish(network, own, chosen, rival, state)[0] for state in states]
        return jax.tree.map(lambda default, ruled: jnp.where(values[1] > values[0], ruled, default), *states)

    return jax.vmap(one)(examples[part], rivals[part])


@functools.partial(jax.jit, static_argnames=("num_steps", "of"), donate_argnames="state")
def _advance(
    network: Network,
    bounds: Bounds,
    label: Array,
    examples: Array,
    rivals: Array,
    state: AscentState,
    part: Array,
    num_steps: int,
    of: int,
) -> tuple[AscentState, dual.Multipliers]:
    """Some steps more for some pairs, and the multipliers that they have reached."""

    def one(example: Array, rival: Array, state: AscentState) -> tuple[AscentState, dual.Multipliers]:
        own, chosen = jax.tree.map(lambda leaf: leaf[example], (bounds, label))
        state = ascent.take_steps(network, own, chosen, rival, state, num_steps, of)
        return state, ascent.finish(network, own, chosen, rival, state)[1]

    some = jax.tree.map(lambda leaf: leaf[part], state)
    some, multipliers = jax.vmap(one)(examples[part], rivals[part], some)
    return jax.tree.map(lambda leaf, new: leaf.at[part].set(new, mode="drop"), state, some), multipliers


@jax.jit
def _prove(
    network: Network,
    bounds: Bounds,
    label: Array,
    examples: Array,
    rivals: Array,
    part: Array,
    multipliers: dual.Multipliers,
) -> Array:
    """The margins of some pairs at some multipliers, net of rounding; NaN where they are not finite."""

    def one(example: Array, rival: Array, multipliers: dual.Multipliers) -> Array:
        own, chosen = jax.tree.map(lambda leaf: leaf[example], (bounds, label))
        return proven_margin(network, own, chosen, rival, multipliers)

    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), multipliers)
    return jax.vmap(one)(examples[part], rivals[part], wide)


def proven_margin(network: Network, bounds: Bounds, label: Array, rival: Array, multipliers: dual.Multipliers) -> Array:
    """The margin that some multipliers prove for float32 inference, for one pair, in float64.

    Soundness:
        A lower bound of ``logits[label] - logits[rival]`` anywhere in the region, in exact arithmetic and in float32,
        if the norms of the bounds are bounds. Not a number where anything is not finite.
    """
    trace = dual.pull(network, bounds, label, rival, dual.given(multipliers))
    value = dual.value(network, bounds, trace)
    logits = bounds.slack.logits[label] + bounds.slack.logits[rival]
    errors = dual.errors(network, bounds, trace, logits)
    margin = value - SUMMED_UP * sum(errors)
    return jnp.where(jnp.isfinite(margin) & bounds.features.finite, margin, jnp.nan)

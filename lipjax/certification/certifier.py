"""The certifier: bounds and certificates of many examples, layer by layer, so that converged norms leave the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import propagation, rounding
from lipjax.bounds.arithmetic import EXACT, FLOAT32, Arithmetic
from lipjax.bounds.dual import forward_margins
from lipjax.bounds.propagation import Bounds
from lipjax.certification.certificates import Certificate, certificate
from lipjax.certification.checks import check_batch, check_labels, check_start_key
from lipjax.certification.ledger import Ledger
from lipjax.certification.packing import Rows
from lipjax.certification.pairs import Doubts, Prover, Starts
from lipjax.networks.graph import Network, check_network
from lipjax.networks.layers import Affine, Scale
from lipjax.networks.regions import check_domain, check_eps, l2_ball
from lipjax.norms import cohorts, solvers, starts
from lipjax.norms.cohorts import MaskedLayer, Norms

LEAST_EPS = 1e-100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certification:
    """The certificates of N examples, and what they rest on.

    Attributes:
        certificate: of each example.
        sigmas: norms of the masked layers (N, layers).
        rows: the rows of each layer (N, ...) that these are norms of.
        live: share of varying neurons behind each activation (N, activations).
        products: products that each norm took (N, layers); zero where the norms were known.
        finite: nothing overflowed on the way to the features, in float32 or in this pass (N,).
        dual_steps: steps of ascent that the dual took, of all rivals (N,).
        points: counterexamples (N, ...), not numbers where none was found; None where none was looked for.
    """

    certificate: Certificate
    sigmas: np.ndarray
    rows: Rows
    live: np.ndarray
    products: np.ndarray
    finite: np.ndarray
    dual_steps: np.ndarray
    points: np.ndarray | None = None

    def at(self, places: np.ndarray) -> Certification:
        """What was found for the examples at some places of the batch."""
        return jax.tree.map(lambda leaf: leaf[places], self)


class Certifier:
    """Certifies many examples of one network, layer by layer, so that converged norms leave the batch.

    The probability of failure ``delta`` is that of everything one certifier ever says: it is divided in advance by
    the norms of the whole layers and by those of ``examples`` examples in ``rounds`` rounds, and no more are given out.

    Args:
        network: the classifier, with parameters of float32 or float64.
        examples: how many examples there will be.
        level: ``"probabilistic"``, ``"deterministic"`` or ``"estimate"``; or a function of a user, from the probability
            of failure of ONE start and ``rtol`` to a :class:`lipjax.norms.cohorts.Solver`, whose claim is trusted.
        delta: total probability that any bound is wrong.
        key: the starts are drawn from it; it must not depend on the examples or on the network.
        rounds: how often each example may be bounded.
        rtol: relative gap at which a norm is tight enough.
        domain: which inputs are certified: ``"ball"``, or ``"pixels"``, what of it lies in [0, 1].

    Raises:
        TypeError: network is no :class:`lipjax.Network`.
        ValueError: an option that cannot be used, named with its value.
    """

    def __init__(
        self,
        network: Network,
        examples: int,
        *,
        level: str | solvers.Level = "probabilistic",
        delta: float = 1e-6,
        key: Array | None = None,
        rounds: int = 1,
        rtol: float = 1e-3,
        domain: str = "ball",
    ) -> None:
        check_network(network)
        check_domain(np.zeros(0), domain)
        self.examples, self.rounds, self.domain = examples, rounds, domain
        self.used = np.zeros((rounds, examples), bool)
        planned = len(network.layers) * (1 + examples * rounds)
        self.solver = solvers.solver_of(level, planned, delta, rtol)
        if key is None and self.claim.may_fail:
            raise ValueError(
                f"key=None: the level {self.claim.name!r} draws random starts; give key=jax.random.key(seed) with a "
                "seed that does not depend on the data"
            )
        self.key = jax.random.key(0) if key is None else key
        check_start_key(self.key)
        rounding.check_range(network)
        self.ledger = Ledger(planned, delta / max(1, planned) if self.claim.may_fail else math.nan)
        self.inference = network.frozen()  # the network in the precision that certificates are about
        with self._precision():
            self.network = self.inference.astype(self.claim.dtype)
            self.sigmas = self._global_norms()
        cohorts.check_known_norms(network.layers)

    @property
    def claim(self) -> cohorts.Claim:
        """What is said rests on norms that are worth this."""
        return self.solver.claim

    @property
    def global_lipschitz(self) -> float:
        """Product of the norms of the whole layers of the feature map."""
        with self._precision():
            return float(self._arithmetic.constant(self.network, jnp.asarray(self.sigmas)))

    def with_global_norms(self, x: Array, label: Array, eps: Array | float) -> Certification:
        """Certificates of a batch with the norms of the whole layers: no start is drawn, no iteration is made."""

        return self._certify(x, label, eps, lambda masked: cohorts.known(self.sigmas[masked.place], len(masked)))

    def with_local_norms(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        index: Array | np.ndarray,
        round_: int = 0,
        ceilings: np.ndarray | None = None,
    ) -> Certification:
        """Certificates of a batch with each example's own norms, or those of the whole layers where they are smaller.

        Args:
            x: inputs (B, ...) in [0, 1] pixels.
            label: classes of the network (B,).
            eps: l2 radius, scalar or (B,).
            index: places of the examples among all of this certifier (B,): starts are drawn by them, repetitions free.
            round_: how often these examples have been bounded before.
            ceilings: upper bounds of the norms (B, layers) known already, as from a larger eps; default none.

        Raises:
            ValueError: more examples or rounds than delta was divided by, an example twice in a round, or inputs and
                labels that are not those of the network.
        """
        self._check(x, label)
        places = np.asarray(index)
        outside = places[(places < 0) | (places >= self.examples)]
        if outside.size or not 0 <= round_ < self.rounds:
            raise ValueError(
                f"example {(*outside, places.max())[0]} in round {round_} was not planned: delta was divided by "
                f"{self.examples} examples and {self.rounds} rounds, counted from 0; make a Certifier for more"
            )
        known = np.broadcast_to(self.sigmas, (len(places), len(self.sigmas)))
        ceilings = known if ceilings is None else np.minimum(known, ceilings)
        first, same = _first_places(places, x, label, np.broadcast_to(np.asarray(eps), places.shape), ceilings)
        if self.claim.may_fail:
            if self.used[round_, places].any():
                again = places[self.used[round_, places]][0]
                raise ValueError(
                    f"example {again} has been bounded in round {round_} before: its starts may not serve other masks; "
                    "use the next round"
                )
            self.used[round_, places] = True
        keys = starts.keys_of_examples(self.key, index, round_)

        def norms(masked: MaskedLayer) -> Norms:
            return self._norms(self.solver, masked, ceilings[:, masked.place], first)

        return self._certify(x, label, eps, norms, keys).at(same)

    def by_dual(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        *,
        sigmas: np.ndarray,
        rows: Rows,
        options: Prover,
        asked: np.ndarray | None = None,
        starts: Starts | None = None,
        index: np.ndarray | None = None,
    ) -> Certification:
        """Certificates of a batch by the dual, with norms that were found before: no start is drawn.

        Args:
            x: inputs (B, ...) in [0, 1] pixels.
            label: classes of the network (B,).
            eps: l2 radius, scalar or (B,).
            sigmas: norms (B, layers) that were found for these very examples and radii, or those of the whole layers.
            rows: the rows that these are norms of.
            options: how margins are proven: :class:`lipjax.certification.pairs.Ascent`, or branch and bound.
            asked: the examples whose margins are ascended (B,); default all. Wrong predictions never are.
            starts: where ascents begin and are left, by place and rival.
            index: places of the examples in ``starts`` (B,).

        Raises:
            ValueError: the level is no bound, or inputs and labels that are not those of the network.
        """
        if not self.claim.is_bound:
            raise ValueError(
                f"level={self.claim.name!r} is no proof, and the dual is one: give a level that is a bound"
            )
        self._check(x, label)
        with self._precision():
            bounds = self._bound(x, eps, lambda place, *_: (sigmas[:, place], None), rows)
            found, forward = _decide(self.network, bounds, jnp.asarray(label), self.claim.name)
            mine = (np.asarray(found.prediction) == np.asarray(label)) & np.asarray(bounds.features.finite)
            mine = mine if asked is None else mine & asked
            doubts = Doubts(self.network, bounds, np.asarray(label), np.asarray(forward), mine, starts, index)
            proven = options.prove(doubts)
            margins, level = jnp.asarray(proven.margins), self.claim.name
            certificate = _improved(self.network, bounds, margins, jnp.asarray(label), level)
            whole = _certification(bounds, certificate, np.zeros_like(sigmas), proven.steps)
            return dataclasses.replace(whole, points=proven.points)

    def _certify(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        norms: Callable[[MaskedLayer], Norms],
        keys: Array | None = None,
    ) -> Certification:
        def ask(place: int, layer: Affine, rows: Array, columns: Array) -> tuple[np.ndarray, np.ndarray]:
            found = norms(MaskedLayer(layer, rows, columns, keys, place))
            return found.sigma, found.products

        self._check(x, label)
        with self._precision():
            bounds = self._bound(x, eps, ask)
            products = np.asarray(bounds.handed_back, np.float64).reshape(-1, len(x)).T
            bounds = dataclasses.replace(bounds, handed_back=())
            certificate, _ = _decide(self.network, bounds, jnp.asarray(label), self.claim.name)
            return _certification(bounds, certificate, products, np.zeros(len(x), int))

    def _bound(self, x: Array, eps: Array | float, ask: propagation.Ask, rows: Rows | None = None) -> Bounds:
        check_eps(x, eps)
        tiny = np.extract((np.asarray(eps) > 0) & (np.asarray(eps) < LEAST_EPS), eps)
        if tiny.size:
            raise ValueError(f"eps is {tiny[0]!s}; expected 0, or at least {LEAST_EPS:g}: smaller radii leave float64")
        inputs = jnp.asarray(np.asarray(x, self.claim.dtype))
        region = l2_ball(inputs, np.asarray(eps, self.claim.dtype), self.domain)
        return propagation.propagate(self.network, region, ask, self._arithmetic, rows=rows)

    def _check(self, x: Array, label: Array) -> None:
        check_batch(self.network, x)
        check_labels(self.network.num_classes, x, label)
        check_domain(x, self.domain)

    def _global_norms(self) -> np.ndarray:
        # Much tighter than the local ones: those are bounded by it, and done as soon as they come near.
        solver, key = self.solver.tightened(20), starts.key_of_whole(self.key)
        layers = enumerate(self.network.layers)
        found = [self._norms(solver, cohorts.whole(layer, place, key)).sigma[0] for place, layer in layers]
        return np.asarray(found, np.float64)

    def _norms(
        self, solver: cohorts.Solver, masked: MaskedLayer, ceiling: Any = np.inf, only: np.ndarray | None = None
    ) -> Norms:
        """What a layer knows, in a proof that of a diagonal alone, which is exact; or what a solver finds."""
        if not self.claim.is_bound or type(masked.layer) is Scale:
            found = cohorts.by_construction(masked)
            if found is not None:
                return found
        found = cohorts.norms(solver, masked, ceiling, only)
        self.ledger.enter(found)
        return found

    @property
    def _arithmetic(self) -> Arithmetic:
        return FLOAT32 if self.claim.is_bound else EXACT

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.claim.dtype == np.float64:
            return jax.enable_x64(True)
        return contextlib.nullcontext()


def _certification(bounds: Bounds, certificate: Certificate, products: np.ndarray, steps: np.ndarray) -> Certification:
    count = len(steps)
    shares = [np.asarray(jnp.mean(live.reshape(count, -1), axis=1)) for live in bounds.live]
    live = np.asarray(shares, np.float64).reshape(-1, count).T
    sigmas = np.asarray(bounds.sigmas, np.float64)
    rows, finite = tuple(map(np.asarray, bounds.rows)), np.asarray(bounds.features.finite)
    return Certification(jax.tree.map(np.asarray, certificate), sigmas, rows, live, products, finite, steps)


def _first_places(places: np.ndarray, *given: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each example stands first, and for all of the batch where the same one does; ValueError unless it is."""
    _, first, of = np.unique(places, return_index=True, return_inverse=True)
    arrays = [np.asarray(array) for array in given]
    for k, same in enumerate(first[of]):
        if k != same and not all(np.array_equal(array[k], array[same]) for array in arrays):
            raise ValueError(
                f"example {places[k]} is in the batch twice, with different inputs, labels or radii: one start may not "
                "serve two masks; give each its own index"
            )
    return first, first[of]


@functools.partial(jax.jit, static_argnames="level")
def _decide(network: Network, bounds: Bounds, label: Array, level: str) -> tuple[Certificate, Array]:
    """Certificates by the forward pass, and its margins (B, classes), net of what inference rounds."""

    def one(bounds: Bounds, label: Array) -> tuple[Certificate, Array]:
        off = bounds.slack.logits
        margins = forward_margins(network, bounds, label) - (off + off[label])
        return certificate(network, bounds, margins, label, level), margins

    return jax.vmap(one)(bounds, label)


@functools.partial(jax.jit, static_argnames="level")
def _improved(network: Network, bounds: Bounds, margins: Array, label: Array, level: str) -> Certificate:
    """Certificates by better margins (B, classes)."""

    def one(bounds: Bounds, margins: Array, label: Array) -> Certificate:
        return certificate(network, bounds, margins, label, level)

    return jax.vmap(one)(bounds, margins, label)

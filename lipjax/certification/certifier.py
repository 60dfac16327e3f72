"""The certifier: bounds and certificates of many examples, layer by layer, so that converged norms leave the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import propagation, rounding
from lipjax.bounds.dual import forward_margins
from lipjax.bounds.enclosures import EXACT, FLOAT32, Enclosure, Solve, enclose, enter
from lipjax.certification.certificates import Certificate, certificate
from lipjax.certification.keys import check_start_key
from lipjax.certification.ledger import Ledger
from lipjax.certification.masks import Rows
from lipjax.certification.pairs import Ascent, Starts, proven_margins
from lipjax.networks.graph import Network, check_network
from lipjax.networks.layers import Affine
from lipjax.networks.regions import check_domain
from lipjax.norms import levels

LEAST_EPS = 1e-100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """Bounds of N examples.

    Attributes:
        certificate: of each example.
        sigmas: norms of the masked layers (N, blocks).
        rows: the rows of each block (N, ...) that these are norms of.
        live: share of varying neurons (N, blocks).
        products: products that each norm took (N, blocks); zero where the norms were known.
        finite: nothing overflowed on the way to the features, in float32 or in this pass (N,).
        dual_steps: steps of ascent that the dual took, of all rivals (N,).
    """

    certificate: Certificate
    sigmas: np.ndarray
    rows: Rows
    live: np.ndarray
    products: np.ndarray
    finite: np.ndarray
    dual_steps: np.ndarray

    def at(self, places: np.ndarray) -> Found:
        """What was found for the examples at some places of the batch."""
        return jax.tree.map(lambda leaf: leaf[places], self)


class Certifier:
    """Certifies many examples of one network, layer by layer, so that converged norms leave the batch.

    The probability of failure ``delta`` is that of everything one certifier ever says: it is divided in advance by
    the norms of the whole layers and by those of ``examples`` examples in ``rounds`` rounds, and no more are given out.

    Args:
        network: the classifier, with parameters of float32 or float64.
        examples: how many examples there will be.
        level: ``"probabilistic"``, ``"deterministic"`` or ``"estimate"``.
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
        level: str = "probabilistic",
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
        planned = len(network.blocks) * (1 + examples * rounds)
        self.level = levels.level_of(level, planned, delta, rtol)
        if key is None and self.level.name == "probabilistic":
            raise ValueError(
                "key=None: the level 'probabilistic' draws random starts; give key=jax.random.key(seed) with a seed "
                "that does not depend on the data"
            )
        self.key = jax.random.key(0) if key is None else key
        check_start_key(self.key)
        rounding.check_range(network)
        self.ledger = Ledger(planned, getattr(self.level, "delta", math.nan))
        with self._precision():
            # Through NumPy: XLA's own conversion takes numbers below the smallest normal one for zero.
            self.network = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, self.level.dtype)), network)
            self.sigmas = self._global_norms()

    @property
    def global_lipschitz(self) -> float:
        """Product of the norms of the whole layers of the feature map."""
        return float(self.network.lipschitz(self.sigmas))

    def globally(self, x: Array, label: Array, eps: Array | float) -> Found:
        """Certificates of a batch with the norms of the whole layers: no start is drawn, no iteration is made."""

        def known(place: int, layer: Affine, rows: Array, columns: Array) -> levels.Norms:
            return levels.known(self.sigmas[place], len(rows))

        return self._certify(x, label, eps, known)

    def locally(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        index: Array | np.ndarray,
        round_: int = 0,
        ceilings: np.ndarray | None = None,
    ) -> Found:
        """Certificates of a batch with each example's own norms, or those of the whole layers where they are smaller.

        Args:
            x: inputs (B, ...) in [0, 1] pixels.
            label: classes of the network (B,).
            eps: l2 radius, scalar or (B,).
            index: places of the examples among all of this certifier (B,): starts are drawn by them, repetitions free.
            round_: how often these examples have been bounded before.
            ceilings: upper bounds of the norms (B, blocks) known already, as from a larger eps; default none.

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
        first, same = _firsts(places, x, label, np.broadcast_to(np.asarray(eps), places.shape), ceilings)
        if self.level.name == "probabilistic":
            if self.used[round_, places].any():
                again = places[self.used[round_, places]][0]
                raise ValueError(
                    f"example {again} has been bounded in round {round_} before: its starts may not serve other masks; "
                    "use the next round"
                )
            self.used[round_, places] = True
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(self.key, 1 + round_)))(index)

        def solve(place: int, layer: Affine, rows: Array, columns: Array) -> levels.Norms:
            found = self.level(place, layer, rows, columns, keys, ceilings[:, place], first)
            self.ledger.enter(found)
            return found

        return self._certify(x, label, eps, solve).at(same)

    def dually(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        *,
        sigmas: np.ndarray,
        rows: Rows,
        options: Ascent,
        asked: np.ndarray | None = None,
        starts: Starts | None = None,
        index: np.ndarray | None = None,
    ) -> Found:
        """Certificates of a batch by the dual, with norms that were found before: no start is drawn.

        Args:
            x: inputs (B, ...) in [0, 1] pixels.
            label: classes of the network (B,).
            eps: l2 radius, scalar or (B,).
            sigmas: norms (B, blocks) that were found for these very examples and radii, or those of the whole layers.
            rows: the rows that these are norms of.
            options: of the ascent.
            asked: the examples whose margins are ascended (B,); default all. Wrong predictions never are.
            starts: where ascents begin and are left, by place and rival; see
                :func:`lipjax.certification.pairs.proven_margins`.
            index: places of the examples in ``starts`` (B,).

        Raises:
            ValueError: the level is no bound, or inputs and labels that are not those of the network.
        """
        if not self.level.is_bound:
            raise ValueError(
                f"level={self.level.name!r} is no proof, and the dual is one: give a level that is a bound"
            )
        self._check(x, label)
        with self._precision():
            masks = tuple(jnp.asarray(each) for each in rows)
            enclosure = self._enclose(x, eps, lambda place, *_: sigmas[:, place], masks)
            found, forward = _decide(self.network, enclosure, jnp.asarray(label), self.level.name)
            mine = np.asarray((found.prediction == label) & enclosure.bounds.features.finite)
            mine = mine if asked is None else mine & asked
            forward = np.asarray(forward)
            margins, steps = proven_margins(
                self.network, enclosure, np.asarray(label), forward, mine, options, starts, index
            )
            certificate = _improved(self.network, enclosure, jnp.asarray(margins), jnp.asarray(label), self.level.name)
            return _found(enclosure, certificate, sigmas, np.zeros_like(sigmas), steps)

    def _certify(
        self, x: Array, label: Array, eps: Array | float, solve: Callable[[int, Affine, Array, Array], levels.Norms]
    ) -> Found:
        found: list[levels.Norms] = []

        def sigma(place: int, layer: Affine, rows: Array, columns: Array) -> np.ndarray:
            found.append(solve(place, layer, rows, columns))
            return found[-1].sigma

        self._check(x, label)
        with self._precision():
            enclosure = self._enclose(x, eps, sigma)
            certificate, _ = _decide(self.network, enclosure, jnp.asarray(label), self.level.name)
            tables = [norm.sigma for norm in found], [norm.products for norm in found]
            sigmas, products = (np.asarray(table, np.float64).reshape(-1, len(x)).T for table in tables)
            return _found(enclosure, certificate, sigmas, products, np.zeros(len(x), int))

    def _enclose(self, x: Array, eps: Array | float, solve: Solve, rows: tuple[Array, ...] | None = None) -> Enclosure:
        tiny = np.extract((np.asarray(eps) > 0) & (np.asarray(eps) < LEAST_EPS), eps)
        if tiny.size:
            raise ValueError(f"eps is {tiny[0]!s}; expected 0, or at least {LEAST_EPS:g}: smaller radii leave float64")
        radius = jnp.broadcast_to(jnp.asarray(eps, self.level.dtype), np.shape(x)[:1])
        region = enter(jnp.asarray(np.asarray(x, self.level.dtype)), radius, self.domain)
        arithmetic = FLOAT32 if self.level.is_bound else EXACT
        return enclose(self.network, region, solve, arithmetic, rows)

    def _check(self, x: Array, label: Array) -> None:
        propagation.check_batch(self.network, x)
        propagation.check_labels(self.network.num_classes, x, label)
        check_domain(x, self.domain)

    def _global_norms(self) -> np.ndarray:
        # Much tighter than the local ones: those are bounded by it, and done as soon as they come near.
        level = self.level
        if isinstance(level, levels.Lanczos):
            level = dataclasses.replace(level, rtol=level.rtol / 20)
        found = []
        for place, block in enumerate(self.network.blocks):
            layer = block.affine
            masks = jnp.ones((1, *layer.out_shape), bool), jnp.ones((1, *layer.in_shape), bool)
            norm = level(place, layer, *masks, jax.random.fold_in(self.key, 0)[None], np.inf)
            self.ledger.enter(norm)
            found.append(norm.sigma[0])
        return np.asarray(found, np.float64)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.level.dtype == np.float64:
            return jax.enable_x64(True)
        return contextlib.nullcontext()


def _found(
    enclosure: Enclosure, certificate: Certificate, sigmas: np.ndarray, products: np.ndarray, steps: np.ndarray
) -> Found:
    bounds = enclosure.bounds
    shares = [np.asarray(jnp.mean(live.reshape(len(sigmas), -1), axis=1)) for live in bounds.live]
    rows = tuple(np.asarray(before.live) for before in bounds.preactivations)
    live = np.asarray(shares, np.float64).reshape(-1, len(sigmas)).T
    finite = np.asarray(bounds.features.finite)
    return Found(jax.tree.map(np.asarray, certificate), sigmas, rows, live, products, finite, steps)


def _firsts(places: np.ndarray, *given: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
def _decide(network: Network, enclosure: Enclosure, label: Array, level: str) -> tuple[Certificate, Array]:
    """Certificates by the forward pass, and its margins (B, classes), net of what inference rounds."""

    def one(enclosure: Enclosure, label: Array) -> tuple[Certificate, Array]:
        margins = forward_margins(network, enclosure.bounds, label) - (enclosure.logits + enclosure.logits[label])
        return certificate(network, enclosure.bounds, margins, label, level), margins

    return jax.vmap(one)(enclosure, label)


@functools.partial(jax.jit, static_argnames="level")
def _improved(network: Network, enclosure: Enclosure, margins: Array, label: Array, level: str) -> Certificate:
    """Certificates by better margins (B, classes)."""

    def one(enclosure: Enclosure, margins: Array, label: Array) -> Certificate:
        return certificate(network, enclosure.bounds, margins, label, level)

    return jax.vmap(one)(enclosure, margins, label)

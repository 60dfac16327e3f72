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

from lipjax import bounds, norms, rounding
from lipjax.certificates import Certificate, certificate
from lipjax.layers import Affine
from lipjax.networks import Block, Fork, Join, Network
from lipjax.regions import Region, l2_ball

LEAST_EPS = 1e-100


@dataclasses.dataclass
class Ledger:
    """What the norms of one certifier have cost, and how tight they came out.

    Attributes:
        planned: starts that delta was divided by.
        starts: starts drawn.
        delta_per_start: probability of failure of each, not a number where it has none.
        products: products with a layer or its transpose, of one example.
        largest_gap: the largest upper / lower - 1 of a norm, not a number for estimates.
    """

    planned: int
    delta_per_start: float
    starts: int = 0
    products: int = 0
    largest_gap: float = math.nan

    def enter(self, found: norms.Norms) -> None:
        """Count what was spent on some norms."""
        self.starts += int(found.drawn.sum())
        self.products += int(found.products.sum())
        self.largest_gap = float(np.fmax.reduce(found.gap, initial=self.largest_gap))

    def facts(self) -> dict[str, float | None]:
        """Ready for JSON; None where a figure has no meaning at this level."""
        facts = {
            "starts_planned": self.planned,
            "starts_drawn": self.starts,
            "delta_per_start": self.delta_per_start,
            "products": self.products,
            "largest_gap": self.largest_gap,
        }
        return {name: None if math.isnan(value) else value for name, value in facts.items()}


@dataclasses.dataclass(frozen=True)
class Found:
    """Bounds of N examples.

    Attributes:
        certificate: of each example.
        sigmas: norms of the masked layers (N, blocks).
        live: share of varying neurons (N, blocks).
        products: products that each norm took (N, blocks); zero where the norms were known.
        finite: nothing overflowed on the way to the features, in float32 or in this pass (N,).
    """

    certificate: Certificate
    sigmas: np.ndarray
    live: np.ndarray
    products: np.ndarray
    finite: np.ndarray

    def at(self, places: np.ndarray) -> Found:
        """What was found for the examples at some places of the batch."""
        certificate = jax.tree.map(lambda leaf: leaf[places], self.certificate)
        tables = (table[places] for table in (self.sigmas, self.live, self.products, self.finite))
        return Found(certificate, *tables)


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

    Raises:
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
    ) -> None:
        self.examples, self.rounds = examples, rounds
        self.used = np.zeros((rounds, examples), bool)
        planned = len(network.blocks) * (1 + examples * rounds)
        self.level = norms.level_of(level, planned, delta, rtol)
        if key is None and self.level.name == "probabilistic":
            raise ValueError(
                "key=None: the level 'probabilistic' draws random starts; give key=jax.random.key(seed) with a seed "
                "that does not depend on the data"
            )
        self.key = jax.random.key(0) if key is None else checked_key(key)
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

        bounds.check_batch(self.network, x)
        bounds.check_labels(self.network, x, label)

        def known(place: int, layer: Affine, rows: Array, columns: Array) -> norms.Norms:
            return norms.known(self.sigmas[place], len(rows))

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
        bounds.check_batch(self.network, x)
        bounds.check_labels(self.network, x, label)
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

        def solve(place: int, layer: Affine, rows: Array, columns: Array) -> norms.Norms:
            found = self.level(place, layer, rows, columns, keys, ceilings[:, place], first)
            self.ledger.enter(found)
            return found

        return self._certify(x, label, eps, solve).at(same)

    def _certify(
        self,
        x: Array,
        label: Array,
        eps: Array | float,
        solve: Callable[[int, Affine, Array, Array], norms.Norms],
    ) -> Found:
        tiny = np.extract((np.asarray(eps) > 0) & (np.asarray(eps) < LEAST_EPS), eps)
        if tiny.size:
            raise ValueError(f"eps is {tiny[0]!s}; expected 0, or at least {LEAST_EPS:g}: smaller radii leave float64")
        with self._precision():
            dtype = self.level.dtype
            radius = jnp.broadcast_to(jnp.asarray(eps, dtype), np.shape(x)[:1])
            region = _enter(jnp.asarray(np.asarray(x, dtype)), radius)
            live, solved, kept = [], [], []
            for step in self.network.steps:
                if isinstance(step, Fork):
                    kept.append(region)
                elif isinstance(step, Join):
                    region = _join(kept.pop(), region)
                else:
                    before, rows, columns, rounded = _before(step, region)
                    solved.append(solve(len(solved), step.affine, rows, columns))
                    region, share = _after(step, before, jnp.asarray(solved[-1].sigma, dtype), rounded)
                    live.append(share)
            sigmas, products = [norm.sigma for norm in solved], [norm.products for norm in solved]
            lipschitz = jnp.broadcast_to(jnp.asarray(self.network.lipschitz(sigmas), dtype), radius.shape)
            found = _decide(self.network, region, lipschitz, jnp.asarray(label), self.level.name)
            tables = (np.asarray(table, np.float64).reshape(-1, len(x)).T for table in (sigmas, live, products))
            return Found(jax.tree.map(np.asarray, found), *tables, np.asarray(region.finite))

    def _global_norms(self) -> np.ndarray:
        # Much tighter than the local ones: those are bounded by it, and done as soon as they come near.
        level = self.level
        if isinstance(level, norms.Lanczos):
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


def checked_key(key: Array) -> Array:
    """The key, if it is one.

    Raises:
        ValueError: it is anything but a single key.
    """
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape:
        what = f"key has shape {key.shape}" if is_key else f"key={key!r} is a {type(key).__name__}"
        raise ValueError(f"{what}; expected a single key, such as jax.random.key(seed)")
    if "threefry" not in str(jax.random.key_impl(key)):
        raise ValueError(
            f"key is of the generator {jax.random.key_impl(key)}, whose numbers depend on the batch; expected "
            "jax.random.key(seed, impl='threefry2x32')"
        )
    return key


@jax.jit
def _enter(x: Array, eps: Array) -> Region:
    return jax.vmap(l2_ball)(x, eps)


def _is_bound(region: Region) -> bool:
    """Whether rounding counts: the levels that are bounds compute in float64, the level ``"estimate"`` does not."""
    return region.center.dtype == jnp.float64


@jax.jit
def _before(block: Block, region: Region) -> tuple[Region, Array, Array, Array]:
    """Regions before the activation, the rows and columns that matter, and what rounding adds to the radius."""

    def one(region: Region) -> tuple[Region, Array, Array, Array]:
        layer, entering = block.affine, region.reshape(block.affine.in_shape)
        before = bounds.preactivation(layer, entering)
        if not _is_bound(entering):
            return before, bounds.live_rows(block.activation, before), entering.live, jnp.zeros_like(entering.ball)
        widened = rounding.without_overflow(
            rounding.widen(before, layer, entering), rounding.magnitude(layer, entering)
        )
        rows = bounds.live_rows(block.activation, widened)
        return widened, rows, entering.live, rounding.error_norm(layer, entering, rows)

    return jax.vmap(one)(region)


@jax.jit
def _after(block: Block, before: Region, sigma: Array, rounded: Array) -> tuple[Region, Array]:
    def one(before: Region, sigma: Array, rounded: Array) -> Region:
        region = bounds.activate(block.activation, before, sigma)
        if not _is_bound(region):
            return region
        return dataclasses.replace(region, radius=rounding.UP * (region.ball + rounded * block.activation.lipschitz))

    region = jax.vmap(one)(before, sigma, rounded)
    return region, jnp.mean(region.live.reshape(len(sigma), -1), axis=1)


@jax.jit
def _join(kept: Region, region: Region) -> Region:
    def one(kept: Region, region: Region) -> Region:
        joined = bounds.join(kept, region)
        if not _is_bound(joined):
            return joined
        widened = rounding.widen_sum(joined, kept)
        return rounding.without_overflow(widened, jnp.abs(jnp.stack(widened.box)))

    return jax.vmap(one)(kept, region)


@functools.partial(jax.jit, static_argnames="level")
def _decide(network: Network, features: Region, lipschitz: Array, label: Array, level: str) -> Certificate:
    def one(features: Region, lipschitz: Array, label: Array) -> Certificate:
        features = features.reshape(network.head.in_shape)
        if not _is_bound(features):
            return certificate(network, features, lipschitz, label, level)
        errors = rounding.logit_errors(network.head, features)
        features = rounding.without_overflow(features, rounding.magnitude(network.head, features))
        return certificate(network, features, lipschitz, label, level, errors)

    return jax.vmap(one)(features, lipschitz, label)

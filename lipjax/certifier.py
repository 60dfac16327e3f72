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
LEVELS = ("probabilistic", "deterministic", "estimate")


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

    def enter(self, found: norms.Norms, places: np.ndarray) -> None:
        """Count what was spent on norms of the examples at some places; padding repeats places."""
        self.starts += len(np.unique(places[found.drawn]))
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
    """

    certificate: Certificate
    sigmas: np.ndarray
    live: np.ndarray
    products: np.ndarray


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
        self.level = level_of(network, examples, level, delta, key, rounds, rtol)
        self.key = jax.random.key(0) if key is None else checked_key(key)
        rounding.check_range(network)
        planned = len(network.blocks) * (1 + examples * rounds)
        self.ledger = Ledger(planned, getattr(self.level, "delta", math.nan))
        with self._precision():
            self.network = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.level.dtype), network)
            self.sigmas = self._global_norms()
            sound = self.level.dtype == np.float64
            blocks = [block.affine for block in self.network.blocks]
            self.absolute = [jax.jit(rounding.absolute_norm)(layer) if sound else None for layer in blocks]

    @property
    def global_lipschitz(self) -> float:
        """Product of the norms of the whole layers of the feature map."""
        return float(self.network.lipschitz(self.sigmas))

    def globally(self, x: Array, label: Array, eps: Array | float) -> Found:
        """Certificates of a batch with the norms of the whole layers: no start is drawn, no iteration is made."""

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
            label: integers (B,).
            eps: l2 radius, scalar or (B,).
            index: place of each example among all of this certifier (B,); its starts are drawn by it.
            round_: how often these examples have been bounded before.
            ceilings: upper bounds of the norms (B, blocks) known already, as from a larger eps; default none.

        Raises:
            ValueError: more examples or rounds than delta was divided by, or an example twice in a round.
        """
        places = np.asarray(index)
        outside = places[(places < 0) | (places >= self.examples)]
        if outside.size or not 0 <= round_ < self.rounds:
            raise ValueError(
                f"example {(*outside, places.max())[0]} in round {round_} was not planned: delta was divided by "
                f"{self.examples} examples and {self.rounds} rounds, counted from 0; make a Certifier for more"
            )
        known = np.broadcast_to(self.sigmas, (len(places), len(self.sigmas)))
        ceilings = known if ceilings is None else np.minimum(known, ceilings)
        _check_repetitions(places, x, np.broadcast_to(np.asarray(eps), places.shape), ceilings)
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
            found = self.level(place, layer, rows, columns, keys, ceilings[:, place])
            self.ledger.enter(found, places)
            return found

        return self._certify(x, label, eps, solve)

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
            region, error = _enter(jnp.asarray(x, dtype), radius)
            live, solved, kept = [], [], []
            for step in self.network.steps:
                if isinstance(step, Fork):
                    kept.append((region, error))
                elif isinstance(step, Join):
                    region, error = _join(*kept.pop(), region, error)
                else:
                    place = len(solved)
                    whole, absolute = jnp.asarray(self.sigmas[place], dtype), self.absolute[place]
                    before, rows, columns, error = _before(step, region, error, whole, absolute)
                    solved.append(solve(place, step.affine, rows, columns))
                    region, share = _after(step, before, jnp.asarray(solved[-1].sigma, dtype))
                    live.append(share)
            sigmas, products = [norm.sigma for norm in solved], [norm.products for norm in solved]
            lipschitz = jnp.broadcast_to(jnp.asarray(self.network.lipschitz(sigmas), dtype), error.shape)
            found = _decide(self.network, region, lipschitz, jnp.asarray(label), error, self.level.name)
            tables = (np.asarray(table, np.float64).reshape(-1, len(x)).T for table in (sigmas, live, products))
            return Found(jax.tree.map(np.asarray, found), *tables)

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
            self.ledger.enter(norm, np.zeros(1, int))
            found.append(norm.sigma[0])
        return np.asarray(found, np.float64)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.level.dtype == np.float64:
            return jax.enable_x64(True)
        return contextlib.nullcontext()


def _check_repetitions(places: np.ndarray, *given: Array | np.ndarray) -> None:
    """Raises ValueError where a place is there again with other arguments: padding repeats whole examples only."""
    _, first, of = np.unique(places, return_index=True, return_inverse=True)
    for array in map(np.asarray, given):
        for k in np.flatnonzero(first[of] != np.arange(len(places))):
            if not np.array_equal(array[k], array[first[of[k]]]):
                raise ValueError(
                    f"example {places[k]} is in the batch twice, with different inputs or radii: one start may not "
                    "serve two masks; give each its own index"
                )


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


def level_of(
    network: Network, examples: int, level: str, delta: float, key: Array | None, rounds: int, rtol: float
) -> norms.Level:
    """The level of a name, with its share of delta."""
    if level == "estimate":
        return norms.PowerIteration()
    if level == "deterministic":
        return norms.Deterministic()
    if level != "probabilistic":
        raise ValueError(f"level={level!r} is not known; give one of {', '.join(LEVELS)}")
    if isinstance(delta, str) or not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} is no probability of failure; give a number between 0 and 1, such as 1e-6")
    if key is None:
        raise ValueError(
            "key=None: the level 'probabilistic' draws random starts; give key=jax.random.key(seed) with a seed that "
            "does not depend on the data"
        )
    if isinstance(rtol, str) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r} cannot be reached; give a relative gap more than 0, such as 1e-3")
    starts = max(1, len(network.blocks) * (1 + examples * rounds))
    return norms.Lanczos(delta / starts, rtol)


@jax.jit
def _enter(x: Array, eps: Array) -> tuple[Region, Array]:
    return jax.vmap(l2_ball)(x, eps), jnp.zeros_like(eps)


@jax.jit
def _before(
    block: Block, region: Region, error: Array, whole: Array, absolute: Array | None
) -> tuple[Region, Array, Array, Array]:
    """Regions before the activation, the rows and columns that matter, and the error of float32 inference so far."""

    def one(region: Region, error: Array) -> tuple[Region, Array, Array, Array]:
        entering = region.reshape(block.affine.in_shape)
        before = bounds.preactivation(block.affine, entering)
        if absolute is not None:
            before = rounding.widen(before, block.affine, entering, error)
            error = rounding.inference_error(error, block.affine, entering, whole, absolute)
            before = rounding.without_overflow(before, rounding.magnitude(block.affine, entering), error)
            error = error * block.activation.lipschitz
        return before, bounds.live_rows(block.activation, before), entering.live, error

    return jax.vmap(one)(region, error)


@jax.jit
def _after(block: Block, before: Region, sigma: Array) -> tuple[Region, Array]:
    region = jax.vmap(functools.partial(bounds.activate, block.activation))(before, sigma)
    return region, jnp.mean(region.live.reshape(len(sigma), -1), axis=1)


@jax.jit
def _join(kept: Region, kept_error: Array, region: Region, error: Array) -> tuple[Region, Array]:
    def one(kept: Region, kept_error: Array, region: Region, error: Array) -> tuple[Region, Array]:
        joined = bounds.join(kept, region)
        if error.dtype == jnp.float64:
            error = rounding.sum_error(kept_error, error, joined)
            widened = rounding.widen_sum(joined, kept_error)
            return rounding.without_overflow(widened, jnp.abs(jnp.stack(widened.box)), error), error
        return joined, error

    return jax.vmap(one)(kept, kept_error, region, error)


@functools.partial(jax.jit, static_argnames="level")
def _decide(
    network: Network, features: Region, lipschitz: Array, label: Array, error: Array, level: str
) -> Certificate:
    def one(features: Region, lipschitz: Array, label: Array, error: Array) -> Certificate:
        features = features.reshape(network.head.in_shape)
        if error.dtype != jnp.float64:
            return certificate(network, features, lipschitz, label, level)
        errors = rounding.logit_errors(error, network.head, features)
        features = rounding.without_overflow(features, rounding.magnitude(network.head, features), errors)
        return certificate(network, features, lipschitz, label, level, errors)

    return jax.vmap(one)(features, lipschitz, label, error)

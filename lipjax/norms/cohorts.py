"""Cohorts: norms of one layer under the masks of many examples, which leave as soon as their own has converged.

How a norm is found is the solver's: a value with a claim, and three methods. The loop here is the same for all; see
docs/extending.md for a solver of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.masks import drops_nothing
from lipjax.norms import power_iteration
from lipjax.norms.starts import random_start

CHECK_ITERS, CHECK_TOLERANCE = 20, 1e-3  # of norms that layers say of themselves, in float32


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the norms of a solver are worth.

    Attributes:
        name: of the level, as in certificates and files.
        is_bound: they are upper bounds, of products in float64; else estimates, in float32, which are no proof.
        draws_starts: they depend on random starts. A bound that does may fail, with a stated probability for each.
    """

    name: str
    is_bound: bool
    draws_starts: bool

    @property
    def may_fail(self) -> bool:
        """Whether they are bounds but for a probability of failure."""
        return self.is_bound and self.draws_starts

    @property
    def dtype(self) -> Any:
        """Precision of the layers, and of the pass that uses the norms."""
        return np.float64 if self.is_bound else np.float32

    def words(self, delta: float) -> str:
        """In words, for reports; ``delta`` is the probability that any of the norms fails."""
        if not self.is_bound:
            return "norms estimated from below, no proof"
        return "norms bounded from above" + (f" but for a probability delta of {delta:g}" if self.may_fail else "")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedLayer:
    """One layer under the masks of N examples: ``I_rows W I_columns`` for each.

    Attributes:
        layer: W.
        rows: that are kept, boolean, or their weights (N, ...).
        columns: likewise (N, ...).
        keys: of the start of each example (N,), or None for solvers that draw none.
        place: of the layer among those of its network, an integer; starts depend on it as well.
    """

    layer: Affine
    rows: Array
    columns: Array
    keys: Array | None
    place: Array | int = 0

    def __len__(self) -> int:
        return self.rows.shape[0]

    def maps(self, scale: Array | float, part: Array) -> tuple[Any, Array, Array]:
        """A function of masks that gives the map over a scale, from its smaller side, and the masks of some examples.

        For use under ``jit``: ``map_of, rows, columns = masked.maps(scale, part)``, then ``vmap`` over the masks.
        """

        def map_of(rows: Array, columns: Array) -> LinearMap:
            return self.layer.linear_map().divided(scale).masked(rows, columns).from_smaller_side()

        return map_of, self.rows[part], self.columns[part]

    def starts(self, scale: Array | float, part: Array) -> Array:
        """The random unit vectors of some examples, on the smaller side of the layer."""
        map_of, rows, columns = self.maps(scale, part)

        def one(rows: Array, columns: Array, key: Array) -> Array:
            return random_start(key, self.place, map_of(rows, columns))

        assert self.keys is not None  # solvers that draw starts are given keys
        return jax.vmap(one)(rows, columns, self.keys[part])


@dataclasses.dataclass(frozen=True)
class Enclosure:
    """What a solver knows about the norms of N examples.

    Attributes:
        lower: lower bounds (N,), not a number where there are none.
        upper: the norms as the solver claims them so far (N,).
        products: products with W or its transpose that each has taken (N,).
        finished: which are tight enough, or as tight as they will be (N,).
    """

    lower: np.ndarray
    upper: np.ndarray
    products: np.ndarray
    finished: np.ndarray


class Solver(Protocol):
    """How norms are found.

    Attributes:
        claim: what they are worth.
        batch_size: the most examples that are advanced together.
    """

    @property
    def claim(self) -> Claim: ...

    @property
    def batch_size(self) -> int: ...

    def init(self, masked: MaskedLayer, ceiling: np.ndarray) -> Any:
        """The state of all N examples; ``ceiling`` (N,) are upper bounds known already, infinite where there is none.

        ``advance`` may change it in place.
        """
        ...

    def advance(self, masked: MaskedLayer, part: np.ndarray, state: Any) -> Any:
        """The state after more work for the examples ``part``, all of which have had the same before.

        Their number is always the same; places of N or more fill up the last part: what is gathered there is to be
        clipped, and what is scattered there dropped, as JAX does by ``mode="clip"`` and ``mode="drop"``.
        """
        ...

    def enclose(self, masked: MaskedLayer, state: Any) -> Enclosure:
        """What is known about all N examples."""
        ...

    def tightened(self, factor: float) -> Solver:
        """The solver for norms that many others are compared with, tighter by a factor where that has a meaning."""
        ...


@dataclasses.dataclass(frozen=True)
class Norms:
    """Spectral norms of one layer under the masks of N examples, on the host.

    Attributes:
        sigma: the norms (N,).
        products: products with W or its transpose that each took (N,).
        gap: upper / lower - 1 (N,), not a number where there is no such pair of bounds.
        drawn: whether a random start was drawn (N,).
    """

    sigma: np.ndarray
    products: np.ndarray
    gap: np.ndarray
    drawn: np.ndarray


def norms(solver: Solver, masked: MaskedLayer, ceiling: Any = np.inf, only: np.ndarray | None = None) -> Norms:
    """The norms of a masked layer.

    Args:
        solver: how they are found.
        masked: the layer and the masks of N examples.
        ceiling: scalar or (N,), upper bounds known already, infinite where there is none; no sigma is larger. Where
            nothing is masked and a ceiling is known, that is the norm: no start is drawn.
        only: places of the examples that are asked about; the others keep their ceiling. Default all.

    Raises:
        TypeError: norms that are claimed to be bounds, of a layer that is not float64.
    """
    if solver.claim.is_bound and masked.layer.dtype != jnp.float64:
        raise TypeError(
            f"the layer computes in {masked.layer.dtype}, but level {solver.claim.name!r} claims bounds, which take "
            "float64: give network.astype(jnp.float64), and call within jax.enable_x64(True)"
        )
    count = len(masked)
    sigma = np.array(np.broadcast_to(ceiling, count), np.float64)
    products, gap = np.zeros(count, int), np.full(count, np.nan)
    asked = _masked_places(masked, sigma, only)
    if asked.size:
        state, unfinished = solver.init(masked, sigma.copy()), asked
        while unfinished.size:
            for part in parts(unfinished, min(solver.batch_size, count), count):
                state = solver.advance(masked, part, state)
            found = solver.enclose(masked, state)
            unfinished = asked[~found.finished[asked]]
        lower, upper = found.lower[asked], np.asarray(found.upper, np.float64)[asked]
        upper = np.where(upper >= 0, upper, np.inf)  # what is no norm proves nothing
        sigma[asked], products[asked] = np.minimum(upper, sigma[asked]), found.products[asked]
        with np.errstate(invalid="ignore", divide="ignore"):
            gap[asked] = np.where(upper == 0, 0.0 * lower, upper / lower - 1)
    return Norms(sigma, products, gap, np.isin(np.arange(count), asked) & solver.claim.draws_starts)


def known(sigma: np.ndarray | float, count: int) -> Norms:
    """Norms of ``count`` examples, or one that they share, at no cost."""
    zeros = np.zeros(count)
    return Norms(zeros + sigma, zeros.astype(int), zeros + np.nan, zeros.astype(bool))


def by_construction(masked: MaskedLayer) -> Norms | None:
    """Norms that a layer knows, at no cost, or None where it does not."""
    found = _known_norms(masked)
    return None if found is None else known(np.asarray(found, np.float64), len(masked))


def check_known_norms(layers: Sequence[Affine]) -> None:
    """Raises ValueError where a layer says of itself a norm that a lower bound of it exceeds."""
    for place, layer in enumerate(layers):
        said = by_construction(whole(layer, place))
        if said is None:
            continue
        linear_map = layer.linear_map().from_smaller_side()
        start = jax.random.normal(jax.random.key(place), linear_map.in_shape, linear_map.dtype)
        least, _ = power_iteration.power_iteration(linear_map, start, CHECK_ITERS)
        if least > said.sigma[0] * (1 + CHECK_TOLERANCE):
            raise ValueError(
                f"layer {place}, {type(layer).__name__}, says that its norm is at most {said.sigma[0]:g}, but it is at "
                f"least {float(least):g}; correct its known_norm, or leave it out"
            )


def whole(layer: Affine, place: int = 0, key: Array | None = None) -> MaskedLayer:
    """A layer of which nothing is masked, as of one example."""
    masks = jnp.ones((1, *layer.out_shape), bool), jnp.ones((1, *layer.in_shape), bool)
    return MaskedLayer(layer, *masks, None if key is None else key[None], place)


def parts(places: np.ndarray, size: int, count: int) -> Iterator[np.ndarray]:
    """Batches of one size of places below ``count``; the last one is filled up with ``count``, which lies outside.

    What is gathered there is clipped, and what is scattered there is dropped. A place that stood in a batch twice would
    be written twice, in an order that accelerators do not define.
    """
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield np.pad(part, (0, size - len(part)), constant_values=count)


@jax.jit
def _known_norms(masked: MaskedLayer) -> Array | None:
    return jax.vmap(masked.layer.known_norm)(masked.rows, masked.columns)


def _masked_places(masked: MaskedLayer, ceiling: np.ndarray, only: np.ndarray | None) -> np.ndarray:
    """The places, of some or all, where something is masked, or no ceiling is known."""
    nothing_masked = np.ones(len(masked), bool)
    for mask in (masked.rows, masked.columns):
        nothing_masked &= np.asarray(drops_nothing(mask))
    places = np.flatnonzero(~(nothing_masked & np.isfinite(ceiling)))
    return places if only is None else np.intersect1d(places, only)

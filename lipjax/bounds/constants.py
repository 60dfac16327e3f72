"""Other bounds of local Lipschitz constants: those of the margins of a fixed network, on the l2 ball of each input.

Each function gives, for every rival j, a constant of ``logits_label - logits_j`` on the ball: a margin divided by it is
a radius. They are what certificates by products of norms are compared with: dense matrices and their singular values,
for small chains of layers and activations with linear pieces. Boxes come from any pass; tight ones from one with
:func:`svd_norms`.

With the slopes ``D_k`` of the neurons in intervals, the gradient of a margin is ``c D_n W_n ... D_1 W_1``. All bounds
are of what it may be; they differ in what they keep of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds.enumeration import Layer, jacobians
from lipjax.bounds.propagation import Bounds
from lipjax.bounds.slopes import Link, differences, links
from lipjax.networks.graph import Network
from lipjax.networks.layers import HIGHEST, Affine
from lipjax.networks.masks import weighted
from lipjax.networks.pieces import Piece

# From the links of one example, their least and largest slopes, and the rows of the last layer, to constants.
Constant = Callable[[tuple[Link, ...], list[tuple[Array, Array]], Array], Array]


def svd_norms(place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, Any]:
    """The ``ask`` of a pass with norms by singular values, up to rounding: for layers whose matrices are small."""
    matrix = layer.matrix()

    def one(rows: Array, columns: Array) -> Array:
        return _norm(weighted(columns.reshape(1, -1), weighted(rows.reshape(-1, 1), matrix)))

    return jax.vmap(one)(rows, columns), None


def product(network: Network, bounds: Bounds | None, label: Array) -> Array:
    """The product of the norms of the layers: with rows and columns dropped on each ball, or of the whole layers.

    ``||I_n c|| ||I_n W_n I_(n-1)|| ... ||I_1 W_1||`` [H21 Eq 6].

    Args:
        network: the classifier, a chain.
        bounds: of the batch, with boxes; None for constants of the whole space.
        label: integers (B,).

    Returns:
        Constants of all margins (B, classes), 0 for the label itself.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding.

    Raises:
        TypeError: the network is no chain, or an activation has no linear pieces.
    """
    return _of_batch(_product, network, bounds, label)


def lip_lt(network: Network, bounds: Bounds | None, label: Array) -> Array:
    """LipLT: the network is a linear one, with every slope in the middle of its interval, and what is left.

    With ``D_k = M_k + H_k E_k``, ``||E_k|| <= 1``, the Jacobian of layer k is at most ``m_k = ||W_k M_(k-1) ... M_1
    W_1|| + sum_j ||W_k M_(k-1) ... W_(j+1) H_j|| m_j``; anywhere, for ReLU, M and H are 1/2.

    Args:
        network: the classifier, a chain.
        bounds: of the batch, with boxes; None for constants of the whole space, as published.
        label: integers (B,).

    Returns:
        As of :func:`product`, never larger than its, nor on a ball than anywhere.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding.

    Raises:
        TypeError: as of :func:`product`.

    Reference:
        Fazlyab, Entesari, Roy, Chellappa, NeurIPS 2023. On balls: rows of m_j are those that vary.
    """
    constant = _around(lambda least, largest: (least + largest) / 2)
    found = _of_batch(constant, network, bounds, label)
    # Neither is always the smaller one: with narrower intervals their middles move, and layers may cancel less.
    return found if bounds is None else jnp.minimum(found, _of_batch(constant, network, None, label))


def merged(network: Network, bounds: Bounds, label: Array) -> Array:
    """Layers merged across neurons that are linear on the ball: the product of norms only counts those that vary.

    With F the slopes that are fixed and V the neurons that vary, ``||W_2 D W_1|| <= ||W_2 F W_1|| + ||W_2 V|| ||V
    W_1||``; over any number of layers as in :func:`lip_lt`, with the least slopes in place of middle ones.

    Args:
        network: the classifier, a chain.
        bounds: of the batch, with boxes.
        label: integers (B,).

    Returns:
        As of :func:`product`, and never larger than its.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding.

    Raises:
        TypeError: as of :func:`product`.

    Reference:
        The idea of [H21], appendix A.2, where linear neurons are merged; this form of it is our own.
    """
    return _of_batch(_around(lambda least, largest: least), network, bounds, label)


def fast_lip(network: Network, bounds: Bounds, label: Array) -> Array:
    """FastLip: interval bounds of every partial derivative, carried from the input to the margins.

    Args:
        network: the classifier, a chain.
        bounds: of the batch, with boxes.
        label: integers (B,).

    Returns:
        As of :func:`product`; not ordered with its.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding.

    Raises:
        TypeError: as of :func:`product`.

    Reference:
        Weng, Zhang, Chen, Song, Hsieh, Boning, Dhillon, Daniel, ICML 2018.
    """
    return _of_batch(_fast_lip, network, bounds, label)


def hein_andriushchenko(network: Network, bounds: Bounds, label: Array) -> Array:
    """The analytic bound for one hidden layer: every pair of neurons at its worst.

    ``||sum_r c_r D_r w_r||^2 = sum_(r,s) c_r c_s <w_r, w_s> D_r D_s``, and each term is at most what it is at a corner
    of the intervals of the two slopes.

    Args:
        network: the classifier: one layer, an activation, and the layer of the logits.
        bounds: of the batch, with boxes.
        label: integers (B,).

    Returns:
        As of :func:`product`; not ordered with its.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding.

    Raises:
        TypeError: as of :func:`product`, or there is not one hidden layer.

    Reference:
        Hein and Andriushchenko, NeurIPS 2017; any slopes in place of those of softplus.
    """
    return _of_batch(_hein_andriushchenko, network, bounds, label)


def exact(network: Network, bounds: Bounds, label: Array, *, max_unstable: int = 16) -> np.ndarray:
    """The local constants themselves, by enumeration of the cells on which a tiny network is linear.

    The largest gradient over all patterns of pieces whose cells meet the ball.

    Args:
        network: the classifier, a chain.
        bounds: of the batch, with boxes and the balls of the inputs, not traced.
        label: integers (B,).
        max_unstable: neurons of one example whose boxes meet several pieces, at most; the patterns may be 2 to their
            number.

    Returns:
        As of :func:`product`, in float64; never larger than any of these bounds.

    Soundness:
        Upper bounds, if the boxes are right; up to rounding. They are attained but for cells without an inside, as two
        neurons with kinks in the same plane have them: those count. Of the domain ``"pixels"``, the whole ball counts.

    Raises:
        TypeError: as of :func:`product`.
        ValueError: more neurons are unstable than may be, or the bounds have no box or ball.

    Reference:
        Jordan and Dimakis, NeurIPS 2020, who find the same constants by mixed integer programming.
    """
    chain, balls = links(network), np.asarray(bounds.input.ball, np.float64)
    centers = np.asarray(bounds.input.center, np.float64).reshape(len(balls), -1)
    rows = np.asarray(jax.vmap(lambda label: differences(network, label))(jnp.asarray(label)), np.float64)
    found = np.zeros(rows.shape[:2])
    for example, radius in enumerate(balls):
        known = jax.tree.map(lambda leaf, example=example: leaf[example], bounds)
        layers = [_layer(link, known) for link in chain]
        unstable = sum(len(layer.choices) for layer in layers)
        if unstable > max_unstable:
            raise ValueError(
                f"{unstable} neurons are unstable on the ball of example {example}, more than max_unstable="
                f"{max_unstable}; take a smaller eps or network, or raise it"
            )
        for jacobian in jacobians(layers, centers[example], float(radius)):
            found[example] = np.maximum(found[example], np.linalg.norm(rows[example] @ jacobian, axis=1))
    return found


def _of_batch(constant: Constant, network: Network, bounds: Bounds | None, label: Array) -> Array:
    chain = links(network)

    def one(known: Bounds | None, label: Array) -> Array:
        return constant(chain, [link.slopes(known) for link in chain], differences(network, label))

    return jax.vmap(one, in_axes=(None if bounds is None else 0, 0))(bounds, jnp.asarray(label))


def _product(chain: tuple[Link, ...], slopes: list[tuple[Array, Array]], rows: Array) -> Array:
    total, live = jnp.ones((), rows.dtype), None
    for link, ends in zip(chain, slopes, strict=True):
        weights = _magnitude(*ends)
        total = total * _norm(weights[:, None] * _columns(live, link.matrix))
        live = weights > 0
    return total * jnp.linalg.norm(_columns(live, rows), axis=1)


def _around(middle: Callable[[Array, Array], Array]) -> Constant:
    """Bounds by linear parts, whose slopes are ``middle(least, largest)``, and what the others may add to them."""

    def constant(chain: tuple[Link, ...], slopes: list[tuple[Array, Array]], rows: Array) -> Array:
        live, of_live, of_varying = None, jnp.ones((), rows.dtype), []
        linear, rests = jnp.eye(chain[0].matrix.shape[1] if chain else rows.shape[1], dtype=rows.dtype), []

        def least(matrix: Array, weights: Array, norm: Callable[[Array], Array]) -> Array:
            """The least of both bounds of ``weights matrix`` times the Jacobian so far."""
            scaled = weights[:, None]
            parts = [norm(scaled * rest) * varying for rest, varying in zip(rests, of_varying, strict=True)]
            split = sum(parts, start=norm(scaled * linear))
            return jnp.minimum(split, norm(scaled * _columns(live, matrix)) * of_live)

        for link, (low, high) in zip(chain, slopes, strict=True):
            linear, rests = _times(link.matrix, linear), [_times(link.matrix, rest) for rest in rests]
            center = middle(low, high)
            half = _magnitude(low - center, high - center)
            weights = _magnitude(low, high)
            of_rows, varying = least(link.matrix, weights, _norm), (half > 0).astype(half.dtype)
            of_varying.append(least(link.matrix, varying, _norm))
            live, of_live = weights > 0, of_rows
            linear, rests = center[:, None] * linear, [center[:, None] * rest for rest in rests]
            rests.append(jnp.diag(half))
        linear, rests = _times(rows, linear), [_times(rows, rest) for rest in rests]
        return least(rows, jnp.ones(len(rows), rows.dtype), lambda matrix: jnp.linalg.norm(matrix, axis=1))

    return constant


def _fast_lip(chain: tuple[Link, ...], slopes: list[tuple[Array, Array]], rows: Array) -> Array:
    size = chain[0].matrix.shape[1] if chain else rows.shape[1]
    lower = upper = jnp.eye(size, dtype=rows.dtype)
    for link, (low, high) in zip(chain, slopes, strict=True):
        lower, upper = _interval_product(link.matrix, lower, upper)
        corners = [slope[:, None] * entry for slope in (low, high) for entry in (lower, upper)]
        lower, upper = jnp.min(jnp.stack(corners), axis=0), jnp.max(jnp.stack(corners), axis=0)
    return jnp.linalg.norm(_magnitude(*_interval_product(rows, lower, upper)), axis=1)


def _hein_andriushchenko(chain: tuple[Link, ...], slopes: list[tuple[Array, Array]], rows: Array) -> Array:
    if len(chain) != 1:
        raise TypeError(f"the network has {len(chain)} hidden layers; this bound is one of networks with one")
    (link,), ((low, high),) = chain, slopes
    gram = _times(link.matrix, link.matrix.T)
    corners = jnp.stack([first[:, None] * second[None] for first in (low, high) for second in (low, high)])
    most, fewest = jnp.max(corners, axis=0), jnp.min(corners, axis=0)

    def one(row: Array) -> Array:
        terms = row[:, None] * row[None] * gram
        return jnp.sqrt(jnp.maximum(jnp.sum(jnp.maximum(terms * most, terms * fewest)), 0))

    return jax.vmap(one)(rows)


def _layer(link: Link, bounds: Bounds) -> Layer:
    """A layer for enumeration; bounds are of one example."""
    pieces, masks = zip(*link.pieces(bounds), strict=True)
    parts = np.array([[np.asarray(part, np.float64) for part in piece] for piece in pieces])  # (pieces, 4, neurons)
    met, neurons = np.array([np.asarray(mask) for mask in masks]), np.arange(link.shift.size)
    slope, intercept = (parts[met.argmax(axis=0), part, neurons] for part in (0, 1))
    choices = {
        int(neuron): [Piece(*map(float, parts[k, :, neuron])) for k in np.flatnonzero(met[:, neuron])]
        for neuron in np.flatnonzero(met.sum(axis=0) > 1)
    }
    matrix, shift = np.asarray(link.matrix, np.float64), np.asarray(link.shift, np.float64)
    return Layer(matrix, shift, slope, intercept, choices)


def _interval_product(matrix: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """What ``matrix @ B`` may be, entry by entry, for ``lower <= B <= upper``."""
    positive, negative = jnp.maximum(matrix, 0), jnp.minimum(matrix, 0)
    return (
        _times(positive, lower) + _times(negative, upper),
        _times(positive, upper) + _times(negative, lower),
    )


def _norm(matrix: Array) -> Array:
    """The largest singular value, from the Gram matrix of the smaller side."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = jnp.max(jnp.abs(matrix))
    scaled = matrix / jnp.where(scale == 0, 1, scale)
    return scale * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(_times(scaled, scaled.T))[-1], 0))


def _columns(live: Array | None, matrix: Array) -> Array:
    """The matrix without the columns that do not vary."""
    return matrix if live is None else jnp.where(live[None], matrix, 0)


def _magnitude(least: Array, largest: Array) -> Array:
    return jnp.maximum(jnp.abs(least), jnp.abs(largest))


def _times(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, precision=HIGHEST)

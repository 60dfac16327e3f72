"""The cells of a ball on which a chain is linear, one after the other: for tiny networks, on the host in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lipjax.networks.pieces import Piece

Cell = tuple[np.ndarray, np.ndarray]  # ``(normals, ends)``: the offsets d from the center with ``normals d >= ends``
SEPARATED = 1 + 1e-9  # a cell is left out where a plane is farther from the center than the radius, times this


class Layer(NamedTuple):
    """One layer of a chain, and what its neurons do in a ball.

    Attributes:
        matrix: (outputs, inputs).
        shift: the bias (outputs,).
        slope: of the neurons that stay on one piece (outputs,).
        intercept: likewise.
        choices: of the others, by their places: the pieces that they may be on, of numbers.
    """

    matrix: np.ndarray
    shift: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    choices: Mapping[int, Sequence[Piece]]


def jacobians(layers: Sequence[Layer], center: np.ndarray, radius: float) -> Iterator[np.ndarray]:
    """The Jacobians (features, inputs) of a chain on all cells that meet a ball.

    Neuron by neuron, the cells are cut in two or three; a part that a plane separates from the ball is left out, with
    all that it would be cut into. Where no plane is found the part is kept: there are never too few.

    Args:
        layers: with the pieces that each neuron may be on anywhere in the ball.
        center: raveled (inputs,).
        radius: of the ball.
    """
    size = center.size

    def enter(place: int, jacobian: np.ndarray, value: np.ndarray, cell: Cell) -> Iterator[np.ndarray]:
        """Behind some layers, which are ``jacobian d + value`` on a cell."""
        if place == len(layers):
            yield jacobian
            return
        layer = layers[place]
        before, at = layer.matrix @ jacobian, layer.matrix @ value + layer.shift
        for slope, intercept, part in split(layer, list(layer.choices), before, at, cell):
            yield from enter(place + 1, slope[:, None] * before, slope * at + intercept, part)

    def split(
        layer: Layer, neurons: list[int], before: np.ndarray, at: np.ndarray, cell: Cell
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Cell]]:
        """Slopes and intercepts on the parts of a cell that differ in what some neurons are on."""
        if not neurons:
            yield layer.slope, layer.intercept, cell
            return
        neuron, *rest = neurons
        for piece in layer.choices[neuron]:
            normals, ends = cell
            for sign, end in ((1.0, piece.start), (-1.0, piece.end)):
                if np.isfinite(end):
                    normals = np.vstack([normals, sign * before[neuron]])
                    ends = np.append(ends, sign * (end - at[neuron]))
            if not separated(normals, ends, radius):
                for slope, intercept, part in split(layer, rest, before, at, (normals, ends)):
                    slope, intercept = slope.copy(), intercept.copy()
                    slope[neuron], intercept[neuron] = piece.slope, piece.intercept
                    yield slope, intercept, part

    yield from enter(0, np.eye(size), center, (np.zeros((0, size)), np.zeros(0)))


def separated(normals: np.ndarray, ends: np.ndarray, radius: float) -> bool:
    """Whether a plane was found between the ball around 0 and the polytope ``normals d >= ends``.

    For any u >= 0 the polytope lies in ``<normals^T u, d> >= <u, ends>``, which is farther from 0 than the radius if
    ``<u, ends> > radius ||normals^T u||``. The u of the nearest point of the polytope is a solution of non-negative
    least squares.

    Reference:
        Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23 (least distance programming).
    """
    if (ends <= 0).all():
        return False  # 0 is in the polytope
    lengths = np.linalg.norm(normals, axis=1)
    if ((lengths == 0) & (ends > 0)).any():
        return True  # a neuron that is constant on the cell, and not on the piece
    lengths = np.where(lengths == 0, 1, lengths)
    normals, ends = normals / lengths[:, None], ends / lengths
    size = normals.shape[1]
    scale = np.abs(ends).max()
    try:
        u, _ = optimize.nnls(np.vstack([normals.T, ends[None] / scale]), np.append(np.zeros(size), 1.0))
    except RuntimeError:
        return False
    return bool(u @ ends > radius * np.linalg.norm(normals.T @ u) * SEPARATED)

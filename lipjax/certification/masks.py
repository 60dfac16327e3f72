"""Masks: which rows of each layer matter, for many examples, one bit a row."""

from __future__ import annotations

import math

import numpy as np

from lipjax.networks.graph import Network

Rows = tuple[np.ndarray, ...]  # booleans (B, *shape of the pre-activations), one array per block


def all_rows(network: Network, count: int) -> Rows:
    """The masks that leave out nothing."""
    return tuple(np.ones((count, *block.affine.out_shape), bool) for block in network.blocks)


def rows_to_bits(rows: Rows) -> np.ndarray:
    """Masks of B examples as bytes (B, n)."""
    flat = [each.reshape(len(each), -1) for each in rows]
    return np.packbits(np.concatenate(flat, axis=1), axis=1) if flat else np.zeros((1, 0), np.uint8)


def rows_from_bits(network: Network, bits: np.ndarray) -> Rows:
    """The inverse of :func:`rows_to_bits` for the blocks of a network."""
    shapes = [block.affine.out_shape for block in network.blocks]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = np.unpackbits(bits, axis=1).astype(bool)
    parts = np.split(flat, ends, axis=1)[: len(shapes)]
    return tuple(part.reshape(len(bits), *shape) for part, shape in zip(parts, shapes, strict=True))

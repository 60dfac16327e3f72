"""Masks: which rows of each layer matter, for many examples, one bit a row."""

from __future__ import annotations

import math

import numpy as np

from lipjax.networks.graph import Network

Rows = tuple[np.ndarray, ...]  # booleans (B, *output), one array per layer


def all_rows(network: Network, count: int) -> Rows:
    """The masks that leave out nothing."""
    return tuple(np.ones((count, *layer.out_shape), bool) for layer in network.layers)


def rows_to_bits(rows: Rows) -> np.ndarray:
    """Masks of B examples as bytes (B, n)."""
    flat = [each.reshape(len(each), -1) for each in rows]
    return np.packbits(np.concatenate(flat, axis=1), axis=1) if flat else np.zeros((1, 0), np.uint8)


def rows_from_bits(network: Network, bits: np.ndarray) -> Rows:
    """The inverse of :func:`rows_to_bits` for the layers of a network."""
    shapes = [layer.out_shape for layer in network.layers]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = np.unpackbits(bits, axis=1).astype(bool)
    parts = np.split(flat, ends, axis=1)[: len(shapes)]
    return tuple(part.reshape(len(bits), *shape) for part, shape in zip(parts, shapes, strict=True))

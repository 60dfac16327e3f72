"""Packing: which rows of each layer matter, for many examples: a bit for each row, or a byte for its weight."""

from __future__ import annotations

import math

import numpy as np

from lipjax.networks.graph import Network
from lipjax.networks.masks import STEPS

Rows = tuple[np.ndarray, ...]  # one array (B, *output) per layer, booleans or weights


def all_rows(network: Network, count: int) -> Rows:
    """The masks and weights that leave out nothing."""
    types = (float if weighs else bool for weighs in network.weighs)
    return tuple(np.ones((count, *layer.out_shape), kind) for layer, kind in zip(network.layers, types, strict=True))


def pack(rows: Rows) -> np.ndarray:
    """Masks and weights of B examples as bytes (B, n). Weights are rounded up to multiples of 1 / STEPS."""
    parts = [np.zeros((len(rows[0]) if rows else 1, 0), np.uint8)]
    for each in rows:
        flat = each.reshape(len(each), -1)
        if flat.dtype == bool:
            parts.append(np.packbits(flat, axis=1))
        else:  # what is not a number drops nothing
            parts.append(np.ceil(np.where(np.isnan(flat), 1, flat) * STEPS).astype(np.uint8))
    return np.concatenate(parts, axis=1)


def unpack(network: Network, packed: np.ndarray) -> Rows:
    """The inverse of :func:`pack` for the layers of a network."""
    sizes = [math.prod(layer.out_shape) for layer in network.layers]
    lengths = [size if weighs else -(-size // 8) for size, weighs in zip(sizes, network.weighs, strict=True)]
    parts = np.split(packed, np.cumsum(lengths), axis=1)[: len(sizes)]
    rows = (
        part / STEPS if weighs else np.unpackbits(part, axis=1, count=size).astype(bool)
        for part, size, weighs in zip(parts, sizes, network.weighs, strict=True)
    )
    return tuple(part.reshape(len(packed), *layer.out_shape) for part, layer in zip(rows, network.layers, strict=True))

"""Sharding: which device owns which examples, and which examples make which step.

Every device owns a contiguous share of the data set and of the stored vectors, and shuffles within its share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jax import Array

from lipjax.training.training_step import Batch


@dataclasses.dataclass(frozen=True)
class Batches:
    """Which examples make which step. Every batch has the same size; the short last one is padded with weight 0."""

    size: int
    devices: int
    seed: int

    def steps(self, num_examples: int) -> int:
        """Steps per epoch."""
        return math.ceil(math.ceil(num_examples / self.devices) / (self.size // self.devices))

    def shuffled(self, num_examples: int, epoch: int) -> Iterator[Batch]:
        """One epoch, shuffled within each device's share by seed and epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        return self._batches(num_examples, [rng.permutation(n) for n in _shares(num_examples, self.devices)])

    def in_order(self, num_examples: int) -> Iterator[Batch]:
        """Every example once, in order."""
        return self._batches(num_examples, [np.arange(n) for n in _shares(num_examples, self.devices)])

    def _batches(self, num_examples: int, orders: list[np.ndarray]) -> Iterator[Batch]:
        steps, size = self.steps(num_examples), self.size // self.devices
        index = np.zeros((self.devices, steps * size), np.int32)
        weight = np.zeros((self.devices, steps * size), np.float32)
        for device, order in enumerate(orders):
            index[device, : len(order)], weight[device, : len(order)] = order, 1.0
        for step in range(steps):
            part = slice(step * size, (step + 1) * size)
            yield Batch(index[:, part], weight[:, part])


def _shares(num_examples: int, devices: int) -> list[int]:
    """How many examples each device owns: contiguous shares, the last one may be short."""
    size = math.ceil(num_examples / devices)
    return [max(0, min(size, num_examples - device * size)) for device in range(devices)]


def deal(array: np.ndarray, devices: int) -> np.ndarray:
    """Examples to [devices, share, ...], padded with zeros at the end."""
    size = math.ceil(len(array) / devices)
    if size * devices != len(array):
        array = np.concatenate([array, np.zeros((size * devices - len(array), *array.shape[1:]), array.dtype)])
    return array.reshape(devices, size, *array.shape[1:])


def collect(table: Array, num_examples: int) -> np.ndarray:
    """The inverse of :func:`deal`, from the devices."""
    shards = sorted(table.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [np.asarray(shard.data)[0] for shard in shards]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts))[:num_examples]


def first_shard(value: Array) -> np.ndarray:
    """The copy of the first device of a replicated value (indexing would gather all copies)."""
    return np.asarray(value.addressable_shards[0].data)[0]

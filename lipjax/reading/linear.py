"""Operations that do more than move entries: products, convolutions, sums, pooling and GroupSort.

A rule takes the parameters of the operation, the value, the axis of its batch, the place of the value among the
operands, and the other operands; it gives the new value and the axis of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks import layers
from lipjax.networks.blocks import blocks
from lipjax.networks.maxmin import MaxMinActivation
from lipjax.reading.values import Value


class MixedError(Exception):
    """An operation along the axis of the batch."""


Rule = Callable[[dict[str, Any], Value, int, int, list[Any]], tuple[Value, int]]


def _without(axes: Any, batch: int) -> tuple[int, ...]:
    """Axes of a batch as axes of one example. Raises MixedError where the batch is one of them."""
    if batch in axes:
        raise MixedError
    return tuple(axis - (axis > batch) for axis in axes)


def reduce_sum(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
    """Sums over axes."""
    axes = _without(params["axes"], batch)
    return value.summed(axes), batch - sum(axis < batch for axis in params["axes"])


def reduce_max(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
    """The maximum over all places of an image, for each channel."""
    axes = _without(params["axes"], batch)
    if len(value.shape) != 3 or axes != (0, 1) or batch != 0:
        raise NotImplementedError(
            "the maximum is over other axes than height and width (of a softmax, leave it out: give logits)"
        )
    pooled = value.max_pooled(value.shape[:2], (1, 1), ((0, 0), (0, 0)))
    return pooled.reshaped(value.shape[2:]), 0


def reduce_window(kind: str) -> Rule:
    """Maxima or sums over windows."""

    def rule(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
        window, stride, padding = (params[key] for key in ("window_dimensions", "window_strides", "padding"))
        if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
            raise NotImplementedError("dilated windows")
        if batch != 0 or len(window) not in (3, 4):
            raise NotImplementedError("windows of anything but signals and images")
        if window[0] != 1 or stride[0] != 1 or tuple(padding[0]) != (0, 0):
            raise MixedError
        if window[-1] != 1 or stride[-1] != 1 or tuple(padding[-1]) != (0, 0):
            raise NotImplementedError("windows over channels")
        image, size, strides = _as_image(value), window[1:-1], stride[1:-1]
        pads = tuple(tuple(map(int, each)) for each in padding[1:-1])
        if len(size) == 1:
            size, strides, pads = (*size, 1), (*strides, 1), (*pads, (0, 0))
        if kind == "max":
            found = image.max_pooled(tuple(size), tuple(strides), pads)
        else:
            channels = image.shape[-1]
            ones = jnp.broadcast_to(jnp.eye(channels), (*size, channels, channels))
            found = image.affine(layers.convolution(ones, jnp.zeros(channels), image.shape, tuple(strides), pads))
        return (found if len(value.shape) == 3 else found.reshaped((found.shape[0], found.shape[2]))), 0

    return rule


def dot_general(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
    """A product of a value with a matrix, or a tensor, of constants."""
    contracting, batched = params["dimension_numbers"]
    if any(axis == batch for axis in batched[place]):
        raise NotImplementedError("a product with a constant that has an axis for the batch")
    groups, theirs_too = _without(batched[place], batch), batched[1 - place]
    axes, theirs = _without(contracting[place], batch), contracting[1 - place]
    kernel = jnp.asarray(others[1 - place])
    free = tuple(axis for axis in range(len(value.shape)) if axis not in (*groups, *axes))
    own = tuple(axis for axis in range(kernel.ndim) if axis not in (*theirs_too, *theirs))
    kept, outer = tuple(value.shape[axis] for axis in free), tuple(kernel.shape[axis] for axis in own)
    shared = tuple(kernel.shape[axis] for axis in theirs_too)
    if 0 in kernel.shape:
        raise NotImplementedError("a product over no entries")
    inputs = math.prod(kernel.shape[axis] for axis in theirs)
    kernels = kernel.transpose(*theirs_too, *theirs, *own).reshape(math.prod(shared), inputs, -1)
    moved = _transposed(value, (*groups, *free, *axes))
    zeros = jnp.zeros(kernels.shape[-1], kernels.dtype)
    if shared:
        whole = blocks(kernels, zeros, math.prod(kept))
    elif math.prod(kept) == 1:
        whole = layers.dense(kernels[0], zeros, (inputs,))
    else:  # the same matrix at each place: a convolution of a window of one
        whole = layers.convolution(kernels[:, None], zeros, (math.prod(kept), 1, inputs), (1, 1), ((0, 0), (0, 0)))
    found = moved.reshaped(whole.in_shape).affine(whole).reshaped((*shared, *kept, *outer))
    # In the result, axes of both operands come first, then those of the left one, then those of the right one.
    left = sum(axis not in (*contracting[place], *batched[place]) for axis in range(batch))
    if place == 0:
        return found, len(shared) + left
    of_shared, of_kept = range(len(shared)), range(len(shared), len(shared) + len(kept))
    of_outer = range(len(shared) + len(kept), len(found.shape))
    return _transposed(found, (*of_shared, *of_outer, *of_kept)), len(shared) + len(outer) + left


def convolution(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
    """A convolution with a kernel of constants, of signals or images in any layout."""
    if place != 0:
        raise NotImplementedError("a kernel that depends on the input")
    dimensions = params["dimension_numbers"]
    if dimensions.lhs_spec[0] != batch or params["batch_group_count"] != 1:
        raise MixedError
    spatial = len(dimensions.lhs_spec) - 2
    if spatial not in (1, 2):
        raise NotImplementedError(f"a convolution with {spatial} dimensions")
    _, *channels_last = (*dimensions.lhs_spec[:1], *dimensions.lhs_spec[2:], dimensions.lhs_spec[1])
    order = tuple(axis - (axis > batch) for axis in channels_last)
    image = _as_image(_transposed(value, order))
    out_c, in_c, *taps = dimensions.rhs_spec
    kernel = jnp.transpose(jnp.asarray(others[1]), (*taps, in_c, out_c))
    stride, dilation = tuple(params["window_strides"]), tuple(params["rhs_dilation"])
    apart = tuple(params["lhs_dilation"])
    padding = tuple(tuple(map(int, each)) for each in params["padding"])
    if spatial == 1:
        kernel, stride, dilation, padding = kernel[:, None], (*stride, 1), (*dilation, 1), (*padding, (0, 0))
        apart = (*apart, 1)
    if apart != (1, 1):  # a transposed convolution
        image = _spread(image, apart)
    kernel = grouped(dilated(kernel, dilation), params["feature_group_count"])
    zeros = jnp.zeros(kernel.shape[-1], kernel.dtype)
    found = image.affine(layers.convolution(kernel, zeros, image.shape, stride, padding))
    if spatial == 1:
        found = found.reshaped((found.shape[0], found.shape[2]))
    # From (..., channels) to the layout of the result.
    position = {dimensions.out_spec[1]: spatial} | {axis: k for k, axis in enumerate(dimensions.out_spec[2:])}
    out_batch = dimensions.out_spec[0]
    return _transposed(found, tuple(position[axis] for axis in sorted(position))), out_batch


def dilated(kernel: Array, dilation: tuple[int, int]) -> Array:
    """The kernel with zeros between its taps."""
    if dilation == (1, 1):
        return kernel
    size = tuple((k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True))
    return jnp.zeros((*size, *kernel.shape[2:]), kernel.dtype).at[:: dilation[0], :: dilation[1]].set(kernel)


def grouped(kernel: Array, groups: int) -> Array:
    """The kernel of all channels, with zeros between different groups."""
    if groups == 1:
        return kernel
    kh, kw, c_in, c_out = kernel.shape
    split = kernel.reshape(kh, kw, c_in, groups, c_out // groups)
    whole = jnp.einsum("hwigo,gk->hwkigo", split, jnp.eye(groups, dtype=kernel.dtype), precision=layers.HIGHEST)
    return whole.reshape(kh, kw, groups * c_in, c_out)


def _spread(image: Value, apart: tuple[int, int]) -> Value:
    """The image with zeros between its pixels."""
    height, width, channels = image.shape
    places = np.full(((height - 1) * apart[0] + 1, (width - 1) * apart[1] + 1, channels), -1, np.int32)
    places[:: apart[0], :: apart[1]] = np.arange(places[:: apart[0], :: apart[1]].size).reshape(image.shape)
    return image.gathered(places)


def _as_image(value: Value) -> Value:
    """A signal (n, channels) as an image of width 1."""
    return value if len(value.shape) == 3 else value.reshaped((value.shape[0], 1, value.shape[1]))


def _transposed(value: Value, order: tuple[int, ...]) -> Value:
    if order == tuple(range(len(order))):
        return value
    numbers = np.arange(math.prod(value.shape), dtype=np.int32).reshape(value.shape)
    return value.gathered(numbers.transpose(order))


def sort(params: dict[str, Any], value: Value, batch: int, place: int, others: list[Any]) -> tuple[Value, int]:
    """GroupSort of 2: neighbours of the last axis, the smaller first."""
    (axis,) = _without((params["dimension"],), batch)
    if axis != len(value.shape) - 1 or value.shape[axis] != 2 or len(others) != 1:
        raise NotImplementedError("a sort of anything but pairs along the last axis")
    minus = jnp.float32(-1)  # MaxMin gives the larger first
    return value.rescaled(minus).activation(MaxMinActivation()).rescaled(minus), batch


RULES: dict[str, Rule] = {
    "reduce_sum": reduce_sum,
    "reduce_max": reduce_max,
    "reduce_window_max": reduce_window("max"),
    "reduce_window_sum": reduce_window("sum"),
    "dot_general": dot_general,
    "sort": sort,
    "conv_general_dilated": convolution,
}

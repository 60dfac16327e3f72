"""Dense float64 NumPy oracles, independent of the library's own arithmetic, and small random networks to try it on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import (
    ClippedMaxMinActivation,
    ClippedReLUActivation,
    Conv,
    Dense,
    ReLUActivation,
    chain,
    convolution,
    dense,
)

# For functions that a test calls a few times: code that is not optimised is made in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def conv_matrix(kernel, in_shape, stride, padding):
    """The dense matrix (outputs, inputs) of a zero-padded convolution, tap by tap, both sides in C order."""
    kernel = np.asarray(kernel, np.float64)
    kh, kw, c_in, c_out = kernel.shape
    height, width, _ = in_shape
    (top, bottom), (left, right) = padding
    rows = (height + top + bottom - kh) // stride[0] + 1
    columns = (width + left + right - kw) // stride[1] + 1
    matrix = np.zeros((rows, columns, c_out, height, width, c_in))
    for i in range(rows):
        for j in range(columns):
            for a in range(kh):
                for b in range(kw):
                    h, w = i * stride[0] + a - top, j * stride[1] + b - left
                    if 0 <= h < height and 0 <= w < width:
                        matrix[i, j, :, h, w, :] += kernel[a, b].T
    return matrix.reshape(rows * columns * c_out, height * width * c_in)


def layer_matrix(layer):
    """``(W, b)`` of an affine layer in float64: z.ravel() = W @ a.ravel() + b."""
    bias = np.asarray(layer.bias, np.float64)
    if isinstance(layer, Dense):
        return np.asarray(layer.kernel, np.float64).T, bias
    assert isinstance(layer, Conv)
    matrix = conv_matrix(layer.kernel, layer.in_shape, layer.stride, layer.padding)
    return matrix, np.tile(bias, matrix.shape[0] // bias.size)


class Clip:
    """``min(max(z, 0), theta)`` of raveled activations; theta is infinite for ReLU."""

    def __init__(self, theta):
        self.theta = theta

    def apply(self, z):
        return np.minimum(np.maximum(z, 0), self.theta)

    def derivative(self, z):
        return np.diag(((z > 0) & (z < self.theta)).astype(np.float64))

    def matter(self, lower, upper):
        """The rows that matter and the outputs that vary, and how near the closest call was."""
        live = (upper > 0) & (lower < self.theta) & (np.zeros_like(upper) < self.theta)
        return live, live, min(np.abs(upper).min(), np.abs(lower - self.theta).min())


class ClippedPairs:
    """``min(max(z1, z2), a)`` and ``max(min(z1, z2), b)`` of raveled activations, pair by pair."""

    def __init__(self, activation, shape):
        self.shape = shape
        self.a, self.b = (np.asarray(clip, np.float64) for clip in (activation.upper_clip, activation.lower_clip))

    def apply(self, z):
        first, second = np.split(z.reshape(*z.shape[:-1], *self.shape), 2, axis=-1)
        pair = np.minimum(np.maximum(first, second), self.a), np.maximum(np.minimum(first, second), self.b)
        return np.concatenate(pair, axis=-1).reshape(z.shape)

    def derivative(self, z):
        places = np.arange(z.size).reshape(self.shape)
        matrix, half = np.zeros((z.size, z.size)), self.shape[-1] // 2
        for place in np.ndindex(*self.a.shape):
            i, j = places[place], places[(*place[:-1], place[-1] + half)]
            larger, smaller = (i, j) if z[i] >= z[j] else (j, i)
            matrix[i, larger] = z[larger] < self.a[place]
            matrix[j, smaller] = z[smaller] > self.b[place]
        return matrix

    def matter(self, lower, upper):
        """By what a pair of intervals can do: which of its two is the larger, and where the clips are."""
        lower, upper = lower.reshape(self.shape), upper.reshape(self.shape)
        rows, outputs, nearest, half = (
            np.zeros(self.shape, bool),
            np.zeros(self.shape, bool),
            np.inf,
            self.shape[-1] // 2,
        )
        for place in np.ndindex(*self.a.shape):
            i, j = place, (*place[:-1], place[-1] + half)
            a, b = self.a[place], self.b[place]
            outputs[i] = max(lower[i], lower[j]) < a
            outputs[j] = min(upper[i], upper[j]) > b
            i_can_be_larger, j_can_be_larger = upper[i] >= lower[j], upper[j] >= lower[i]
            rows[i] = (outputs[i] and i_can_be_larger) or (outputs[j] and j_can_be_larger)
            rows[j] = (outputs[i] and j_can_be_larger) or (outputs[j] and i_can_be_larger)
            calls = max(lower[i], lower[j]) - a, min(upper[i], upper[j]) - b, upper[i] - lower[j], upper[j] - lower[i]
            nearest = min(nearest, *np.abs(calls))
        return rows.ravel(), outputs.ravel(), nearest


def rule(activation, shape):
    if isinstance(activation, ClippedMaxMinActivation):
        return ClippedPairs(activation, shape)
    clipped = isinstance(activation, ClippedReLUActivation)
    return Clip(np.asarray(activation.theta, np.float64).ravel() if clipped else np.inf)


class DenseNetwork:
    """A chain of layers and activations as float64 matrices: the forward pass, and the region pass with exact norms."""

    def __init__(self, network):
        self.layers = [layer_matrix(layer) for layer in network.layers]
        pairs = zip(network.layers, network.activations, strict=True)
        self.rules = [rule(activation, layer.out_shape) for layer, activation in pairs]
        self.head = layer_matrix(network.head)

    def activations(self, x):
        """Pre- and post-activations of raveled inputs (..., inputs): two lists, one array (..., outputs) per block."""
        before, after = [], []
        for (matrix, bias), rule in zip(self.layers, self.rules, strict=True):
            before.append(x @ matrix.T + bias)
            after.append(rule.apply(before[-1]))
            x = after[-1]
        return before, after

    def features(self, x):
        return self.activations(x)[1][-1] if self.layers else x

    def logits(self, x):
        return self.features(x) @ self.head[0].T + self.head[1]

    def jacobian(self, x):
        """d features / d x at one raveled input."""
        total = np.eye(x.size)
        for (matrix, _), rule, z in zip(self.layers, self.rules, self.activations(x)[0], strict=True):
            total = rule.derivative(z) @ matrix @ total
        return total

    def regions(self, x, eps):
        """The region pass in float64: per block (lower, upper, live outputs, sigma), before the activation.

        Also how near any neuron is to changing sides, where float32 may come out with another mask.
        """
        live = np.ones(x.size, bool)
        lower, upper, center, radius, nearest, blocks = x - eps, x + eps, x, eps, np.inf, []
        for (matrix, bias), rule in zip(self.layers, self.rules, strict=True):
            center = matrix @ center + bias
            mid, half = matrix @ (lower + upper) / 2 + bias, np.abs(matrix) @ (upper - lower) / 2
            ball = radius * np.linalg.norm(matrix * live, axis=1)
            lower, upper = np.maximum(mid - half, center - ball), np.minimum(mid + half, center + ball)
            rows, new, near = rule.matter(lower, upper)
            nearest = min(nearest, near)
            sigma = spectral_norm(matrix * np.outer(rows, live))
            blocks.append((lower, upper, new, sigma))
            radius, live = radius * sigma, new
            lower, upper, center = (rule.apply(z) for z in (lower, upper, center))
        return blocks, nearest


def spectral_norm(matrix):
    """The largest singular value; 0 for an empty or zero matrix."""
    matrix = matrix[matrix.any(axis=1)][:, matrix.any(axis=0)]  # what a mask leaves of it has the same one
    return float(np.linalg.svd(matrix, compute_uv=False)[0]) if matrix.size else 0.0


def box_and_ball_minimum(c, low, high, radius):
    """min <c, d> over low <= d <= high, ||d|| <= radius, where low <= 0 <= high: bisection on the multiplier, float64.

    ||clip(-t c, low, high)|| grows with t, so the t at which it meets the radius is found by halving log t; what is
    returned is a feasible value from which the dual value may differ by no more than rounding.
    """
    c, low, high, radius = (np.asarray(value, np.float64) for value in (c, low, high, radius))
    corner = np.where(c > 0, low, np.where(c < 0, high, 0))
    if np.linalg.norm(corner) <= radius:
        return c @ corner
    if radius == 0:
        return 0.0
    below, above = -400.0, 400.0
    for _ in range(200):
        middle = (below + above) / 2
        if np.linalg.norm(np.clip(-np.exp(middle) * c, low, high)) <= radius:
            below = middle
        else:
            above = middle
    return c @ np.clip(-np.exp(below) * c, low, high)


def margins_minimum(kernel, bias, center, lower, upper, radius, label):
    """The least margins (classes,) over box and ball, exactly: ``kernel`` (features, classes)."""
    kernel, bias, center, lower, upper = (np.asarray(a, np.float64) for a in (kernel, bias, center, lower, upper))
    directions = (kernel[:, [label]] - kernel).T
    clean = directions @ center + bias[label] - bias
    low, high = np.minimum(lower - center, 0), np.maximum(upper - center, 0)
    drops = np.array([box_and_ball_minimum(c, low, high, radius) for c in directions])
    return clean + drops, clean


def ball_points(rng, x, eps, count, directions=None):
    """Points of the ball around raveled x: half on its surface, half inside, and those along given directions."""
    offsets = rng.standard_normal((count, x.size))
    if directions is not None:
        offsets = np.concatenate([offsets, directions, -directions])
    offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-300)
    lengths = np.ones((len(offsets), 1))
    lengths[: count // 2] = rng.uniform(0, 1, (count // 2, 1))
    return x + eps * lengths * offsets


def slow_but(cases, *names):
    """Cases of parametrize, slow but for those with these names, which stand for all in the default tests."""
    return [case if case in names else pytest.param(case, marks=pytest.mark.slow) for case in cases]


KINDS = ("dense relu", "dense clipped", "conv relu", "conv clipped", "dense pairs", "conv pairs")


def random_network(kind, seed, *, scale=1.0, shift=0.0, clip=0.5):
    """A small random network: one structure per kind, so that a test compiles once per kind.

    Args:
        kind: one of KINDS.
        seed: of the weights.
        scale: of the kernels, in units that keep activations about as large as they came in.
        shift: added to the biases of the hidden layers: negative ones kill neurons.
        clip: mean of the clips.
    """
    rng = np.random.default_rng(seed)

    def array(*shape, std):
        return jnp.asarray(rng.standard_normal(shape) * std, jnp.float32)

    def bias(n):
        return jnp.asarray(rng.standard_normal(n) * 0.2 + shift, jnp.float32)

    def block(affine):
        if "relu" in kind:
            return affine, ReLUActivation()
        if "pairs" in kind:
            half = (*affine.out_shape[:-1], affine.out_shape[-1] // 2)
            clips = rng.uniform(-0.1, 2 * clip, half), rng.uniform(-2 * clip, 0.1, half)
            return affine, ClippedMaxMinActivation(*(jnp.asarray(c, jnp.float32) for c in clips))
        return affine, ClippedReLUActivation(jnp.asarray(rng.uniform(-0.1, 2 * clip, affine.out_shape), jnp.float32))

    def full(inputs, outputs, shape):
        return dense(array(inputs, outputs, std=scale / np.sqrt(inputs)), bias(outputs), shape)

    if "dense" in kind:
        first, second = (10, 8) if "pairs" in kind else (9, 7)
        hidden = (*block(full(5, first, (5,))), *block(full(first, second, (first,))))
        return chain(*hidden, dense(array(second, 3, std=0.5), bias(3), (second,)))
    channels = 4 if "pairs" in kind else 3
    first = convolution(array(3, 3, 2, channels, std=scale / 4), bias(channels), (5, 6, 2), (1, 1), ((1, 1), (1, 1)))
    second = convolution(array(4, 3, channels, 2, std=scale / 6), bias(2), first.out_shape, (2, 1), ((1, 0), (0, 1)))
    third = full(int(np.prod(second.out_shape)), 6, second.out_shape)
    hidden = (*block(first), *block(second), *block(third))
    return chain(*hidden, dense(array(6, 3, std=0.5), bias(3), (6,)))


def network_of(shape, layers, activation, seed):
    """A random network: layers are widths, or (channels, kernel, stride, padding) of square convolutions; 3 classes."""
    rng = np.random.default_rng(seed)
    rules, input_shape = [], shape
    for spec in layers:
        if isinstance(spec, tuple):
            channels, kernel, stride, padding = spec
            size = (kernel, kernel, shape[-1], channels)
            weights = rng.standard_normal(size) * np.sqrt(2 / np.prod(size[:3]))
            bias = rng.standard_normal(channels) * 0.2
            affine = convolution(
                weights.astype(np.float32), bias.astype(np.float32), shape, (stride,) * 2, ((padding,) * 2,) * 2
            )
        else:
            inputs = int(np.prod(shape))
            weights, bias = rng.standard_normal((inputs, spec)) * np.sqrt(2 / inputs), rng.standard_normal(spec) * 0.2
            affine = dense(weights.astype(np.float32), bias.astype(np.float32), shape)
        shape = affine.out_shape
        clips = jnp.asarray(rng.uniform(0.2, 1.0, shape), jnp.float32)
        rules += [affine, ReLUActivation() if activation == "relu" else ClippedReLUActivation(clips)]
    head = dense(rng.standard_normal((int(np.prod(shape)), 3)).astype(np.float32), np.zeros(3, np.float32), shape)
    return chain(*rules, head, input_shape=input_shape)


def changed(network, place, operation):
    """The network with another operation at one of its nodes."""
    nodes = list(network.nodes)
    nodes[place] = dataclasses.replace(nodes[place], operation=operation)
    return dataclasses.replace(network, nodes=tuple(nodes))


def random_inputs(network, seed, count):
    """Inputs (count, ...) in [0, 1]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, (count, *network.input_shape)).astype(np.float32)

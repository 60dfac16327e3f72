"""Dense float64 NumPy oracles, independent of the library's own arithmetic, and small random networks to try it on."""

import jax.numpy as jnp
import numpy as np

from lipjax import Block, ClippedReLU, Conv, Dense, Network, ReLU, convolution, dense


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


def thetas(network):
    """The clips of each block, raveled, infinite for ReLU."""
    return [
        np.asarray(block.activation.theta, np.float64).ravel() if isinstance(block.activation, ClippedReLU) else np.inf
        for block in network.blocks
    ]


class DenseNetwork:
    """A network as float64 matrices: the forward pass, and the region pass with exact norms."""

    def __init__(self, network):
        self.layers = [layer_matrix(block.affine) for block in network.blocks]
        self.thetas = thetas(network)
        self.head = layer_matrix(network.head)

    def activations(self, x):
        """Pre- and post-activations of raveled inputs (..., inputs): two lists, one array (..., outputs) per block."""
        before, after = [], []
        for (matrix, bias), theta in zip(self.layers, self.thetas, strict=True):
            before.append(x @ matrix.T + bias)
            after.append(np.minimum(np.maximum(before[-1], 0), theta))
            x = after[-1]
        return before, after

    def features(self, x):
        return self.activations(x)[1][-1] if self.layers else x

    def logits(self, x):
        return self.features(x) @ self.head[0].T + self.head[1]

    def jacobian(self, x):
        """d features / d x at one raveled input."""
        total = np.eye(x.size)
        for (matrix, _), theta, z in zip(self.layers, self.thetas, self.activations(x)[0], strict=True):
            total = ((z > 0) & (z < theta))[:, None] * (matrix @ total)
        return total

    def regions(self, x, eps):
        """The pass of section 3 of the design in float64: per block (lower, upper, live, sigma), before activation.

        Also how near any neuron is to changing sides, where float32 may come out with another mask.
        """
        live = np.ones(x.size, bool)
        lower, upper, center, radius, nearest, blocks = x - eps, x + eps, x, eps, np.inf, []
        for (matrix, bias), theta in zip(self.layers, self.thetas, strict=True):
            center = matrix @ center + bias
            mid, half = matrix @ (lower + upper) / 2 + bias, np.abs(matrix) @ (upper - lower) / 2
            ball = radius * np.linalg.norm(matrix * live, axis=1)
            lower, upper = np.maximum(mid - half, center - ball), np.minimum(mid + half, center + ball)
            new = (upper > 0) & (lower < theta) & (np.zeros_like(upper) < theta)
            nearest = min(nearest, np.abs(upper).min(), np.abs(lower - theta).min())
            sigma = spectral_norm(matrix * np.outer(new, live))
            blocks.append((lower, upper, new, sigma))
            radius, live = radius * sigma, new
            lower, upper, center = (np.minimum(np.maximum(z, 0), theta) for z in (lower, upper, center))
        return blocks, nearest


def spectral_norm(matrix):
    """The largest singular value; 0 for an empty or zero matrix."""
    return float(np.linalg.svd(matrix, compute_uv=False)[0]) if matrix.any() else 0.0


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


KINDS = ("dense relu", "dense clipped", "conv relu", "conv clipped")


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
            return Block(affine, ReLU())
        return Block(affine, ClippedReLU(jnp.asarray(rng.uniform(-0.1, 2 * clip, affine.out_shape), jnp.float32)))

    def full(inputs, outputs, shape):
        return dense(array(inputs, outputs, std=scale / np.sqrt(inputs)), bias(outputs), shape)

    if "dense" in kind:
        blocks = (block(full(5, 9, (5,))), block(full(9, 7, (9,))))
        return Network(blocks, dense(array(7, 3, std=0.5), bias(3), (7,)))
    first = convolution(array(3, 3, 2, 3, std=scale / 4), bias(3), (5, 6, 2), (1, 1), ((1, 1), (1, 1)))
    second = convolution(array(4, 3, 3, 2, std=scale / 6), bias(2), first.out_shape, (2, 1), ((1, 0), (0, 1)))
    third = full(int(np.prod(second.out_shape)), 6, second.out_shape)
    return Network((block(first), block(second), block(third)), dense(array(6, 3, std=0.5), bias(3), (6,)))


def network_of(shape, layers, activation, seed):
    """A random network: layers are widths, or (channels, kernel, stride, padding) of square convolutions; 3 classes."""
    rng = np.random.default_rng(seed)
    blocks, input_shape = [], shape
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
        blocks.append(Block(affine, ReLU() if activation == "relu" else ClippedReLU(clips)))
    head = dense(rng.standard_normal((int(np.prod(shape)), 3)).astype(np.float32), np.zeros(3, np.float32), shape)
    return Network(tuple(blocks), head, input_shape)


def random_inputs(network, seed, count):
    """Inputs (count, ...) in [0, 1]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, (count, *network.input_shape)).astype(np.float32)

"""The one convolution and its transpose, against dense matrices and against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

from lipjax.networks import convolutions
from lipjax.networks.convolutions import conv_transpose, transpose_kernel

conv = jax.jit(convolutions.conv, static_argnums=(2, 3))

# (H, W, C), (kh, kw), channels, stride, padding
CASES = [
    ((6, 6, 2), (3, 3), 3, (1, 1), ((1, 1), (1, 1))),
    ((6, 5, 1), (1, 1), 2, (1, 1), ((0, 0), (0, 0))),
    ((5, 6, 2), (1, 1), 2, (2, 3), ((2, 1), (0, 2))),
    ((8, 8, 2), (4, 4), 3, (2, 2), ((1, 1), (1, 1))),
    ((7, 7, 2), (4, 4), 3, (2, 2), ((1, 1), (1, 1))),
    ((9, 8, 2), (3, 2), 2, (2, 3), ((0, 0), (0, 0))),
    ((8, 10, 1), (4, 3), 2, (3, 2), ((2, 0), (1, 3))),
    ((7, 6, 2), (2, 5), 2, (3, 1), ((0, 3), (2, 1))),
    ((9, 9, 1), (2, 2), 2, (4, 4), ((0, 0), (1, 0))),
    ((5, 5, 3), (5, 4), 2, (1, 2), ((0, 0), (3, 3))),
    ((4, 4, 1), (3, 3), 1, (1, 1), ((4, 3), (3, 5))),
]
IDS = [f"{x[0]}x{x[1]} k{k[0]}x{k[1]} s{s[0]}x{s[1]} p{p}" for x, k, _, s, p in CASES]


@functools.partial(jax.jit, static_argnums=(2, 3))
def plain(x, kernel, stride, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, stride, padding, dimension_numbers=numbers)[0]


def transposed(y, kernel, stride, padding, shape):
    return oracles.jit(lambda y, k: conv_transpose(y, transpose_kernel(k, stride), stride, padding, shape))(y, kernel)


def sample(case, seed=0):
    shape, size, channels, stride, padding = case
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, shape[2], channels)), jnp.float32)
    matrix = oracles.conv_matrix(kernel, shape, stride, padding)
    out_shape = jax.eval_shape(lambda x: plain(x, kernel, stride, padding), x).shape
    y = jnp.asarray(rng.standard_normal(out_shape), jnp.float32)
    return x, kernel, y, stride, padding, matrix


def close(actual, expected, scale=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=scale * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_conv_is_its_dense_matrix(case):
    x, kernel, y, stride, padding, matrix = sample(case)
    out = conv(x, kernel, stride, padding)
    assert out.shape == y.shape
    close(out.ravel(), matrix @ np.asarray(x, np.float64).ravel())


@pytest.mark.parametrize("few", [0, 100], ids=["windows", "taps"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float64_transposes_are_the_transposed_matrix_either_way(case, few, monkeypatch):
    monkeypatch.setattr(convolutions, "FEW_CHANNELS", few)
    with jax.enable_x64(True):
        x, kernel, y, stride, padding, matrix = sample(case)
        y, kernel = y.astype(jnp.float64), kernel.astype(jnp.float64)
        back = transposed(y, kernel, stride, padding, x.shape)
        assert back.dtype == jnp.float64
        close(back.ravel(), matrix.T @ np.asarray(y).ravel(), 1e-13)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_conv_transpose_is_the_transposed_matrix(case):
    x, kernel, y, stride, padding, matrix = sample(case)
    back = transposed(y, kernel, stride, padding, x.shape)
    assert back.shape == x.shape
    close(back.ravel(), matrix.T @ np.asarray(y, np.float64).ravel())
    expected = jax.linear_transpose(lambda x: plain(x, kernel, stride, padding), x)(y)[0]
    close(back, np.asarray(expected))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_transpose_identity(case):
    x, kernel, y, stride, padding, _ = sample(case, seed=1)
    forward = jnp.vdot(conv(x, kernel, stride, padding), y)
    back = jnp.vdot(x, transposed(y, kernel, stride, padding, x.shape))
    assert forward == pytest.approx(float(back), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_are_those_of_the_plain_convolution(case):
    x, kernel, y, stride, padding, matrix = sample(case, seed=2)

    def gradients(convolve):
        return jax.jit(jax.grad(lambda x, k: jnp.vdot(jnp.sin(convolve(x, k, stride, padding)), y), (0, 1)))(x, kernel)

    for ours, theirs in zip(gradients(conv), gradients(plain), strict=True):
        close(ours, np.asarray(theirs), 1e-5)
    cotangent = np.asarray(y, np.float64) * np.cos((matrix @ np.asarray(x, np.float64).ravel()).reshape(y.shape))
    close(gradients(conv)[0].ravel(), matrix.T @ cotangent.ravel())


FEW = [CASES[0], CASES[4], CASES[6]]
FEW_IDS = [IDS[0], IDS[4], IDS[6]]


@pytest.mark.parametrize("case", FEW, ids=FEW_IDS)
def test_gradients_under_vmap_with_shared_and_with_own_kernels(case):
    x, kernel, y, stride, padding, _ = sample(case, seed=3)
    xs, kernels = jnp.stack([x, -x, 2 * x]), jnp.stack([kernel, kernel**2, -kernel])

    def gradients(convolve, x, kernel):
        return jax.grad(lambda x, k: jnp.vdot(convolve(x, k, stride, padding) ** 2, y), (0, 1))(x, kernel)

    for axis, weights in ((None, kernel), (0, kernels)):
        ours, theirs = (
            jax.jit(jax.vmap(lambda x, k, f=f: gradients(f, x, k), (0, axis)))(xs, weights) for f in (conv, plain)
        )
        jax.tree.map(lambda a, b: close(a, np.asarray(b)), ours, theirs)


@pytest.mark.parametrize("case", FEW, ids=FEW_IDS)
def test_second_derivatives_are_those_of_the_plain_convolution(case):
    x, kernel, y, stride, padding, _ = sample(case, seed=4)
    rng = np.random.default_rng(5)
    directions = tuple(jnp.asarray(rng.standard_normal(a.shape), jnp.float32) for a in (x, kernel))

    def second(convolve):
        def slope(x, kernel):  # reverse over reverse
            grads = jax.grad(lambda x, k: jnp.vdot(convolve(x, k, stride, padding) ** 3, y), (0, 1))(x, kernel)
            return sum(jnp.vdot(g, d) for g, d in zip(grads, directions, strict=True))

        return jax.jit(jax.grad(slope, (0, 1)))(x, kernel)

    jax.tree.map(lambda a, b: close(a, np.asarray(b)), second(conv), second(plain))


@pytest.mark.parametrize("case", FEW, ids=FEW_IDS)
def test_jvp_is_the_product_rule(case):
    x, kernel, _, stride, padding, matrix = sample(case, seed=6)
    rng = np.random.default_rng(7)
    x_dot = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    kernel_dot = jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32)
    towards_x = matrix @ np.asarray(x_dot, np.float64).ravel()
    towards_kernel = oracles.conv_matrix(kernel_dot, x.shape, stride, padding) @ np.asarray(x, np.float64).ravel()
    _, both = jax.jvp(lambda x, k: conv(x, k, stride, padding), (x, kernel), (x_dot, kernel_dot))
    _, first = jax.jvp(lambda x: conv(x, kernel, stride, padding), (x,), (x_dot,))
    _, second = jax.jvp(lambda k: conv(x, k, stride, padding), (kernel,), (kernel_dot,))
    close(both.ravel(), towards_x + towards_kernel)
    close(first.ravel(), towards_x)
    close(second.ravel(), towards_kernel)


def test_transpose_and_gradients_work_inside_a_loop():
    x, kernel, _, stride, padding, matrix = sample(CASES[4], seed=8)
    transposed = transpose_kernel(kernel, stride)

    def body(_, a):
        return conv_transpose(conv(a, kernel, stride, padding), transposed, stride, padding, x.shape) / 100

    def body_by_gradient(_, a):
        return jax.grad(lambda a: jnp.sum(conv(a, kernel, stride, padding) ** 2) / 2)(a) / 100

    expected = np.asarray(x, np.float64).ravel()
    for _ in range(3):
        expected = matrix.T @ (matrix @ expected) / 100
    close(jax.jit(lambda x: lax.fori_loop(0, 3, body, x))(x).ravel(), expected)
    close(jax.jit(lambda x: lax.fori_loop(0, 3, body_by_gradient, x))(x).ravel(), expected)

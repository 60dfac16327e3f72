"""Block diagonal layers: a dense layer of its own for each group of inputs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.networks.layers import FFT_ROUNDING, HIGHEST, Bilinear, layer


@jax.tree_util.register_dataclass
@layer
class Blocks(Bilinear):
    """A dense layer for each group, the same at each of its places: kernel (groups, inputs, outputs).

    Inputs are (groups, places, inputs), outputs (groups, places, outputs).
    """

    def form(self, kernel: Array, a: Array) -> Array:
        return jnp.einsum("gpi,gio->gpo", a, kernel, precision=HIGHEST)

    @property
    def terms(self) -> int:
        return self.kernel.shape[1]

    @property
    def adjoint_terms(self) -> int:
        return self.kernel.shape[2]

    def whole_norm(self) -> float:
        kernel = np.asarray(self.kernel, np.float64)
        if not np.isfinite(kernel).all():
            return math.inf
        largest = np.abs(kernel).max(initial=0) or 1.0  # their squares may leave float64
        return float(np.linalg.norm(kernel / largest, ord=2, axis=(1, 2)).max()) * largest * (1 + FFT_ROUNDING)


def blocks(kernel: Array, bias: Array, places: int = 1) -> Blocks:
    """A block diagonal layer.

    Args:
        kernel: shape (groups, inputs, outputs).
        bias: shape (outputs,), or (groups, places, outputs).
        places: where each block is applied, one after the other.
    """
    groups, inputs, outputs = kernel.shape
    shapes = {"in_shape": (groups, places, inputs), "out_shape": (groups, places, outputs)}
    return Blocks(kernel=kernel, bias=bias, **shapes)

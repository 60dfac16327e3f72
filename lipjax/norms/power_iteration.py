"""Spectral norms of masked linear maps by power iteration. This module knows no layer, only products.

What is returned is an estimate from below: it trains a network and reproduces the paper, it is not a proof.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from lipjax.networks.linear_maps import LinearMap, length, unit

TOL, MAX_ITERS = 1e-3, 2000  # of the paper's evaluation


def power_iteration(
    linear_map: LinearMap, vector: Array, num_iters: int, other: Array | None = None
) -> tuple[Array, Array]:
    """Warm-started power iteration.

    Each iteration is ``v <- W u / ||W u||``, ``u <- W^T v / ||W^T v||``; the result is sigma = <u, W^T v>. The loop
    carries no gradient: u and v are constants, and the gradient of sigma is the rank-one one, d sigma = <v, dW u>.
    The last product of the loop is the differentiated one, so n iterations cost 2 n products, and one more where
    there are two starts.

    Args:
        linear_map: W.
        vector: start on the input side of W; any length, also zero.
        num_iters: at least 1.
        other: another start. The iteration goes on from the one that W stretches more.

    Returns:
        ``(sigma, vector)``: the estimate and the unit vector to start from next time. Both are zero where W is.

    Soundness:
        Estimate: sigma is at most the spectral norm, however many iterations are made.

    Reference:
        [H21] section 3.3.
    """
    v = linear_map.image(vector)
    if other is not None:
        v_other = linear_map.image(other)
        v = jnp.where(length(v_other) > length(v), v_other, v)

    def iterate(_: int, v: Array) -> Array:
        return unit(linear_map.matvec(unit(linear_map.rmatvec(v))))

    v = lax.stop_gradient(lax.fori_loop(0, num_iters - 1, iterate, lax.stop_gradient(unit(v))))
    product = linear_map.rmatvec(v)
    u = lax.stop_gradient(unit(product))
    return jnp.sum(u * product), u


def converged_norm(
    linear_map: LinearMap, vector: Array, *, tol: float = TOL, max_iters: int = MAX_ITERS
) -> tuple[Array, Array]:
    """Power iteration until ``||u_{t+1} - u_t|| <= tol``, the paper's procedure for evaluation.

    Under ``vmap`` every example has its own stop: one that has converged is frozen while others go on.

    Args:
        linear_map: W.
        vector: start on the input side of W.
        tol: when to stop.
        max_iters: cap on the iterations, at least 1.

    Returns:
        ``(sigma, num_iters)``: the estimate and the iterations it took.

    Soundness:
        Estimate: sigma is at most the spectral norm, and the stop can come early where the start has little of the
        top singular vector.

    Reference:
        [H21] appendix (power iteration to 1e-3, at most 2000 iterations).
    """
    _, sigma, _, num_iters = iterate_until(linear_map, unit(vector), tol=tol, max_iters=max_iters)
    return sigma, num_iters


def iterate_until(linear_map: LinearMap, u: Array, *, tol: float, max_iters: int) -> tuple[Array, Array, Array, Array]:
    """Power iteration from the unit vector u until it moves by at most ``tol``, or for ``max_iters`` iterations.

    Returns:
        ``(u, sigma, change, num_iters)``: the last vector, ``||W^T v||`` for the unit vector v along the image of the
        vector before it, how far the last iteration moved it, and their number. Sigma alone carries a gradient.
    """

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, change, step = carry
        return (step < max_iters) & (change > tol)

    def iterate(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        u, _, _, step = carry
        new = unit(linear_map.rmatvec(unit(linear_map.matvec(u))))
        return new, u, jnp.sqrt(jnp.sum((new - u) ** 2)), step + 1

    u = lax.stop_gradient(u)
    far = jnp.full_like(u, jnp.inf, shape=())
    u, before, change, num_iters = lax.while_loop(unfinished, iterate, (u, u, far, jnp.int32(0)))
    sigma, _ = power_iteration(linear_map, before, 1)
    return u, sigma, change, num_iters

"""Randomized smoothing: the probabilistic peer of certificates by bounds, for any function.

What is certified is not the function f but the smoothed one, whose class is the one that f gives most often under
Gaussian noise. It holds with a chance of at least 1 - delta for each input, over the draws of the noise; what float32
rounds inside of f is a part of f.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

AT_ONCE = 1000  # noisy copies of inputs in one call of the function
ABSTAINED = -1


class Smoothed(NamedTuple):
    """What smoothing says of a batch; NumPy arrays.

    Attributes:
        prediction: class of the smoothed function (B,), or -1 where it abstains.
        radius: l2 radius (B,) within which that class stays, in the scale of the inputs; 0 where it abstains.
        probability: lower confidence bound (B,) of the share of noise for which the function gives that class.
    """

    prediction: np.ndarray
    radius: np.ndarray
    probability: np.ndarray


def smoothed_radius(
    f: Callable[[Array], Array],
    x: Array,
    noise: float,
    num_samples: int,
    delta: float,
    key: Array,
    *,
    num_choosing: int = 100,
) -> Smoothed:
    """Predict and certify a batch by the function smoothed with Gaussian noise.

    ``radius = noise Phi^-1(p)``, where p is a lower confidence bound (Clopper-Pearson) of the share of the class that
    came first in a few samples of their own.

    Args:
        f: from a batch (N, ...) to logits (N, classes); traced.
        x: inputs (B, ...), floating-point.
        noise: standard deviation, in the scale of the inputs.
        num_samples: per input, for the confidence bound.
        delta: the chance that a radius is wrong, at most, for each input.
        key: of the noise; use every key once.
        num_choosing: samples per input that choose the class.

    Returns:
        Class, radius and the bound of the share, for each input.

    Raises:
        ValueError: noise that is not positive and finite, delta outside of (0, 1), or numbers of samples below 1.
        TypeError: inputs that are not float32 or float64: noise of fewer bits has no tails.

    Reference:
        Cohen, Rosenfeld, Kolter, ICML 2019, Theorem 1 and Proposition 2 (CERTIFY).
    """
    if not (0 < noise < math.inf):
        raise ValueError(f"noise={noise} cannot be used; give a standard deviation more than 0")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} cannot be used; give a chance between 0 and 1")
    for name, count in (("num_samples", num_samples), ("num_choosing", num_choosing)):
        if count < 1:
            raise ValueError(f"{name}={count} cannot be used; give at least 1")
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"x has type {x.dtype}; expected floating-point inputs, float32 or wider: noise is drawn in it")
    counting = jax.jit(functools.partial(_counts, f), static_argnames="count")
    found = []
    for one, own in zip(x, jax.random.split(key, len(x)), strict=True):
        choosing, certifying = jax.random.split(own)
        chosen = int(np.argmax(_all_counts(counting, one, noise, num_choosing, choosing)))
        hits = int(_all_counts(counting, one, noise, num_samples, certifying)[chosen])
        share = lower_confidence(hits, num_samples, delta)
        radius = noise * float(special.ndtri(share)) if share > 0.5 else 0.0
        found.append((chosen if radius > 0 else ABSTAINED, radius, share))
    prediction, radius, probability = zip(*found, strict=True) if found else ((), (), ())
    return Smoothed(np.array(prediction, np.int32), np.array(radius), np.array(probability))


def lower_confidence(hits: int, num_samples: int, delta: float) -> float:
    """The largest p of which so many hits, or more, have a chance of at most delta (Clopper and Pearson, 1934)."""
    return 0.0 if hits == 0 else float(special.betaincinv(hits, num_samples - hits + 1, delta)) * (1 - 1e-9)


def _all_counts(counting: Callable[..., Array], x: Array, noise: float, num_samples: int, key: Array) -> np.ndarray:
    """How often each class comes first under noise, in calls of one size and a last one."""
    whole, rest = divmod(num_samples, AT_ONCE)
    sizes = [AT_ONCE] * whole + [rest] * (rest > 0)
    keys = jax.random.split(key, len(sizes))
    return np.sum([counting(x, noise, own, count=size) for own, size in zip(keys, sizes, strict=True)], axis=0)


def _counts(f: Callable[[Array], Array], x: Array, noise: float, key: Array, count: int) -> Array:
    """How often each class comes first for so many noisy copies of one input; logits that are NaN count for none."""
    copies = x[None] + noise * jax.random.normal(key, (count, *x.shape), x.dtype)
    logits = f(copies)
    valid = ~jnp.any(jnp.isnan(logits), axis=1)
    first = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(valid[:, None], first, 0), axis=0)

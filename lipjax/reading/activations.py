"""Functions that are activations, by what they are: those of ``jax.nn``, which Flax has under its own names too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lipjax.networks.activations import Activation, ClipActivation, ReLUActivation
from lipjax.networks.leaky import LeakyReLUActivation
from lipjax.networks.smooth import (
    ELUActivation,
    GELUActivation,
    SigmoidActivation,
    SiLUActivation,
    SoftplusActivation,
    TanhActivation,
    TanhGELUActivation,
)


def clip(low: float, high: float) -> ClipActivation:
    """The activation that clips to an interval."""
    return ClipActivation(jnp.float32(low), jnp.float32(high))


def leaky_relu(negative_slope: float = 0.01) -> LeakyReLUActivation:
    """Of ``jax.nn.leaky_relu``."""
    return LeakyReLUActivation(jnp.float32(negative_slope))


def elu(alpha: float = 1.0) -> ELUActivation:
    """Of ``jax.nn.elu``."""
    if alpha != 1:
        raise TypeError(f"ELU with alpha={alpha}, whose slope jumps, is not supported; use alpha=1")
    return ELUActivation()


def gelu(approximate: bool = True) -> GELUActivation | TanhGELUActivation:
    """Of ``jax.nn.gelu``."""
    return TanhGELUActivation() if approximate else GELUActivation()


# A function: from the keywords that it is called with besides its input to the activation.
FUNCTIONS: dict[Callable, Callable[..., Activation]] = {
    jax.nn.relu: ReLUActivation,
    jax.nn.relu6: functools.partial(clip, 0, 6),
    jax.nn.hard_tanh: functools.partial(clip, -1, 1),
    jax.nn.leaky_relu: leaky_relu,
    jnp.abs: functools.partial(leaky_relu, -1),
    jnp.tanh: TanhActivation,
    jax.nn.tanh: TanhActivation,
    jax.lax.tanh: TanhActivation,
    jax.nn.sigmoid: SigmoidActivation,
    jax.lax.logistic: SigmoidActivation,
    jax.nn.softplus: SoftplusActivation,
    jax.nn.elu: elu,
    jax.nn.silu: SiLUActivation,
    jax.nn.gelu: gelu,
}


def known(function: Any) -> Activation | None:
    """The activation that a function is, or ``functools.partial`` of one with keywords; None for any other.

    Raises:
        TypeError: keywords with which it is none.
    """
    keywords = {}
    if isinstance(function, functools.partial) and not function.args:
        function, keywords = function.func, function.keywords
    try:
        factory = FUNCTIONS.get(function)
    except TypeError:  # it has no hash
        return None
    return None if factory is None else factory(**keywords)

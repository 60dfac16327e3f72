"""Robustness: what one asks of a network, for batches: Lipschitz constants, certificates, radii."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.bounds import propagation
from lipjax.bounds.rule import Rule
from lipjax.certification.branching import branching_of
from lipjax.certification.certificates import Certificate
from lipjax.certification.certifier import Certifier
from lipjax.certification.checks import check_batch, check_labels, check_start_key
from lipjax.certification.evidence import Examples, no_evidence
from lipjax.certification.pairs import Ascent
from lipjax.certification.radius import certified_radii
from lipjax.certification.stages import (
    BOUNDING,
    OF_RADII,
    Branch,
    Dual,
    Global,
    Local,
    StageOf,
    chosen_stages,
    climb,
    ladder_of,
)
from lipjax.networks.graph import Network, check_network
from lipjax.networks.layers import Dense, dense
from lipjax.networks.regions import (
    check_domain,
    check_eps,
    check_pixels,
    l2_ball,
)
from lipjax.norms import estimates, starts
from lipjax.norms.solvers import Level

Output = str | tuple[int, int]  # of a network: "features", "logits", or two classes, for the difference of their logits
ROUNDED = 2.0**-22  # more than a difference or a product is rounded by, relatively


def certify(
    network: Network,
    x: Array,
    label: Array,
    eps: Array | float,
    *,
    level: str | Level = "probabilistic",
    delta: float = 1e-6,
    key: Array | None = None,
    rtol: float = 1e-3,
    stages: Sequence[str | StageOf] | None = None,
    dual_steps: int = 60,
    branch_seconds: float = 10.0,
    rule: Rule | None = None,
    domain: str = "ball",
) -> Certificate:
    """Bound the worst-case margins of a batch on its eps-balls.

    Stage by stage, each for the examples that those before have not certified: the norms of the whole layers, norms of
    each example's own, and the dual with those norms.

    Args:
        network: the classifier.
        x: inputs (B, ...) in [0, 1] pixels.
        label: integers (B,).
        eps: l2 radius, scalar or one per input (B,), in pixels.
        level: ``"probabilistic"``, ``"deterministic"`` or ``"estimate"``: what the spectral norms are worth; or a
            solver of your own, see :class:`lipjax.Certifier`.
        delta: total probability that anything returned is wrong, for ``"probabilistic"``.
        key: draws the random starts; not used for anything else, and independent of x and of the network.
        rtol: relative gap at which a norm is tight enough.
        stages: some of ``("global", "local", "dual", "branch")``, in this order; default the first three, at level
            ``"estimate"`` the first two. Functions of your own, from ``eps`` to a
            :class:`lipjax.certification.stages.Stage`, may be anywhere.
        dual_steps: steps of ascent for each rival, in the dual.
        branch_seconds: of branch and bound on the dual, for each input.
        rule: trained slopes that the dual may start from.
        domain: ``"ball"``, the whole l2 ball, or ``"pixels"``, what of it lies in [0, 1]: the claim is about those
            inputs alone.

    Returns:
        A certificate for each example, with the smallest Lipschitz constant that was computed and the largest lower
        bound of the worst margin. A tie, a wrong prediction and a NaN or infinity on the way are not certified.

    Soundness:
        See ``level``: with ``"probabilistic"`` all bounds hold together with a probability of at least 1 - delta over
        the key, with ``"deterministic"`` always, for exact and for float32 inference (docs/soundness.md);
        ``"estimate"`` is no proof.

    Raises:
        TypeError: x is traced, or no float32 or float64.
        ValueError: x is not a batch of inputs of the network, the labels do not fit it, or an option cannot be used.
    """
    _check(network, x, eps)
    _check_classes(network, x, label)
    certifier = Certifier(network, len(x), level=level, delta=delta, key=key, rtol=rtol, domain=domain)
    check_domain(x, domain)
    ascent, branching = _ascent(dual_steps, rule), branching_of(branch_seconds)
    known = {"global": Global(eps), "local": Local(eps), "dual": Dual(eps, ascent), "branch": Branch(eps, branching)}
    ladder = ladder_of(chosen_stages(stages, certifier.claim, BOUNDING), known, eps)
    evidence = no_evidence(certifier, np.asarray(label))
    climb(ladder, certifier, evidence, functools.partial(_whole, x, label))
    found = evidence.certificate(certifier.claim.name, domain)
    return dataclasses.replace(
        found,
        prediction=jnp.asarray(found.prediction),
        worst_margin=_outward(found.worst_margin, -np.inf),
        lipschitz=_outward(found.lipschitz, np.inf),
        certified=jnp.asarray(found.certified),
    )


def certified_radius(
    network: Network,
    x: Array,
    label: Array,
    *,
    max_eps: float | None = None,
    tol: float = 1e-3,
    max_rounds: int = 20,
    stages: Sequence[str] | None = None,
    dual_steps: int = 60,
    rule: Rule | None = None,
    **options: Any,
) -> Array:
    """The largest eps of each example that passed the test of :func:`certify` in a bisection.

    The search starts at the radius that the global norms certify, doubles until the test refuses, and halves the
    interval that is left. A certificate at one radius is one at every smaller radius.

    Args:
        network: the classifier.
        x: inputs (B, ...) in [0, 1] pixels.
        label: integers (B,).
        max_eps: no larger radius is tried; default the diameter of the pixel range.
        tol: width of the last interval, relative to the radius, in pixels where that is larger than 1; radii below
            ``tol`` are known to ``tol**2`` pixels.
        max_rounds: tests per example; delta is divided by them in advance.
        stages: which tests there are, ``dual_steps`` and ``rule`` likewise as of :func:`certify`. The dual goes on from
            radius to radius with the multipliers that it has found.
        dual_steps: steps of ascent for each rival and radius.
        rule: trained slopes that the dual may start from.
        **options: ``level``, ``delta``, ``key``, ``rtol`` and ``domain`` as of :func:`certify`.

    Returns:
        Shape (B,): 0 where the prediction is not the label, or nothing passed.

    Soundness:
        As of :func:`certify`, for all examples and rounds together.

    Raises:
        TypeError: x is traced, or no float32 or float64.
        ValueError: as of :func:`certify`, or max_eps, tol or max_rounds is not more than 0.
    """
    _check(network, x, 0.0)
    _check_classes(network, x, label)
    for name, value in (("max_eps", math.sqrt(x[0].size) if max_eps is None else max_eps), ("tol", tol)):
        if not (isinstance(value, numbers.Real) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r} cannot be used; give a finite number more than 0, in pixels")
    if not (isinstance(max_rounds, numbers.Integral) and max_rounds > 0):
        raise ValueError(f"max_rounds={max_rounds!r} cannot be used; give an integer more than 0")
    ascent, certifier = _ascent(dual_steps, rule), Certifier(network, len(x), rounds=max_rounds, **options)
    names = chosen_stages(stages, certifier.claim, BOUNDING)
    if any(map(callable, names)) or "branch" in names:
        raise ValueError("stages of a radius have to be some of " + ", ".join(OF_RADII))
    check_domain(x, certifier.domain)
    batch = (np.asarray(x), np.asarray(label), np.arange(len(x)))
    radii = certified_radii(certifier, *batch, max_eps=max_eps, tol=tol, stages=names, options=ascent)
    return _outward(radii, -np.inf)


def local_lipschitz(
    network: Network, x: Array, eps: Array | float, *, of: Output = "features", **options: Any
) -> Array:
    """The local Lipschitz constant of the features, of the logits or of a margin on the eps-ball around each input.

    The product of the norms of the layers with the rows and columns dropped whose neurons are constant on the ball:
    ``||phi(x') - phi(x'')|| <= L ||x' - x''||`` for any two points of the ball [H21 Eq 6].

    Args:
        network: the classifier.
        x: inputs (B, ...), in [0, 1] pixels.
        eps: l2 radius of the balls, scalar or one per input (B,), in pixels.
        of: ``"features"``, what the last layer takes; ``"logits"``; or two classes ``(i, j)``, for the difference of
            their logits.
        **options: ``level``, ``delta``, ``key`` and ``rtol`` as of :func:`certify`. With ``level="estimate"`` the
            function may be traced (``jit``, ``vmap``, ``grad``).

    Returns:
        Shape (B,).

    Soundness:
        As of :func:`certify`.

    Raises:
        TypeError: x is traced at a level that is a bound, or no float32 or float64.
        ValueError: x is not a batch of inputs of the network, or an option cannot be used.
    """
    estimated = options.get("level") == "estimate"
    _check(network, x, eps, traced=estimated)
    network, factor = _up_to(network, of, estimated=estimated)
    if estimated:
        key, whole = _estimates(network, options)
        ask = estimates.Estimate(starts.keys_of_examples(key, jnp.arange(len(x))), ceilings=whole)
        return factor * propagation.propagate(network, l2_ball(x, eps), ask).lipschitz
    certifier, index = Certifier(network, len(x), **options), np.arange(len(x))
    found = certifier.with_local_norms(x, jnp.zeros(len(x), jnp.int32), eps, index)
    return _outward(factor * found.certificate.lipschitz, np.inf)


def global_lipschitz(network: Network, *, of: Output = "features", **options: Any) -> Array:
    """The product of the norms of the whole layers: a constant for any two inputs.

    Args:
        network: the classifier.
        of: of what, as of :func:`local_lipschitz`.
        **options: ``level``, ``delta``, ``key`` and ``rtol`` as of :func:`certify`.

    Returns:
        Scalar.

    Soundness:
        As of :func:`certify`.
    """
    check_network(network)
    estimated = options.get("level") == "estimate"
    network, factor = _up_to(network, of, estimated=estimated)
    if estimated:
        return jnp.asarray(factor * network.lipschitz(_estimates(network, options)[1]))
    return _outward(np.float64(factor * Certifier(network, 0, **options).global_lipschitz), np.inf)


def _up_to(network: Network, of: Output, *, estimated: bool) -> tuple[Network, float]:
    """A network whose features are what is asked about, and what its constant is to be multiplied by.

    Two rows of a dense layer are subtracted in float64, where nothing is flushed to zero. Rows of another layer are
    computed, and what that rounds may be all that is left of a difference: there the constant of the logits is taken.
    """
    if of == "features":
        return network, 1.0
    if of == "logits":
        return network.with_features_from(network.head), 1.0
    classes = network.num_classes
    if not (isinstance(of, tuple) and len(of) == 2 and all(isinstance(c, numbers.Integral) for c in of)):
        raise ValueError(f"of={of!r} cannot be used; give 'features', 'logits', or two classes (i, j)")
    if not all(0 <= c < classes for c in of):
        raise ValueError(f"of={of} names a class that is not there; expected two classes from 0 to {classes - 1}")
    if not isinstance(network.head, Dense):
        return network.with_features_from(network.head), math.sqrt(2) * (1 + ROUNDED)
    first, second = (network.head.row(c) for c in of)
    difference = first - second if estimated else np.asarray(first, np.float64) - np.asarray(second, np.float64)
    layer = dense(difference[:, None], jnp.zeros(1, network.head.dtype), network.head.in_shape)
    return network.with_features_from(layer), 1 + ROUNDED


def _estimates(network: Network, options: dict[str, Any]) -> tuple[Array, Array]:
    """The key of level ``estimate`` in traced code, and norms of the whole layers; delta and rtol have no meaning."""
    unknown = options.keys() - {"level", "key", "delta", "rtol"}
    if unknown:
        raise TypeError(f"{unknown.pop()!r} is no option; there are level, delta, key and rtol")
    key = jax.random.key(0) if options.get("key") is None else options["key"]
    check_start_key(key)
    whole, _ = estimates.whole_norms(network.layers, estimates.Estimate(starts.key_of_whole(key)))
    return key, whole


def _ascent(dual_steps: int, rule: Rule | None) -> Ascent:
    if not (isinstance(dual_steps, numbers.Integral) and dual_steps >= 0):
        raise ValueError(f"dual_steps={dual_steps!r} cannot be used; give an integer of at least 0")
    return Ascent(int(dual_steps), rule)


def _whole(x: Array, label: Array, places: np.ndarray, title: str) -> Iterator[tuple[np.ndarray, Examples]]:
    """One batch of some places, filled up by repeating to the size of all, so that little is compiled."""
    del title
    if places.size:
        index = np.resize(places, len(x))
        yield places, Examples(np.asarray(x)[index], np.asarray(label)[index], index)


def _check(network: Network, x: Array, eps: Array | float, *, traced: bool = False) -> None:
    """Raises unless x is a batch of pixels and eps its radii, all finite, and known unless they may be traced."""
    unknown = isinstance(x, jax.core.Tracer) or isinstance(eps, jax.core.Tracer)
    if unknown and not traced:
        raise TypeError(
            "certificates are computed outside of traced code; under jit, vmap or grad use lipjax.propagate, or "
            "lipjax.local_lipschitz with level='estimate'"
        )
    check_batch(network, x)
    check_pixels(x)
    if not len(x):
        raise ValueError("x is an empty batch; expected at least one input")
    if unknown:
        return
    if isinstance(eps, str) or np.isinf(eps).any():
        wrong = eps if isinstance(eps, str) else np.extract(np.isinf(eps), eps)[0]
        raise ValueError(f"eps is {wrong}; expected a finite radius of at least 0, in [0, 1] pixels")
    check_eps(x, eps)
    wrong = ~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(axis=1)
    if wrong.any():
        raise ValueError(f"x[{np.flatnonzero(wrong)[0]}] holds NaN or infinity; expected pixels in [0, 1]")


def _check_classes(network: Network, x: Array, label: Array) -> None:
    """Raises ValueError unless there are classes to tell apart, and the labels are some of them."""
    if network.num_classes < 2:
        raise ValueError(
            f"the network has {network.num_classes} logit, and a margin is that between two; give a classifier of two "
            "classes two logits, such as 0 and its own"
        )
    check_labels(network.num_classes, x, label)


def _outward(values: np.ndarray, towards: float) -> Array:
    """As float64, or as float32 rounded towards plus or minus infinity where 64 bits are not enabled."""
    if jax.config.jax_enable_x64 or values.dtype == np.float32:
        return jnp.asarray(values)
    with np.errstate(over="ignore"):  # beyond the range of float32 it becomes infinite, or the largest number
        narrow = values.astype(np.float32)
    inward = narrow < values if towards > 0 else narrow > values
    outward = np.where(inward, np.nextafter(narrow, np.float32(towards)), narrow)
    # Numbers below the smallest normal one may be taken for zero by whoever reads them.
    smallest = np.copysign(np.finfo(np.float32).smallest_normal, np.float32(towards))
    tiny = (np.abs(outward) < np.abs(smallest)) & (values != 0)
    return jnp.asarray(np.where(tiny, np.where(np.sign(values) == np.sign(smallest), smallest, 0), outward))

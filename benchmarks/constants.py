"""Compare bounds of one constant: that of the margin against the nearest rival on the l2 ball of one input.

Four networks, none of them larger than dense matrices allow: the example of the paper's appendix A.1, two random ones,
and the network of `results/digits`. Boxes come from a pass with exact norms, and are the same for all bounds.

Usage:
  python -m benchmarks.constants [--digits results/digits] [--points 20000]
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import lipjax
from lipjax import constants
from lipjax.bounds.propagation import Bounds
from lipjax.experiments.data import load
from lipjax.networks.graph import Network

ROUNDS, MAX_UNSTABLE, AT_ONCE = 5, 16, 500


class Case(NamedTuple):
    """A network in float64, one input (1, ...) with its label, and the radius."""

    title: str
    network: Network
    x: Array
    label: Array
    eps: float


BOUNDS: dict[str, Callable[[Network, Bounds, Array], Array]] = {
    "product of the norms of whole layers": lambda network, bounds, label: constants.product(network, None, label),
    "LipLT, whole layers": lambda network, bounds, label: constants.lip_lt(network, None, label),
    "product of local norms": constants.product,
    "linear neurons merged (appendix A.2)": constants.merged,
    "LipLT with local slopes": constants.lip_lt,
    "FastLip": constants.fast_lip,
    "Hein and Andriushchenko": constants.hein_andriushchenko,
}
EXACT, SAMPLED = "exact, by enumeration", "largest of the samples"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=pathlib.Path, default=pathlib.Path("results/digits"), help="a trained run")
    parser.add_argument("--points", type=int, default=20000, help="of the ball that are sampled; default: 20000")
    options = parser.parse_args(arguments)
    network, dataset = lipjax.load_run(options.digits).network, load("digits", "test")
    with jax.enable_x64(True):
        wide, x = network.astype(np.float64), jnp.asarray(dataset.images[:1], jnp.float64) / dataset.scale
        label = jnp.argmax(wide(x), axis=1)
        cases = [toy(), random((3, 8, 8, 3), 0.3), random((8, 16, 3), 0.3)]
        cases += [Case("digits", wide, x, label, eps) for eps in (0.02, 0.1, 0.5)]
        print(table(cases, [measure(case, options.points) for case in cases]))


def toy() -> Case:
    """The example of appendix A.1 with a second class of zeros: layers diag(3, 2, 1) and clips of 1."""
    kernel, zero = jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.zeros(3)
    block = lipjax.dense(kernel, zero, (3,)), lipjax.ClippedReLUActivation(jnp.ones(3))
    head = lipjax.dense(jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), jnp.zeros(2), (3,))
    network = lipjax.chain(*block, *block, head)
    return Case("appendix A.1", network, jnp.array([[1.0, -1.0, 0.0]]), jnp.array([0]), 0.1)


def random(sizes: tuple[int, ...], eps: float, seed: int = 0) -> Case:
    """Dense layers of random weights with ReLU between them."""
    rng = np.random.default_rng(seed)
    operations: list[Any] = []
    for inputs, outputs in itertools.pairwise(sizes):
        kernel, bias = rng.normal(size=(inputs, outputs)) * np.sqrt(2 / inputs), 0.3 * rng.normal(size=outputs)
        operations += [lipjax.dense(jnp.asarray(kernel), jnp.asarray(bias), (inputs,)), lipjax.ReLUActivation()]
    network, x = lipjax.chain(*operations[:-1]), jnp.asarray(rng.uniform(size=(1, sizes[0])))
    return Case("random " + "-".join(map(str, sizes)), network, x, jnp.argmax(network(x), axis=1), eps)


def measure(case: Case, points: int) -> dict[str, tuple[float, float]]:
    """What each bound is, and the seconds of its fastest call once compiled; without bounds that do not apply."""
    bounds = jax.jit(lambda x: lipjax.propagate(case.network, lipjax.l2_ball(x, case.eps), constants.svd_norms))(case.x)
    logits = case.network(case.x)[0]
    rival = int(jnp.argmax(logits.at[case.label[0]].set(-jnp.inf)))
    found = {}
    for name, bound in BOUNDS.items():
        compiled = jax.jit(bound)
        try:
            value = float(compiled(case.network, bounds, case.label)[0, rival])
        except TypeError:
            continue
        times = [_seconds(lambda f=compiled: f(case.network, bounds, case.label))[1] for _ in range(ROUNDS)]
        found[name] = value, min(times)
    try:
        value, seconds = _seconds(
            lambda: constants.exact(case.network, bounds, case.label, max_unstable=MAX_UNSTABLE)[0, rival]
        )
        found[EXACT] = float(value), seconds
    except ValueError:
        pass
    found[SAMPLED] = _seconds(lambda: sampled(case, rival, points))
    return found


def sampled(case: Case, rival: int, points: int) -> float:
    """The largest gradient of the margin at points of the ball, or difference between two of them over their distance.

    Half of the points are on the sphere, half inside.
    """
    label = case.label[0]

    def margin(x: Array) -> Array:
        logits = case.network.logits(x)
        return logits[label] - logits[rival]

    @jax.jit
    def largest(offsets: Array) -> Array:
        x = case.x + offsets.reshape(-1, *case.x.shape[1:])
        margins, gradients = jax.vmap(jax.value_and_grad(margin))(x)
        slopes = jnp.linalg.norm(gradients.reshape(len(x), -1), axis=1)
        distances = jnp.linalg.norm(offsets[1:] - offsets[:-1], axis=1)
        return jnp.maximum(jnp.max(slopes), jnp.max(jnp.abs(margins[1:] - margins[:-1]) / distances))

    rng, best = np.random.default_rng(1), 0.0
    for _ in range(-(-points // AT_ONCE)):
        offsets = rng.normal(size=(AT_ONCE, case.x.size))
        offsets *= case.eps / np.linalg.norm(offsets, axis=1, keepdims=True)
        offsets[::2] *= rng.uniform(size=(AT_ONCE // 2, 1)) ** (1 / case.x.size)
        best = max(best, float(largest(jnp.asarray(offsets))))
    return best


def table(cases: list[Case], found: list[dict[str, tuple[float, float]]]) -> str:
    """Values and seconds in Markdown, a row for each bound."""
    head = [f"{case.title}, eps {case.eps:g}" for case in cases]
    lines = [f"| bound of the constant | {' | '.join(head)} |", "|---" * (len(cases) + 1) + "|"]
    for name in (*BOUNDS, EXACT, SAMPLED):
        cells = [f"{each[name][0]:.4g} ({each[name][1]:.2g} s)" if name in each else "" for each in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    value = jax.block_until_ready(run())
    return value, time.perf_counter() - begin


if __name__ == "__main__":
    main()

"""Certify the networks of the SDP-CROWN paper, stage by stage, beside what it published for itself and for others.

The folder holds six networks NAME.npz (weights as PyTorch names and lays them out) and the paper's images,
images_mnist.npz and images_cifar.npz. Radii, in pixels, are the paper's. Nothing is tuned on these images.

Usage:
  python -m benchmarks.verifiers --networks DIR [--only 'mnist_*'] [--limit 200] [--output results/verifiers]
      [--branch-seconds 10]

Reference:
  Chiu, Chen, Zhang, Zhang, SDP-CROWN, ICML 2025: percent of 200 images, seconds per image on one V100.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.certification.stages import NAMES
from lipjax.experiments.data import Dataset
from lipjax.experiments.evaluation import evaluate
from lipjax.networks.activations import ReLUActivation
from lipjax.networks.graph import Network
from lipjax.networks.layers import convolution, dense
from lipjax.reading.values import Value

MEAN, DEVIATION = np.array([125.3, 123.0, 113.9]) / 255, 0.225  # of the CIFAR-10 inputs
BATCH, DUAL_STEPS = 100, 150


@dataclasses.dataclass(frozen=True)
class Published:
    """A network and what the paper says of it.

    Attributes:
        images: which file.
        shape: of one image.
        strides: and zero padding of its convolutions.
        radius: l2, in pixels.
        pgd: percent that withstand the paper's attack.
        sdp_crown: percent certified, and seconds.
        branching: the best percent of GCP-CROWN, BICCOS and beta-CROWN.
        lipschitz: percent by the product of the norms.
        lipsdp: percent by LipSDP.
    """

    images: str
    shape: tuple[int, int, int]
    strides: tuple[tuple[int, int], ...]
    radius: float
    pgd: float
    sdp_crown: tuple[float, float]
    branching: float
    lipschitz: float
    lipsdp: float


NETWORKS = {
    "mnist_mlp": Published("mnist", (28, 28, 1), (), 1.0, 54, (32.5, 2.5), 41, 29, 30.5),
    "mnist_convsmall": Published("mnist", (28, 28, 1), ((2, 1),) * 2, 0.3, 84.5, (81.5, 12), 19.5, 77.5, 78.5),
    "cifar10_cnn_a": Published("cifar", (32, 32, 3), ((2, 1),) * 2, 24 / 255, 55.5, (49, 12), 20, 39, 39),
    "cifar10_cnn_c": Published("cifar", (32, 32, 3), ((2, 0),) * 2, 24 / 255, 47, (42.5, 10), 36, 36.5, 38.5),
    "cifar10_convsmall": Published("cifar", (32, 32, 3), ((2, 0),) * 2, 24 / 255, 52.5, (43.5, 9), 18, 33, 33.5),
    "cifar10_convdeep": Published(
        "cifar", (32, 32, 3), ((2, 1), (1, 1), (1, 1), (2, 1)), 24 / 255, 50.5, (46, 25), 31.5, 39.5, 39.5
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Certify and write ``verifiers.json`` and ``verifiers.md``; networks that were not asked for keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=pathlib.Path, required=True, help="folder of networks and images")
    parser.add_argument("--only", default="*", help="pattern of names; default: all")
    parser.add_argument("--limit", type=int, default=200, help="images; default: 200")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/verifiers"), help="folder")
    parser.add_argument("--branch-seconds", type=float, default=0, help="branch and bound per image; default: none")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "verifiers.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, published in NETWORKS.items():
        if fnmatch.fnmatch(name, options.only):
            rows[name] = measure(options.networks, name, published, options.limit, options.branch_seconds)
            path.write_text(json.dumps({name: rows[name] for name in NETWORKS if name in rows}, indent=2) + "\n")
            (options.output / "verifiers.md").write_text(table(rows))
    print(table(rows))


def measure(folder: pathlib.Path, name: str, published: Published, limit: int, branch_seconds: float) -> dict[str, Any]:
    """What the stages find on the ball and on pixels: the default ones, and branch and bound where it has time."""
    network, dataset = (
        read_network(folder / f"{name}.npz", published),
        read_images(folder, published).take(slice(limit)),
    )
    found = {}
    for domain in ("ball", "pixels"):
        result = evaluate(
            network,
            dataset,
            published.radius,
            batch_size=BATCH,
            domain=domain,
            dual_steps=DUAL_STEPS,
            stages=NAMES if branch_seconds else None,
            branch_seconds=branch_seconds,
        ).summary
        keys = ("clean_accuracy", "pgd_accuracy", "attack_accuracy", "certified_accuracy", "certified_accuracy_after")
        found[domain] = {key: result[key] for key in (*keys, "seconds", "cost_per_image", "level", "delta")}
        found[domain]["branch_seconds"] = branch_seconds
        found[domain]["images"] = len(dataset)
    return found


def read_network(path: pathlib.Path, published: Published) -> Network:
    """A network from its file; inputs are pixels in [0, 1]."""
    with np.load(path) as file:
        weights = {key: file[key].astype(np.float32) for key in file.files}
    names = [key.removesuffix(".weight") for key in weights if key.endswith(".weight")]
    value, images = Value.of_input(published.shape), published.shape
    if published.images == "cifar":
        value = value.rescaled(jnp.full(3, 1 / DEVIATION, jnp.float32), jnp.asarray(-MEAN / DEVIATION, jnp.float32))
    for place, name in enumerate(names):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if weight.ndim == 4:
            stride, padding = published.strides[place]
            pads = ((padding,) * 2,) * 2
            layer = convolution(jnp.asarray(weight.transpose(2, 3, 1, 0)), bias, value.shape, (stride,) * 2, pads)
            images = layer.out_shape
        else:
            if len(value.shape) == 3:  # ravelled with channels first there, last here
                height, width, channels = images
                weight = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(len(weight), -1)
                value = value.reshaped((math.prod(images),))
            layer = dense(jnp.asarray(weight.T), bias, value.shape)
        value = value.affine(layer)
        if place < len(names) - 1:
            value = value.activation(ReLUActivation())
    return value.network()


def read_images(folder: pathlib.Path, published: Published) -> Dataset:
    """The paper's images of a data set."""
    with np.load(folder / f"images_{published.images}.npz") as file:
        return Dataset(file["images"].reshape(-1, *published.shape), file["labels"].astype(np.int32), 255, 10)


def table(rows: dict[str, Any]) -> str:
    """Percent of images, ours beside the published ones, in Markdown."""
    lines = [
        "# Published networks, certified",
        "",
        f"Percent of the images; ours at level `probabilistic`, delta 1e-6, {DUAL_STEPS} steps of the dual, on "
        f"{jax.devices()[0].device_kind}. Seconds are per image, of all stages with their compilation; SDP-CROWN's",
        "on one V100. Branch and bound is the best of GCP-CROWN, BICCOS and beta-CROWN.",
        "",
        "| network, radius | domain | withstand PGD | withstand our attack | global | local | dual | branch | seconds "
        "| published: PGD | SDP-CROWN (seconds) | branch and bound | LipSDP | Lipschitz product |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, published in NETWORKS.items():
        for domain, found in rows.get(name, {}).items():
            after = found["certified_accuracy_after"]
            ours = (found["pgd_accuracy"], found["attack_accuracy"], after["global"], after["local"], after["dual"])
            theirs = f"{published.pgd} | {published.sdp_crown[0]} ({published.sdp_crown[1]}) | {published.branching}"
            theirs += f" | {published.lipsdp} | {published.lipschitz}"
            lines.append(
                f"| {name}, {published.radius:.4g} | {domain} | {' | '.join(f'{100 * value:.1f}' for value in ours)} | "
                f"{_branched(found)} | "
                f"{found['cost_per_image']['seconds']:.2f} | {theirs if domain == 'ball' else ' | ' * 4} |"
            )
    return "\n".join(lines) + "\n"


def _branched(found: dict[str, Any]) -> str:
    """What branch and bound adds up to, and in how many seconds per image."""
    after = found["certified_accuracy_after"].get("branch")
    return "" if after is None else f"{100 * after:.1f} ({found['branch_seconds']:g} s)"


if __name__ == "__main__":
    main()

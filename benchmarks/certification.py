"""Compare the levels of certification on one trained run: images per second and products per norm.

Usage:
  python -m benchmarks.certification --workdir runs/mnist [--limit 256] [--eps 1.58]
"""

from __future__ import annotations

import argparse
import pathlib

from lipjax.experiments import settings
from lipjax.experiments.data import load
from lipjax.experiments.evaluation import evaluate
from lipjax.experiments.trained import load_run

COMPARED = ("estimate", "probabilistic")


def main() -> None:
    """Certify the same images at both levels, once to compile and once for the clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, default=256, help="test images")
    parser.add_argument("--eps", type=float, help="default: the config's")
    options = parser.parse_args()
    config = settings.load(options.workdir)
    dataset = load(config.data.name, "test", config.data.dir, config.data.cache)
    network = load_run(options.workdir).network
    chosen, eps = dataset.take(slice(options.limit)), options.eps or config.eps
    print(f"{config.data.name}, {len(chosen)} images, eps {eps:g}; after global bounds and attack, local bounds of")
    rates = {}
    for level in COMPARED:
        for _ in range(2):
            summary = evaluate(network, chosen, eps, batch_size=config.certify.batch_size, level=level).summary
        bounded, seconds = summary["counts"]["bounded_locally"], summary["seconds"]["local"]
        rates[level] = bounded / seconds
        products = " ".join(f"{products:.0f}" for products in summary["products_per_norm"])
        print(f"{level:>14}: {bounded} images at {rates[level]:.2f} images/s; products per norm, by layer: {products}")
        ratio, certified = summary["mean_local_to_global_ratio"], summary["counts"]["certified"]
        print(f"{'':>16}certified {certified}, mean local / global Lipschitz constant {ratio:.4f}")
    ratio = rates["probabilistic"] / rates["estimate"]
    print(f"probabilistic against estimate: {ratio:.2f} times as many images per second (target: at least 3)")


if __name__ == "__main__":
    main()

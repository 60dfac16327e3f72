"""Which frame should stored vectors have where images are cropped and flipped? Estimates against converged norms.

A network trains on CIFAR-10 twice: with vectors in the frame of the untransformed image, moved along with it, and with
vectors left as they come out of the last step. Then both estimate the norms of images in new frames.

Usage:
  python -m benchmarks.frames [--images 2000] [--epochs 6] [--architecture 4c3f]
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipjax import augmentation, bounds, data, methods, reading, runs, settings

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_4c3f.py"
MEASURED = 64


def main() -> None:
    """Train both ways on the same images and print the ratios of estimated to converged norms, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--architecture", default="4c3f")
    options = parser.parse_args()
    config = settings.parse([f"--config={CONFIG}", f"--config.schedule.epochs={options.epochs}"])
    config.model.architecture, config.schedule.batch_size = options.architecture, 100
    config.schedule.warmup, config.schedule.ramp, config.data.validation, config.probe.size = 0.0, 0.5, 0, 0
    whole = data.load("cifar10", "train").take(slice(options.images))
    for name, moves in (("frame of the image", True), ("as they come", False)):
        with mock.patch.object(data, "load", return_value=whole), tempfile.TemporaryDirectory() as folder:
            ratios = _ratios(config, pathlib.Path(folder), moves)
        print(f"{name:>20}: {' '.join(f'{ratio:.3f}' for ratio in ratios)}  product {np.prod(ratios):.3f}", flush=True)


def _ratios(config: settings.Config, folder: pathlib.Path, moves: bool) -> np.ndarray:
    """Estimated over converged norm of each layer, on average over images in new frames."""
    as_it_is = lambda vectors, frame, size: vectors  # noqa: E731
    stays = mock.patch.multiple(augmentation, into_frame=as_it_is, out_of_frame=as_it_is)
    if not moves:
        stays.start()
    try:
        run = runs.Run(config, folder)
        state = run.spread(run.initial_state())
        for epoch in range(config.schedule.epochs):
            state, _ = run.epoch(state, epoch)
        state = run.gathered(state)
        x = jnp.asarray(run.train.images[:MEASURED], jnp.float32) / run.train.scale
        frame = augmentation.draw(jax.random.key(7), MEASURED, config.data.crop_padding)
        stored = tuple(augmentation.into_frame(jnp.asarray(t[:MEASURED]), frame, x.shape[1]) for t in state.vectors)
    finally:
        if not moves:
            stays.stop()
    network = reading.from_flax(nnx.merge(run.graphdef, state.params), x.shape[1:])
    objective, key = run.method.objective, jax.random.key(8)
    assert isinstance(objective, methods.Bounded)
    exact = bounds.Estimate(key, tol=1e-4)

    @jax.jit
    def sigmas(network, x, stored):
        shared, _ = methods.whole_norms(objective.layers(network), state.global_vectors, objective.iterations, key)

        def one(x, vectors):
            norm = objective.norm(network, vectors, state.global_vectors, shared, key, key)
            estimated = objective.propagate(network, x, config.eps, norm).sigmas
            return estimated, objective.propagate(network, x, config.eps, exact).sigmas

        return jax.vmap(one)(x, stored)

    estimated, converged = sigmas(network, augmentation.moved(x, frame, config.data.crop_padding), stored)
    return np.mean(np.asarray(estimated) / np.asarray(converged), axis=0)


if __name__ == "__main__":
    main()

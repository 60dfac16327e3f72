"""Should stored vectors move with the images where those are cropped and flipped? Estimates against converged norms.

A network trains on CIFAR-10 twice: with vectors in the frame of the untransformed image, moved along with it, and with
vectors left as they come out of the last step, which is what lipjax does. Then both estimate the norms of images in new
frames. The learning rate decays from a quarter of the epochs on: what counts is the end of a training, where the
weights hardly move.

Usage:
  python -m benchmarks.frames [--images 500] [--epochs 16] [--architecture 4c3f] [--eps 0.1412]
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lipjax.bounds import propagation
from lipjax.experiments import data, runs, settings
from lipjax.reading import flax
from lipjax.training import methods, training_step

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_4c3f.py"
PADDING, MEASURED = 4, 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """How each image of a batch was moved: shifted by (down, right) pixels (B,), then flipped or not (B,)."""

    down: Array
    right: Array
    flipped: Array


def draw(key: Array, count: int) -> Frame:
    """A random frame for each of ``count`` images."""
    shift_key, flip_key = jax.random.split(key)
    down, right = jax.random.randint(shift_key, (2, count), -PADDING, PADDING + 1)
    return Frame(down, right, jax.random.bernoulli(flip_key, shape=(count,)))


def moved(images: Array, frame: Frame) -> Array:
    """Images (B, H, W, C) in their frames, with zeros where they have left."""
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    return into_frame(padded, frame, padded.shape[1])[:, PADDING:-PADDING, PADDING:-PADDING]


def into_frame(vectors: Array, frame: Frame, size: int) -> Array:
    """Vectors (B, h, w, C) moved like images of height ``size``, round at the borders; others (B, n) as they are."""

    def one(vector: Array, frame: Frame) -> Array:
        rolled = jnp.roll(vector, _places(vector, frame, size), axis=(0, 1))
        return jnp.where(frame.flipped, rolled[:, ::-1], rolled)

    return jax.vmap(one)(vectors, frame) if vectors.ndim == 4 else vectors


def out_of_frame(vectors: Array, frame: Frame, size: int) -> Array:
    """The inverse of :func:`into_frame`."""

    def one(vector: Array, frame: Frame) -> Array:
        down, right = _places(vector, frame, size)
        return jnp.roll(jnp.where(frame.flipped, vector[:, ::-1], vector), (-down, -right), axis=(0, 1))

    return jax.vmap(one)(vectors, frame) if vectors.ndim == 4 else vectors


def _places(vector: Array, frame: Frame, size: int) -> tuple[Array, Array]:
    """The shift in places of the vector, whose layer has strides in front of it."""
    scale = vector.shape[0] / size
    down, right = (jnp.round(shift * scale).astype(jnp.int32) for shift in (frame.down, frame.right))
    return down, right


@dataclasses.dataclass(frozen=True)
class InFrames:
    """An objective on images in random frames.

    Attributes:
        inner: of the images as they are.
        moves: stored vectors move with the images, and back.
    """

    inner: methods.Bounded
    moves: bool

    def layers(self, network):
        return self.inner.layers(network)

    def kept(self, network):
        return self.inner.kept(network)

    def __call__(self, network, x, label, eps, kappa, stored, whole, key):
        frame, size = draw(key, len(x)), x.shape[1]
        there = tuple(into_frame(vectors, frame, size) for vectors in stored) if self.moves else stored
        loss, metrics, there, whole = self.inner(network, moved(x, frame), label, eps, kappa, there, whole, key)
        back = tuple(out_of_frame(vectors, frame, size) for vectors in there) if self.moves else there
        return loss, metrics, back, whole


def main() -> None:
    """Train both ways on the same images and print the ratios of estimated to converged norms, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="training images")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--architecture", default="4c3f")
    parser.add_argument("--eps", type=float, default=36 / 255, help="the smaller, the fewer neurons vary")
    options = parser.parse_args()
    config = settings.parse([f"--config={CONFIG}", f"--config.schedule.epochs={options.epochs}"])
    config.model.architecture, config.schedule.batch_size = options.architecture, 50
    config.eps = config.eps_train = options.eps
    config.schedule.warmup, config.schedule.ramp, config.schedule.constant = 0.0, 0.25, 0.25
    config.data.validation = config.data.crop_padding = config.probe.size = 0
    whole = data.load("cifar10", "train").take(slice(options.images))
    for name, moves in (("moved with the image", True), ("as they come", False)):
        with mock.patch.object(data, "load", return_value=whole), tempfile.TemporaryDirectory() as folder:
            ratios, live = _ratios_and_live(config, pathlib.Path(folder), moves)
        print(f"{name:>20}: {' '.join(f'{ratio:.3f}' for ratio in ratios)}  product {np.prod(ratios):.3f}")
        print(f"{'share that varies':>20}: {' '.join(f'{share:.2f}' for share in live)}", flush=True)


def _ratios_and_live(config: settings.Config, folder: pathlib.Path, moves: bool) -> tuple[np.ndarray, np.ndarray]:
    """Estimated over converged norm of each layer, and the share of varying neurons: means over images moved anew."""
    run = runs.Run(config, folder)
    objective = run.method.objective
    assert isinstance(objective, methods.Bounded)
    method = dataclasses.replace(run.method, objective=InFrames(objective, moves))
    run.train_step = training_step.mapped(training_step.train_step, method, run.graphdef)
    state = run.spread(run.initial_state())
    for epoch in range(config.schedule.epochs):
        state, _ = run.epoch(state, epoch)
    state = run.gathered(state)
    x = jnp.asarray(run.train.images[:MEASURED], jnp.float32) / run.train.scale
    frame = draw(jax.random.key(7), MEASURED)
    stored = tuple(jnp.asarray(table[:MEASURED]) for table in state.vectors)
    if moves:
        stored = tuple(into_frame(vectors, frame, x.shape[1]) for vectors in stored)
    network = flax.from_flax(nnx.merge(run.graphdef, state.params), x.shape[1:])
    key = jax.random.key(8)
    exact = propagation.Estimate(key, tol=1e-4)

    @jax.jit
    def measured(network, x, stored):
        shared, _ = methods.whole_norms(objective.layers(network), state.global_vectors, objective.iterations, key)

        def one(x, vectors):
            norm = objective.norm(network, vectors, state.global_vectors, shared, key, key)
            estimated, found = (objective.propagate(network, x, config.eps, how) for how in (norm, exact))
            return estimated.sigmas / found.sigmas, jnp.stack([jnp.mean(live) for live in found.live])

        return jax.vmap(one)(x, stored)

    return tuple(np.mean(np.asarray(column), axis=0) for column in measured(network, moved(x, frame), stored))


if __name__ == "__main__":
    main()

"""Random crops and flips against slices in NumPy."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.training import augmentation

PADDING, SHAPE = 2, (6, 7, 2)


def test_every_shift_and_both_flips_come_equally_often_and_nothing_else():
    image, count = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32), 10_000
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    allowed = {}
    for down in range(2 * PADDING + 1):
        for right in range(2 * PADDING + 1):
            crop = padded[down : down + SHAPE[0], right : right + SHAPE[1]]
            allowed[crop.tobytes()] = down, right, False
            allowed[crop[:, ::-1].tobytes()] = down, right, True
    images = jnp.broadcast_to(image, (count, *SHAPE))
    found = np.asarray(jax.jit(augmentation.crops_and_flips, static_argnums=2)(jax.random.key(0), images, PADDING))
    counts = collections.Counter(allowed[crop.tobytes()] for crop in found)
    assert len(counts) == len(allowed) == 2 * (2 * PADDING + 1) ** 2
    expected = count / len(allowed)  # 200: six standard deviations are 84
    assert all(abs(number - expected) < 84 for number in counts.values())


def test_images_of_one_batch_are_not_mixed_and_another_key_moves_them_otherwise():
    images = jnp.stack([jnp.full(SHAPE, float(k + 1)) for k in range(50)])
    one, other = (np.asarray(augmentation.crops_and_flips(jax.random.key(k), images, PADDING)) for k in (1, 2))
    for k in range(50):
        assert set(np.unique(one[k])) <= {0.0, k + 1.0}
    assert not np.array_equal(one, other)

"""Random crops and flips against loops in NumPy; stored vectors in the frame of the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import augmentation, convolution, spectral
from lipjax.bounds import linear_map

PADDING = 4


def one_frame(down, right, flipped):
    return augmentation.Frame(jnp.array([down]), jnp.array([right]), jnp.array([flipped]))


@pytest.mark.parametrize(("down", "right", "flipped"), [(0, 0, False), (4, -4, False), (-3, 1, True), (0, 0, True)])
def test_an_image_is_a_crop_of_itself_padded_by_zeros(down, right, flipped):
    image = np.random.default_rng(0).uniform(size=(6, 7, 2)).astype(np.float32)
    padded = np.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    crop = padded[PADDING - down : PADDING - down + 6, PADDING - right : PADDING - right + 7]
    expected = crop[:, ::-1] if flipped else crop
    found = augmentation.moved(jnp.asarray(image)[None], one_frame(down, right, flipped), PADDING)
    np.testing.assert_array_equal(found[0], expected)


def test_frames_take_every_shift_and_both_flips_equally_often():
    frame = augmentation.draw(jax.random.key(0), 9000, PADDING)
    for shift in (frame.down, frame.right):
        places, counts = np.unique(np.asarray(shift), return_counts=True)
        assert places.tolist() == list(range(-PADDING, PADDING + 1))
        assert np.all(np.abs(counts - 1000) < 150)
    assert abs(float(jnp.mean(frame.flipped)) - 0.5) < 0.03
    assert abs(np.corrcoef(np.asarray(frame.down), np.asarray(frame.right))[0, 1]) < 0.05


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 16, 4), (8, 8, 2), (12,)])
def test_vectors_come_back_from_a_frame_as_they_were(shape):
    vectors = jax.random.normal(jax.random.key(1), (50, *shape)).astype(jnp.bfloat16)
    frame = augmentation.draw(jax.random.key(2), 50, PADDING)
    there = augmentation.into_frame(vectors, frame, 32)
    np.testing.assert_array_equal(augmentation.out_of_frame(there, frame, 32), vectors)
    if len(shape) == 3:
        assert not np.array_equal(there, vectors)
    else:
        np.testing.assert_array_equal(there, vectors)


def test_the_vector_of_a_masked_layer_in_its_frame_fits_the_moved_mask():
    """What is live moves with the image, and with it the top singular vector: a stored one is a good start again."""
    rng, size = np.random.default_rng(3), 16
    layer = convolution(
        jnp.asarray(rng.standard_normal((4, 4, 1, 4)), jnp.float32),
        jnp.zeros(4),
        (size, size, 1),
        (2, 2),
        ((1, 1),) * 2,
    )
    live = np.zeros((size, size, 1), bool)
    live[6:10, 5:9] = True  # far from the borders
    frame = one_frame(4, -2, False)

    def sigma_and_vector(live, start, num_iters):
        masked = linear_map(layer).masked(jnp.ones((8, 8, 4), bool), jnp.asarray(live))
        return spectral.power_iteration(masked.from_smaller_side(), start, num_iters)

    oriented = linear_map(layer).from_smaller_side()
    start = jnp.asarray(rng.standard_normal(oriented.in_shape), jnp.float32)
    sigma, vector = sigma_and_vector(live, start, 2000)
    moved_live = np.asarray(augmentation.moved(jnp.asarray(live, jnp.float32)[None], frame, PADDING))[0] > 0
    carried = augmentation.into_frame(vector[None], frame, size)[0]
    np.testing.assert_allclose(sigma_and_vector(moved_live, carried, 1)[0], sigma, rtol=1e-4)
    assert float(sigma_and_vector(moved_live, vector, 1)[0]) < 0.95 * float(sigma)  # as it was, it does not fit

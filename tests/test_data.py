"""Data sets: digits, tensorflow-datasets from a prepared folder, the cache, and what is said when there is nothing."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lipjax.errors import InputError
from lipjax.experiments import data

PREPARED = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or pathlib.Path(__file__).parents[2] / "shared" / "tfds")
needs_mnist = pytest.mark.skipif(
    not (PREPARED / "mnist").exists(),
    reason="no prepared MNIST in TFDS_DATA_DIR nor in shared/tfds beside the checkout",
)


def test_digits_are_a_fixed_stratified_split():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.images.max() == train.scale == 16
    shares = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    assert np.all(np.abs(shares - len(test) / 1797) < 0.01)
    seen = {image.tobytes() for image in train.images}
    assert np.mean([image.tobytes() in seen for image in test.images]) < 0.01


def test_validation_is_taken_out_of_training():
    train = data.load("digits", "train")
    kept, held_out = data.train_and_validation(train, 137, seed=1)
    assert (len(kept), len(held_out)) == (1300, 137)
    both = np.concatenate([kept.images, held_out.images]).reshape(len(train), -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, train.images.reshape(len(train), -1)))
    again, _ = data.train_and_validation(train, 137, seed=1)
    np.testing.assert_array_equal(kept.images, again.images)
    assert len(data.train_and_validation(train, 0, seed=1)[0]) == len(train)


@pytest.mark.parametrize("validation", [-1, 1437, 99999])
def test_impossible_validation_split_is_named(validation):
    with pytest.raises(InputError, match=f"config.data.validation is {validation}; expected 0 to 1436"):
        data.train_and_validation(data.load("digits", "train"), validation, seed=0)


def test_unknown_names_are_named():
    with pytest.raises(
        InputError,
        match="unknown data set 'imagenet'.*known are digits, mnist, fashion_mnist, cifar10, cifar100, tiny_imagenet",
    ):
        data.load("imagenet", "train")
    with pytest.raises(InputError, match="unknown split 'val'"):
        data.load("digits", "val")


def test_missing_data_set_says_where_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        data.load("mnist", "train", str(tmp_path / "here"), str(tmp_path / "cache"))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "here"),
        str(tmp_path / "cache"),
        "TFDS_DATA_DIR",
        "--config.data.dir",
        "lipjax[prepare]",
    ):
        assert part in message


def write_cache(folder, version, value):
    folder.mkdir(exist_ok=True)
    images = np.full((3, 28, 28, 1), value, np.uint8)
    np.savez(folder / f"mnist-{version}-train.npz", images=images, labels=np.arange(3, dtype=np.int32))


def test_newest_cache_serves_where_nothing_is_prepared(tmp_path, monkeypatch):
    write_cache(tmp_path / "cache", "3.0.1", 7)
    write_cache(tmp_path / "cache", "3.0.10", 9)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("LIPJAX_CACHE", str(tmp_path / "cache"))
    loaded = data.load("mnist", "train")
    assert loaded.images.max() == 9
    assert loaded.scale == 255


def test_broken_cache_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    write_cache(tmp_path / "cache", "3.0.1", 7)
    path = tmp_path / "cache" / "mnist-3.0.1-train.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="no data set 'mnist'"):
        data.load("mnist", "train", str(tmp_path / "nothing"), str(tmp_path / "cache"))
    assert f"ignoring the broken cache {path}" in capsys.readouterr().err


READ_SCRIPT = """
import sys
from lipjax.experiments import data
train = data.load("mnist", "test", sys.argv[1], sys.argv[2])
assert train.images.shape == (10000, 28, 28, 1), train.images.shape
assert train.labels[:5].tolist() == [2, 0, 4, 8, 7] or sorted(set(train.labels.tolist())) == list(range(10))
assert "tensorflow" not in sys.modules
"""


@needs_mnist
def test_prepared_mnist_is_read_without_tensorflow_and_then_cached(tmp_path):
    arguments = [sys.executable, "-c", READ_SCRIPT, str(PREPARED), str(tmp_path)]
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "not here")}  # the argument wins
    subprocess.run(arguments, env=environment, check=True, timeout=200)
    assert [path.name for path in tmp_path.iterdir()] == ["mnist-3.0.1-test.npz"]
    cached = data.load("mnist", "test", str(tmp_path / "nothing"), str(tmp_path))
    assert np.bincount(cached.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

"""Data sets as arrays: scikit-learn's digits, which is bundled, and others by name through tensorflow-datasets.

Training reads uint8 arrays only; TensorFlow is never imported, except to prepare a data set that is not there yet.
Decoded arrays are cached, so that a machine without tensorflow-datasets can train from the cache.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import sys
import zipfile
import zlib

import numpy as np

from lipjax.errors import InputError
from lipjax.experiments import references

# Shape of an image and number of classes. A data set of tensorflow-datasets is one line here.
SPECS: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "tiny_imagenet": ((64, 64, 3), 200),
}
NAMES = tuple(SPECS)
TINY_ARCHIVE = "tiny-imagenet-200.zip"
TEST_SPLITS = {"tiny_imagenet": "validation"}  # whose official test images have no public labels
DIGITS_TEST, DIGITS_SEED = 360, 0  # the fixed stratified split: 1,437 training and 360 test images


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels of one split.

    Attributes:
        images: uint8 (n, ...), images as (n, H, W, C), or float32 in [0, 1].
        labels: int32 (n,).
        scale: the value that stands for 1.0.
        num_classes: number of classes.
    """

    images: np.ndarray
    labels: np.ndarray
    scale: int
    num_classes: int

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, num_classes: int | None = None) -> Dataset:
        """A data set of a user's arrays.

        Args:
            images: (n, ...), uint8 or floating-point in [0, 1].
            labels: integers (n,).
            num_classes: default one more than the largest label.

        Raises:
            InputError: arrays of another kind.
        """
        return _of_arrays(np.asarray(images), np.asarray(labels), num_classes, "Dataset.of")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray | slice) -> Dataset:
        """The examples at the given places."""
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])


def is_own(name: str) -> bool:
    """Whether a name is that of a data set of the user: ``package.module:load``, or an ``.npz`` file."""
    return references.is_reference(name) or name.endswith(".npz")


def spec(name: str) -> tuple[tuple[int, ...], int]:
    """Shape of an image and number of classes of a data set."""
    if not is_own(name):
        return SPECS[name]
    train = load(name, "train")
    return train.images.shape[1:], train.num_classes


def from_file(path: pathlib.Path, name: str) -> Dataset:
    """A user's own images, for a model of a known data set.

    Args:
        path: an ``.npz`` file with ``images`` (n, H, W, C), uint8 or floating-point in [0, 1], and ``labels`` (n,).
        name: data set whose shape and classes the images must have.

    Raises:
        InputError: what is wrong with the file, and what is expected.
    """
    shape, classes = spec(name)
    arrays = _arrays(path, ("images", "labels"), f"--data={path}")
    return _checked(arrays["images"], arrays["labels"], shape, classes, f"--data={path}", name)


def any_file(path: pathlib.Path) -> Dataset:
    """A user's own inputs, for a model of the user's own.

    Args:
        path: an ``.npz`` file with ``images`` (n, ...), uint8 or floating-point in [0, 1], and ``labels`` (n,).

    Raises:
        InputError: what is wrong with the file, and what is expected.
    """
    arrays = _arrays(path, ("images", "labels"), f"--data={path}")
    return _of_arrays(arrays["images"], arrays["labels"], None, f"--data={path}")


def _of_arrays(images: np.ndarray, labels: np.ndarray, num_classes: int | None, what: str) -> Dataset:
    classes = 1 + int(labels.max(initial=0)) if num_classes is None else num_classes
    return _checked(images, labels, images.shape[1:], classes, what, "this data set")


def _arrays(path: pathlib.Path, names: tuple[str, ...], what: str) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: file[key] for key in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it is no .npz" if isinstance(error, ValueError) else error  # NumPy would advise to unpickle it
        raise InputError(f"{what} cannot be read: {reason}; give an .npz with {' and '.join(names)}") from None


def _checked(
    images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], classes: int, what: str, name: str
) -> Dataset:
    """Images and labels as a data set; InputError unless they are images of this shape in [0, 1] and classes."""
    if images.ndim < 2 or images.shape[1:] != shape or not len(images):
        wanted = f"at least one image of shape {shape}"
        raise InputError(f"{what}: images have shape {images.shape}; the model of {name} takes {wanted}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{what}: labels are {labels.dtype} {labels.shape}; expected {len(images)} integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{what}: labels reach from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")
    if images.dtype == np.uint8:
        return Dataset(images, labels.astype(np.int32), 255, classes)
    if not np.issubdtype(images.dtype, np.floating) or not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"{what}: images are {images.dtype} from {images.min()} to {images.max()}; expected uint8, or "
            "floating-point pixels in [0, 1]"
        )
    return Dataset(images.astype(np.float32), labels.astype(np.int32), 1, classes)


def load(name: str, split: str, data_dir: str | None = None, cache_dir: str | None = None) -> Dataset:
    """Load one split of a data set.

    Looked for in this order: the cache of arrays decoded from the prepared folder, the prepared folder itself, and, if
    TensorFlow is installed (``pip install lipjax[prepare]``), the internet. A cache is used on its own where there is
    no prepared folder.

    Args:
        name: one of :data:`NAMES`; or of the user: ``package.module:load``, called with the split for images and
            labels, or an ``.npz`` file with ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``, as
            :func:`from_file` takes them.
        split: ``"train"`` or ``"test"``.
        data_dir: folder of prepared tensorflow-datasets; default ``TFDS_DATA_DIR``, then ``~/tensorflow_datasets``.
        cache_dir: folder of decoded arrays; default ``LIPJAX_CACHE``, then ``~/.cache/lipjax``.

    Raises:
        InputError: an unknown name or split, or a data set that is nowhere, with what to install or set.
    """
    if is_own(name) and split in ("train", "test"):
        return _own(name, split)
    if name not in NAMES:
        raise InputError(f"unknown data set {name!r} in config.data.name; known are {', '.join(NAMES)}")
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}; use 'train' or 'test'")
    if name == "digits":
        return _digits(split)
    source = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    cache = pathlib.Path(cache_dir or os.environ.get("LIPJAX_CACHE") or "~/.cache/lipjax").expanduser()
    images, labels = _cached(name, split, source, cache)
    return Dataset(images, labels, scale=255, num_classes=SPECS[name][1])


def train_and_validation(train: Dataset, validation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Take ``validation`` images, chosen by the seed, out of the training split.

    Raises:
        InputError: fewer than 0 or not fewer than there are.
    """
    if not 0 <= validation < len(train):
        raise InputError(
            f"config.data.validation is {validation}; expected 0 to {len(train) - 1}, a part of the training split"
        )
    order = np.random.default_rng(seed).permutation(len(train))
    held_out, kept = np.sort(order[:validation]), np.sort(order[validation:])
    return train.take(kept), train.take(held_out)


def _own(name: str, split: str) -> Dataset:
    """A data set of the user."""
    splits = ("train", "test")
    if references.is_reference(name):
        load_split = references.find(name, "--config.data.name")
        found = {each: load_split(each) for each in splits}
    else:
        keys = tuple(f"{each}_{part}" for each in splits for part in ("images", "labels"))
        arrays = _arrays(pathlib.Path(name).expanduser(), keys, f"--config.data.name={name}")
        found = {each: (arrays[f"{each}_images"], arrays[f"{each}_labels"]) for each in splits}
    images, labels = map(np.asarray, found[split])
    classes = 1 + max(int(np.max(labels, initial=0)) for _, labels in found.values())
    shape = np.shape(found["train"][0])[1:]
    return _checked(images, labels, shape, classes, f"--config.data.name={name} ({split})", name)


def _digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    parts = train_test_split(images, labels, test_size=DIGITS_TEST, random_state=DIGITS_SEED, stratify=labels)
    which = 0 if split == "train" else 1
    return Dataset(parts[which], parts[2 + which].astype(np.int32), scale=16, num_classes=10)


def _cached(name: str, split: str, source: pathlib.Path, cache: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Decoded arrays of the newest prepared version, or of the newest cached one where none is prepared."""
    prepared = _versions(source / name)
    if not prepared:
        cached = _newest(path for path in cache.glob(f"{name}-*-{split}.npz"))
        if cached is not None and (arrays := _read(cached)) is not None:
            return arrays
        _prepare(name, source, cache)
        prepared = _versions(source / name)
    version = prepared[-1]
    path = cache / f"{name}-{version}-{split}.npz"
    if path.exists() and (arrays := _read(path)) is not None:
        return arrays
    images, labels = _decode(source / name / version, split)
    _write(path, images, labels)
    return images, labels


def _versions(folder: pathlib.Path) -> list[str]:
    """Prepared versions in a folder, oldest first."""
    found = (path.parent.name for path in folder.glob("*/dataset_info.json"))
    return sorted(found, key=_version_number)


def _version_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _newest(paths) -> pathlib.Path | None:
    return max(paths, key=lambda path: _version_number(path.name.split("-")[1]), default=None)


def _decode(folder: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(
            f"{folder} is prepared, but reading it needs tensorflow-datasets: pip install tensorflow-datasets "
            "array_record, or copy the cached arrays of another machine and set LIPJAX_CACHE"
        ) from None
    print(f"decoding {folder} ({split}), once; the arrays are cached", file=sys.stderr)
    name = TEST_SPLITS.get(folder.parent.name, "test") if split == "test" else split
    examples = tfds.builder_from_directory(folder).as_data_source(name)
    images = np.stack([example["image"] for example in examples])
    return images, np.asarray([example["label"] for example in examples], np.int32)


def _prepare(name: str, source: pathlib.Path, cache: pathlib.Path) -> None:
    """Download and prepare a data set with TensorFlow, or say what is missing."""
    if name == "tiny_imagenet":
        _prepare_tiny_imagenet(source, cache)
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"no data set {name!r} in {source} (prepared) or {cache} (cached): set TFDS_DATA_DIR or --config.data.dir "
            "to a folder that holds it, or pip install 'lipjax[prepare]' to download it"
        )
    import tensorflow_datasets as tfds

    print(f"preparing {name} in {source} with tensorflow-datasets, once", file=sys.stderr)
    try:
        tfds.builder(name, data_dir=source, file_format="array_record").download_and_prepare()
    except Exception as error:  # a network or checksum error of any library below
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"preparing {name} in {source} failed: {type(error).__name__}: {reason}") from error


def _prepare_tiny_imagenet(source: pathlib.Path, cache: pathlib.Path) -> None:
    """Prepare Tiny-ImageNet from its original archive; neither internet nor TensorFlow are needed."""
    manual = source / "downloads" / "manual"
    if not (manual / TINY_ARCHIVE).exists():
        raise InputError(
            f"no data set 'tiny_imagenet' in {source} (prepared) or {cache} (cached): put the original {TINY_ARCHIVE} "
            f"into {manual}, or set TFDS_DATA_DIR or --config.data.dir to a folder that holds it prepared"
        )
    import tensorflow_datasets as tfds

    from lipjax.experiments.tiny_imagenet import TinyImagenet  # it imports tensorflow-datasets

    print(f"preparing tiny_imagenet in {source} from {manual / TINY_ARCHIVE}, once", file=sys.stderr)
    builder = TinyImagenet(data_dir=source, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Cached arrays; None, with a message, where the file is broken."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"ignoring the broken cache {path}: {error}", file=sys.stderr)
        return None


def _write(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write a cache in one move, so that a killed process leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, images=images, labels=labels)
    partial.replace(path)

"""Tiny-ImageNet-200 as a data set of tensorflow-datasets, from its original archive and without TensorFlow.

Importing this module imports tensorflow-datasets; :mod:`lipjax.experiments.data` does so only to prepare the data set.
"""

from __future__ import annotations

import collections
import io
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lipjax.errors import InputError

ARCHIVE = "tiny-imagenet-200.zip"
ROOT = "tiny-imagenet-200"
NUM_CLASSES = 200
SHAPE = (64, 64, 3)


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """200 classes of ImageNet in 64x64 pixels; labels are the places of the sorted WordNet ids.

    The validation split is what everybody tests on: the labels of the official test images are not public.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {ARCHIVE} (http://cs231n.stanford.edu/{ARCHIVE}) into the manual folder."

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=SHAPE, dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
            }
        )
        return self.dataset_info_from_configs(features=features, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        archive = Archive(pathlib.Path(dl_manager.manual_dir) / ARCHIVE)
        return {"train": archive.examples(archive.train), "validation": archive.examples(archive.validation)}

    def _generate_examples(self, **_: Any) -> Iterator:
        raise NotImplementedError  # _split_generators gives the examples


class Archive:
    """The original archive, looked through before anything is written.

    Attributes:
        train: names and labels of the training images.
        validation: names and labels of the validation images.

    Raises:
        InputError: it cannot be read, or something is missing in it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            self.file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is broken or not whole: {error}; download it again") from error
        self.names = set(self.file.namelist())
        classes = sorted(self._read("wnids.txt").decode().split())
        if len(classes) != NUM_CLASSES:
            raise InputError(f"{path}: wnids.txt names {len(classes)} classes, not {NUM_CLASSES}; download it again")
        self.train = []
        counts = {}
        for label, wnid in enumerate(classes):
            folder = f"{ROOT}/train/{wnid}/images/"
            images = sorted(name for name in self.names if name.startswith(folder) and name.endswith(".JPEG"))
            counts[wnid] = len(images)
            self.train += [(name, label) for name in images]
        self.validation = []
        for line in self._read("val/val_annotations.txt").decode().splitlines():
            name, wnid = line.split("\t")[:2]
            inside = f"{ROOT}/val/images/{name}"
            if inside not in self.names or wnid not in counts:
                raise InputError(f"{path} is not whole: {inside} of class {wnid} is missing; download it again")
            self.validation.append((inside, classes.index(wnid)))
        _check_equal(path, "training", counts)
        found = collections.Counter(label for _, label in self.validation)
        _check_equal(path, "validation", {wnid: found[label] for label, wnid in enumerate(classes)})
        if not self.train or not self.validation:
            raise InputError(f"{path} holds no images; download it again")

    def examples(self, listed: list[tuple[str, int]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and examples, for tensorflow-datasets; images are encoded bytes."""
        for name, label in listed:
            yield (
                pathlib.PurePath(name).name,
                {"image": _colored(self._read_inside(name), name, self.path), "label": label},
            )

    def _read(self, name: str) -> bytes:
        if f"{ROOT}/{name}" not in self.names:
            raise InputError(f"{self.path} is not whole: it has no {ROOT}/{name}; download it again")
        return self._read_inside(f"{ROOT}/{name}")

    def _read_inside(self, name: str) -> bytes:
        try:
            return self.file.read(name)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{self.path} is broken: {name}: {error}; download it again") from error


def _check_equal(path: pathlib.Path, part: str, counts: dict[str, int]) -> None:
    """Raises InputError unless all classes have as many images."""
    few, most = min(counts, key=lambda wnid: counts[wnid]), max(counts.values())
    if counts[few] < most:
        raise InputError(
            f"{path} is not whole: class {few} has {counts[few]} {part} images, others {most}; download it again"
        )


def _colored(encoded: bytes, name: str, path: pathlib.Path) -> bytes:
    """The image as it is where it is RGB; grey ones as RGB, losslessly."""
    try:
        image = Image.open(io.BytesIO(encoded))
        size, mode = image.size, image.mode
        rgb = image if mode == "RGB" else image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path} is broken: {name}: {error}; download it again") from error
    if size != SHAPE[:2]:
        raise InputError(f"{path}: {name} has {size[0]}x{size[1]} pixels, not {SHAPE[0]}x{SHAPE[1]}")
    if mode == "RGB":
        return encoded
    buffer = io.BytesIO()
    rgb.save(buffer, format="png")
    return buffer.getvalue()

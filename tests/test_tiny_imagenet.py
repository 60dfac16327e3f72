"""Tiny-ImageNet from its archive: images and labels, grey images, and archives that are broken or not whole."""

import io
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from lipjax.errors import InputError
from lipjax.experiments import data
from lipjax.experiments.tiny_imagenet import ARCHIVE, Archive

SAMPLE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tiny-imagenet-200-sample.zip"
WNIDS = [f"n{k:08d}" for k in np.random.default_rng(0).permutation(200)]  # not in the order of the labels


def jpeg(seed, mode="RGB", size=(64, 64)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format="jpeg")
    return buffer.getvalue()


RGB, GREY = jpeg(1), jpeg(2, "L")


def entries():
    """Names and contents of a small archive: two training images of each class, the first ones grey, and one other."""
    files = {"wnids.txt": "\n".join(WNIDS).encode()}
    for wnid in WNIDS:
        files |= {f"train/{wnid}/images/{wnid}_{k}.JPEG": (GREY, RGB)[k] for k in range(2)}
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"not an image"
    annotations = [f"val_{k}.JPEG\t{wnid}\t0\t0\t63\t63" for k, wnid in enumerate(WNIDS)]
    files |= {f"val/images/val_{k}.JPEG": RGB for k in range(200)}
    return files | {"val/val_annotations.txt": "\n".join(annotations).encode()}


def write(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def decoded(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_a_prepared_archive_has_its_images_and_labels_and_needs_no_tensorflow(tmp_path, capfd):
    write(tmp_path / "downloads" / "manual" / ARCHIVE, entries())
    train, test = (data.load("tiny_imagenet", split, str(tmp_path), str(tmp_path)) for split in ("train", "test"))
    assert "tensorflow" not in sys.modules
    assert "preparing tiny_imagenet" in capfd.readouterr().err
    assert train.images.shape == (400, 64, 64, 3)
    assert train.num_classes == 200
    assert np.bincount(train.labels).tolist() == [2] * 200
    assert sorted(test.labels) == list(range(200))
    kinds = {image.tobytes() for image in train.images}
    assert kinds == {decoded(RGB).tobytes(), decoded(GREY).tobytes()}
    assert all(np.array_equal(image, decoded(RGB)) for image in test.images)
    again = data.load("tiny_imagenet", "train", str(tmp_path / "elsewhere"), str(tmp_path))
    np.testing.assert_array_equal(again.images, train.images)  # from the cache alone


def test_a_missing_archive_is_said_with_its_place(tmp_path):
    with pytest.raises(InputError, match=rf"no data set 'tiny_imagenet'.*put the original {ARCHIVE} into .*manual"):
        data.load("tiny_imagenet", "train", str(tmp_path), str(tmp_path))


def without(*names):
    return {name: content for name, content in entries().items() if name not in names}


FIRST = f"train/{WNIDS[7]}/images/{WNIDS[7]}_1.JPEG"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (without("wnids.txt"), "is not whole: it has no tiny-imagenet-200/wnids.txt"),
        (without("val/val_annotations.txt"), "it has no tiny-imagenet-200/val/val_annotations.txt"),
        (without(FIRST), f"class {WNIDS[7]} has 1 training images, others 2"),
        (without("val/images/val_2.JPEG"), "val_2.JPEG of class .* is missing"),
        (
            entries() | {"val/val_annotations.txt": entries()["val/val_annotations.txt"].rsplit(b"\n", 1)[0]},
            f"class {WNIDS[-1]} has 0 validation images, others 1",
        ),
        (entries() | {"wnids.txt": b"n00000001"}, "wnids.txt names 1 classes, not 200"),
    ],
)
def test_an_archive_that_is_not_whole_is_refused_by_name(files, message, tmp_path):
    path = write(tmp_path / "downloads" / "manual" / ARCHIVE, files)
    with pytest.raises(InputError, match=message) as error:
        Archive(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("encoded", "message"), [(b"no image", "is broken"), (jpeg(3, size=(32, 64)), "64x32 pixels")])
def test_an_image_that_cannot_be_used_is_named_and_nothing_is_left_prepared(encoded, message, tmp_path):
    write(tmp_path / "downloads" / "manual" / ARCHIVE, entries() | {FIRST: encoded})
    with pytest.raises(InputError, match=rf"{ARCHIVE}.*{WNIDS[7]}_1.JPEG.*{message}|{ARCHIVE} {message}.*{WNIDS[7]}_1"):
        data.load("tiny_imagenet", "train", str(tmp_path), str(tmp_path))
    assert not list((tmp_path / "tiny_imagenet").glob("1.*"))


def test_a_truncated_and_a_damaged_archive_are_refused(tmp_path):
    path = write(tmp_path / "downloads" / "manual" / ARCHIVE, entries())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"tiny-imagenet-200.zip is broken or not whole"):
        data.load("tiny_imagenet", "train", str(tmp_path), str(tmp_path))
    place = whole.index(GREY)
    path.write_bytes(whole[: place + 100] + b"\0\0\0\0" + whole[place + 104 :])
    with pytest.raises(InputError, match=r"tiny-imagenet-200.zip is broken: .*_0.JPEG: Bad CRC-32"):
        data.load("tiny_imagenet", "train", str(tmp_path), str(tmp_path))


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample of Tiny-ImageNet is not here")
def test_the_sample_of_the_original_is_read(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(SAMPLE, manual / ARCHIVE)
    train, test = (data.load("tiny_imagenet", split, str(tmp_path), str(tmp_path)) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [20] * 200
    assert np.bincount(test.labels).tolist() == [5] * 200
    assert train.images.std() > 40

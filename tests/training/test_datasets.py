from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperfaiss.errors import CorruptFileError, InvalidParameterError
from training.datasets import flickr25k, load_flickr25k, load_nus_wide, nus_wide

FOLDERS = ("actor", "beach_ball")


def write_jpeg(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, quality=95)


def value_of(image: Image.Image) -> int:
    return int(np.asarray(image).mean().round())


def flickr_labels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 24)) < 0.2


def write_flickr25k(folder: Path, labels: np.ndarray, images: str = "mirflickr", annotations: str = "annotations") -> None:
    """MIRFLICKR-25000 in small; image i is grey of value i."""
    for i in range(1, len(labels) + 1):
        write_jpeg(folder / images / f"im{i}.jpg", i)
    (folder / images / "doc").mkdir()
    (folder / annotations).mkdir(parents=True, exist_ok=True)
    (folder / annotations / "README.txt").write_text("MIRFLICKR-25k Annotations v0.80")
    for concept, column in zip(flickr25k.CONCEPTS, labels.T, strict=True):
        numbers = [str(i + 1) for i in np.flatnonzero(column)]
        (folder / annotations / f"{concept}.txt").write_text("".join(f"{number}\n" for number in numbers))
        (folder / annotations / f"{concept}_r1.txt").write_text("".join(f"{number}\n" for number in numbers[:1]))


def write_nus_wide(
    folder: Path, labels: np.ndarray, *, images: str = "Flickr", flat: bool = False, prefix: str = "", skip: Sequence[int] = ()
) -> list[str]:
    """NUS-WIDE in small, with lists as they are published (DOS paths); image i is grey of value i, `skip` are missing."""
    names = [f"{FOLDERS[i % 2]}\\{i:04d}_{9000 + i}.jpg" for i in range(len(labels))]
    for part in ("ImageList", "Groundtruth/AllLabels", images):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageList" / "Imagelist.txt").write_text("".join(f"{prefix}{name}\r\n" for name in names), newline="")
    every = dict(zip(nus_wide.CONCEPTS, labels.T, strict=True)) | {"zebra": np.ones(len(labels), bool)}
    for concept, column in every.items():
        text = "".join(f"{int(label)}\r\n" for label in column)
        (folder / "Groundtruth" / "AllLabels" / f"Labels_{concept}.txt").write_text(text, newline="")
    for i, name in enumerate(names):
        if i not in skip:
            write_jpeg(folder / images / (name.split("\\")[1] if flat else name.replace("\\", "/")), i)
    return names


def nus_labels(n: int, seed: int = 0) -> np.ndarray:
    labels = np.random.default_rng(seed).random((n, 21)) < 0.15
    labels[::5] = False  # images with none of the 21 labels
    return labels


# Flickr25K


def test_concepts_are_those_of_the_literature() -> None:
    assert (len(flickr25k.CONCEPTS), len(set(flickr25k.CONCEPTS))) == (24, 24)
    assert (len(nus_wide.CONCEPTS), len(set(nus_wide.CONCEPTS))) == (21, 21)
    assert list(flickr25k.CONCEPTS) == sorted(flickr25k.CONCEPTS)
    assert list(nus_wide.CONCEPTS) == sorted(nus_wide.CONCEPTS)


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("mirflickr", "annotations"),
        ("images", "mirflickr25k_annotations_v080"),
        ("mirflickr", "mirflickr/annotations"),
        (".", "."),
    ],
)
def test_flickr25k(tmp_path: Path, images: str, annotations: str) -> None:
    ref = flickr_labels(30)
    ref[3] = False
    write_flickr25k(tmp_path, ref, images, annotations)
    comp = load_flickr25k(tmp_path)
    assert (comp.name, comp.n, comp.class_names) == ("flickr25k", 30, flickr25k.CONCEPTS)
    assert comp.labels is not None
    assert comp.labels.dtype == np.bool_
    np.testing.assert_array_equal(comp.labels, ref)
    assert [value_of(comp.image(i)) for i in range(30)] == list(range(1, 31))  # in the order of their numbers, not names


def test_flickr25k_fingerprint_follows_images_and_labels(tmp_path: Path) -> None:
    labels = flickr_labels(12)
    write_flickr25k(tmp_path / "a", labels)
    write_flickr25k(tmp_path / "b", labels)
    before = load_flickr25k(tmp_path / "a").fingerprint
    assert load_flickr25k(tmp_path / "b").fingerprint == before  # wherever it lies
    Image.new("RGB", (60, 60)).save(tmp_path / "b" / "mirflickr" / "im5.jpg")
    assert load_flickr25k(tmp_path / "b").fingerprint != before
    (tmp_path / "a" / "annotations" / "sky.txt").write_text("1\n")
    assert load_flickr25k(tmp_path / "a").fingerprint != before


@pytest.mark.parametrize("line", ["13", "0", "-1", "x", "1 2", "1.0", "1_1", "²", "+5"])
def test_flickr25k_refuses_lines_that_are_no_image(tmp_path: Path, line: str) -> None:
    write_flickr25k(tmp_path, flickr_labels(12))
    path = tmp_path / "annotations" / "sea.txt"
    path.write_text(f"3\n\n{line}\n4\n", encoding="utf-8")
    with pytest.raises(
        CorruptFileError, match=r"sea\.txt, line 3: expected the number of an image from 1 to 12, got "
    ) as error:
        load_flickr25k(tmp_path)
    assert repr(line) in str(error.value)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(CorruptFileError, match=r"sea\.txt can't be read as text"):
        load_flickr25k(tmp_path)


def test_flickr25k_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="no folder at"):
        load_flickr25k(tmp_path / "absent")
    with pytest.raises(InvalidParameterError, match=r"no images in .*: looked for mirflickr/im1\.jpg, "):
        load_flickr25k(tmp_path)
    write_flickr25k(tmp_path, flickr_labels(12))
    for i in (1, 7):
        (tmp_path / "mirflickr" / f"im{i + 1}.jpg").unlink()
    with pytest.raises(InvalidParameterError, match=r"lacks 2 of im1\.jpg … im12\.jpg: im2\.jpg, im8\.jpg"):
        load_flickr25k(tmp_path)
    for i in (1, 7):
        write_jpeg(tmp_path / "mirflickr" / f"im{i + 1}.jpg", 0)
    for name in ("animals", "tree"):
        (tmp_path / "annotations" / f"{name}.txt").unlink()
    with pytest.raises(InvalidParameterError, match=r"annotations lacks animals\.txt, tree\.txt"):
        load_flickr25k(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        path.unlink()
    with pytest.raises(InvalidParameterError, match=r"no annotations in .*: looked for annotations/animals\.txt"):
        load_flickr25k(tmp_path)


# NUS-WIDE


@pytest.mark.parametrize("options", [{}, {"flat": True, "images": "images"}, {"prefix": "C:\\ImageData\\Flickr\\"}])
def test_nus_wide(tmp_path: Path, options: dict[str, object]) -> None:
    ref = nus_labels(40)
    write_nus_wide(tmp_path, ref, **options)  # type: ignore[arg-type]
    comp = load_nus_wide(tmp_path)
    kept = np.flatnonzero(ref.any(axis=1))
    assert 0 < len(kept) < 40
    assert (comp.name, comp.n, comp.class_names) == ("nus-wide", len(kept), nus_wide.CONCEPTS)
    assert comp.labels is not None
    assert comp.labels.dtype == np.bool_
    np.testing.assert_array_equal(comp.labels, ref[kept])
    np.testing.assert_array_equal([value_of(comp.image(i)) for i in range(comp.n)], kept)


def test_nus_wide_leaves_out_what_is_not_on_disk(tmp_path: Path) -> None:
    ref = nus_labels(40)
    kept = np.flatnonzero(ref.any(axis=1))
    names = write_nus_wide(tmp_path, ref, skip=[*kept[[2, 9]], 0])  # image 0 has no label: no loss
    (tmp_path / "Flickr" / names[kept[12]].replace("\\", "/")).write_bytes(b"")  # a download that failed
    with pytest.warns(UserWarning, match=rf"3 of the {len(kept)} images .* are not in .*Flickr, such as ") as caught:
        comp = load_nus_wide(tmp_path)
    assert names[kept[2]] in str(caught[0].message)
    rest = np.delete(kept, [2, 9, 12])
    assert comp.labels is not None
    np.testing.assert_array_equal(comp.labels, ref[rest])
    np.testing.assert_array_equal([value_of(comp.image(i)) for i in range(comp.n)], rest)


def test_nus_wide_needs_images(tmp_path: Path) -> None:
    names = write_nus_wide(tmp_path, nus_labels(10), skip=range(10))
    with pytest.raises(InvalidParameterError, match=r"none of the 8 images .* is in .*Flickr, such as ") as error:
        load_nus_wide(tmp_path)
    assert names[1] in str(error.value)
    write_nus_wide(tmp_path, np.zeros((10, 21), bool))
    with pytest.raises(InvalidParameterError, match=r"none of the 0 images .* is in .*Flickr$"):
        load_nus_wide(tmp_path)


def test_nus_wide_fingerprint_follows_images_and_labels(tmp_path: Path) -> None:
    labels = nus_labels(12)
    for name in ("a", "b", "c"):
        write_nus_wide(tmp_path / name, labels)
    before = load_nus_wide(tmp_path / "a").fingerprint
    assert load_nus_wide(tmp_path / "b").fingerprint == before
    Image.new("RGB", (60, 60)).save(tmp_path / "b" / "Flickr" / "beach_ball" / "0001_9001.jpg")
    assert load_nus_wide(tmp_path / "b").fingerprint != before
    (tmp_path / "c" / "Groundtruth" / "AllLabels" / "Labels_sky.txt").write_text("1\n" * 12)
    assert load_nus_wide(tmp_path / "c").fingerprint != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n" * 11, r"Labels_sky\.txt has 11 labels, .*Imagelist\.txt has 12 images"),
        ("0\n" * 13, r"Labels_sky\.txt has 13 labels"),
        ("", r"Labels_sky\.txt has 1 labels"),
        ("0\n" * 4 + "-1130179\n" + "0\n" * 7, r"Labels_sky\.txt, line 5: expected 0 or 1, got '-1130179'"),
        ("0\n\n" + "0\n" * 10, r"Labels_sky\.txt, line 2: expected 0 or 1, got ''"),
        ("0 1\n" * 12, r"line 1: expected 0 or 1, got '0 1'"),
    ],
)
def test_nus_wide_refuses_wrong_labels(tmp_path: Path, text: str, message: str) -> None:
    write_nus_wide(tmp_path, nus_labels(12))
    (tmp_path / "Groundtruth" / "AllLabels" / "Labels_sky.txt").write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        load_nus_wide(tmp_path)


def test_nus_wide_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="no folder at"):
        load_nus_wide(tmp_path / "absent")
    with pytest.raises(InvalidParameterError, match=r"no list of images in .*: looked for ImageList/Imagelist\.txt, "):
        load_nus_wide(tmp_path)
    write_nus_wide(tmp_path, nus_labels(12))
    labels = tmp_path / "Groundtruth" / "AllLabels"
    for name in ("Labels_animal.txt", "Labels_sky.txt"):
        (labels / name).unlink()
    with pytest.raises(InvalidParameterError, match=r"AllLabels lacks Labels_animal\.txt, Labels_sky\.txt$"):
        load_nus_wide(tmp_path)
    (tmp_path / "ImageList" / "Imagelist.txt").write_text("a\\1.jpg\n\na\\2.jpg\n")
    with pytest.raises(CorruptFileError, match=r"Imagelist\.txt, line 2: expected the path of an image, got an empty line"):
        load_nus_wide(tmp_path)
    labels.rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidParameterError, match=r"no labels in .*: looked for Groundtruth/AllLabels, "):
        load_nus_wide(tmp_path)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_nus_wide(tmp_path, np.ones((2, 21), bool))
    (tmp_path / "Flickr" / "actor" / "0000_9000.jpg").write_bytes(b"<html>gone</html>")
    images = load_nus_wide(tmp_path)
    with pytest.raises(CorruptFileError, match=r"0000_9000\.jpg"):
        images.image(0)

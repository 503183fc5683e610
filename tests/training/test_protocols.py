from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from training import protocols
from training.data import ImageSet, from_arrays, load_images
from training.datasets import flickr25k, nus_wide
from training.protocols import PROTOCOLS, Protocol, load_protocol
from training.split import Split, split_protocol

SMALL: dict[str, dict[str, Any]] = {
    "cifar10-i": {"queries_per_class": 2},
    "cifar10-ii": {"queries_per_class": 2, "train_per_class": 3},
    "flickr25k": {"queries": 4, "train": 6},
    "nus-wide": {"queries_per_class": 2, "train_per_class": 3},
}


def write_classes(folder: Path, classes: int = 3, each: int = 6, parts: tuple[str, ...] = ("",)) -> None:
    for part in parts:
        for c in range(classes):
            (folder / part / f"class{c}").mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (4, 4), (c, i, 0)).save(folder / part / f"class{c}" / f"{i}.jpg")


def write_flickr25k(folder: Path, n: int = 20) -> np.ndarray:
    labels = np.random.default_rng(0).random((n, 24)) < 0.2
    (folder / "mirflickr").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for i in range(n):
        Image.new("L", (4, 4), i).save(folder / "mirflickr" / f"im{i + 1}.jpg")
    for name, column in zip(flickr25k.CONCEPTS, labels.T, strict=True):
        (folder / "annotations" / f"{name}.txt").write_text("".join(f"{i + 1}\n" for i in np.flatnonzero(column)))
    return labels


def write_nus_wide(folder: Path, n: int = 230) -> np.ndarray:
    labels = np.eye(21, dtype=bool)[np.arange(n) % 21] | (np.random.default_rng(0).random((n, 21)) < 0.1)
    for part in ("ImageList", "Groundtruth/AllLabels", "Flickr/zoo"):
        (folder / part).mkdir(parents=True)
    for i in range(n):
        Image.new("L", (4, 4), i).save(folder / "Flickr" / "zoo" / f"{i:04d}_{i}.jpg")
    (folder / "ImageList" / "Imagelist.txt").write_text("".join(f"zoo\\{i:04d}_{i}.jpg\n" for i in range(n)))
    for name, column in zip(nus_wide.CONCEPTS, labels.T, strict=True):
        (folder / "Groundtruth" / "AllLabels" / f"Labels_{name}.txt").write_text("\n".join(str(int(v)) for v in column))
    return labels


def labelled(labels: np.ndarray) -> ImageSet:
    return from_arrays("made", np.zeros((len(labels), 1, 1), np.uint8), labels)


def test_published_numbers() -> None:
    """The splits as the paper and its authors' code have them, on labels of the collections' real sizes."""
    assert PROTOCOLS == ("cifar10-i", "cifar10-ii", "flickr25k", "nus-wide")
    rng = np.random.default_rng(0)
    cifar = labelled(rng.permutation(np.repeat(np.arange(10), 6000)))
    one, two = load_protocol("cifar10-i", cifar), load_protocol("cifar10-ii", cifar)
    for found, train in ((one, 5000), (two, 500)):
        assert found.n == 1000
        for part, each in ((found.split.query, 1000), (found.split.train, train), (found.split.database, 5000)):
            np.testing.assert_array_equal(np.bincount(found.labels[part]), [each] * 10)
    np.testing.assert_array_equal(one.split.query, two.split.query)
    flickr = load_protocol("flickr25k", labelled(rng.random((25_000, 24)) < 0.1))
    assert [len(part) for part in (flickr.split.query, flickr.split.train, flickr.split.database)] == [2000, 5000, 23_000]
    assert flickr.n == 5000
    # As many images, and of each label about as many, as NUS-WIDE has: 0.026 of them show a mountain, 0.38 the sky.
    shares = np.geomspace(0.026, 0.38, 21)
    labels = rng.random((195_834, 21)) < shares
    labels[~labels.any(axis=1), 20] = True
    nus = load_protocol("nus-wide", labelled(labels))
    assert [len(part) for part in (nus.split.query, nus.split.train, nus.split.database)] == [2100, 10_500, 193_734]
    assert (nus.labels[nus.split.query].sum(axis=0) >= 100).all()
    assert (nus.labels[nus.split.train].sum(axis=0) >= 500).all()
    assert nus.n == 5000


def check(found: Protocol, name: str, n: int) -> None:
    split = found.split
    assert (found.name, found.images.n, found.n) == (name, n, 1000 if name.startswith("cifar") else 5000)
    np.testing.assert_array_equal(np.sort(np.r_[split.query, split.database]), np.arange(n))
    assert set(split.train) <= set(split.database)
    assert split.fingerprint == found.images.fingerprint


def test_cifar10_from_a_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "set")
    for name in ("cifar10-i", "cifar10-ii"):
        found = load_protocol(name, tmp_path / "set", seed=4, **SMALL[name])
        check(found, name, 18)
        ref = split_protocol(np.repeat(np.arange(3), 6), seed=4, **SMALL[name])
        for part in ("query", "train", "database"):
            np.testing.assert_array_equal(getattr(found.split, part), getattr(ref, part))
        assert found.split.seed == 4
    with pytest.raises(InvalidParameterError, match="class 'class0' has 6 items, the split needs 1500 of each class"):
        load_protocol("cifar10-ii", tmp_path / "set")


def test_cifar10_parts_are_merged(tmp_path: Path) -> None:
    write_classes(tmp_path / "set", parts=("train", "test"))
    check(load_protocol("cifar10-ii", str(tmp_path / "set"), **SMALL["cifar10-ii"]), "cifar10-ii", 36)
    check(load_protocol("cifar10-ii", tmp_path / "set" / "train", **SMALL["cifar10-ii"]), "cifar10-ii", 18)
    write_classes(tmp_path / "one", parts=("train",))
    check(load_protocol("cifar10-ii", tmp_path / "one", **SMALL["cifar10-ii"]), "cifar10-ii", 18)


class FakeCIFAR10:
    classes: ClassVar = ["cold", "warm"]
    roots: ClassVar[list[str]] = []

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        self.roots.append(root)
        self.targets = [0, 1] * (5 if train else 3)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (2, 2)), self.targets[i]


def test_cifar10_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    FakeCIFAR10.__name__ = "CIFAR10"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here" / "cifar-10-batches-py").mkdir(parents=True)
    usual = str(tmp_path / "cache" / "hyperfaiss" / "datasets")
    for data, root in (
        (None, usual),
        ("cifar10", usual),
        (tmp_path / "here", str(tmp_path / "here")),
        (tmp_path / "here" / "cifar-10-batches-py", str(tmp_path / "here")),
    ):
        FakeCIFAR10.roots.clear()
        check(load_protocol("cifar10-ii", data, **SMALL["cifar10-ii"]), "cifar10-ii", 16)
        assert FakeCIFAR10.roots == [root, root]


def test_flickr25k(tmp_path: Path) -> None:
    labels = write_flickr25k(tmp_path)
    found = load_protocol("flickr25k", tmp_path, seed=1, **SMALL["flickr25k"])
    check(found, "flickr25k", 20)
    assert (len(found.split.query), len(found.split.train)) == (4, 6)
    np.testing.assert_array_equal(found.labels, labels)
    with pytest.raises(InvalidParameterError, match="20 items are too few for 2000 queries and 5000 training items"):
        load_protocol("flickr25k", tmp_path)


def test_nus_wide(tmp_path: Path) -> None:
    labels = write_nus_wide(tmp_path)
    found = load_protocol("nus-wide", tmp_path, seed=1, **SMALL["nus-wide"])
    check(found, "nus-wide", 230)
    assert (len(found.split.query), len(found.split.train)) == (42, 63)
    np.testing.assert_array_equal(found.labels, labels)
    with pytest.raises(InvalidParameterError, match=r"class '[a-z]+' has \d+ items left, the split needs 600 of each class"):
        load_protocol("nus-wide", tmp_path)


@pytest.mark.parametrize("name", ["flickr25k", "nus-wide"])
def test_what_has_no_download_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        InvalidParameterError, match=rf"{name} can't be downloaded by itself: get .*https://.* or .*datasets/{name}"
    ):
        load_protocol(name)
    (write_flickr25k if name == "flickr25k" else write_nus_wide)(tmp_path / "hyperfaiss" / "datasets" / name)
    assert load_protocol(name, **SMALL[name]).images.name == name


def test_draws_repeat_and_differ_by_seed(tmp_path: Path) -> None:
    write_flickr25k(tmp_path / "f")
    write_nus_wide(tmp_path / "n")
    write_classes(tmp_path / "c")
    for name, folder in zip(PROTOCOLS, ("c", "c", "f", "n"), strict=True):
        one, again, other = (load_protocol(name, tmp_path / folder, seed=seed, **SMALL[name]) for seed in (0, 0, 1))
        np.testing.assert_array_equal(one.split.query, again.split.query)
        np.testing.assert_array_equal(one.split.train, again.split.train)
        assert (one.split.query != other.split.query).any()
        one.split.save(tmp_path / "split.json")
        np.testing.assert_array_equal(Split.load(tmp_path / "split.json", again.images).train, one.split.train)


def test_numbers_of_another_protocol(tmp_path: Path) -> None:
    for name, numbers, message in (
        ("cifar10-i", {"train_per_class": 3}, "cifar10-i takes queries_per_class, not train_per_class"),
        ("cifar10-ii", {"queries": 3}, "cifar10-ii takes queries_per_class and train_per_class, not queries"),
        (
            "flickr25k",
            {"queries_per_class": 3, "train_per_class": 1},
            "takes queries and train, not queries_per_class or train_per_",
        ),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            load_protocol(name, tmp_path, **numbers)
    write_classes(tmp_path / "set")
    for number in (0, -1):
        with pytest.raises(InvalidParameterError, match="at least 1"):
            load_protocol("cifar10-ii", tmp_path / "set", queries_per_class=1, train_per_class=number)


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="no protocol 'cifar10'; there are cifar10-i, "):
        load_protocol("cifar10")
    for name in PROTOCOLS:
        with pytest.raises(InvalidParameterError, match="no folder at"):
            load_protocol(name, tmp_path / "absent")
    (tmp_path / "plain").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "plain" / "0.png")
    with pytest.raises(InvalidParameterError, match="has no labels to judge retrieval with"):
        load_protocol("cifar10-ii", tmp_path / "plain")
    write_classes(tmp_path / "set", classes=1)
    with pytest.raises(InvalidParameterError, match=r"one class, .*'class0'"):
        load_protocol("cifar10-i", tmp_path / "set", queries_per_class=2)
    unlabelled = load_images(tmp_path / "plain")
    with pytest.raises(InvalidParameterError, match="has no labels"):
        _ = Protocol("flickr25k", unlabelled, Split(*[np.zeros(0, np.int64)] * 3), 5000).labels
    assert set(protocols._RULES) == set(PROTOCOLS)
    with pytest.raises(InvalidVectorsError, match="float64"):
        load_protocol("cifar10-ii", from_arrays("x", np.zeros((3, 2, 2), np.uint8), np.zeros(3)))

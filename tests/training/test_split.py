from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError, UnsupportedVersionError
from tests.training.toys import grey_images
from training.split import Split, checked_labels, random_split, split_protocol


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def assert_same(comp: Split, ref: Split) -> None:
    for name in ("query", "train", "database"):
        np.testing.assert_array_equal(getattr(comp, name), getattr(ref, name))
        assert getattr(comp, name).dtype == np.int64
    assert (comp.seed, comp.fingerprint) == (ref.seed, ref.fingerprint)


def random_labels(n: int, shares: tuple[float, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, len(shares))) < shares


# Labels


def test_labels_are_classes_or_a_column_each() -> None:
    classes = checked_labels(np.array([1, 0, 2], np.uint8), 3)
    assert (classes.dtype, classes.tolist()) == (np.int64, [1, 0, 2])
    several = checked_labels([[True, False], [False, False]], 2)
    assert (several.dtype, several.tolist()) == (np.bool_, [[True, False], [False, False]])


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, 1.0],
        [True, False],
        ["a", "b"],
        [0],
        [[0, 1], [1, 1]],
        np.zeros((2, 0), bool),
        np.zeros((3, 2), bool),
        np.zeros((2, 1, 1), bool),
    ],
)
def test_other_labels_are_refused(labels: Any) -> None:
    with pytest.raises(InvalidVectorsError, match=r"bool of shape \(2, L\) or integers of shape \(2,\), got "):
        checked_labels(labels, 2)


# Drawing


def test_protocol_ii() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), [30, 40, 50, 60]))
    split = split_protocol(labels, queries_per_class=5, train_per_class=7, seed=3)
    assert np.bincount(labels[split.query]).tolist() == [5] * 4
    assert np.bincount(labels[split.train]).tolist() == [7] * 4
    np.testing.assert_array_equal(split.database, np.setdiff1d(np.arange(180), split.query))
    assert set(split.train) <= set(split.database)
    for part in (split.query, split.train, split.database):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    again = split_protocol(labels, queries_per_class=5, train_per_class=7, seed=3)
    other = split_protocol(labels, queries_per_class=5, train_per_class=7, seed=4)
    np.testing.assert_array_equal(again.train, split.train)
    assert (other.query != split.query).any()


def test_protocol_i_trains_on_the_database() -> None:
    labels = np.repeat([3, 9], 10)
    split = split_protocol(labels, queries_per_class=2, train_per_class=None, seed=0)
    np.testing.assert_array_equal(split.train, split.database)
    assert (len(split.query), len(split.database)) == (4, 16)


@pytest.mark.parametrize(("sizes", "queries"), [((600, 1000), 100), ((30, 601), 5), ((4, 9), 1)])
def test_queries_are_a_sixth_of_the_smallest_class_at_most_100(sizes: tuple[int, ...], queries: int) -> None:
    split = split_protocol(np.repeat(np.arange(len(sizes)) * 7, sizes))
    assert len(split.query) == queries * len(sizes)
    np.testing.assert_array_equal(split.train, split.database)


def test_split_errors() -> None:
    with pytest.raises(InvalidParameterError, match="class 1 has 2 items, the split needs 3"):
        split_protocol([0, 0, 0, 1, 1], queries_per_class=1, train_per_class=2)
    with pytest.raises(InvalidParameterError, match="queries 0"):
        split_protocol([0, 0], queries_per_class=0, train_per_class=1)
    with pytest.raises(InvalidVectorsError, match="float64"):
        split_protocol([0.0, 1.0], queries_per_class=1, train_per_class=1)


def test_several_labels_draw_from_the_rarest_on() -> None:
    labels = random_labels(400, (0.6, 0.1, 0.3), seed=1)
    split = split_protocol(labels, queries_per_class=8, train_per_class=20, seed=5)
    assert (len(split.query), len(split.train), len(split.database)) == (24, 60, 376)
    np.testing.assert_array_equal(np.sort(np.r_[split.query, split.database]), np.arange(400))
    assert set(split.train) <= set(split.database)
    for part, each in ((split.query, 8), (split.train, 20)):  # each label has its own, whatever else they carry
        assert (labels[part].sum(axis=0) >= each).all()
        assert labels[part].any(axis=1).all()
    assert_same(split_protocol(labels, queries_per_class=8, train_per_class=20, seed=5), split)
    assert (split_protocol(labels, queries_per_class=8, train_per_class=20, seed=6).query != split.query).any()


def test_rare_labels_are_not_drawn_away() -> None:
    labels = np.zeros((30, 2), bool)
    labels[:, 0] = True  # everything has the first label, the last five the second one, too
    labels[25:, 1] = True
    for seed in range(20):
        split = split_protocol(labels, queries_per_class=2, train_per_class=3, seed=seed)
        assert labels[split.query, 1].sum() == 2
        assert labels[split.train, 1].sum() == 3


def test_several_labels_train_on_the_database() -> None:
    labels = random_labels(50, (0.5, 0.5))
    split = split_protocol(labels, queries_per_class=3)
    np.testing.assert_array_equal(split.train, split.database)
    assert len(split.query) == 6
    scarce = np.ones((3, 2), bool)  # a query of each label, and one image that is left
    assert len(split_protocol(scarce, queries_per_class=1).query) == 2
    assert len(split_protocol(labels).query) == 2 * (labels.sum(axis=0).min() // 6)


def test_too_few_with_a_label() -> None:
    labels = np.zeros((10, 2), bool)
    labels[:3] = True
    with pytest.raises(InvalidParameterError, match="class 'sea' has 1 items left, the split needs 2 of each class"):
        split_protocol(labels, queries_per_class=1, train_per_class=1, class_names=("sky", "sea"))
    with pytest.raises(InvalidParameterError, match="class 1 has 1 items left"):
        split_protocol(labels, queries_per_class=1, train_per_class=1)


def test_random_split() -> None:
    split = random_split(100, queries=20, train=30, seed=1)
    assert (len(split.query), len(split.train), len(split.database)) == (20, 30, 80)
    np.testing.assert_array_equal(np.sort(np.r_[split.query, split.database]), np.arange(100))
    assert set(split.train) <= set(split.database)
    assert_same(random_split(100, queries=20, train=30, seed=1), split)
    assert (random_split(100, queries=20, train=30, seed=2).query != split.query).any()
    everything = random_split(100, queries=99, train=None, seed=1)
    np.testing.assert_array_equal(everything.train, everything.database)
    with pytest.raises(InvalidParameterError, match="100 items are too few for 71 queries and 30"):
        random_split(100, queries=71, train=30)
    with pytest.raises(InvalidParameterError, match="too few for 100 queries and 1"):
        random_split(100, queries=100, train=None)
    for queries, train in ((0, 1), (1, 0)):
        with pytest.raises(InvalidParameterError, match="at least 1"):
            random_split(100, queries=queries, train=train)


# A split's promises and its file


@pytest.mark.parametrize(
    ("query", "train", "database", "message"),
    [
        (rows(1, 0), rows(2), rows(2, 3), "query must be ascending"),
        (rows(0), rows(2, 2), rows(2, 3), "train must be ascending"),
        (rows(-1), rows(2), rows(2, 3), "query must be ascending"),
        (rows(0), rows(2), rows(2, 3).astype(np.int32), "database must be .* int32"),
        (rows(0), rows(2), rows(2, 3)[None], "database must be"),
        (rows(0, 2), rows(3), rows(2, 3), "share"),
        (rows(0), rows(1), rows(2, 3), "train has rows"),
    ],
)
def test_rows_are_checked(query: Any, train: Any, database: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        Split(query, train, database)


@pytest.mark.parametrize(
    "split",
    [
        split_protocol(np.arange(90) % 3, queries_per_class=4, train_per_class=5, seed=7),
        split_protocol(np.arange(90) % 3, queries_per_class=4),
        replace(random_split(30, queries=5, train=9), fingerprint="abc"),
        Split(rows(2, 9), rows(4), rows(4, 7)),  # neither queries nor the database hold the others
        Split(rows(9), rows(0, 4), rows(0, 4)),
        Split(rows(), rows(), rows()),
    ],
    ids=["ii", "i", "random", "partial", "query last", "empty"],
)
def test_file_round_trip(tmp_path: Path, split: Split) -> None:
    split.save(tmp_path / "split.json")
    assert_same(Split.load(tmp_path / "split.json"), split)
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_file_is_small_and_plain(tmp_path: Path) -> None:
    split = split_protocol(np.arange(60_000) % 10, queries_per_class=1000)
    split.save(tmp_path / "split.json")
    assert (tmp_path / "split.json").stat().st_size < 80_000
    fields = json.loads((tmp_path / "split.json").read_text())
    assert fields["query"] == split.query.tolist()
    assert (fields["items"], fields["seed"], fields["train"], fields["database"]) == (60_000, 0, None, None)


def test_file_belongs_to_its_images(tmp_path: Path) -> None:
    images = grey_images(30)
    split = replace(random_split(30, queries=5, train=9), fingerprint=images.fingerprint)
    split.save(tmp_path / "split.json")
    assert_same(Split.load(tmp_path / "split.json", images), split)
    for others in (grey_images(30, seed=1), images.subset(np.arange(29, -1, -1))):
        with pytest.raises(InvalidParameterError, match=r"split\.json splits 30 images with fingerprint .* 'grey' has 30 with"):
            Split.load(tmp_path / "split.json", others)
    replace(split, fingerprint=None).save(tmp_path / "unknown.json")
    assert Split.load(tmp_path / "unknown.json", grey_images(30, seed=1)).fingerprint is None
    with pytest.raises(InvalidParameterError, match="splits 30 images"):
        Split.load(tmp_path / "unknown.json", images.subset(np.arange(20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 10**12}, "items must be .* got 1000000000000"),
        ({"items": "30"}, "items must be"),
        ({"items": -1}, "items must be"),
        ({"items": 3}, "query must be a list of row numbers from 0 to 2"),
        ({"query": [1, 2.5]}, "query must be"),
        ({"query": {"a": 1}}, "query must be"),
        ({"query": [-1, 2]}, "query must be"),
        ({"query": [5, 4]}, "query must be ascending"),
        ({"query": [True]}, "query must be"),
        ({"train": [0, 99]}, "train must be"),
        ({"query": [1], "train": [1]}, "train has rows"),
        ({"database": [0, 1, 2, 3]}, "share|lacks"),
        ({"seed": "x"}, "seed must be"),
        ({"images": 3}, "seed must be an integer and images a string"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "split.json"
    random_split(30, queries=5, train=9).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFileError, match=message) as error:
        Split.load(path)
    assert str(path) in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    with pytest.raises(InvalidParameterError, match="no file at"):
        Split.load(path)
    random_split(30, queries=5, train=9).save(path)
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match="is not JSON"):
            Split.load(path)
    for content in (b"[]", b"3", b'{"format": 1}'):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match="is not a split"):
            Split.load(path)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(UnsupportedVersionError, match="format 2, this version reads 1"):
        Split.load(path)

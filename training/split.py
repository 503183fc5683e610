"""Labels of a collection, and the split that retrieval is judged on: queries, a database, training items."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError, UnsupportedVersionError
from hyperfaiss.io import atomic_path

if TYPE_CHECKING:
    from training.data import ImageSet

__all__ = ["Labels", "Rows", "Split", "checked_labels", "random_split", "split_protocol"]

Labels = npt.NDArray[np.int64] | npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

_FORMAT = 1
_MAX_ITEMS = 10**8  # what a split file may claim before anything is allocated
_QUERIES_PER_CLASS = 100


def checked_labels(labels: Any, n: int) -> Labels:
    """Labels of n items: integers (n,), the class of each, as int64; or bool (n, L), which of L labels each has.

    Two items are relevant to each other if they have the same class, or share a label.
    Raises InvalidVectorsError for another shape or dtype.
    """
    y = np.asarray(labels)
    if y.shape == (n,) and y.dtype.kind in "iu":
        return y.astype(np.int64)
    if y.ndim == 2 and len(y) == n and y.shape[1] and y.dtype == np.bool_:
        return y
    raise InvalidVectorsError(
        f"labels must be bool of shape ({n}, L) or integers of shape ({n},), got {y.dtype} of shape {y.shape}"
    )


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers, each sorted ascending, int64. Queries are in neither of the others; train lies within database.

    Attributes:
        query, train, database: row numbers.
        seed: what they were drawn with, if they were.
        fingerprint: of the ImageSet that they number, if it is known.

    Raises:
        InvalidParameterError: row numbers that are not as above.
    """

    query: Rows
    train: Rows
    database: Rows
    seed: int | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for name in ("query", "train", "database"):
            rows = getattr(self, name)
            if rows.ndim != 1 or rows.dtype != np.int64 or (rows[:1] < 0).any() or (np.diff(rows) <= 0).any():
                raise InvalidParameterError(f"{name} must be ascending row numbers, int64, got {rows.dtype} {rows[:5]} …")
        if np.isin(self.query, self.database, assume_unique=True).any():
            raise InvalidParameterError("query and database share rows")
        if not np.isin(self.train, self.database, assume_unique=True).all():
            raise InvalidParameterError("train has rows that database lacks")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file; ``null`` stands for a database of all rows but the queries, and for training on all of it."""
        items = 1 + max(int(rows.max(initial=-1)) for rows in (self.query, self.database))
        fields = {
            "format": _FORMAT,
            "seed": self.seed,
            "images": self.fingerprint,
            "items": items,
            "query": self.query.tolist(),
            "train": None if np.array_equal(self.train, self.database) else self.train.tolist(),
            "database": None if len(self.query) + len(self.database) == items else self.database.tolist(),
        }
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        with atomic_path(path) as temporary:
            temporary.write_text(f"{{\n{lines}\n}}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], images: ImageSet | None = None) -> Split:
        """What :meth:`save` wrote; of these ``images``, if given.

        Raises:
            InvalidParameterError: no such file, or a split of other images.
            CorruptFileError, UnsupportedVersionError: not a split file, or a newer one.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError as e:
            raise InvalidParameterError(f"no file at {path}") from e
        except (ValueError, RecursionError) as e:
            raise CorruptFileError(f"{path} is not JSON: {e}") from e
        if not isinstance(fields, dict) or not {"format", "items", "query", "train", "database"} <= set(fields):
            raise CorruptFileError(f"{path} is not a split: expected an object with format, items, query, train and database")
        if fields["format"] != _FORMAT:
            raise UnsupportedVersionError(f"{path} has format {fields['format']!r}, this version reads {_FORMAT}")
        items, seed, fingerprint = fields["items"], fields.get("seed"), fields.get("images")
        if type(items) is not int or not 0 <= items <= _MAX_ITEMS:
            raise CorruptFileError(f"{path}: items must be a number of images up to {_MAX_ITEMS:,}, got {items!r}")
        if not isinstance(seed, int | None) or not isinstance(fingerprint, str | None):
            raise CorruptFileError(f"{path}: seed must be an integer and images a string, got {seed!r} and {fingerprint!r}")
        query = _rows(path, "query", fields["query"], items)
        rest = np.setdiff1d(np.arange(items, dtype=np.int64), query, assume_unique=True)
        database = rest if fields["database"] is None else _rows(path, "database", fields["database"], items)
        train = database if fields["train"] is None else _rows(path, "train", fields["train"], items)
        try:
            split = cls(query, train, database, seed, fingerprint)
        except InvalidParameterError as e:
            raise CorruptFileError(f"{path}: {e}") from e
        if images is not None and (items > images.n or (fingerprint is not None and fingerprint != images.fingerprint)):
            raise InvalidParameterError(
                f"{path} splits {items:,} images with fingerprint {fingerprint}; {images.name!r} has {images.n:,} with "
                f"{images.fingerprint}: other images, labels or file times, or another order"
            )
        return split


def _rows(path: Path, name: str, values: Any, items: int) -> Rows:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < items for v in values):
        raise CorruptFileError(f"{path}: {name} must be a list of row numbers from 0 to {items - 1}")
    return np.array(values, dtype=np.int64)


def split_protocol(
    labels: npt.ArrayLike,
    *,
    queries_per_class: int | None = None,
    train_per_class: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> Split:
    """Draw queries and training items class by class; every item that is not a query is the database.

    The paper's protocol I is train_per_class = None (all the database trains), its protocol II a number of training
    items a class, which stay in the database. Of several labels an item counts for the one that it was drawn for: the
    rarest label draws first, from items that none has drawn. Same labels, numbers and seed: same split.

    Args:
        labels: (n,) integers, or (n, L) bool.
        queries_per_class: at least 1; None for a sixth of the smallest class, but at most 100.
        train_per_class: at least 1; None for all.
        class_names: for messages.

    Raises:
        InvalidVectorsError: labels of another shape or dtype.
        InvalidParameterError: a number below 1, or a class with fewer items than asked for.
    """
    y = checked_labels(labels, len(np.asarray(labels)))
    if y.ndim == 2:
        sizes = y.sum(axis=0)
        classes = np.argsort(sizes, kind="stable")
    else:
        classes, sizes = np.unique(y, return_counts=True)
    if queries_per_class is None:
        queries_per_class = max(1, min(_QUERIES_PER_CLASS, int(sizes.min(initial=len(y))) // 6))
    if queries_per_class < 1 or (train_per_class is not None and train_per_class < 1):
        raise InvalidParameterError(f"need at least 1 a class: queries {queries_per_class}, training {train_per_class}")
    needed = queries_per_class + (train_per_class or 1)
    rng = np.random.default_rng(seed)
    query, train = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    free = np.ones(len(y), bool)
    for c in classes:
        members = rng.permutation(np.flatnonzero((y[:, c] if y.ndim == 2 else y == c) & free))
        if len(members) < needed:
            name = repr(class_names[c]) if 0 <= c < len(class_names) else c
            left = " left" if y.ndim == 2 else ""
            raise InvalidParameterError(f"class {name} has {len(members)} items{left}, the split needs {needed} of each class")
        drawn = members[: queries_per_class + (train_per_class or 0)]
        free[drawn] = False
        query.append(drawn[:queries_per_class])
        train.append(drawn[queries_per_class:])
    return _split(len(y), np.concatenate(query), np.concatenate(train) if train_per_class else None, seed)


def random_split(n: int, *, queries: int, train: int | None, seed: int = 0) -> Split:
    """Draw so many queries of n items, and so many training items of the others (None: all), which are the database.

    Raises InvalidParameterError for a number below 1, or too few items.
    """
    if queries < 1 or (train is not None and train < 1):
        raise InvalidParameterError(f"need at least 1 each, got {queries} queries and {train} training items")
    if n < queries + (train or 1):
        raise InvalidParameterError(f"{n} items are too few for {queries} queries and {train or 1} training items")
    order = np.random.default_rng(seed).permutation(n)
    return _split(n, order[:queries], None if train is None else order[queries:][:train], seed)


def _split(n: int, query: Rows, train: Rows | None, seed: int) -> Split:
    queries = np.sort(query)
    database = np.setdiff1d(np.arange(n, dtype=np.int64), queries, assume_unique=True)
    return Split(queries, database if train is None else np.sort(train), database, seed)

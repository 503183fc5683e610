"""How good ranked lists are: one definition of relevance, precision, average precision and recall, for all that measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidVectorsError

__all__ = ["Relevance", "precision_and_ap", "recall"]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# Rows of labels that are packed, and entries of queries × distinct sets of labels that are compared, at a time.
_ROWS, _PAIRS = 1 << 16, 1 << 22


def precision_and_ap(relevant: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Precision and average precision within the first n = 1 … N of ranked lists.

    ``relevant`` (nq, N) bool; both results are (nq, N) float64, column n − 1 is for length n.
    AP within n = ``Σᵢ precision(i)·rel(i) / (hits within n)``, 0 without hits.
    """
    hits = relevant.cumsum(axis=1, dtype=np.int64)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    return precision, (precision * relevant).cumsum(axis=1) / np.maximum(hits, 1)


def recall(I: npt.ArrayLike, true: npt.ArrayLike) -> FloatArray:  # noqa: E741
    """Share (nq,) of each query's true neighbours ``true`` (nq, n) that are among its results I (nq, k), in any order.

    −1 is nobody on either side, and an id that comes twice counts once; a query without true neighbours has 0.
    """
    found, wanted = np.asarray(I), np.asarray(true)
    if found.ndim != 2 or wanted.ndim != 2 or len(found) != len(wanted):
        raise InvalidVectorsError(f"need I (nq, k) and true (nq, n), got {found.shape} and {wanted.shape}")
    # One number for (row, id), so that one call compares all rows.
    ids, numbers = np.unique(np.concatenate([found, wanted], axis=1), return_inverse=True)
    keys = numbers.reshape(len(found), found.shape[1] + wanted.shape[1]).astype(np.int64) + np.arange(len(found))[
        :, None
    ] * len(ids)
    left, right = np.unique(keys[:, : found.shape[1]]), np.unique(keys[:, found.shape[1] :][wanted >= 0])
    both = np.intersect1d(left, right, assume_unique=True)
    common, there = (np.bincount(part // max(len(ids), 1), minlength=len(found)) for part in (both, right))
    shares: FloatArray = common / np.maximum(there, 1)
    return shares


class Relevance:
    """Which vectors of a database are relevant to which queries: those that have the query's label, or share one with it.

    Labels are (n,), one of each vector, integers or strings; or bool (n, L), which of L labels a vector has (several, or none).
    Both sides are of one kind. InvalidVectorsError says what did not fit. Of bool labels 8 bytes a vector are kept for each 64
    labels; other labels are kept as they are, and may be mapped from a file.
    """

    def __init__(self, query_labels: npt.ArrayLike, database_labels: npt.ArrayLike) -> None:
        queries, database = np.asarray(query_labels), np.asarray(database_labels)
        kinds = _kind(queries), _kind(database)
        if "" in kinds or kinds[0] != kinds[1] or (kinds[0] == "sets" and queries.shape[1] != database.shape[1]):
            raise InvalidVectorsError(
                "labels must be integers or strings (n,) or bool (n, L), alike for queries and database, got "
                f"{queries.dtype} of shape {queries.shape} and {database.dtype} of shape {database.shape}"
            )
        self.nq, self.n = len(queries), len(database)
        self._sets = kinds[0] == "sets"
        self._queries = _packed(queries) if self._sets else queries
        self._database = _packed(database) if self._sets else database

    def of(self, I: npt.ArrayLike, first: int = 0) -> BoolArray:  # noqa: E741
        """Whether the results I (b, N), rows of the database, of queries ``first`` to ``first + b − 1`` are relevant: (b, N).

        −1, no result, is not relevant.
        """
        found = np.asarray(I)
        if found.ndim != 2 or found.dtype.kind not in "iu" or not 0 <= first <= first + len(found) <= self.nq:
            raise InvalidVectorsError(
                f"need integers (b, N) for queries {first} on, got {found.dtype} of shape {found.shape} for {self.nq} queries"
            )
        if found.size and not -1 <= found.min() <= found.max() < self.n:
            raise InvalidVectorsError(f"results {found.min()} to {found.max()} for a database of {self.n}")
        if not self.n:
            return np.zeros(found.shape, np.bool_)
        wanted = self._queries[first : first + len(found)]
        if not self._sets:
            same: BoolArray = (self._database[found] == wanted[:, None]) & (found >= 0)
            return same
        shared = np.zeros(found.shape, np.bool_)
        for word in range(wanted.shape[1]):
            shared |= (self._database[found, word] & wanted[:, word, None]) != 0
        return shared & (found >= 0)

    def totals(self) -> IntArray:
        """Number (nq,) of vectors in the database that are relevant to each query."""
        totals = np.zeros(self.nq, np.int64)
        if not self.n:
            return totals
        single = not self._sets or self._database.shape[1] == 1  # sorting rows is slow
        kinds, counts = np.unique(self._database, axis=None if single else 0, return_counts=True)
        if not self._sets:
            place = np.minimum(np.searchsorted(kinds, self._queries), len(kinds) - 1)
            totals[:] = np.where(kinds[place] == self._queries, counts[place], 0)
            return totals
        kinds = kinds.reshape(len(kinds), -1)
        step = max(1, _PAIRS // len(kinds))
        for start in range(0, self.nq, step):
            shared = np.zeros((len(self._queries[start : start + step]), len(kinds)), np.bool_)
            for word in range(kinds.shape[1]):
                shared |= (self._queries[start : start + step, word, None] & kinds[:, word]) != 0
            totals[start : start + step] = shared @ counts
        return totals


def _kind(labels: npt.NDArray[Any]) -> str:
    if labels.ndim == 2 and labels.dtype == np.bool_ and labels.shape[1]:
        return "sets"
    if labels.ndim != 1:
        return ""
    if labels.dtype.kind in "iub" or not labels.size:  # [] is float64 for NumPy
        return "numbers"
    return "strings" if labels.dtype.kind in "US" else ""


def _packed(labels: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Sets of labels (n, L) bool as bits of words (n, ceil(L / 64))."""
    n, L = labels.shape
    padded = np.zeros((n, -(-L // 64) * 8), np.uint8)
    for start in range(0, n, _ROWS):
        padded[start : start + _ROWS, : -(-L // 8)] = np.packbits(labels[start : start + _ROWS], axis=1)
    return padded.view(np.uint64)

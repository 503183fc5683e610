"""How good codes are: mean average precision and speed, measured through an index's own search."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hyperfaiss import HyperbolicPQIndex, Model
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.metrics import precision_and_ap

__all__ = ["Evaluation", "Searchable", "average_precision", "evaluate_index", "evaluate_model", "mean_average_precision"]


class Searchable(Protocol):
    """An index of faiss or of hyperfaiss."""

    @property
    def ntotal(self) -> int: ...

    def search(self, x: Any, k: int) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Evaluation:
    """What a search over labelled data gave.

    map_at_n : mean average precision within the first n results, 0 to 1.
    n : length of the result lists.
    queries_per_second : of one search over all queries, the median of several.
    queries, database : how many of each.
    """

    map_at_n: float
    n: int
    queries_per_second: float
    queries: int
    database: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def average_precision(relevant: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """AP of ranked lists: ``relevant`` (nq, N) bool to (nq,), see ``hyperfaiss.metrics``."""
    return precision_and_ap(relevant)[1][:, -1]


def mean_average_precision(
    I: npt.NDArray[np.int64],  # noqa: E741
    query_labels: npt.ArrayLike,
    database_labels: npt.ArrayLike,
    N: int | None = None,
) -> float:
    """MAP@N of result lists I (nq, >= N) of positions in the database; −1 (no result) counts as not relevant.

    A result is relevant if it has the query's label: ``query_labels`` (nq,), ``database_labels`` (n,).
    Raises InvalidVectorsError when lists and labels do not fit each other.
    """
    lists, wanted, labels = np.asarray(I), np.asarray(query_labels), np.asarray(database_labels)
    N = lists.shape[-1] if N is None else N
    if lists.ndim != 2 or not 1 <= N <= lists.shape[1] or wanted.shape != lists.shape[:1] or labels.ndim != 1:
        raise InvalidVectorsError(
            f"need I (nq, >= N), query_labels (nq,) and database_labels (n,), got {lists.shape}, {wanted.shape} and "
            f"{labels.shape} with N = {N}"
        )
    if lists.size and not -1 <= lists.min() <= lists.max() < len(labels):
        raise InvalidVectorsError(f"results {lists.min()} to {lists.max()} for a database of {len(labels)}")
    total = 0.0
    for start in range(0, len(lists), 1024):  # bounds the (queries, N) temporaries
        rows = slice(start, start + 1024)
        found = lists[rows, :N]
        total += average_precision((labels[found] == wanted[rows, None]) & (found >= 0)).sum()
    return total / max(len(lists), 1)


def evaluate_index(
    index: Searchable,
    queries: npt.NDArray[np.float32],
    query_labels: npt.ArrayLike,
    database_labels: npt.ArrayLike,
    N: int,
    *,
    repeats: int = 3,
) -> Evaluation:
    """MAP@N and speed of an index that holds the database already.

    N is cut to the size of the database. One search warms up (and gives the MAP), ``repeats`` are timed.
    Raises InvalidParameterError for an empty index or N, repeats < 1.
    """
    if index.ntotal < 1 or N < 1 or repeats < 1:
        raise InvalidParameterError(
            f"need a filled index, N >= 1 and repeats >= 1, got ntotal = {index.ntotal}, N = {N}, repeats = {repeats}"
        )
    N = min(N, index.ntotal)
    _, I = index.search(queries, N)  # noqa: E741
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        index.search(queries, N)
        seconds.append(time.perf_counter() - start)
    return Evaluation(
        map_at_n=mean_average_precision(I, query_labels, database_labels),
        n=N,
        queries_per_second=len(queries) / statistics.median(seconds),
        queries=len(queries),
        database=index.ntotal,
    )


def evaluate_model(
    model: Model,
    database: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    database_labels: npt.ArrayLike,
    query_labels: npt.ArrayLike,
    N: int,
    *,
    repeats: int = 3,
) -> Evaluation:
    """:func:`evaluate_index` of a new index of the model over ``database``; both matrices hold raw backbone features."""
    index = HyperbolicPQIndex.from_model(model)
    index.add(database)
    return evaluate_index(index, queries, query_labels, database_labels, N, repeats=repeats)

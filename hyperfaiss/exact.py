"""Exact search over the vectors themselves, by a codec's own distance: the order that codes approximate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .checks import MAX_ID, FloatArray, IntArray, as_integer, as_vectors
from .codec import _METRICS, HyperbolicProductQuantizer
from .kernels import exact as heaps
from .kernels import tables as kernels
from .kernels.runtime import run_tasks
from .model import Projector
from .progress import track

__all__ = ["exact_search"]

# Vectors that are compared at a time, at first and at last. Until a query has k, and by then a limit, all of them are
# computed; so the first parts are small.
_FIRST, _MOST = 1024, 65536
# Queries of a task.
_QUERIES = 16


def exact_search(
    codec: HyperbolicProductQuantizer,
    xb: npt.ArrayLike,
    xq: npt.ArrayLike,
    k: int,
    *,
    projector: Projector | None = None,
    verbose: bool = False,
) -> tuple[FloatArray, IntArray]:
    """The k nearest of the vectors ``xb`` (n, d) to each query ``xq`` (nq, d), compared as they are, without codes.

    The distance is the codec's: its metric on the product of its manifolds, clipping included, computed as its distance tables
    are. What an index of the same vectors finds differs by quantisation alone. No matrix of distances exists: beside D and I
    the search takes what 65,536 vectors take a few times over, and some MB a thread, whatever n and nq are; ``xb`` may be
    mapped from a file.

    Parameters
    ----------
    projector : makes the tangent vectors out of both; None: they are tangent vectors.
    verbose : show progress.

    Returns D (nq, k) float32 and I (nq, k) int64, rows of xb, sorted by (distance, row); missing ones are +inf and −1.
    """
    k = as_integer(k, "k", 1)
    d = codec.d if projector is None else projector.d_in
    mapped = isinstance(xb, np.memmap) and xb.ndim == 2  # looked at part by part
    base: npt.NDArray[np.generic] = xb if mapped else as_vectors(xb, d, "xb")  # type: ignore[assignment]
    n = len(base)

    def points(x: npt.ArrayLike, name: str, first: int = 0) -> FloatArray:
        vectors = as_vectors(x, d, name)
        return codec._points(vectors if projector is None else projector.transform(vectors), first)

    queries = points(xq, "xq")
    nq, keep = len(queries), min(k, n)
    D, I = np.full((nq, k), np.inf, np.float32), np.full((nq, k), -1, np.int64)  # noqa: E741
    if not nq or not n:
        return D, I
    heap_D, heap_I = np.full((nq, keep), np.inf, np.float32), np.full((nq, keep), MAX_ID + 1)
    chunks = [slice(i, min(i + _QUERIES, nq)) for i in range(0, nq, _QUERIES)]
    for start, stop in track(_parts(n), "exact search", verbose):
        part = _Part(codec, points(base[start:stop], f"xb[{start}:{stop}]", start), start)

        def visit(rows: slice, part: _Part = part) -> Iterator[None]:
            candidates = part.candidates(queries[rows], heap_D[rows, 0])
            yield
            for q, chosen in zip(range(rows.start, rows.stop), candidates, strict=True):
                part.compare(queries[q : q + 1], np.flatnonzero(chosen), heap_D[q], heap_I[q])
                yield

        run_tasks(visit, chunks)
    heaps.sort_heaps(heap_D, heap_I)
    D[:, :keep], I[:, :keep] = heap_D, heap_I
    return D, I


def _parts(n: int) -> list[tuple[int, int]]:
    """From 0 to n in parts that double."""
    bounds = [0]
    while bounds[-1] < n:
        bounds.append(min(n, bounds[-1] + max(_FIRST, min(bounds[-1], _MOST))))
    return list(zip(bounds, bounds[1:], strict=False))


class _Part:
    """Some vectors of the database, as points (n, M, dsub); the first of them is number ``first``."""

    def __init__(self, codec: HyperbolicProductQuantizer, points: FloatArray, first: int) -> None:
        self._codec, self._points, self._first = codec, points, first
        self._transposed, norms, _ = self._prepared(points)
        with np.errstate(over="ignore"):  # of what is that far out, no bound says anything
            self._heights = norms[:, 2].astype(np.float32)

    def candidates(self, queries: FloatArray, limits: FloatArray) -> npt.NDArray[np.bool_]:
        """Which vectors could be nearer than ``limits`` (nq,) to the queries (nq, M, dsub): (nq, n)."""
        found = np.ones((len(queries), len(self._points)), np.bool_)
        if self._codec.metric != "inner_product":
            is_geodesic = self._codec.metric == "geodesic"
            curvatures = self._codec.curvatures
            heaps.find_candidates(queries, self._transposed, self._heights, curvatures, is_geodesic, limits, found)
        return found

    def compare(self, query: FloatArray, rows: IntArray, D: FloatArray, I: IntArray) -> None:  # noqa: E741
        """Let vectors ``rows`` into the heap of a query (1, M, dsub)."""
        if not len(rows):
            return
        table = np.empty((1, self._codec.M, len(rows)), np.float32)
        prepared = self._prepared(self._points[rows])
        kernels.distance_tables(query, *prepared, self._codec.curvatures, _METRICS[self._codec.metric], table)
        heaps.keep_nearest(table[0], self._first + rows, D, I)

    def _prepared(self, points: FloatArray) -> kernels.Prepared:
        """Points in the place of codewords."""
        return kernels.prepare(points.swapaxes(0, 1), self._codec.curvatures)

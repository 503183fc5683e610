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

# Vectors that are mapped at a time, and vectors whose distances to a query are computed at a time: these stay in the cache.
_ROWS, _LANES = 8192, 1024
# Bytes of distances that one task holds at a time.
_TABLE_BYTES = 2 << 20


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
    the search takes 2 MB a thread and what 8,192 vectors take, whatever n and nq are; ``xb`` may be mapped from a file.

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
    most = max(1, _TABLE_BYTES // (4 * codec.M * _LANES))
    chunks = [slice(i, min(i + most, nq)) for i in range(0, nq, most)]
    for start in track(range(0, n, _ROWS), "exact search", verbose):
        part = points(base[start : start + _ROWS], f"xb[{start}:{start + _ROWS}]", start)
        blocks = [(start + i, len(part[i : i + _LANES]), _prepared(codec, part[i : i + _LANES]))
                  for i in range(0, len(part), _LANES)]  # fmt: skip

        def visit(rows: slice, blocks: list[tuple[int, int, kernels.Prepared]] = blocks) -> Iterator[None]:
            tables = np.empty((rows.stop - rows.start, codec.M, _LANES), np.float32)
            for first, count, prepared in blocks:
                kernels.distance_tables(queries[rows], *prepared, codec.curvatures, _METRICS[codec.metric], tables)
                heaps.keep_nearest(tables, count, first, heap_D[rows], heap_I[rows])
                yield

        run_tasks(visit, chunks)
    heaps.sort_heaps(heap_D, heap_I)
    D[:, :keep], I[:, :keep] = heap_D, heap_I
    return D, I


def _prepared(codec: HyperbolicProductQuantizer, points: FloatArray) -> kernels.Prepared:
    """Points (n, M, dsub) in the place of codebooks (M, _LANES, dsub), the last ones filled up with the origin."""
    books = np.zeros((codec.M, _LANES, codec.dsub), np.float32)
    books[:, : len(points)] = points.swapaxes(0, 1)
    return kernels.prepare(books, codec.curvatures)

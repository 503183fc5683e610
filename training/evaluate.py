"""How good codes are, measured through an index's own search: against labels, and against the order of the vectors themselves.

Whatever the size of the database, no matrix of all distances is made: lists of results are judged some queries at a time, and
the order of the unquantised vectors is that of ``hyperfaiss.exact.exact_search``. None of this needs torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, Model, lorentz
from hyperfaiss.base import BaseIndex
from hyperfaiss.checks import as_vectors
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.exact import exact_search
from hyperfaiss.metrics import Relevance, precision_and_ap, recall
from hyperfaiss.model import Projector

__all__ = [
    "Curve", "Evaluation", "Searchable", "Subspace", "average_precision", "evaluate_index", "evaluate_model",
    "mean_average_precision", "order_recall", "subspace_statistics",
]  # fmt: skip

FloatArray = npt.NDArray[np.float32]

# Results that are judged at a time, and vectors that are compared with their codewords at a time: what bounds the memory.
_RESULTS, _ROWS = 1 << 21, 8192
# Points of a precision-recall curve that are kept, half of them evenly spaced, half of them denser where the ranks are small.
_POINTS = 400


class Searchable(Protocol):
    """An index of faiss or of hyperfaiss."""

    @property
    def ntotal(self) -> int: ...

    def search(self, x: Any, k: int) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Curve:
    """Precision and recall within the first ``ranks`` results, means over the queries that something is relevant to.

    ranks : ascending; up to 200 all of them, further on some.
    precision, recall : of each rank, 0 to 1. The recall is the share of all relevant vectors of the database.
    queries : how many queries are in the means; all means are 0 where there are none.
    """

    ranks: tuple[int, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    queries: int


@dataclass(frozen=True)
class Subspace:
    """What a codebook does with vectors.

    ksub, used : codewords, and how many of them code a vector.
    entropy : of the codes, in bits: log2(ksub) when all are used alike. perplexity : 2**entropy, the codewords used in effect.
    squared_error : mean squared Lorentzian distance of the points to their codewords.
    geodesic_error : mean geodesic distance of the points to their codewords.
    spread : mean squared Lorentzian distance of the points to their midpoint: the error that a single codeword would have.
    relative_error : squared_error / spread, 0 where all points are one.
    """

    ksub: int
    used: int
    entropy: float
    perplexity: float
    squared_error: float
    geodesic_error: float
    spread: float
    relative_error: float


@dataclass(frozen=True)
class Evaluation:
    """What a search over labelled data gave.

    map_at_n : mean average precision within the first n results, 0 to 1.
    n : length of the result lists.
    queries_per_second : of one search over all queries for n results, the median of several.
    queries, database : how many of each.
    precision : P@k by k, the share of the first k results that is relevant.
    curve : precision against recall.
    recall : recall@k by k, the share of the k nearest by the order of the unquantised vectors that are among the first k
        results; empty where that order was not asked for. recall_queries : of how many queries.
    subspaces : codeword usage and quantisation errors of each subspace, likewise.
    """

    map_at_n: float
    n: int
    queries_per_second: float
    queries: int
    database: int
    precision: dict[int, float] = field(default_factory=dict)
    curve: Curve | None = None
    recall: dict[int, float] = field(default_factory=dict)
    recall_queries: int = 0
    subspaces: tuple[Subspace, ...] = ()

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

    Labels are (n,), or bool (n, L) for several of each: see ``hyperfaiss.metrics.Relevance``.
    Raises InvalidVectorsError when lists and labels do not fit each other.
    """
    lists, relevance = np.asarray(I), Relevance(query_labels, database_labels)
    N = lists.shape[-1] if N is None else N
    if lists.ndim != 2 or not 1 <= N <= lists.shape[1] or len(lists) != relevance.nq:
        raise InvalidVectorsError(f"need I (nq, >= N) and labels of nq queries, got {lists.shape}, N = {N}, {relevance.nq}")
    total, step = 0.0, max(1, _RESULTS // N)
    for start in range(0, len(lists), step):
        total += average_precision(relevance.of(lists[start : start + step, :N], start)).sum()
    return total / max(len(lists), 1)


def evaluate_index(
    index: Searchable,
    queries: FloatArray,
    query_labels: npt.ArrayLike,
    database_labels: npt.ArrayLike,
    N: int,
    *,
    repeats: int = 3,
    at: Sequence[int] = (1, 10, 100),
    depth: int | None = None,
    vectors: FloatArray | None = None,
    recall_queries: int = 1000,
    verbose: bool = False,
) -> Evaluation:
    """MAP@N, precision and speed of an index that holds the database already, under the ids 0 … n − 1.

    Parameters
    ----------
    query_labels, database_labels : (n,), or bool (n, L) for several of each: see ``hyperfaiss.metrics.Relevance``.
    N : cut to the size of the database.
    repeats : searches for N results that are timed.
    at : the k of P@k and of recall@k; those beyond the database are left out.
    depth : ranks of the precision-recall curve, cut to the size of the database; default: N. The search is for as many
        results, some queries at a time: all ranks of 1M vectors take about 0.2 s a query.
    vectors : the database's vectors in the order of their ids, of an index of hyperfaiss: asks for ``recall`` and
        ``subspaces``, too. May be mapped from a file.
    recall_queries : how many queries the recall is measured with, evenly spaced where there are more; 0: none.
    verbose : show progress of the longest part, the search over the vectors.

    Raises InvalidParameterError for an empty index, N, repeats or at < 1, InvalidVectorsError for what does not fit.
    """
    if index.ntotal < 1 or N < 1 or repeats < 1:
        raise InvalidParameterError(
            f"need a filled index, N >= 1 and repeats >= 1, got ntotal = {index.ntotal}, N = {N}, repeats = {repeats}"
        )
    n, nq = index.ntotal, len(queries)
    ks = _lengths(at, n)
    N = min(N, n)
    relevance = Relevance(query_labels, database_labels)
    if (relevance.nq, relevance.n) != (nq, n):
        raise InvalidVectorsError(f"{nq} queries and {n} vectors have labels of {relevance.nq} and {relevance.n}")
    tally = _Tally(relevance, N, max(N, min(depth or N, n), *ks))
    step = max(1, _RESULTS // tally.depth)
    for start in range(0, nq, step):
        tally.add(index.search(queries[start : start + step], tally.depth)[1], start)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        index.search(queries, N)
        seconds.append(time.perf_counter() - begin)
    shares: dict[int, float] = {}
    asked, subspaces = 0, tuple[Subspace, ...]()
    if vectors is not None:
        if not isinstance(index, BaseIndex):
            raise InvalidParameterError(f"the order of the vectors is known for indexes of hyperfaiss, not {type(index)}")
        asked = min(nq, recall_queries)
        if asked:
            chosen = queries[np.linspace(0, nq - 1, asked).astype(np.int64)]
            shares = order_recall(index, vectors, chosen, ks, verbose=verbose)
        subspaces = subspace_statistics(index.codec, vectors, projector=index.projector)
    return Evaluation(
        map_at_n=tally.total_ap / max(nq, 1),
        n=N,
        queries_per_second=nq / statistics.median(seconds),
        queries=nq,
        database=n,
        precision={k: tally.hits[k - 1] / (k * max(nq, 1)) for k in ks},
        curve=tally.curve(max(N, min(depth or N, n))),
        recall=shares,
        recall_queries=asked,
        subspaces=subspaces,
    )


def evaluate_model(
    model: Model,
    database: FloatArray,
    queries: FloatArray,
    database_labels: npt.ArrayLike,
    query_labels: npt.ArrayLike,
    N: int,
    *,
    quantisation: bool = False,
    refit: bool = False,
    **options: Any,
) -> Evaluation:
    """:func:`evaluate_index` of a new index of the model over ``database``; both matrices hold raw backbone features.

    ``quantisation`` asks for recall@k against the unquantised order, and for codeword usage and errors. ``options`` are those
    of ``evaluate_index``. ``refit`` first fits the codebooks to the database, as ``faiss.IndexPQ`` is trained on it.
    """
    index = HyperbolicPQIndex.from_model(model)
    if refit:
        index.train(database)
    index.add(database)
    vectors = database if quantisation else None
    return evaluate_index(index, queries, query_labels, database_labels, N, vectors=vectors, **options)


def order_recall(
    index: BaseIndex, vectors: FloatArray, queries: FloatArray, at: Sequence[int] = (1, 10, 100), *, verbose: bool = False
) -> dict[int, float]:
    """Recall@k by k: the share of the k nearest ``vectors`` (n, d), compared unquantised, among the index's first k results.

    The index holds those vectors under the ids 0 … n − 1. Both orders are by the codec's distance, ties to the smaller id.
    """
    if len(vectors) != index.ntotal:
        raise InvalidVectorsError(f"the index holds {index.ntotal} vectors, {len(vectors)} were given")
    ks = _lengths(at, len(vectors))
    if not ks:
        return {}
    _, true = exact_search(index.codec, vectors, queries, max(ks), projector=index.projector, verbose=verbose)
    _, found = index.search(queries, max(ks))
    return {k: float(recall(found[:, :k], true[:, :k]).sum()) / max(len(queries), 1) for k in ks}


def subspace_statistics(
    codec: HyperbolicProductQuantizer, vectors: FloatArray, *, projector: Projector | None = None
) -> tuple[Subspace, ...]:
    """Codeword usage and quantisation errors of ``vectors`` (n, d), one entry for each subspace; some vectors at a time.

    ``projector`` makes tangent vectors of them; None: they are.
    """
    if not len(vectors) or codec.codebooks is None:
        raise InvalidVectorsError(f"need a trained codec and vectors, got {codec!r} and {len(vectors)} vectors")
    M, theta = codec.M, codec.curvatures.astype(np.float64)
    counts, subspaces = np.zeros((M, codec.ksub), np.int64), np.arange(M)
    squared, geodesic, height, place = np.zeros(M), np.zeros(M), np.zeros(M), np.zeros((M, codec.dsub))
    for start in range(0, len(vectors), _ROWS):
        x = as_vectors(vectors[start : start + _ROWS], codec.d if projector is None else projector.d_in, "vectors")
        x = x if projector is None else projector.transform(x)
        codes = codec.compute_codes(x)
        parts = codec.clip(x).reshape(len(x), M, codec.dsub)
        points = lorentz.exp0(parts, theta).astype(np.float64)
        np.add.at(counts, (subspaces, codes), 1)
        to_codeword = lorentz.squared_distance(points, codec.codebooks[subspaces, codes], theta)
        squared += to_codeword.sum(axis=0)
        # The geodesic distance of a chord: 2/√θ · asinh(√θ/2 · chord), and the chord itself where it is flat.
        half, scale = np.sqrt(theta * to_codeword) / 2, np.sqrt(np.where(theta > 0, theta, 1)) / 2
        geodesic += np.where(theta > 0, np.arcsinh(half) / scale, np.sqrt(to_codeword)).sum(axis=0)
        norm2 = np.einsum("nmd,nmd->nm", points, points)
        height += (norm2 / (1 + np.sqrt(1 + theta * norm2))).sum(axis=0)
        place += points.sum(axis=0)
    n = len(vectors)
    share = counts / n
    entropy = -np.sum(share * np.log2(np.where(counts > 0, share, 1)), axis=1)
    return tuple(
        Subspace(
            ksub=codec.ksub,
            used=int((counts[m] > 0).sum()),
            entropy=float(entropy[m]) + 0.0,
            perplexity=float(2 ** entropy[m]),
            squared_error=float(squared[m] / n),
            geodesic_error=float(geodesic[m] / n),
            spread=spread,
            relative_error=float(squared[m] / n / spread) if spread > 0 else 0.0,
        )
        for m, spread in enumerate(_spread(height / n, place / n, theta).tolist())
    )


def _spread(
    height: npt.NDArray[np.float64], place: npt.NDArray[np.float64], theta: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean squared Lorentzian distance of points to their midpoint, of the means of their heights (M,) and of points (M, dsub).

    With s the mean of all coordinates, the midpoint is s/(√θ|s|) and the mean is (2/θ)(√θ|s| − 1), where
    θ|s|² = 1 + θu, u = 2h + θh² − |place|². In the flat limit it is u, the variance.
    """
    u = np.maximum(2 * height + theta * height**2 - (place**2).sum(axis=1), 0)
    spread: npt.NDArray[np.float64] = 2 * u / (1 + np.sqrt(1 + theta * u))
    return spread


def _lengths(at: Sequence[int], n: int) -> list[int]:
    """The lengths of lists to judge, ascending, none beyond n."""
    if any(k < 1 for k in at):
        raise InvalidParameterError(f"lengths of lists must be >= 1, got {list(at)}")
    return sorted({int(k) for k in at if k <= n})


class _Tally:
    """Counts over lists of results, from which the means follow."""

    def __init__(self, relevance: Relevance, N: int, depth: int) -> None:
        self.N, self.depth = N, depth
        self._relevance, self._totals = relevance, relevance.totals()
        self.total_ap = 0.0
        self.hits = np.zeros(depth)  # relevant results within each rank, summed over the queries
        self._recall = np.zeros(depth)

    def add(self, I: npt.NDArray[np.int64], first: int) -> None:  # noqa: E741
        """Results I (b, depth) of the queries from ``first`` on."""
        relevant = self._relevance.of(I, first)
        self.total_ap += float(average_precision(relevant[:, : self.N]).sum())
        hits = relevant.cumsum(axis=1, dtype=np.int32)
        self.hits += hits.sum(axis=0)
        # One product in place of a division of every entry.
        self._recall += (1 / np.maximum(self._totals[first : first + len(hits)], 1)) @ hits

    def curve(self, depth: int) -> Curve:
        """The curve up to a rank."""
        half = _POINTS // 2
        spaced = np.geomspace(1, depth, half), np.linspace(1, depth, half), np.arange(1, min(depth, half) + 1)
        ranks = np.unique(np.rint(np.concatenate(spaced)).astype(np.int64))
        judged = int((self._totals > 0).sum())
        precision = self.hits[ranks - 1] / (ranks * max(judged, 1))
        recalled = self._recall[ranks - 1] / max(judged, 1)
        return Curve(tuple(ranks.tolist()), tuple(precision.tolist()), tuple(recalled.tolist()), judged)

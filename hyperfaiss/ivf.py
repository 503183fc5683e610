"""The inverted file: vectors in lists by the nearest centroid of a FAISS quantizer; a query visits the nearest lists only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from .base import BaseIndex, Parts, Visits, as_codec
from .checks import FloatArray, IntArray, as_codes, as_integer, as_new_ids
from .codec import HyperbolicProductQuantizer, Metric
from .errors import InvalidParameterError, InvalidVectorsError
from .io import Reader
from .kernels.runtime import get_num_threads, run_tasks
from .model import Model
from .packing import unpack
from .progress import track
from .search import View
from .selectors import Choice
from .storage import Codes, Piece

__all__ = ["HyperbolicIVFPQIndex"]

# Vectors, and floats of them, that the quantizer is asked about at a time. FAISS compares so few one by one, and many by matrix
# products, whose last bits depend on what else is in them.
_TOGETHER = 16
_TOGETHER_FLOATS = 100_000
# Of these, so many make a task for the threads.
_TASK = 64 * _TOGETHER
# Vectors that are compared by products at a time, if there are so many, and the quantizers that do it.
_PRODUCTS = 2048
_COMPARE_ALL = (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP)
# Lists to visit that are known at a time, over all queries: 32 MB.
_PROBES = 1 << 22
_ITERATIONS = 10  # of k-means, as in faiss.Level1Quantizer
_MAX_POINTS_PER_CENTROID = 256
_process = os.getpid()


class HyperbolicIVFPQIndex(BaseIndex):
    """Search over the ``nprobe`` lists nearest to a query, with the interface of ``faiss.IndexIVFPQ``.

    Vectors are put into ``nlist`` lists by ``quantizer``, an index of FAISS over tangent vectors that holds the nlist
    centroids. Codes are not relative to the centroid, so one table of distances serves all lists, and at nprobe = nlist the
    answer is that of :class:`HyperbolicPQIndex` to the bit. Otherwise as there; ids are always stored.

    Parameters
    ----------
    quantizer : any faiss.Index of the codec's dimension; None: ``faiss.IndexFlatL2``. For many thousands of lists take
        ``faiss.IndexHNSWFlat``. One that holds nlist centroids is used as it is, an empty one is filled by ``train``.
    d, M, nbits, curvatures, metric, clip_radius, seed : those of :class:`HyperbolicProductQuantizer`.
    nlist : number of lists.

    Attributes
    ----------
    As in :class:`HyperbolicPQIndex`, and
    quantizer : faiss.Index
    nlist : int
    nprobe : int, lists that a query visits, 1 to begin with; more than nlist means all.
    """

    _kind = "ivf"

    def __init__(
        self,
        quantizer: Any,
        d: int,
        nlist: int,
        M: int,
        nbits: int = 8,
        *,
        curvatures: npt.ArrayLike = 1.0,
        metric: Metric = "geodesic",
        clip_radius: float | None = None,
        seed: int = 1234,
    ) -> None:
        codec = HyperbolicProductQuantizer(
            d, M, nbits, curvatures=curvatures, metric=metric, clip_radius=clip_radius, seed=seed
        )
        self._init_lists(quantizer, codec, nlist)

    @classmethod
    def from_codec(cls, quantizer: Any, codec: HyperbolicProductQuantizer, nlist: int) -> HyperbolicIVFPQIndex:
        """An empty index that uses ``quantizer`` and ``codec`` (no copies)."""
        self = cls.__new__(cls)
        self._init_lists(quantizer, as_codec(codec), nlist)
        return self

    @classmethod
    def from_model(
        cls,
        model: str | os.PathLike[str] | Model,
        nlist: int | None = None,
        *,
        level: int | None = None,
        quantizer: Any = None,
    ) -> HyperbolicIVFPQIndex:
        """An empty index for the embeddings of a trained model, given as its file or loaded.

        Either ``level`` is given, one of the levels of the learnt hierarchy (0 is the finest), whose prototypes become the
        centroids of the lists, and nothing is left to train; or ``nlist``, and ``train(x)`` finds centroids.
        """
        loaded = model if isinstance(model, Model) else Model.load(model)
        if (level is None) == (nlist is None):
            raise InvalidParameterError(f"give either nlist or level, got nlist = {nlist} and level = {level}")
        if level is None:
            self = cls.from_codec(quantizer, loaded.codec, as_integer(nlist, "nlist", 1))
        else:
            levels = loaded.prototypes
            if not levels:
                raise InvalidParameterError(f"the model has no hierarchy, so there is no level {level}: give nlist")
            centroids = levels[as_integer(level, "level", 0, len(levels) - 1)].centroids
            self = cls.from_codec(quantizer, loaded.codec, len(centroids))
            self._fill_quantizer(self._coarse(centroids))
        self.projector = loaded.projector
        return self

    def _init_lists(self, quantizer: Any, codec: HyperbolicProductQuantizer, nlist: int) -> None:
        nlist = as_integer(nlist, "nlist", 1, 2**31 - 1)
        if quantizer is None:
            quantizer = faiss.IndexFlatL2(codec.d)
        if not isinstance(quantizer, faiss.Index):
            raise InvalidParameterError(f"quantizer must be a faiss.Index or None, got {type(quantizer).__name__}")
        if quantizer.d != codec.d:
            raise InvalidParameterError(f"quantizer takes {quantizer.d} dimensions, the codec {codec.d}")
        if quantizer.ntotal not in (0, nlist):
            raise InvalidParameterError(f"quantizer must hold no centroids or nlist = {nlist}, it holds {quantizer.ntotal}")
        self._init(codec, nlist)
        self.quantizer = quantizer
        self._nprobe = 1

    # ---------------------------------------------------------------------------------------------- attributes

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return self._store.nlist

    @property
    def nprobe(self) -> int:
        """Lists that a query visits."""
        return self._nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._nprobe = as_integer(value, "nprobe", 1)

    @property
    def is_trained(self) -> bool:
        """Whether there are codebooks and centroids."""
        return self.codec.is_trained and self._has_centroids

    @property
    def coarse_code_size(self) -> int:
        """Bytes of a list's number in ``sa_encode``."""
        return ((self.nlist - 1).bit_length() + 7) // 8

    @property
    def sa_code_size(self) -> int:
        """Bytes of one code from ``sa_encode``: the list's number, lowest byte first, then the codes."""
        return self.coarse_code_size + self.code_size

    def get_list_size(self, list_no: int) -> int:
        """Number of vectors in a list."""
        return int(self._store.sizes[self._list_number(list_no)])

    def get_list(self, list_no: int) -> tuple[IntArray, Codes]:
        """Ids (n,) and codes (n, code_size) of a list, copies."""
        number = self._list_number(list_no)
        view = self._store.view()
        first, last = view.starts[number : number + 2]
        nothing = view.blocks[:0] if first == last else view.blocks
        return self._contents(view._replace(blocks=nothing, order=view.order[first:last], starts=np.array([0, last - first])))

    # ---------------------------------------------------------------------------------------------- changes

    def train(self, x: npt.ArrayLike) -> None:
        """Fit to ``x`` (n, d) what is not trained yet: centroids by k-means, and codebooks by hyperbolic k-means.

        Raises InvalidParameterError if nothing is left to train.
        """
        self._require_empty()
        if self.is_trained:
            raise InvalidParameterError("codebooks and centroids are there already: build a new index to train others")
        tangents = self._tangents(x)
        filled = self._has_centroids
        try:
            if not filled:
                self._fill_quantizer(self._centroids(self._coarse(tangents)))
            if not self.codec.is_trained:
                self.codec.train(tangents)
        except BaseException:
            if not filled:
                self.quantizer.reset()
            raise

    def add_to_list(self, list_no: int, codes: npt.ArrayLike, ids: npt.ArrayLike) -> None:
        """Add vectors by their codes (n, code_size) and ids (n,) to one list, whatever the quantizer would say."""
        self._require_trained()
        number = self._list_number(list_no)
        unpacked = unpack(as_codes(codes, self.code_size), self.M, self.nbits)
        self._store.append([Piece(unpacked, as_new_ids(ids, len(unpacked)), np.full(len(unpacked), number))])

    # ---------------------------------------------------------------------------------------------- search

    def search_preassigned(
        self,
        x: npt.ArrayLike,
        k: int,
        Iq: npt.ArrayLike,
        Dq: Any = None,  # noqa: ARG002 (FAISS's callers pass it)
        *,
        params: Any = None,
        D: FloatArray | None = None,
        I: IntArray | None = None,  # noqa: E741
    ) -> tuple[FloatArray, IntArray]:
        """``search`` over the lists ``Iq`` (nq, nprobe), the most promising first, −1 for none. ``Dq`` is not needed."""
        return self._search(x, k, params, D, I, Iq)

    def range_search_preassigned(
        self,
        x: npt.ArrayLike,
        radius: float,
        Iq: npt.ArrayLike,
        Dq: Any = None,  # noqa: ARG002
        *,
        params: Any = None,
    ) -> tuple[IntArray, FloatArray, IntArray]:
        """``range_search`` over the lists ``Iq`` (nq, nprobe), −1 for none. ``Dq`` is not needed."""
        return self._range_search(x, radius, params, Iq)

    def _visits(self, queries: FloatArray, view: View, choice: Choice, assigned: Any) -> Visits:
        probes = None if assigned is None else self._as_probes(assigned, len(queries))
        nprobe = min(choice.nprobe or self.nprobe, self.nlist) if probes is None else probes.shape[1]
        if probes is None and nprobe == self.nlist:
            yield slice(0, len(queries)), view, None
            return
        step = max(1, _PROBES // max(1, nprobe))
        for start in range(0, len(queries), step):
            rows = slice(start, min(start + step, len(queries)))
            if probes is None:
                yield rows, view, self._closest(self._coarse(queries[rows]), nprobe, choice.quantizer_params)
            else:
                yield rows, view, probes[rows]

    def _as_probes(self, lists: Any, nq: int) -> IntArray:
        array = np.asarray(lists)
        if array.dtype.kind not in "iu" or array.ndim != 2 or len(array) != nq or not array.shape[1]:
            raise InvalidVectorsError(f"Iq must be int64 of shape ({nq}, nprobe), got {array.dtype} of shape {array.shape}")
        if array.size and not (array.min() >= -1 and array.max() < self.nlist):
            raise InvalidVectorsError(
                f"Iq must hold lists from 0 to {self.nlist - 1}, or -1, got {array.min()} to {array.max()}"
            )
        ordered = np.sort(array, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, at = np.argwhere(twice)[0]
            raise InvalidVectorsError(f"Iq must name a list once for a query, row {row} has list {ordered[row, at]} twice")
        return np.ascontiguousarray(array, dtype=np.int64)

    # ---------------------------------------------------------------------------------------------- coarse quantizer

    @property
    def _has_centroids(self) -> bool:
        return bool(self.quantizer.is_trained and self.quantizer.ntotal == self.nlist)

    def _coarse(self, tangents: FloatArray) -> FloatArray:
        """Where the quantizer sees tangent vectors: the choice of the coarse space is here and nowhere else.

        Clipped as the codec clips them: what lies beyond the radius is the same to the codes, and lists of what differs there
        alone would be visited in vain. (``benchmarks.ivf coarse`` compares spaces.)
        """
        return self.codec.clip(tangents)

    def _closest(self, coarse: FloatArray, nprobe: int, params: Any = None, progress: str = "") -> IntArray:
        """The lists (n, nprobe) closest to each vector of the coarse space, the closest first, −1 where FAISS finds none.

        Which lists these are does not depend on the other vectors: where a matrix product leaves a doubt, the vector is asked
        about anew.
        """
        lists = np.empty((len(coarse), nprobe), np.int64)
        rows = np.arange(len(coarse))
        step = max(_PRODUCTS, -(-faiss.cvar.distance_compute_blas_threshold // self.codec.d))
        if type(self.quantizer) in _COMPARE_ALL and params is None and nprobe < self.nlist and len(coarse) >= step:
            rows = self._ask_many(coarse, lists, step, progress)
        few = max(1, min(_TOGETHER, _TOGETHER_FLOATS // self.codec.d))

        def ask(start: int) -> Iterator[None]:
            for first in range(start, min(start + _TASK, len(rows)), few):
                which = rows[first : min(first + few, start + _TASK)]
                lists[which] = self._ask(coarse[which], nprobe, params)[1]
                yield

        self._run(ask, range(0, len(rows), _TASK), progress)
        return lists

    def _ask_many(self, coarse: FloatArray, lists: IntArray, step: int, progress: str) -> IntArray:
        """Fill ``lists`` by FAISS's matrix products, ``step`` vectors at a time; returns those whose lists are in doubt.

        That is where the last list and the first one left out differ by less than rounding can hide. A distance by products is
        off by at most (d + 2) u (|x| + |c|)², u = 2**-24, in any order of summation, and one by one by no more than that.
        """
        nprobe = lists.shape[1]
        centroids = self.quantizer.reconstruct_n(0, self.nlist)
        with np.errstate(over="ignore"):
            largest = np.sqrt(np.einsum("ij,ij->i", centroids, centroids).max())
        doubtful = np.empty(len(coarse), np.bool_)

        def ask(start: int) -> Iterator[None]:
            part = slice(start, start + step)
            D, I = self._ask(coarse[part], nprobe + 1)  # noqa: E741
            lists[part] = I[:, :nprobe]
            with np.errstate(over="ignore", invalid="ignore"):  # a nan is a doubt
                norms = np.sqrt(np.einsum("ij,ij->i", coarse[part], coarse[part]))
                hidden = 4 * (self.codec.d + 4) * 2.0**-24 * (norms + largest) ** 2
                doubtful[part] = ~(np.abs(D[:, nprobe] - D[:, nprobe - 1]) > hidden)
            yield

        self._run(ask, range(0, len(coarse), step), progress)
        return np.flatnonzero(doubtful)

    def _ask(self, coarse: FloatArray, k: int, params: Any = None) -> tuple[FloatArray, IntArray]:
        """The quantizer's answer, by this thread alone: OpenMP's threads do not survive a fork."""
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            D, I = self.quantizer.search(coarse, k, params=params)  # noqa: E741
        finally:
            faiss.omp_set_num_threads(threads)
        return D, I

    def _run(self, ask: Callable[[int], Iterator[None]], starts: Sequence[int], progress: str) -> None:
        batches = [starts]
        if progress and self.verbose:
            batches = [starts[i : i + 16] for i in range(0, len(starts), 16)]
        for batch in track(batches, progress, verbose=len(batches) > 1):
            run_tasks(ask, batch)

    def _lists_of(self, tangents: FloatArray) -> IntArray:
        lists = self._closest(self._coarse(tangents), 1, progress="assigning to lists")[:, 0]
        if (lists < 0).any():
            row = int(np.flatnonzero(lists < 0)[0])
            raise InvalidVectorsError(f"row {row}: the quantizer {type(self.quantizer).__name__} finds no list for it")
        return lists

    def _centroids(self, coarse: FloatArray) -> FloatArray:
        """``nlist`` centroids (nlist, d) by FAISS's k-means; of many vectors a sample is used."""
        if len(coarse) < self.nlist:
            raise InvalidVectorsError(f"training needs at least nlist = {self.nlist} vectors, got {len(coarse)}")
        limit = _MAX_POINTS_PER_CENTROID * self.nlist
        if len(coarse) > limit:
            rng = np.random.default_rng(self.codec.seed)
            coarse = coarse[np.sort(rng.choice(len(coarse), limit, replace=False))]
        clustering = faiss.Clustering(coarse.shape[1], self.nlist)
        clustering.niter, clustering.seed = 1, self.codec.seed % 2**31
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, _MAX_POINTS_PER_CENTROID
        nearest = faiss.IndexFlatL2(coarse.shape[1])
        threads = faiss.omp_get_max_threads()
        # In a forked child OpenMP waits for threads that are its parent's.
        faiss.omp_set_num_threads(get_num_threads() if os.getpid() == _process else 1)
        try:
            # Each call goes on from the centroids of the last.
            for _ in track(range(_ITERATIONS), "k-means of the lists", self.verbose):
                clustering.train(coarse, nearest)
        finally:
            faiss.omp_set_num_threads(threads)
        centroids: FloatArray = faiss.vector_to_array(clustering.centroids).reshape(self.nlist, -1)
        return centroids

    def _fill_quantizer(self, centroids: FloatArray) -> None:
        if self.quantizer.ntotal:
            raise InvalidParameterError(f"quantizer must be empty, it holds {self.quantizer.ntotal} centroids")
        if not self.quantizer.is_trained:
            self.quantizer.train(centroids)
        self.quantizer.add(centroids)

    # ---------------------------------------------------------------------------------------------- inside

    def _list_number(self, list_no: Any) -> int:
        return as_integer(list_no, "list_no", 0, self.nlist - 1)

    def _packed(self, piece: Piece) -> Codes:
        numbers = piece.lists.astype("<i8").view(np.uint8).reshape(-1, 8)[:, : self.coarse_code_size]
        return np.concatenate([numbers, super()._packed(piece)], axis=1)

    def _unpacked(self, codes: Codes) -> Piece:
        numbers = np.zeros((len(codes), 8), np.uint8)
        numbers[:, : self.coarse_code_size] = codes[:, : self.coarse_code_size]
        lists = numbers.view("<i8")[:, 0].astype(np.int64)
        if len(lists) and lists.max() >= self.nlist:
            raise InvalidVectorsError(f"codes must begin with the number of a list, 0 to {self.nlist - 1}, got {lists.max()}")
        return super()._unpacked(codes[:, self.coarse_code_size :])._replace(lists=lists)

    def _described(self) -> list[str]:
        return [f"nlist={self.nlist}", f"nprobe={self.nprobe}", f"quantizer={type(self.quantizer).__name__}"]

    def _require_same_make(self, other: Any) -> None:
        super()._require_same_make(other)
        mine, theirs = self.quantizer, other.quantizer
        if mine is not theirs and faiss.serialize_index(mine).tobytes() != faiss.serialize_index(theirs).tobytes():
            raise InvalidParameterError(
                f"merging needs the same lists: the index has {self.nlist}, the other {other.nlist}, of other centroids"
            )

    def _to_parts(self) -> Parts:
        return {"nlist": self.nlist, "nprobe": self.nprobe}, {"index.quantizer": faiss.serialize_index(self.quantizer)}

    @classmethod
    def _from_parts(cls, reader: Reader, codec: HyperbolicProductQuantizer) -> HyperbolicIVFPQIndex:
        nlist, nprobe = reader.count("nlist"), reader.count("nprobe")
        try:
            quantizer = faiss.deserialize_index(reader.tensor("index.quantizer", np.uint8, (None,)))
            self = cls.from_codec(quantizer, codec, nlist)
            self.nprobe = nprobe
        except (RuntimeError, InvalidParameterError) as error:
            raise reader.corrupt(f"unusable lists: {error}") from error
        if not self._has_centroids:
            raise reader.corrupt(f"the quantizer should hold {nlist} centroids, holds {quantizer.ntotal}")
        return self

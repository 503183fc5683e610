"""What both indexes are: FAISS's calls over a codec, a store of blocks and a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import faiss
import numpy as np
import numpy.typing as npt

from .checks import MAX_ID, FloatArray, IntArray, as_codes, as_id_array, as_integer, as_new_ids, as_vectors
from .codec import HyperbolicProductQuantizer, Metric
from .errors import InvalidParameterError, NotTrainedError, UnknownIdError
from .io import Reader
from .model import Projector
from .packing import pack, packed_size, unpack
from .search import View, nearest, within
from .selectors import Choice, admitted, read_parameters, restrict
from .storage import BlockStore, Codes, Piece, gathered, positions_of

__all__ = ["BaseIndex", "Parts", "Visits", "as_codec"]

Self = TypeVar("Self", bound="BaseIndex")
Parts = tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]
# Queries, what they search, and the lists that each of them visits (None: all).
Visits = Iterator[tuple[slice, View, "IntArray | None"]]


class BaseIndex:
    """Vectors by their product-quantized codes, with ids, and FAISS's calls on them.

    A child says where vectors go (``_lists_of``), which lists a query visits (``_visits``), what training is (``train``), and
    what more its file holds. One thread at a time may change an index; searches of other threads go on meanwhile, each over
    the state that it began with. An error or Ctrl-C leaves an index as it was before the call.

    Ids are from 0 to 2**63 − 2 and stay with their vectors. Automatic ones go on from the largest ever given. An id may be
    given to several vectors in several calls, as in FAISS: ``remove_ids`` and ``update_vectors`` then mean all of them,
    ``reconstruct`` the first.
    """

    _kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[BaseIndex]]] = {}

    codec: HyperbolicProductQuantizer
    _projector: Projector | None
    _store: BlockStore

    def __init_subclass__(cls) -> None:
        if "_kind" in vars(cls):  # a user's own class is none that a file names
            BaseIndex._kinds[cls._kind] = cls

    def _init(self, codec: HyperbolicProductQuantizer, nlist: int) -> None:
        self.codec = codec
        self._projector = None
        self._store = BlockStore(codec.M, nlist)

    def __repr__(self) -> str:
        described = [f"d={self.d}", f"ntotal={self.ntotal}", *self._described()]
        described += ["ids=stored"] if self._store.has_ids else []
        described += [] if self.projector is None else [f"projector={self.projector!r}"]
        return f"{type(self).__name__}({', '.join(described)}, codec={self.codec!r})"

    def __len__(self) -> int:
        return self.ntotal

    def __copy__(self: Self) -> Self:
        """An index with vectors of its own; codec, projector and quantizer are shared."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._store = self._store.copy()
        return twin

    # ---------------------------------------------------------------------------------------------- attributes

    @property
    def projector(self) -> Projector | None:
        """What turns the vectors that calls take into tangent vectors; None: they are tangent vectors."""
        return self._projector

    @projector.setter
    def projector(self, value: Projector | None) -> None:
        if value is not None and value.d_out != self.codec.d:
            raise InvalidParameterError(f"the projector makes {value.d_out} dimensions, the codec takes {self.codec.d}")
        self._projector = value

    @property
    def d(self) -> int:
        """Dimension of the vectors that train, add and search take."""
        return self.codec.d if self.projector is None else self.projector.d_in

    @property
    def M(self) -> int:
        """Number of subspaces."""
        return self.codec.M

    @property
    def nbits(self) -> int:
        """Bits of one subspace's code."""
        return self.codec.nbits

    @property
    def ksub(self) -> int:
        """Codewords of a subspace."""
        return self.codec.ksub

    @property
    def dsub(self) -> int:
        """Dimension of a subspace."""
        return self.codec.dsub

    @property
    def code_size(self) -> int:
        """Bytes of a vector's codes in ``codes`` and in files: ceil(M · nbits / 8). In memory each code takes a byte."""
        return packed_size(self.M, self.nbits)

    @property
    def ntotal(self) -> int:
        """Number of vectors in the index."""
        return len(self._store)

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.codec.is_trained

    @property
    def metric(self) -> Metric:
        """The codec's metric."""
        return self.codec.metric

    @property
    def metric_type(self) -> int:
        """``faiss.METRIC_L2`` whatever ``metric`` is: tells FAISS's callers that small is near."""
        return int(faiss.METRIC_L2)

    @property
    def verbose(self) -> bool:
        """Whether training and adding show progress on stderr."""
        return self.codec.verbose

    @verbose.setter
    def verbose(self, value: bool) -> None:
        self.codec.verbose = bool(value)

    @property
    def codes(self) -> Codes:
        """All codes, a copy (ntotal, code_size) uint8, packed as FAISS packs; row i belongs to ``ids[i]``."""
        return self._contents(self._store.view())[1]

    @property
    def ids(self) -> IntArray:
        """All ids, a copy (ntotal,) int64: in order of adding in a flat index, list after list in an IVF index."""
        return self._contents(self._store.view())[0]

    # ---------------------------------------------------------------------------------------------- changes

    def train(self, x: npt.ArrayLike) -> None:
        """Fit what the index has to learn to ``x`` (n, d)."""
        raise NotImplementedError

    def add(self, x: npt.ArrayLike) -> None:
        """Add vectors (n, d); their ids go on from the largest ever given. All are added or, on an error or Ctrl-C, none."""
        self._add(self._tangents_to_add(x), None)

    def add_with_ids(self, x: npt.ArrayLike, ids: npt.ArrayLike) -> None:
        """Add vectors (n, d) with these ids (n,), integers from 0 to 2**63 − 2 of which no two are alike."""
        tangents = self._tangents_to_add(x)
        self._add(tangents, as_new_ids(ids, len(tangents)))

    def add_sa_codes(self, codes: npt.ArrayLike, ids: npt.ArrayLike | None = None) -> None:
        """Add vectors by their codes (n, sa_code_size) uint8, as ``sa_encode`` makes them."""
        self._require_trained()
        piece = self._unpacked(as_codes(codes, self.sa_code_size))
        self._store.append([piece if ids is None else piece._replace(ids=as_new_ids(ids, len(piece.codes)))])

    def remove_ids(self, sel: Any) -> int:
        """Remove vectors: ``sel`` is an array of ids, a mask over ids or a ``faiss.IDSelector`` (see ``SearchParameters``).

        Returns how many were removed; ids that the index does not hold are ignored. The others keep their ids.
        """
        return self._store.remove(admitted(self._store.view(), sel, self._store.next_id))

    def update_vectors(self, ids: npt.ArrayLike, x: npt.ArrayLike) -> None:
        """Replace the vectors of ``ids`` (n,) by ``x`` (n, d). UnknownIdError: the index does not hold one of them.

        Costs a copy of the codes, so many at once are cheaper than one after the other.
        """
        tangents = self._tangents_to_add(x)
        wanted = as_new_ids(ids, len(tangents))
        view = self._store.view()
        self._positions(view, wanted)
        positions, rows = self._all_positions(view, wanted)
        piece = Piece(self.codec.compute_codes(tangents), None, self._lists_of(tangents))
        if len(positions):
            lists = None if piece.lists is None else piece.lists[rows]
            self._store.replace(positions, Piece(piece.codes[rows], None, lists))

    def merge_from(self: Self, other: Self, add_id: int = 0) -> None:
        """Take over the vectors of ``other``, an index of the same make, which is empty afterwards.

        Their ids become id + add_id; one that is taken already is an InvalidParameterError (``add_id=index.next_id`` avoids
        them all). If neither index stores ids and ``add_id`` is 0, other's vectors are numbered behind the own ones, as
        ``faiss.IndexPQ`` does it.
        """
        self._require_same_make(other)
        offset = as_integer(add_id, "add_id", -MAX_ID, MAX_ID)
        if not offset and not self._store.has_ids and not other._store.has_ids:
            offset = self.next_id
        view = other._store.view()
        if other.ntotal:
            self._require_free_ids(other.ids, offset)
        pieces = (piece._replace(ids=piece.ids + offset) for piece in other._store.pieces(view))
        self._store.append(pieces)
        other.reset()

    def reset(self) -> None:
        """Remove all vectors; what was trained stays, and automatic ids begin at 0."""
        self._store = BlockStore(self.M, self._store.nlist)

    @property
    def next_id(self) -> int:
        """The next automatic id: one more than the largest ever given."""
        return self._store.next_id

    # ---------------------------------------------------------------------------------------------- search

    def search(
        self,
        x: npt.ArrayLike,
        k: int,
        *,
        params: Any = None,
        D: FloatArray | None = None,
        I: IntArray | None = None,  # noqa: E741
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest vectors of each query (nq, d): distances D (nq, k) float32 and ids I (nq, k) int64.

        Rows are sorted by distance, then id. Missing neighbours are +inf and −1. ``D`` and ``I`` may be given to be filled.
        ``params`` : :class:`SearchParameters`, ``faiss.SearchParameters`` or ``faiss.SearchParametersIVF``: which ids may be
        found (``sel``), and how many lists are visited (``nprobe``).
        """
        return self._search(x, k, params, D, I)

    def range_search(self, x: npt.ArrayLike, radius: float, *, params: Any = None) -> tuple[IntArray, FloatArray, IntArray]:
        """All vectors nearer than ``radius`` (in float32) to each query (nq, d): lims, D, I.

        lims (nq + 1,) int64; the neighbours of query q are D[lims[q] : lims[q + 1]] float32 and I[lims[q] : lims[q + 1]] int64,
        sorted by distance, then id. ``params`` as in ``search``.
        """
        return self._range_search(x, radius, params)

    def search_and_reconstruct(
        self, x: npt.ArrayLike, k: int, *, params: Any = None
    ) -> tuple[FloatArray, IntArray, FloatArray]:
        """``search``, and the neighbours' reconstructed tangent vectors R (nq, k, codec.d); NaN where one is missing."""
        D, I = self.search(x, k, params=params)  # noqa: E741
        R = np.full((*I.shape, self.codec.d), np.nan, np.float32)
        R[I >= 0] = self.reconstruct_batch(I[I >= 0])
        return D, I, R

    def assign(self, x: npt.ArrayLike, k: int = 1) -> IntArray:
        """The ids I (nq, k) of ``search``."""
        return self.search(x, k)[1]

    # ---------------------------------------------------------------------------------------------- codes and vectors

    def reconstruct(self, key: int) -> FloatArray:
        """The tangent vector (codec.d,) that the code of vector ``key`` stands for. UnknownIdError if there is none."""
        number = as_integer(key, "key", -(2**63))
        if number > MAX_ID:
            raise UnknownIdError(f"id {number} is unknown: the index holds {self._held()}")
        vector: FloatArray = self.reconstruct_batch(np.array([number]))[0]
        return vector

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> FloatArray:
        """Tangent vectors (ni, codec.d) of the ids n0 … n0 + ni − 1, all of which must be there.

        ni = −1: of all ids from n0 on that there are, in their order.
        """
        first = as_integer(n0, "n0", -(2**63))
        count = as_integer(ni, "ni", -1)
        last = (self.next_id if count == -1 else first + count) - 1
        if first < 0 or last >= self.next_id or first > last + 1 or count > self.ntotal:
            raise UnknownIdError(f"ids {first} to {last} were asked for, the index holds {self._held()}")
        if count == -1 and self._store.has_ids:
            ids = self.ids
            return self.reconstruct_batch(np.sort(ids[ids >= first]))
        return self.reconstruct_batch(np.arange(first, last + 1))

    def reconstruct_batch(self, ids: npt.ArrayLike) -> FloatArray:
        """Tangent vectors (n, codec.d) of these ids (n,). UnknownIdError: the index does not hold one of them."""
        view = self._store.view()
        return self.codec.decode(gathered(view, self._positions(view, as_id_array(ids))))

    @property
    def sa_code_size(self) -> int:
        """Bytes of one code from ``sa_encode``."""
        return self.code_size

    def sa_encode(self, x: npt.ArrayLike) -> Codes:
        """Codes (n, sa_code_size) uint8 of vectors (n, d), without adding them."""
        tangents = self._tangents_to_add(x)
        return self._packed(Piece(self.codec.compute_codes(tangents), None, self._lists_of(tangents)))

    def sa_decode(self, codes: npt.ArrayLike) -> FloatArray:
        """Tangent vectors (n, codec.d) of codes (n, sa_code_size) uint8."""
        self._require_trained()
        return self.codec.decode(self._unpacked(as_codes(codes, self.sa_code_size)).codes)

    # ---------------------------------------------------------------------------------------------- for children

    def _lists_of(self, tangents: FloatArray) -> IntArray | None:  # noqa: ARG002
        """The list that each vector goes to; None where there is only one."""
        return None

    def _visits(self, queries: FloatArray, view: View, choice: Choice, assigned: Any) -> Visits:  # noqa: ARG002
        """How the queries go about it, some at a time. ``assigned``: the lists to visit, where the caller has chosen them."""
        yield slice(0, len(queries)), view, None

    def _packed(self, piece: Piece) -> Codes:
        return pack(piece.codes, self.nbits)

    def _unpacked(self, codes: Codes) -> Piece:
        return Piece(unpack(codes, self.M, self.nbits))

    def _contents(self, view: View) -> tuple[IntArray, Codes]:
        """Ids (n,) and packed codes (n, code_size) of a view, list after list."""
        ids, codes = [np.empty(0, np.int64)], [np.empty((0, self.code_size), np.uint8)]
        for piece in self._store.pieces(view):
            ids.append(piece.ids)
            codes.append(pack(piece.codes, self.nbits))
        return np.concatenate(ids), np.concatenate(codes)

    def _described(self) -> list[str]:
        return []

    def _to_parts(self) -> Parts:
        """What a file holds of a child alone."""
        return {}, {}

    @classmethod
    def _from_parts(cls: type[Self], reader: Reader, codec: HyperbolicProductQuantizer) -> Self:
        """An empty index of what ``_to_parts`` wrote."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- inside

    def _require_trained(self) -> None:
        if not self.is_trained:
            raise NotTrainedError("the index is not trained: call train(x), or build it with from_codec or from_model")

    def _require_empty(self) -> None:
        if self.ntotal:
            raise InvalidParameterError(
                f"training would change the meaning of the {self.ntotal} codes in the index: reset() first"
            )

    def _tangents(self, x: npt.ArrayLike) -> FloatArray:
        vectors = as_vectors(x, self.d)
        return vectors if self.projector is None else self.projector.transform(vectors)

    def _tangents_to_add(self, x: npt.ArrayLike) -> FloatArray:
        self._require_trained()
        return self._tangents(x)

    def _add(self, tangents: FloatArray, ids: IntArray | None) -> None:
        codes = self.codec.compute_codes(tangents)
        self._store.append([Piece(codes, ids, self._lists_of(tangents))])

    def _view(self, choice: Choice) -> View:
        view = self._store.view()
        return view if choice.sel is None else restrict(view, choice.sel, self._store.next_id)

    def _search(
        self,
        x: npt.ArrayLike,
        k: int,
        params: Any,
        D: FloatArray | None,
        I: IntArray | None,  # noqa: E741
        assigned: Any = None,
    ) -> tuple[FloatArray, IntArray]:
        self._require_trained()
        k = as_integer(k, "k", 1)
        choice = read_parameters(params)
        queries = self._tangents(x)
        visits = self._visits(queries, self._view(choice), choice, assigned)
        D = cast("FloatArray", _output(D, "D", (len(queries), k), np.float32))
        I = cast("IntArray", _output(I, "I", (len(queries), k), np.int64))  # noqa: E741
        for rows, view, probes in visits:
            nearest(self._tables(queries, rows), rows.stop - rows.start, view, k, D[rows], I[rows], probes)
        return D, I

    def _range_search(
        self, x: npt.ArrayLike, radius: float, params: Any, assigned: Any = None
    ) -> tuple[IntArray, FloatArray, IntArray]:
        self._require_trained()
        limit = _as_radius(radius)
        choice = read_parameters(params)
        queries = self._tangents(x)
        lims, found = np.zeros(len(queries) + 1, np.int64), [(np.empty(0, np.float32), np.empty(0, np.int64))]
        for rows, view, probes in self._visits(queries, self._view(choice), choice, assigned):
            part, D, I = within(self._tables(queries, rows), rows.stop - rows.start, view, limit, probes)  # noqa: E741
            lims[rows.start + 1 : rows.stop + 1] = lims[rows.start] + part[1:]
            found.append((D, I))
        all_D, all_I = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return lims, all_D, all_I

    def _tables(self, queries: FloatArray, rows: slice) -> Callable[[slice], FloatArray]:
        first = rows.start

        def tables_of(part: slice) -> FloatArray:
            return self.codec.tables_of(queries[first + part.start : first + part.stop], first + part.start)

        return tables_of

    def _held(self) -> str:
        if not self.ntotal:
            return "no vectors"
        return f"{self.ntotal} ids up to {self.next_id - 1}" if self._store.has_ids else f"0 to {self.ntotal - 1}"

    def _positions(self, view: View, ids: IntArray) -> IntArray:
        """The (first) position of each id; UnknownIdError if one has none."""
        positions = self._store.find(view, ids)
        missing = ids[positions < 0]
        if len(missing):
            raise UnknownIdError(
                f"{len(missing)} of {len(ids)} ids are unknown, first {missing[0]}; the index holds {self._held()}"
            )
        return positions

    def _all_positions(self, view: View, ids: IntArray) -> tuple[IntArray, IntArray]:
        """All positions whose id is among ``ids``, and for each the place of its id in there."""
        positions = positions_of(admitted(view, ids, self.next_id))
        stored = view.ids[positions] if len(view.ids) else positions
        order = np.argsort(ids)
        return positions, order[np.searchsorted(ids, stored, sorter=order)]

    def _require_same_make(self, other: Any) -> None:
        if type(other) is not type(self) or other is self:
            what = "the index itself" if other is self else type(other).__name__
            raise InvalidParameterError(f"only another {type(self).__name__} can be merged into this one, got {what}")
        self._require_trained()
        other._require_trained()
        for name in ("projector", "codec"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not theirs and not _same_parts(mine, theirs):
                raise InvalidParameterError(f"merging needs the same {name}: the index has {mine!r}, the other {theirs!r}")

    def _require_free_ids(self, ids: IntArray, offset: int) -> None:
        low, high = int(ids.min()) + offset, int(ids.max()) + offset
        if low < 0 or high > MAX_ID:
            raise InvalidParameterError(f"add_id = {offset} makes ids {low} to {high}, they must be from 0 to 2**63 - 2")
        taken = ids[self._store.find(self._store.view(), ids + offset) >= 0] + offset
        if len(taken):
            raise InvalidParameterError(
                f"both indexes hold id {taken[0]} ({len(taken)} in common): pass add_id={self.next_id} to give new ids"
            )


# -------------------------------------------------------------------------------------------------- arguments


def as_codec(codec: Any) -> HyperbolicProductQuantizer:
    if not isinstance(codec, HyperbolicProductQuantizer):
        raise InvalidParameterError(f"codec must be a HyperbolicProductQuantizer, got {type(codec).__name__}")
    return codec


def _as_radius(radius: Any) -> float:
    try:
        if isinstance(radius, (bool, np.bool_)):
            raise TypeError
        with np.errstate(over="ignore"):
            value = float(np.float32(radius))
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise InvalidParameterError(f"radius must be a number, got {radius!r}")
    return value


def _same_parts(a: Any, b: Any) -> bool:
    """Whether two codecs or projectors are the same but for the seed of their training."""
    if a is None or b is None:
        return a is b
    (fields, tensors), (other_fields, other_tensors) = a.to_parts(), b.to_parts()
    for part in (fields, other_fields):
        part.get("codec", {}).pop("seed", None)
    return fields == other_fields and all(np.array_equal(tensors[name], other_tensors[name]) for name in tensors)


def _output(array: Any, name: str, shape: tuple[int, int], dtype: type) -> Any:
    """``array`` if it can take a result of this shape and dtype, a new one if it is None."""
    if array is None:
        return np.empty(shape, dtype)
    usable = isinstance(array, np.ndarray) and array.shape == shape and array.dtype == dtype
    if not usable or not array.flags.c_contiguous or not array.flags.writeable:
        came = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else repr(type(array))
        raise InvalidParameterError(f"{name} must be a writeable contiguous {np.dtype(dtype)} array {shape}, got {came}")
    return array

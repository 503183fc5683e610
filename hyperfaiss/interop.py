"""Both ways to FAISS: take over the codes of its product quantizers, and make of ours an index that stock FAISS searches.

From FAISS: its product quantizer is ours at curvature 0 ("squared" for its L2, "inner_product" for its inner product), so
codebooks and codes are taken as they are, its vector transforms become the index's projector, and its ids stay.

To FAISS: the scan sees nothing but a table of distances T (M, ksub), so an index with *one-hot* codebooks e₁ … e_ksub in each
subspace, searched by inner product with the query −T, adds up −T[m, code[m]] over m: our distance, negated. No metric needs
to be known to FAISS, in whatever language it is called; only the query matrix is made here (``faiss_query``).
"""

# faiss.contrib has no type hints.
# mypy: allow-untyped-calls
from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .checks import MAX_ID, FloatArray, IntArray
from .codec import HyperbolicProductQuantizer, Metric
from .errors import FileFormatError, InvalidParameterError, InvalidVectorsError, NotTrainedError
from .index import HyperbolicPQIndex
from .ivf import HyperbolicIVFPQIndex
from .model import Projector
from .packing import pack, unpack
from .storage import Codes, Piece

__all__ = ["faiss_query", "from_faiss", "projector_from_faiss", "to_faiss"]

Index = HyperbolicPQIndex | HyperbolicIVFPQIndex
_TAKEN = "IndexPQ and IndexIVFPQ(by_residual=False), within IndexPreTransform, IndexIDMap and IndexIDMap2"
# Vectors that are taken over at a time.
_PIECE = 1 << 20
# What to do about the types that come closest.
_REMEDIES = {
    "IndexPQFastScan": "convert the IndexPQ that it was made from, or add its vectors to a new index",
    "IndexIVFPQFastScan": "convert the IndexIVFPQ that it was made from, or add its vectors to a new index",
    "IndexIVFPQR": "rebuild it as IndexIVFPQ with by_residual = False",
    "IndexRefine": "convert its base_index",
    "IndexRefineFlat": "convert its base_index",
    "IndexShards": "merge its shards into one index first (merge_from)",
    "IndexReplicas": "convert one of its replicas",
    "GpuIndexIVFPQ": "call faiss.index_gpu_to_cpu first",
}


def from_faiss(index: Any) -> Index:
    """An index over the codes of a trained FAISS index: same neighbours, served by our scan.

    Parameters
    ----------
    index : ``faiss.IndexPQ`` or ``faiss.IndexIVFPQ`` with ``by_residual = False``, 4 to 8 bits a code, metric L2 or inner
        product, bare or within ``IndexPreTransform``, ``IndexIDMap`` and ``IndexIDMap2``; or the path of a file that
        ``faiss.write_index`` wrote. It is not changed, and nothing of it is shared.

    Returns
    -------
    HyperbolicPQIndex or HyperbolicIVFPQIndex, at curvature 0. Ids, ``nprobe`` and a copy of the coarse quantizer come along,
    transforms become the ``projector``. The answer is the exact ADC answer, as FAISS's is for ``search_type = ST_PQ``. For the
    inner product, distances are FAISS's with the sign changed, so that small is near.

    Raises
    ------
    InvalidParameterError : a type, metric, transform or size that can't be taken; it says what could.
    InvalidVectorsError : negative ids, or codebooks that are not finite.
    NotTrainedError : the index is not trained.
    FileNotFoundError, FileFormatError : the path names no file, or none that FAISS can read.
    """
    import faiss

    if isinstance(index, (str, os.PathLike)):
        index = _read(index)
    if not isinstance(index, faiss.Index):
        raise InvalidParameterError(f"expected a faiss index ({_TAKEN}) or the path of its file, got {type(index).__name__}")
    core, transforms, id_maps = _unwrap(index)
    codec = _codec(core)  # refuses what can't be taken, before anything is copied
    projector = projector_from_faiss(transforms) if transforms else None
    ours: Index
    if isinstance(core, faiss.IndexPQ):
        ours = HyperbolicPQIndex.from_codec(codec)
    else:
        ours = HyperbolicIVFPQIndex.from_codec(faiss.clone_index(core.quantizer), codec, core.nlist)
        ours.nprobe = core.nprobe
    ours.projector = projector
    ours._store.append(_pieces(core, id_maps))
    return ours


def to_faiss(index: Index) -> Any:
    """A stock FAISS index that ranks the vectors of ``index`` as it does, for queries that ``faiss_query`` makes.

    A flat index becomes ``faiss.IndexPQ`` over M·ksub dimensions, within ``IndexIDMap2`` if its ids are not 0 … ntotal − 1; an
    IVF index ``faiss.IndexIVFPQ`` over M·(ksub + dsub): there each row of the table is followed by what the quantizer sees of
    the vector, and a ``RemapDimensionsTransform`` before the quantizer picks that out, so lists are probed as here.

        faiss.write_index(to_faiss(index), "stock.faiss")
        np.save("queries.npy", faiss_query(index, xq))
        # elsewhere, with FAISS alone
        D, I = faiss.read_index("stock.faiss").search(np.load("queries.npy"), k)

    The metric is the inner product: FAISS's ``D`` is ours with the sign changed, to float32 rounding (FAISS adds up in another
    order), and draws come in any order. The codebooks are M·ksub² floats more, 2 MB at M = 8. The result is for searching: to
    add, remove or reconstruct, do so here and convert again. Nothing of ``index`` is shared.

    Raises NotTrainedError, or InvalidParameterError for another type.
    """
    import faiss

    _require(index)
    codec = index.codec
    M, ksub = codec.M, codec.ksub
    width = _width(index)
    core: Any
    if isinstance(index, HyperbolicIVFPQIndex):
        columns = np.arange(M * width, dtype=np.int32).reshape(M, width)[:, ksub:].ravel()
        pick = faiss.RemapDimensionsTransform(M * width, codec.d, faiss.swig_ptr(columns))
        quantizer = faiss.IndexPreTransform(pick, faiss.clone_index(index.quantizer))
        core = faiss.IndexIVFPQ(quantizer, M * width, index.nlist, M, codec.nbits, faiss.METRIC_INNER_PRODUCT)
        core.by_residual = False
        core.nprobe = index.nprobe
    else:
        core = faiss.IndexPQ(M * width, M, codec.nbits, faiss.METRIC_INNER_PRODUCT)
    books = np.zeros((M, ksub, width), np.float32)
    books[:, np.arange(ksub), np.arange(ksub)] = 1
    faiss.copy_array_to_vector(books.ravel(), core.pq.centroids)
    core.is_trained = True

    if isinstance(index, HyperbolicIVFPQIndex):
        for codes, ids, lists in index._store.pieces(index._store.view()):
            packed = pack(codes, codec.nbits)
            bounds = [*np.flatnonzero(np.diff(lists, prepend=-1)), len(lists)]
            for first, last in zip(bounds, bounds[1:], strict=False):
                pointers = faiss.swig_ptr(ids[first:last]), faiss.swig_ptr(packed[first:last])
                core.invlists.add_entries(int(lists[first]), int(last - first), *pointers)
        core.ntotal = index.ntotal
        return core
    ids = index.ids
    plain = np.array_equal(ids, np.arange(len(ids)))
    stock = core if plain else faiss.IndexIDMap2(core)  # takes an empty index only
    faiss.copy_array_to_vector(index.codes.ravel(), core.codes)
    core.ntotal = stock.ntotal = index.ntotal
    if not plain:
        faiss.copy_array_to_vector(ids, stock.id_map)
        stock.construct_rev_map()
    return stock


def faiss_query(index: Index, x: npt.ArrayLike) -> FloatArray:
    """Queries (nq, M·ksub) float32 for ``to_faiss(index)`` that stand for vectors ``x`` (nq, d); (nq, M·(ksub + dsub)) for IVF.

    Query q holds its distances to all codewords, negated; at M = 8 and 8 bits that is 8 KB. They depend on codec
    and projector only, so they serve all indexes of one kind that share these.

    Raises InvalidVectorsError, also where a distance is beyond float32 (FAISS would make NaN of it), and NotTrainedError.
    """
    _require(index)
    tangents = index._tangents(x)
    codec = index.codec
    queries = np.empty((len(tangents), codec.M, _width(index)), np.float32)
    np.negative(codec.tables_of(tangents), out=queries[:, :, : codec.ksub])
    if isinstance(index, HyperbolicIVFPQIndex):
        queries[:, :, codec.ksub :] = index._coarse(tangents).reshape(-1, codec.M, codec.dsub)
    flat = queries.reshape(len(tangents), codec.M * _width(index))
    if not np.isfinite(flat).all():
        row = int(np.flatnonzero(~np.isfinite(flat).all(axis=1))[0])
        raise InvalidVectorsError(f"row {row}: a distance to a codeword is beyond float32; FAISS can't add it up")
    return flat


def projector_from_faiss(transforms: Any) -> Projector:
    """The projector that does what a chain of trained FAISS transforms does, to float32 rounding.

    ``transforms`` : one ``faiss.VectorTransform`` or several in the order of their application. Linear ones (OPQ, PCA, ITQ,
    random rotation, RemapDimensions) are multiplied into one; centring may come anywhere, L2 normalisation before the first
    linear one only, for that is a projector's order.

    Raises InvalidParameterError for other transforms and orders, NotTrainedError for untrained ones.
    """
    import faiss

    chain = [transforms] if isinstance(transforms, faiss.VectorTransform) else list(transforms)
    if not chain or not all(isinstance(t, faiss.VectorTransform) for t in chain):
        names = ", ".join(type(t).__name__ for t in chain) or "none"
        raise InvalidParameterError(f"expected faiss.VectorTransforms, got {names}")
    steps = [step for transform in chain for step in _steps(faiss.downcast_VectorTransform(transform))]
    width = chain[0].d_in
    shift, normalize = np.zeros(width), False  # shift: minus the projector's mean
    weight: npt.NDArray[np.float64] | None = None
    bias = np.zeros(width)
    for step in steps:
        if step.matrix is not None:
            weight = step.matrix if weight is None else step.matrix @ weight
            bias = step.matrix @ bias + step.offset
        elif step.normalize:
            if weight is not None or bias.any():
                raise InvalidParameterError(
                    f"{step.name} follows a linear or centring transform; a projector normalises first: "
                    "apply the transforms yourself and convert the index below them"
                )
            normalize = True
        elif weight is None and not normalize:
            shift = shift + step.offset
        else:
            bias = bias + step.offset
    return Projector(
        [(np.eye(width) if weight is None else weight, bias)], mean=-shift if shift.any() else None, normalize=normalize
    )


# -------------------------------------------------------------------------------------------------- inside


def _read(path: str | os.PathLike[str]) -> Any:
    import faiss

    name = os.fspath(path)
    if not Path(name).is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    try:
        return faiss.read_index(name)
    except RuntimeError as error:
        raise FileFormatError(f"{name} can't be read as a faiss index: {error}") from error


def _unwrap(index: Any) -> tuple[Any, list[Any], list[IntArray]]:
    """What is inside the wrappers, the transforms in order of application, and the id maps from the innermost out."""
    import faiss

    transforms: list[Any] = []
    id_maps: list[IntArray] = []
    while True:
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain
            transforms += [chain.at(i) for i in range(chain.size())]
        elif isinstance(index, faiss.IndexIDMap):
            id_maps.insert(0, faiss.vector_to_array(index.id_map))
        else:
            return index, transforms, id_maps
        index = index.index


def _pieces(core: Any, id_maps: list[IntArray]) -> Iterator[Piece]:
    """The vectors of an IndexPQ or IndexIVFPQ, with what the id maps around it make of their ids."""
    import faiss

    M, nbits = core.pq.M, core.pq.nbits
    if isinstance(core, faiss.IndexPQ):
        codes = faiss.vector_to_array(core.codes).reshape(core.ntotal, core.code_size)
        for start in range(0, len(codes), _PIECE):
            part = codes[start : start + _PIECE]
            ids = _mapped(np.arange(start, start + len(part)), id_maps) if id_maps else None
            yield Piece(unpack(part, M, nbits), ids)
        return
    invlists = core.invlists
    sizes = np.fromiter(map(invlists.list_size, range(core.nlist)), np.int64, core.nlist)
    ends = np.cumsum(sizes)
    first = done = 0
    while first < core.nlist:
        last = min(int(np.searchsorted(ends, done + _PIECE)) + 1, core.nlist)
        lists = np.repeat(np.arange(first, last), sizes[first:last])
        codes, ids = _copied(invlists, lists, core.code_size)
        yield Piece(unpack(codes, M, nbits), _mapped(ids, id_maps), lists)
        first, done = last, int(ends[last - 1])


def _copied(invlists: Any, lists: IntArray, code_size: int) -> tuple[Codes, IntArray]:
    """Codes (n, code_size) and ids (n,) of whole inverted lists, one after the other: ``lists`` (n,) names each vector's."""
    codes, ids = np.empty((len(lists), code_size), np.uint8), np.empty(len(lists), np.int64)
    starts = np.flatnonzero(np.diff(lists, prepend=-1))
    numbers, counts = lists[starts].tolist(), np.diff(starts, append=len(lists)).tolist()
    for array, get, release in (
        (codes, invlists.get_codes, invlists.release_codes),
        (ids, invlists.get_ids, invlists.release_ids),
    ):
        target, row = array.ctypes.data, array.strides[0]
        for number, count in zip(numbers, counts, strict=True):
            pointer = get(number)
            ctypes.memmove(target, int(pointer), count * row)
            release(number, pointer)
            target += count * row
    return codes, ids


def _mapped(labels: IntArray, id_maps: list[IntArray]) -> IntArray:
    for id_map in id_maps:
        if labels.size and not (labels.min() >= 0 and labels.max() < len(id_map)):
            raise InvalidVectorsError(
                f"an IndexIDMap of {len(id_map)} ids wraps an index with ids {labels.min()} to {labels.max()}"
            )
        labels = id_map[labels]
    if labels.size and not (labels.min() >= 0 and labels.max() <= MAX_ID):
        raise InvalidVectorsError(f"ids must be from 0 to 2**63 - 2, the faiss index has {labels.min()} to {labels.max()}")
    return labels


def _width(index: Index) -> int:
    """Dimensions of a subspace of ``to_faiss(index)``: a table's row, and what the quantizer sees of the vector."""
    return index.ksub + (index.dsub if isinstance(index, HyperbolicIVFPQIndex) else 0)


def _codec(core: Any) -> HyperbolicProductQuantizer:
    """The codec of an IndexPQ or IndexIVFPQ, or the error that says why it can't be taken."""
    import faiss

    metrics: dict[int, Metric] = {faiss.METRIC_L2: "squared", faiss.METRIC_INNER_PRODUCT: "inner_product"}
    kind = type(core).__name__
    if type(core) not in (faiss.IndexPQ, faiss.IndexIVFPQ):  # subclasses mean something else by their codes
        remedy = _REMEDIES.get(kind, "add its vectors to a new index (hyperfaiss.index_factory)")
        raise InvalidParameterError(f"faiss.{kind} can't be taken, only {_TAKEN} can: {remedy}")
    if core.metric_type not in metrics:
        raise InvalidParameterError(
            f"faiss.{kind} has metric_type {core.metric_type}, only METRIC_L2 ({faiss.METRIC_L2}) and METRIC_INNER_PRODUCT "
            f"({faiss.METRIC_INNER_PRODUCT}) can be taken"
        )
    if kind == "IndexIVFPQ" and core.by_residual:
        raise InvalidParameterError(
            "faiss.IndexIVFPQ has by_residual = True: its codes are relative to list centroids. "
            "Set by_residual = False before training it, and add the vectors again"
        )
    if not 4 <= core.pq.nbits <= 8:
        raise InvalidParameterError(
            f"faiss.{kind} has nbits = {core.pq.nbits}, 4 to 8 can be taken: train it again with nbits = 8"
        )
    if not core.is_trained:
        raise NotTrainedError(f"the faiss.{kind} is not trained")
    pq = core.pq
    books = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    return HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric=metrics[core.metric_type])


class _Step(NamedTuple):
    """x → matrix · x + offset, or x + offset without a matrix, or x / |x|."""

    name: str
    matrix: npt.NDArray[np.float64] | None = None
    offset: npt.NDArray[np.float64] | float = 0.0
    normalize: bool = False


def _steps(transform: Any) -> list[_Step]:
    import faiss

    name = f"faiss.{type(transform).__name__}"
    if not transform.is_trained:
        raise NotTrainedError(f"the {name} is not trained")
    if isinstance(transform, faiss.LinearTransform):
        matrix = faiss.vector_to_array(transform.A).astype(np.float64).reshape(transform.d_out, transform.d_in)
        return [_Step(name, matrix, faiss.vector_to_array(transform.b).astype(np.float64) if transform.have_bias else 0.0)]
    if isinstance(transform, faiss.RemapDimensionsTransform):
        source = faiss.vector_to_array(transform.map)
        matrix = np.zeros((transform.d_out, transform.d_in))
        matrix[np.flatnonzero(source >= 0), source[source >= 0]] = 1  # -1: an output that stays 0
        return [_Step(name, matrix)]
    if isinstance(transform, (faiss.CenteringTransform, faiss.ITQTransform)):
        centring = _Step(name, offset=-faiss.vector_to_array(transform.mean).astype(np.float64))
        if isinstance(transform, faiss.CenteringTransform):
            return [centring]
        return [centring, _Step(name, normalize=True), *_steps(transform.pca_then_itq)]
    if isinstance(transform, faiss.NormalizationTransform) and transform.norm == 2:
        return [_Step(name, normalize=True)]
    what = f"{name} (norm = {transform.norm:g})" if isinstance(transform, faiss.NormalizationTransform) else name
    raise InvalidParameterError(
        f"{what} can't be taken, only linear transforms, centring and L2 normalisation can: "
        "apply it yourself and convert the index below it"
    )


def _require(index: Any) -> None:
    if not isinstance(index, (HyperbolicPQIndex, HyperbolicIVFPQIndex)):
        raise InvalidParameterError(f"expected a HyperbolicPQIndex or HyperbolicIVFPQIndex, got {type(index).__name__}")
    index._require_trained()

"""The flat index: every vector's code is compared with every query, exactly. And the files of all indexes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import BaseIndex, as_codec
from .checks import MAX_ID
from .codec import HyperbolicProductQuantizer, Metric
from .errors import InvalidParameterError
from .io import Reader, Source, Target, write_tensors
from .kernels.scan import BLOCK
from .model import Model, Projector
from .packing import pack, packed_size, unpack
from .storage import BlockStore, Piece

__all__ = ["HyperbolicPQIndex", "read_index", "write_index"]


class HyperbolicPQIndex(BaseIndex):
    """Exact search over product-quantized vectors in hyperbolic space, with the interface of ``faiss.IndexPQ``.

    It takes tangent vectors at the origin, (n, d) float32; or, when built from a trained model, the model's embeddings, which
    it projects itself. ``search`` returns the exact k smallest float32 ADC distances, ties to the smaller id; the answer is
    the same to the bit for any number of threads and any split of the queries over calls. What holds for ids, threads and
    errors is said at :class:`hyperfaiss.base.BaseIndex`. Ids are stored from the first that is not the vector's place on.

    Parameters
    ----------
    d, M, nbits, curvatures, metric, clip_radius, seed : those of :class:`HyperbolicProductQuantizer`.

    Attributes
    ----------
    d : dimension of the vectors that train, add and search take.
    M, nbits, ksub, dsub, code_size, ntotal, next_id : int
    is_trained, verbose : bool
    metric : str, the codec's; metric_type : int, ``faiss.METRIC_L2``.
    codec : HyperbolicProductQuantizer
    projector : Projector or None
    codes, ids : uint8 (ntotal, code_size) and int64 (ntotal,), copies.
    """

    _kind = "flat"

    def __init__(
        self,
        d: int,
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
        self._init(codec, 1)

    @classmethod
    def from_codec(cls, codec: HyperbolicProductQuantizer) -> HyperbolicPQIndex:
        """An empty index that uses ``codec`` (not a copy)."""
        self = cls.__new__(cls)
        self._init(as_codec(codec), 1)
        return self

    @classmethod
    def from_model(cls, model: str | os.PathLike[str] | Model) -> HyperbolicPQIndex:
        """An empty index for the embeddings of a trained model, given as its file or loaded.

        ``d`` is the dimension of the model's input; the index projects what it is given, without torch.
        """
        loaded = model if isinstance(model, Model) else Model.load(model)
        self = cls.from_codec(loaded.codec)
        self.projector = loaded.projector
        return self

    def train(self, x: npt.ArrayLike) -> None:
        """Fit the codebooks to ``x`` (n, d): hyperbolic k-means, see ``HyperbolicProductQuantizer.train``.

        Raises InvalidParameterError when the index holds vectors: their codes would change their meaning.
        """
        self._require_empty()
        self.codec.train(self._tangents(x))

    @classmethod
    def _from_parts(cls, reader: Reader, codec: HyperbolicProductQuantizer) -> HyperbolicPQIndex:  # noqa: ARG003
        return cls.from_codec(codec)


# -------------------------------------------------------------------------------------------------- files


def write_index(index: BaseIndex, target: Target) -> None:
    """Write a trained index to a path, or to a binary file object from its position on.

    A save to a path that is killed leaves a former file of that name whole. Codes of less than 8 bits are packed.
    """
    if not isinstance(index, BaseIndex):
        raise InvalidParameterError(f"expected an index of hyperfaiss, got {type(index).__name__}")
    index._require_trained()
    store, view = index._store, index._store.view()
    fields: dict[str, Any] = {
        "type": index._kind, "ntotal": len(store), "next_id": store.next_id, "stored_ids": store.has_ids,
    }  # fmt: skip
    tensors: dict[str, Any] = {"index.sizes": store.sizes}
    for more_fields, more_tensors in (
        index.codec.to_parts(),
        ({}, {}) if index.projector is None else index.projector.to_parts(),
        index._to_parts(),
    ):
        fields |= more_fields
        tensors |= more_tensors
    if index.nbits == 8:  # as they are in memory, list after list, so that they can be mapped
        nblocks = len(view.blocks)
        tensors["index.blocks"] = _Streamed(np.uint8, view.blocks.shape, lambda: (blocks for blocks, _ in store.blocks(view)))
        if store.has_ids:
            tensors["index.ids"] = _Streamed(np.int64, (nblocks, BLOCK), lambda: (ids for _, ids in store.blocks(view)))
    else:
        n, code_size = len(store), index.code_size
        tensors["index.codes"] = _Streamed(
            np.uint8, (n, code_size), lambda: (pack(p.codes, index.nbits) for p in store.pieces(view))
        )
        if store.has_ids:
            tensors["index.ids"] = _Streamed(np.int64, (n,), lambda: (p.ids for p in store.pieces(view)))
    write_tensors(target, "index", fields, tensors)


def read_index(source: Source, *, mmap: bool = False, verify: bool | None = None) -> Any:
    """Read an index that ``write_index`` wrote, from a path or from a binary file object's position on.

    Parameters
    ----------
    mmap : map codes and ids instead of reading them: opens at once and shares its memory with other processes. Codes of less
        than 8 bits are unpacked into memory all the same. The first change of the index copies them into memory, and the file
        is never changed; it must not be either, other than by replacing it, while the index lives.
    verify : whether the checksums of codes and ids are compared; by default if they are read and not if they are mapped, which
        would read them. The header, the shapes and all other tensors are always checked.

    Raises FileNotFoundError, FileFormatError (no index of ours), UnsupportedVersionError, CorruptFileError.
    """
    verify = not mmap if verify is None else bool(verify)
    with Reader(source, "index", map=bool(mmap), verify=verify) as reader:
        codec = HyperbolicProductQuantizer.from_parts(reader)
        kind = BaseIndex._kinds.get(reader.field("type", str))
        if kind is None:
            raise reader.corrupt(f"unknown type of index {reader.fields['type']!r}, known are {sorted(BaseIndex._kinds)}")
        index = kind._from_parts(reader, codec)
        if "projector" in reader.fields:
            projector = Projector.from_parts(reader)
            if projector.d_out != codec.d:
                raise reader.corrupt(f"projector makes {projector.d_out} dimensions, the codec takes {codec.d}")
            index.projector = projector
        index._store = _read_store(reader, codec, index._store.nlist, verify)
    return index


def _read_store(reader: Reader, codec: HyperbolicProductQuantizer, nlist: int, verify: bool) -> BlockStore:
    ntotal, next_id = reader.count("ntotal"), reader.count("next_id")
    stored_ids = reader.field("stored_ids", bool)
    sizes = reader.tensor("index.sizes", np.int64, (nlist,))
    if not ((sizes >= 0) & (sizes <= ntotal)).all() or sum(sizes.tolist()) != ntotal:
        raise reader.corrupt(f"the sizes of the lists do not add up to {ntotal}")
    if next_id > MAX_ID + 1 or (not stored_ids and (nlist > 1 or next_id < ntotal)):
        raise reader.corrupt(f"{ntotal} vectors in {nlist} lists, {'with' if stored_ids else 'without'} ids, up to {next_id}")
    nblocks = int((-(-sizes // BLOCK)).sum())
    packed = codec.nbits < 8
    ids = None
    if stored_ids:
        ids = reader.tensor("index.ids", np.int64, (ntotal,) if packed else (nblocks, BLOCK), large=True).reshape(-1)
        if verify and len(ids) and not (ids.min() >= 0 and ids.max() < next_id):
            raise reader.corrupt(f"ids should be from 0 to {next_id - 1}, are from {ids.min()} to {ids.max()}")
    if not packed:
        blocks = reader.tensor("index.blocks", np.uint8, (nblocks, codec.M, BLOCK), large=True)
        return BlockStore.from_blocks(blocks, ids, sizes, next_id)
    codes = reader.tensor("index.codes", np.uint8, (ntotal, packed_size(codec.M, codec.nbits)), large=True)
    lists = np.repeat(np.arange(nlist), sizes) if nlist > 1 else None
    return BlockStore.from_piece(Piece(unpack(codes, codec.M, codec.nbits), ids, lists), nlist, next_id)


@dataclass
class _Streamed:
    """A tensor for ``write_tensors`` that is made piece by piece."""

    dtype: Any
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]

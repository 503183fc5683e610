"""Which vectors a call is about: ids, masks over ids, and FAISS's IDSelectors, evaluated for whole indexes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from .checks import IntArray, as_id_array, as_integer
from .errors import InvalidParameterError, InvalidVectorsError
from .kernels import layout as kernels
from .kernels.runtime import run_tasks
from .search import View
from .storage import Masks, as_masks, bits_between, id_set, used_lanes

__all__ = ["SearchParameters", "admitted", "read_parameters", "restrict"]

BoolArray = npt.NDArray[np.bool_]

# Ids that a selector is asked about at a time.
_PIECE = 1 << 18


@dataclass
class SearchParameters:
    """``params`` of a search, for selectors that ``faiss.SearchParameters`` can't hold; either is accepted everywhere.

    sel : which ids may be found: a bool array with one entry for every id ever given, 0 … the largest; an integer array of ids
        (those that the index does not hold are ignored); any ``faiss.IDSelector``; None for all. Arrays cost least; an
        ``IDSelectorBatch`` does not tell its ids, so it is asked about every vector, which takes longer than many a scan.
    nprobe : lists to visit, for this search (None: the index's nprobe). A flat index ignores it.
    """

    sel: Any = None
    nprobe: int | None = None


@dataclass
class Choice:
    """A search's parameters, checked."""

    sel: Any = None
    nprobe: int | None = None
    quantizer_params: Any = None


def read_parameters(params: Any) -> Choice:
    """The parameters of a search from None, ours, ``faiss.SearchParameters`` or ``faiss.SearchParametersIVF``.

    InvalidParameterError: another type, nprobe < 1, or a field that is not supported.
    """
    if params is None:
        return Choice()
    if isinstance(params, SearchParameters):
        nprobe = None if params.nprobe is None else as_integer(params.nprobe, "nprobe", 1)
        return Choice(params.sel, nprobe)
    if isinstance(params, faiss.SearchParametersIVF):
        if params.max_codes:
            raise InvalidParameterError(f"max_codes is not supported, got {params.max_codes}: choose nprobe instead")
        nprobe = as_integer(params.nprobe, "nprobe", 1)
        return Choice(_typed(params, params.sel), nprobe, params.quantizer_params)
    if type(params) is faiss.SearchParameters:
        return Choice(_typed(params, params.sel))
    raise InvalidParameterError(
        "params must be hyperfaiss.SearchParameters, faiss.SearchParameters or faiss.SearchParametersIVF, "
        f"got {type(params).__name__}"
    )


def restrict(view: View, sel: Any, next_id: int) -> View:
    """``view`` without the vectors that ``sel`` does not admit, and without the blocks that hold none it admits."""
    masks = admitted(view, sel, next_id)
    places = np.flatnonzero(masks[view.order] if len(view.order) else masks)
    starts = np.searchsorted(places, view.starts)
    if not len(places):  # an empty order would mean all blocks
        return view._replace(
            blocks=view.blocks[:0], n=0, ids=view.ids[:0], masks=masks[:0], order=view.order[:0], starts=starts
        )
    return view._replace(masks=masks, order=view.order[places] if len(view.order) else places, starts=starts)


def admitted(view: View, sel: Any, next_id: int) -> Masks:
    """Bits (nblocks,) of the vectors in use that ``sel`` (see :class:`SearchParameters`) admits.

    ``next_id`` is one more than the largest id ever given. Raises InvalidVectorsError: a mask of another length, ids that are
    no integers; InvalidParameterError: anything else that is no selector.
    """
    used = used_lanes(view)
    if isinstance(sel, faiss.IDSelector):
        return _by_selector(view, sel) & used
    try:
        array = np.asarray(sel)
    except (TypeError, ValueError) as error:
        raise InvalidVectorsError(f"sel can't be read as an array: {error}") from error
    if array.dtype.kind == "O":
        raise InvalidParameterError(f"sel must be a bool mask, an array of ids or a faiss.IDSelector, got {type(sel).__name__}")
    if array.dtype == np.bool_:
        if array.shape != (next_id,):
            raise InvalidVectorsError(
                f"a mask needs an entry for each of the ids 0 to {next_id - 1}: shape ({next_id},), got {array.shape}"
            )
        # Lanes that are not in use may hold any id.
        return as_masks(array.take(view.ids, mode="clip") if len(view.ids) else array[: view.n], len(used)) & used
    return _by_ids(view, used, as_id_array(array, "sel"))


def _by_ids(view: View, used: Masks, ids: IntArray) -> Masks:
    masks = np.zeros(len(used), np.uint64)
    if len(view.ids):
        kernels.mark(view.ids, used, *id_set(ids)[:2], masks)
    else:
        kernels.set_bits(ids[(ids >= 0) & (ids < view.n)], masks)
    return masks


# ------------------------------------------------------------------------------------------------ FAISS


def _by_selector(view: View, sel: Any) -> Masks:
    if type(sel) is faiss.IDSelectorRange and not len(view.ids):
        return bits_between(sel.imin, sel.imax, len(view.blocks))
    member = _member(sel)
    admitted = np.empty(view.n, np.bool_)

    def ask(start: int) -> Iterator[None]:
        stop = min(start + _PIECE, view.n)
        admitted[start:stop] = member(view.ids[start:stop] if len(view.ids) else np.arange(start, stop))
        yield

    run_tasks(ask, range(0, view.n, _PIECE))
    return as_masks(admitted, len(view.blocks))


def _member(sel: Any) -> Callable[[IntArray], BoolArray]:  # noqa: PLR0911 (a case each)
    """``sel.is_member`` for arrays of ids.

    In NumPy for the classes whose fields tell who is a member; for the others FAISS loops over the ids itself.
    """
    kind = type(sel)
    if kind is faiss.IDSelectorAll:
        return lambda ids: np.ones(len(ids), np.bool_)
    if kind is faiss.IDSelectorRange:
        low, high = sel.imin, sel.imax
        return lambda ids: (ids >= low) & (ids < high)
    if kind is faiss.IDSelectorArray:
        wanted = faiss.rev_swig_ptr(sel.ids, sel.n).copy() if sel.n else np.empty(0, np.int64)
        return lambda ids: np.isin(ids, wanted)
    if kind is faiss.IDSelectorBitmap:
        return _bitmap(faiss.rev_swig_ptr(sel.bitmap, sel.n).copy() if sel.n else np.empty(0, np.uint8))
    if kind is faiss.IDSelectorNot:
        inner = _member(_typed(sel, sel.sel))
        return lambda ids: ~inner(ids)
    operators = {faiss.IDSelectorAnd: np.logical_and, faiss.IDSelectorOr: np.logical_or, faiss.IDSelectorXOr: np.logical_xor}
    if kind in operators:
        left, right, operator = _member(_typed(sel, sel.lhs)), _member(_typed(sel, sel.rhs)), operators[kind]
        return lambda ids: operator(left(ids), right(ids))
    return lambda ids: _asked(sel, ids)


def _bitmap(bitmap: npt.NDArray[np.uint8]) -> Callable[[IntArray], BoolArray]:
    bits = np.append(np.unpackbits(bitmap, bitorder="little"), np.uint8(0)).view(np.bool_)
    # Ids beyond the bitmap fall on the last bit, which is not set.
    return lambda ids: bits.take(np.where(ids >= 0, ids, len(bits)), mode="clip")


def _asked(sel: Any, ids: IntArray) -> BoolArray:
    """What FAISS says of each id, without a call from Python for each.

    An index of one number a vector, the vector's place in ``ids``, is told to remove the members; whoever is left is none.
    """
    index = faiss.IndexFlatL2(1)
    index.add(np.arange(len(ids), dtype=np.int32).view(np.float32)[:, None])
    table: Any = faiss.Int64Vector()
    faiss.copy_array_to_vector(ids, table)
    index.remove_ids(faiss.IDSelectorTranslated(table, sel))
    member = np.ones(len(ids), np.bool_)
    member[faiss.vector_to_array(index.codes).view(np.int32)] = False
    return member


def _typed(owner: Any, field: Any) -> Any:
    """``field`` of ``owner`` as the object that was put there: SWIG hands out the base class.

    FAISS keeps what its objects refer to alive in their ``__dict__``; who has the same address is the one.
    """
    if field is not None and hasattr(field, "this"):
        for candidate in _kept(vars(owner).values()):
            if hasattr(candidate, "this") and int(candidate.this) == int(field.this):
                return candidate
    return field


def _kept(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, dict):
            yield from _kept(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _kept(value)
        else:
            yield value

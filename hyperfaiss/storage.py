"""Where vectors live: one arena of blocks of 64 codes, shared by all lists, and the ids of their positions.

A block belongs to one list, and only a list's last block is part filled, so the sizes of the lists say which lanes are in
use. A flat index is one list; its ids are stored from when they cease to be the positions.

A state is never changed once it is published: adding writes behind what it covers and publishes the next one, all else
builds a new arena. So a search in another thread goes on with what it began with, and a call that fails or is interrupted
has changed nothing. Only one thread at a time may change a store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .checks import MAX_ID, IntArray
from .errors import InvalidParameterError
from .kernels import layout as kernels
from .kernels.scan import BLOCK
from .search import View

__all__ = [
    "BlockStore",
    "Codes",
    "Masks",
    "Piece",
    "as_masks",
    "bits_between",
    "gathered",
    "id_set",
    "positions_of",
    "used_lanes",
]

Codes = npt.NDArray[np.uint8]
Masks = npt.NDArray[np.uint64]

# Blocks handled at a time where many are gone through: a million vectors.
_PIECE = 16384
_NONE = np.empty(0, np.int64)
_NO_MASKS = np.empty(0, np.uint64)
_ALL_LANES = np.uint64(2**64 - 1)


class Piece(NamedTuple):
    """Vectors on their way: codes (n, M), ids (n,) or None for the next automatic ones, lists (n,) or None for list 0."""

    codes: Codes
    ids: Any = None
    lists: Any = None


class BlockStore:
    """Codes (n, M) uint8 with their ids, in ``nlist`` lists.

    Automatic ids go on from the largest id ever given. Appending is amortised O(1) a vector: room grows by 1 % or 64 KB, in
    place where the system can. Arrays that can't be written, because they are a file's, are copied by the first change.
    """

    def __init__(self, M: int, nlist: int = 1) -> None:
        self.M, self.nlist = M, nlist
        self._state = self._empty()
        self._viewed: tuple[_State, View] | None = None

    @classmethod
    def from_piece(cls, piece: Piece, nlist: int, next_id: int) -> BlockStore:
        """A store of these vectors."""
        self = cls(piece.codes.shape[1], nlist)
        self.append([piece])
        self._state = self._state._replace(next_id=next_id)
        return self

    @classmethod
    def from_blocks(cls, blocks: Codes, ids: IntArray | None, sizes: IntArray, next_id: int) -> BlockStore:
        """Take over blocks (nblocks, M, 64) that lie list after list, with ids (64 · nblocks,) of their lanes."""
        self = cls(blocks.shape[1], len(sizes))
        counts = _blocks_for(sizes)
        owners = np.repeat(np.arange(len(sizes), dtype=np.int32), counts) if self.nlist > 1 else self._state.arena.owners
        arena = _Arena(blocks, ids, owners)
        self._state = _State(arena, int(sizes.sum()), len(blocks), next_id, sizes, np.cumsum(counts) - 1)
        return self

    def __len__(self) -> int:
        return self._state.n

    def __getstate__(self) -> dict[str, Any]:
        state = self._state
        nblocks, arena = state.nblocks, state.arena
        ids = None if arena.ids is None else arena.ids[: nblocks * BLOCK].copy()
        used = _Arena(arena.blocks[:nblocks].copy(), ids, arena.owners[:nblocks].copy())
        return {"M": self.M, "nlist": self.nlist, "_state": state._replace(arena=used), "_viewed": None}

    def copy(self) -> BlockStore:
        """A store of the same vectors that lives its own life."""
        twin = BlockStore(self.M, self.nlist)
        twin.__dict__.update(self.__getstate__())
        return twin

    @property
    def next_id(self) -> int:
        """The next automatic id: one more than the largest ever given."""
        return self._state.next_id

    @property
    def has_ids(self) -> bool:
        """Whether ids are stored; if not, they are the positions."""
        return self._state.arena.ids is not None

    @property
    def sizes(self) -> IntArray:
        """Vectors in each list (nlist,), not to be written to."""
        return self._state.sizes

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, with their room to grow."""
        state = self._state
        arena = state.arena
        ids = 0 if arena.ids is None else arena.ids.nbytes
        return arena.blocks.nbytes + ids + arena.owners.nbytes + state.sizes.nbytes + state.tails.nbytes

    def view(self) -> View:
        """What a search reads: the present state."""
        state = self._state  # first, for its arrays may be exchanged for longer ones at any moment
        viewed = self._viewed
        if viewed is not None and viewed[0] is state:
            return viewed[1]
        nblocks, ids = state.nblocks, state.arena.ids
        blocks = state.arena.blocks[:nblocks]
        if self.nlist == 1:
            stored = _NONE if ids is None else ids[: nblocks * BLOCK]
            return View(blocks, state.n, stored, _NO_MASKS, _NONE, np.array([0, nblocks]))
        assert ids is not None
        starts = np.concatenate([[0], np.cumsum(_blocks_for(state.sizes))])
        order = np.empty(nblocks, np.int64)
        kernels.order_by_list(state.arena.owners[:nblocks], starts[:-1].copy(), order)
        masks = np.full(nblocks, _ALL_LANES)
        filled = state.sizes > 0
        masks[state.tails[filled]] = _lanes_below((state.sizes[filled] - 1) % BLOCK + 1)
        view = View(blocks, nblocks * BLOCK, ids[: nblocks * BLOCK], masks, order, starts)
        self._viewed = state, view
        return view

    # ---------------------------------------------------------------------------------------------- changes

    def append(self, pieces: Iterable[Piece]) -> None:
        """Add vectors: all pieces or, if one of them fails, none."""
        # Arrays that a view holds can't grow in place.
        self._viewed = None
        self._state = self._extended(self._state, pieces)

    def remove(self, masks: Masks) -> int:
        """Remove the positions whose bits are set in ``masks`` (nblocks,), all in use; returns how many. The rest closes up."""
        view = self.view()
        removed = int(_as_lanes(masks).sum())
        if removed:
            self._state = self._without(view, masks)
        return removed

    def replace(self, positions: IntArray, piece: Piece) -> None:
        """Give the vectors at ``positions`` the codes and, where there are several, the lists of ``piece``."""
        state = self._state
        if self.nlist == 1:
            arena = _Arena(state.arena.blocks[: state.nblocks].copy(), state.arena.ids, state.arena.owners)
            kernels.scatter(piece.codes, positions, arena.blocks)
            self._state = state._replace(arena=arena)
            return
        view = self.view()
        masks = np.zeros(state.nblocks, np.uint64)
        kernels.set_bits(positions, masks)
        piece = piece._replace(ids=view.ids[positions])
        self._state = self._extended(self._without(view, masks), [piece])

    # ---------------------------------------------------------------------------------------------- access

    def pieces(self, view: View, masks: Masks | None = None) -> Iterator[Piece]:
        """All vectors of ``view``, or those that ``masks`` admits, with ids and lists, list after list."""
        masks = used_lanes(view) if masks is None else masks
        order = view.order if len(view.order) else np.arange(len(view.blocks))
        owners = np.repeat(np.arange(len(view.starts) - 1), np.diff(view.starts))
        for start in range(0, len(order), _PIECE):
            blocks = order[start : start + _PIECE]
            places = np.flatnonzero(_as_lanes(masks[blocks]))
            which = places // BLOCK
            positions = blocks[which] * BLOCK + places % BLOCK
            ids = view.ids[positions] if len(view.ids) else positions
            yield Piece(gathered(view, positions), ids, owners[start : start + _PIECE][which])

    def blocks(self, view: View) -> Iterator[tuple[Codes, IntArray]]:
        """All blocks of ``view`` (n, M, 64), list after list, and their ids (n, 64), 0 in lanes that are not in use."""
        order = view.order if len(view.order) else np.arange(len(view.blocks))
        used = used_lanes(view)
        for start in range(0, len(order), _PIECE):
            numbers = order[start : start + _PIECE]
            ids = view.ids.reshape(-1, BLOCK)[numbers] if len(view.ids) else _NONE
            yield view.blocks[numbers], np.where(_as_lanes(used[numbers]), ids, 0) if len(view.ids) else _NONE

    def find(self, view: View, ids: IntArray) -> IntArray:
        """The first position of each id (n,), −1 where there is none."""
        if not len(view.ids):
            return np.where((ids >= 0) & (ids < view.n), ids, -1)
        keys, inverse = np.unique(ids, return_inverse=True)
        found = np.full(len(keys), -1)
        kernels.find(view.ids, used_lanes(view), *id_set(keys), found)
        return found[inverse]

    # ---------------------------------------------------------------------------------------------- inside

    def _empty(self) -> _State:
        ids = np.zeros(0, np.int64) if self.nlist > 1 else None
        arena = _Arena(np.zeros((0, self.M, BLOCK), np.uint8), ids, np.zeros(0, np.int32))
        return _State(arena, 0, 0, 0, np.zeros(self.nlist, np.int64), np.full(self.nlist, -1))

    def _without(self, view: View, masks: Masks) -> _State:
        """The state without these positions: a new arena, list after list, each closed up from its first gap on.

        Blocks before the gap are copied as they are, so that taking little away costs little more than a copy.
        """
        order = view.order if len(view.order) else np.arange(len(view.blocks))
        owners = np.repeat(np.arange(self.nlist), np.diff(view.starts))
        removed = _as_lanes(masks[order]).sum(1)
        before = np.concatenate([[0], np.cumsum(removed)])
        sizes = self._state.sizes - np.diff(before[view.starts])
        counts = _blocks_for(sizes)
        firsts = np.cumsum(counts) - counts
        moves = before[1:] > before[view.starts[:-1]][owners]
        blocks = np.zeros((int(counts.sum()), self.M, BLOCK), np.uint8)
        ids = np.zeros(len(blocks) * BLOCK, np.int64) if len(view.ids) else None

        stay = np.flatnonzero(~moves)
        there = firsts[owners[stay]] + stay - view.starts[owners[stay]]
        for start in range(0, len(stay), _PIECE):
            rows = slice(start, start + _PIECE)
            blocks[there[rows]] = view.blocks[order[stay[rows]]]
            if ids is not None:
                ids.reshape(-1, BLOCK)[there[rows]] = view.ids.reshape(-1, BLOCK)[order[stay[rows]]]

        room = (firsts + np.bincount(owners[stay], minlength=self.nlist)) * BLOCK  # each list's next position
        kept, pack = used_lanes(view) & ~masks, np.flatnonzero(moves)
        for start in range(0, len(pack), _PIECE):
            numbers = pack[start : start + _PIECE]
            places = np.flatnonzero(_as_lanes(kept[order[numbers]]))
            lists = owners[numbers[places // BLOCK]]
            old = order[numbers[places // BLOCK]] * BLOCK + places % BLOCK
            added = np.bincount(lists, minlength=self.nlist)
            new = (room - (np.cumsum(added) - added))[lists] + np.arange(len(old))
            room += added
            kernels.scatter(gathered(view, old), new, blocks)
            if ids is None and not np.array_equal(new, old):
                ids = np.arange(len(blocks) * BLOCK)
            if ids is not None:
                ids[new] = view.ids[old] if len(view.ids) else old
        n = int(sizes.sum())
        if ids is not None and self.nlist == 1 and (not n or (ids[n - 1] == n - 1 and np.array_equal(ids[:n], np.arange(n)))):
            ids = None  # as they are the positions
        return BlockStore.from_blocks(blocks, ids, sizes, self._state.next_id)._state

    def _extended(self, state: _State, pieces: Iterable[Piece]) -> _State:
        """``state`` with more vectors in its arena, behind what it covers."""
        for codes, ids, lists in pieces:
            if ids is None and state.next_id + len(codes) - 1 > MAX_ID:
                raise InvalidParameterError(
                    f"{len(codes)} automatic ids from {state.next_id} on would go beyond 2**63 - 2: use add_with_ids"
                )
            for start in range(0, len(codes), _PIECE * BLOCK):
                rows = slice(start, start + _PIECE * BLOCK)
                state = self._extended_by(
                    state, codes[rows], None if ids is None else ids[rows], None if lists is None else lists[rows]
                )
        return state

    def _extended_by(self, state: _State, codes: Codes, ids: IntArray | None, lists: IntArray | None) -> _State:
        n, arena = len(codes), state.arena
        if not n:
            return state
        lists = np.zeros(n, np.int64) if lists is None else lists
        last_id = state.next_id + n - 1 if ids is None else int(ids.max())
        added = np.bincount(lists, minlength=self.nlist)
        arena.reserve(state.nblocks + int((_blocks_for(state.sizes + added) - _blocks_for(state.sizes)).sum()), self.nlist > 1)
        sizes, tails, nblocks = state.sizes.copy(), state.tails.copy(), np.array([state.nblocks])
        positions = np.empty(n, np.int64)
        kernels.place(lists, sizes, tails, nblocks, arena.owners, positions)
        kernels.scatter(codes, positions, arena.blocks)
        if ids is None and (arena.ids is not None or state.next_id != state.n):
            ids = np.arange(state.next_id, state.next_id + n)
        if arena.ids is None and ids is not None and not np.array_equal(ids, positions):
            arena.ids = np.arange(len(arena.blocks) * BLOCK)
        if arena.ids is not None and ids is not None:
            arena.ids[positions] = ids
        next_id = max(state.next_id, last_id + 1)
        return _State(arena, state.n + n, int(nblocks[0]), next_id, sizes, tails)


class _Arena:
    """Arrays with room to grow: blocks (capacity, M, 64), ids (64 · capacity,) or None, owners, the list of each block."""

    def __init__(self, blocks: Codes, ids: IntArray | None, owners: npt.NDArray[np.int32]) -> None:
        self.blocks, self.ids, self.owners = blocks, ids, owners

    def reserve(self, nblocks: int, owned: bool) -> None:
        """See to it that there are so many blocks and that they can be written."""
        have, M = self.blocks.shape[:2]
        nbytes = BLOCK * (M if self.ids is None else M + 8)
        spare = max(have // 100, (64 << 10) // nbytes, 1)
        nblocks = max(nblocks, have + spare) if nblocks > have else have
        self._grow("blocks", (nblocks, M, BLOCK))
        if self.ids is not None:
            self._grow("ids", (nblocks * BLOCK,))
        if owned:
            self._grow("owners", (nblocks,))

    def _grow(self, name: str, shape: tuple[int, ...]) -> None:
        writeable = getattr(self, name).flags.writeable
        if getattr(self, name).shape == shape and writeable:
            return
        try:
            if not writeable:
                raise ValueError("a file's")
            getattr(self, name).resize(shape)  # realloc: moves pages, not bytes, and fills with 0
        except ValueError:  # a file's, or a search holds a view: leave theirs alone
            array = getattr(self, name)
            grown = np.zeros(shape, array.dtype)
            grown[: len(array)] = array
            setattr(self, name, grown)


class _State(NamedTuple):
    """n vectors in the first nblocks blocks of the arena. ``tails`` (nlist,): the last block of each list."""

    arena: _Arena
    n: int
    nblocks: int
    next_id: int
    sizes: IntArray
    tails: IntArray


def gathered(view: View, positions: IntArray) -> Codes:
    """Codes (n, M) at ``positions`` (n,)."""
    codes = np.empty((len(positions), view.blocks.shape[1]), np.uint8)
    kernels.gather(view.blocks, positions, codes)
    return codes


def used_lanes(view: View) -> Masks:
    """The lanes in use, as bits (nblocks,)."""
    if len(view.masks) or not view.n:
        return view.masks
    masks = np.full(len(view.blocks), _ALL_LANES)
    masks[-1] = _lanes_below(np.array([(view.n - 1) % BLOCK + 1]))[0]
    return masks


def as_masks(admitted: npt.NDArray[np.bool_], nblocks: int) -> Masks:
    """Bits (nblocks,) of one truth value for each position; positions beyond are not admitted."""
    masks = np.zeros(nblocks, np.uint64)
    packed = np.packbits(admitted, bitorder="little")
    masks.view(np.uint8)[: len(packed)] = packed
    return masks


def id_set(ids: IntArray) -> tuple[Masks, IntArray, IntArray]:
    """What the kernels look ids up in: filter, keys, and the place of each key in ``ids``. Negative ids are left out."""
    size = 1 << (2 * len(ids) + 1).bit_length()
    bits, keys, numbers = np.zeros(max(1, size // 8), np.uint64), np.full(size, -1), np.full(size, -1)
    kernels.fill_set(ids, bits, keys, numbers)
    return bits, keys, numbers


def bits_between(low: int, high: int, nblocks: int) -> Masks:
    """Bits (nblocks,) of the positions low … high − 1, as far as they exist."""
    low, high = max(low, 0), min(high, nblocks * BLOCK)
    masks = np.zeros(nblocks, np.uint64)
    if low < high:
        first, last = low // BLOCK, (high - 1) // BLOCK
        masks[first : last + 1] = _ALL_LANES
        masks[first] &= _ALL_LANES << np.uint64(low % BLOCK)
        masks[last] &= _ALL_LANES >> np.uint64((-high) % BLOCK)
    return masks


def positions_of(masks: Masks) -> IntArray:
    """The positions whose bits are set, in order."""
    return np.flatnonzero(_as_lanes(masks))


def _as_lanes(masks: Masks) -> npt.NDArray[np.bool_]:
    """Truth values (n, 64) of bits (n,)."""
    return np.unpackbits(masks.view(np.uint8), bitorder="little").view(np.bool_).reshape(-1, BLOCK)


def _lanes_below(count: IntArray) -> Masks:
    """Masks of the first 1 to 64 lanes."""
    masks: Masks = _ALL_LANES >> (BLOCK - count).astype(np.uint64)
    return masks


def _blocks_for(n: IntArray) -> IntArray:
    blocks: IntArray = -(-n // BLOCK)
    return blocks

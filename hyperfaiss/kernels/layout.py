"""Where codes lie: between rows of codes and blocks of 64 transposed vectors, between bits and bytes, and looking ids up.

A position is 64 · block + lane. No argument is checked.
"""

from __future__ import annotations

import numpy as np
from numba import types

from .runtime import device_function, kernel
from .scan import BLOCK

_BYTES = types.Array(types.uint8, 2, "C", readonly=True)
_BLOCKS = types.Array(types.uint8, 3, "C", readonly=True)
_IDS = types.Array(types.int64, 1, "C", readonly=True)
_MASKS = types.Array(types.uint64, 1, "C", readonly=True)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_FREE = -1  # no id is negative


# ------------------------------------------------------------------------------------------------ blocks


@kernel(types.void(_IDS, types.int64[::1], types.int64[::1], types.int64[::1], types.int32[::1], types.int64[::1]))
def place(lists, sizes, tails, nblocks, owners, positions):
    """Give each new vector, of list ``lists[i]``, the next position of its list: in the list's last block or in a new one.

    ``sizes`` and ``tails`` (nlist,), vectors and last block of each list, ``nblocks`` (1,) and ``owners``, the list of each
    block, are brought up to date. Empty ``owners``: there is one list, and nobody asks.
    """
    for i in range(lists.shape[0]):
        number = lists[i]
        lane = sizes[number] % BLOCK
        if lane == 0:
            tails[number] = nblocks[0]
            if owners.shape[0]:
                owners[nblocks[0]] = number
            nblocks[0] += 1
        positions[i] = tails[number] * BLOCK + lane
        sizes[number] += 1


@kernel(types.void(_BYTES, _IDS, types.uint8[:, :, ::1]))
def scatter(codes, positions, blocks):
    """Write rows of ``codes`` (n, M) to their positions in ``blocks``."""
    for i in range(codes.shape[0]):
        b, lane = positions[i] // BLOCK, positions[i] % BLOCK
        for m in range(codes.shape[1]):
            blocks[b, m, lane] = codes[i, m]


@kernel(types.void(_BLOCKS, _IDS, types.uint8[:, ::1]))
def gather(blocks, positions, codes):
    """Read rows of ``codes`` (n, M) from their positions in ``blocks``."""
    for i in range(codes.shape[0]):
        b, lane = positions[i] // BLOCK, positions[i] % BLOCK
        for m in range(codes.shape[1]):
            codes[i, m] = blocks[b, m, lane]


@kernel(types.void(types.Array(types.int32, 1, "C", readonly=True), types.int64[::1], types.int64[::1]))
def order_by_list(owners, cursors, order):
    """``order`` = the blocks list after list, each list's in order of number; ``cursors`` begins as each list's first place."""
    for b in range(owners.shape[0]):
        order[cursors[owners[b]]] = b
        cursors[owners[b]] += 1


# ------------------------------------------------------------------------------------------------ bits


@kernel(types.void(_BYTES, types.int64, types.uint8[:, ::1]))
def pack(codes, nbits, packed):
    """Rows of M codes below 2**nbits, one after the other from the first byte's lowest bit on: as FAISS's BitstringWriter."""
    for i in range(codes.shape[0]):
        packed[i] = 0
        for m in range(codes.shape[1]):
            byte, shift = m * nbits // 8, m * nbits % 8
            packed[i, byte] |= np.uint8((codes[i, m] << shift) & 0xFF)
            if shift + nbits > 8:
                packed[i, byte + 1] |= np.uint8(codes[i, m] >> (8 - shift))


@kernel(types.void(_BYTES, types.int64, types.uint8[:, ::1]))
def unpack(packed, nbits, codes):
    """The inverse of ``pack``."""
    for i in range(codes.shape[0]):
        for m in range(codes.shape[1]):
            byte, shift = m * nbits // 8, m * nbits % 8
            value = np.int64(packed[i, byte]) >> shift
            if shift + nbits > 8:
                value |= np.int64(packed[i, byte + 1]) << (8 - shift)
            codes[i, m] = np.uint8(value & ((1 << nbits) - 1))


# ------------------------------------------------------------------------------------------------ ids


# A set of ids is a hash table, ``keys`` and their ``numbers``, and before it a filter of one bit an id, which fits into
# the first-level cache and turns nearly all strangers away. Sizes are powers of two.


@device_function
def _passes(key, bits):
    """Whether ``key`` may be in the set."""
    at = (np.uint64(key) * _GOLDEN) >> np.uint64(20)
    word = bits[(at >> np.uint64(6)) & np.uint64(bits.shape[0] - 1)]
    return (word >> (at & np.uint64(63))) & _ONE


@device_function
def _slot(key, keys):
    """Where ``key`` is in the hash table, or the free place where it would be."""
    last = np.uint64(keys.shape[0] - 1)
    at = ((np.uint64(key) * _GOLDEN) >> np.uint64(32)) & last
    while keys[at] != key and keys[at] != _FREE:
        at = (at + _ONE) & last
    return at


@kernel(types.void(_IDS, types.uint64[::1], types.int64[::1], types.int64[::1]))
def fill_set(ids, bits, keys, numbers):
    """Make a set of the ``ids`` >= 0, from ``bits`` of 0 and ``keys``, more than there are ids, of −1."""
    for i in range(ids.shape[0]):
        if ids[i] >= 0:
            slot = _slot(ids[i], keys)
            keys[slot] = ids[i]
            numbers[slot] = i
            at = (np.uint64(ids[i]) * _GOLDEN) >> np.uint64(20)
            bits[(at >> np.uint64(6)) & np.uint64(bits.shape[0] - 1)] |= _ONE << (at & np.uint64(63))


@kernel(types.void(_IDS, _MASKS, _MASKS, _IDS, types.uint64[::1]))
def mark(ids, used, bits, keys, marked):
    """``marked`` (nblocks,) gets a bit for each used position whose id is in the set."""
    for b in range(used.shape[0]):
        found = np.uint64(0)
        for lane in range(min(BLOCK, ids.shape[0] - b * BLOCK)):
            key = ids[b * BLOCK + lane]
            if _passes(key, bits) and keys[_slot(key, keys)] == key:
                found |= _ONE << np.uint64(lane)
        marked[b] = found & used[b]


@kernel(types.void(_IDS, _MASKS, _MASKS, _IDS, _IDS, types.int64[::1]))
def find(ids, used, bits, keys, numbers, found):
    """``found[number]`` = the first used position with the id of that number; the others are left alone."""
    for b in range(used.shape[0]):
        for lane in range(min(BLOCK, ids.shape[0] - b * BLOCK)):
            key = ids[b * BLOCK + lane]
            if _passes(key, bits) and (used[b] >> np.uint64(lane)) & _ONE:
                slot = _slot(key, keys)
                if keys[slot] == key and found[numbers[slot]] < 0:
                    found[numbers[slot]] = b * BLOCK + lane


@kernel(types.void(_IDS, types.uint64[::1]))
def set_bits(positions, masks):
    """Set the bit of each position."""
    for i in range(positions.shape[0]):
        masks[positions[i] // BLOCK] |= _ONE << np.uint64(positions[i] % BLOCK)

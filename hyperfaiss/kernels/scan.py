"""The exact top-k scan over blocked codes.

What "the distance" of a stored vector is, to the bit: the float32 sum ``((T[0][c₀] + T[1][c₁]) + T[2][c₂]) + …`` over the
subspaces m = 0 … M−1 in that order, each addition rounded to float32. Vectors with equal distances are ordered by id, the
smaller first. Every result follows from these two rules alone, so no split of the work over threads, blocks, lists or batches
and no SIMD level can change it.

**Two passes over a block.** The first finds lanes that may be nearer than the query's limit, with lower bounds (``simd``; at
level ``generic`` with the exact distances themselves). The second computes the exact distance of these few and keeps those that
come before the limit (distance, id).

**Keeping the best.** Each query has a buffer of at least 2·keep + 64 entries. Whoever beats the limit is appended; a full
buffer is cut to the ``keep`` best by selection, the worst of which becomes the new limit. Early limits are poor, so the first
blocks fill buffers quickly; later blocks have few candidates.

**The byte table.** With Lₘ the least entry of subspace m and τ the limit, ``small[m][c] = floor((T[m][c] − Lₘ) · s)``, at most
255, where s = 254 / (τ' − Σ Lₘ) and τ' is τ plus whatever the rounding of a float32 sum can hide. For a vector whose float32
distance is τ or less, Σ (T − L) ≤ τ' − Σ L, so its sum of bytes is 254 or less: it is never left out. ``s`` is itself made a
little smaller than that, so that no rounding of the products matters.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from . import simd
from .runtime import device_function, kernel

BLOCK = simd.BLOCK  # vectors in a block of codes
EMPTY = np.iinfo(np.int64).max

# A query's state. It takes what comes before (limit, limit_id) in the order of (distance, id); ``count`` entries of its buffer
# are in use. ``low`` is the sum of the least entries of its table, ``slack`` what may be lost in a float32 sum: a part of the
# limit if no entry is negative (relative), else an absolute amount (hidden). ``fresh``: the byte table belongs to this limit.
STATE = np.dtype(
    [
        ("limit_id", np.int64),
        ("count", np.int64),
        ("low", np.float64),
        ("relative", np.float64),
        ("hidden", np.float64),
        ("limit", np.float32),
        ("fresh", np.int32),
    ],
    align=True,
)

# Codes that all queries of a call scan before moving on: they stay in the second-level cache.
_GROUP_BYTES = 64 << 10
# Relative error that one float32 addition is allowed here: four times what it can have.
_ROUNDING = 2.0**-22
_STATES = types.Array(numba.from_dtype(STATE), 1, "C")
_TABLES = types.Array(types.float32, 3, "C", readonly=True)
_LOWS = types.float32[:, ::1]
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ONE = np.uint64(1)


# ------------------------------------------------------------------------------------------------ the buffer


@device_function
def _before(d, i, e, j):
    return d < e or (d == e and i < j)


@device_function
def _swap(D, I, a, b):  # noqa: E741
    D[a], D[b] = D[b], D[a]
    I[a], I[b] = I[b], I[a]


@device_function
def _partition(D, I, first, last):  # noqa: E741
    """Split entries first … last (at least 2) about one of them: returns a ``j`` in [first, last) that ends the left part."""
    middle = (first + last) // 2
    # The median of three keeps sorted input, the usual one, from being the worst case.
    if _before(D[middle], I[middle], D[first], I[first]):
        _swap(D, I, middle, first)
    if _before(D[last], I[last], D[first], I[first]):
        _swap(D, I, last, first)
    if _before(D[last], I[last], D[middle], I[middle]):
        _swap(D, I, last, middle)
    d, i = D[middle], I[middle]
    left, right = first - 1, last + 1
    while True:
        left += 1
        while _before(D[left], I[left], d, i):
            left += 1
        right -= 1
        while _before(d, i, D[right], I[right]):
            right -= 1
        if left >= right:
            return right
        _swap(D, I, left, right)


@device_function
def _select(D, I, count, keep):  # noqa: E741
    """Bring the ``keep`` first of ``count`` entries by (distance, id) to the front, the last of them to keep − 1."""
    first, last, target = 0, count - 1, keep - 1
    while first < last:
        split = _partition(D, I, first, last)
        if target <= split:
            last = split
        else:
            first = split + 1


@device_function
def _sort(D, I, count):  # noqa: E741
    """Sort entries 0 … count − 1 by (distance, id)."""
    stack = np.empty((64, 2), np.int64)
    stack[0, 0], stack[0, 1] = 0, count - 1
    depth = 1
    while depth:
        depth -= 1
        first, last = stack[depth, 0], stack[depth, 1]
        while last - first > 16:
            split = _partition(D, I, first, last)
            # The longer part waits, so the stack holds at most log2(count) parts.
            if split - first > last - split:
                stack[depth, 0], stack[depth, 1] = first, split
                first = split + 1
            else:
                stack[depth, 0], stack[depth, 1] = split + 1, last
                last = split
            depth += 1
        for a in range(first + 1, last + 1):
            d, i = D[a], I[a]
            b = a
            while b > first and _before(d, i, D[b - 1], I[b - 1]):
                D[b], I[b] = D[b - 1], I[b - 1]
                b -= 1
            D[b], I[b] = d, i


@device_function
def _cut(state, D, I, keep):  # noqa: E741
    """Cut a buffer to its ``keep`` best, which sets the limit; a buffer with fewer stays as it is."""
    if state["count"] >= keep:
        _select(D, I, state["count"], keep)
        state["count"] = keep
        state["limit"], state["limit_id"] = D[keep - 1], I[keep - 1]
        state["fresh"] = 0


# ------------------------------------------------------------------------------------------------ the byte table


@kernel(types.void(_TABLES, _LOWS, _STATES))
def prepare(tables, lows, states):
    """Set up queries: ``lows[q, m]`` = least entry of ``tables[q, m]``, and what follows from them in ``states[q]``."""
    nq, M, ksub = tables.shape
    lanes = 16  # as many running minima as let LLVM use its vectors; ksub is a multiple
    low, high = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for q in range(nq):
        total, hidden, signed = 0.0, 0.0, False
        for m in range(M):
            for i in range(lanes):
                low[i] = high[i] = tables[q, m, i]
            for j in range(lanes, ksub, lanes):
                for i in range(lanes):
                    value = tables[q, m, j + i]
                    low[i] = value if value < low[i] else low[i]
                    high[i] = value if value > high[i] else high[i]
            least, most = low[0], high[0]
            for i in range(1, lanes):
                least, most = min(least, low[i]), max(most, high[i])
            lows[q, m] = least
            total += least
            hidden += max(abs(least), abs(most))
            signed = signed or least < 0
        state = states[q]
        state["low"] = total
        state["relative"] = M * _ROUNDING
        state["hidden"] = M * _ROUNDING * hidden if signed else 0.0
        state["fresh"] = 0


@device_function
def _quantise(state, table, lows, small):
    """Fill the byte table for the query's limit."""
    M, ksub = table.shape
    limit = np.float64(state["limit"])
    room = limit + abs(limit) * state["relative"] + state["hidden"] - state["low"]
    state["fresh"] = 1
    if not abs(room) < 1e38:  # entries that are infinite, or whose differences may be: leave nothing out
        for m in range(M):
            for j in range(ksub):
                small[m, j] = 0
        return
    # Of two sums without room between them, a scale beyond float32 would make nan of 0 · inf.
    scale = np.float32(min(254 * (1 - 2.0**-20) / room, 1e38)) if room > 0 else np.float32(1e38)
    for m in range(M):
        least = lows[m]
        for j in range(ksub):
            scaled = (table[m, j] - least) * scale
            small[m, j] = np.uint8(scaled if scaled < 255 else np.float32(255))


# ------------------------------------------------------------------------------------------------ the scan


@device_function
def _distance(table, block, lane):
    total = table[0, block[0, lane]]
    for m in range(1, table.shape[0]):
        total += table[m, block[m, lane]]
    return total


@device_function
def _candidates_generic(block, table, small, limit):  # noqa: ARG001
    """Mask of the lanes whose distance is at most ``limit``."""
    mask = np.uint64(0)
    # Eight sums at a time in registers, their codes loaded as one word: twice as fast as the gathers that LLVM makes of a loop.
    words = block.view(np.uint64)
    byte = np.uint64(0xFF)
    for w in range(BLOCK // 8):
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for m in range(table.shape[0]):
            row, codes = table[m], words[m, w]
            s0 += row[codes & byte]
            s1 += row[codes >> np.uint64(8) & byte]
            s2 += row[codes >> np.uint64(16) & byte]
            s3 += row[codes >> np.uint64(24) & byte]
            s4 += row[codes >> np.uint64(32) & byte]
            s5 += row[codes >> np.uint64(40) & byte]
            s6 += row[codes >> np.uint64(48) & byte]
            s7 += row[codes >> np.uint64(56)]
        for i, s in enumerate((s0, s1, s2, s3, s4, s5, s6, s7)):
            mask |= np.uint64(s <= limit) << np.uint64(8 * w + i)
    return mask


def _candidates(bounds: dict[int, Any]) -> Any:
    """The same by lower bounds: a mask of the lanes whose distance may be at most the limit of the byte table."""
    bound16, bound32, bound64, bound128, bound256 = (bounds[ksub] for ksub in simd.SIZES)

    @device_function
    def candidates(block, table, small, limit):  # noqa: ARG001
        ksub = table.shape[1]
        if ksub == 256:
            return bound256(block, small)
        if ksub == 128:
            return bound128(block, small)
        if ksub == 64:
            return bound64(block, small)
        if ksub == 32:
            return bound32(block, small)
        return bound16(block, small)

    return candidates


@device_function
def _few(mask):
    """Whether a mask has so few bits that their distances cost less than bounds of all lanes."""
    for _ in range(4):
        mask &= mask - _ONE
    return mask == 0


def _make_scan(candidates: Any, by_bytes: bool) -> Any:
    """The scan with this function for the first pass, which needs the byte table or not.

    (Numba could not cache the scan if it took them at run time.)
    """

    @device_function
    def scan(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep):  # noqa: E741
        group = max(1, _GROUP_BYTES // (blocks.shape[1] * BLOCK))
        for v in range(visits.shape[0]):
            for start in range(visits[v, 0], visits[v, 1], group):
                stop = min(start + group, visits[v, 1])
                for r in range(visits[v, 2], visits[v, 3]):
                    q = rows[r]
                    state, table, buffer_D, buffer_I = states[q], tables[q], D[q], I[q]
                    for at in range(start, stop):
                        b = order[at] if order.shape[0] else at
                        if order.shape[0] and at + 1 < stop:  # the processor foresees blocks that follow each other only
                            simd.prefetch(blocks[order[at + 1]])
                        mask = masks[b] if masks.shape[0] else _ALL >> np.uint64(max(0, (b + 1) * BLOCK - n))
                        if state["limit"] < np.inf and not _few(mask):
                            if by_bytes and not state["fresh"]:
                                _quantise(state, table, lows[q], small[q])
                            mask &= candidates(blocks[b], table, small[q], state["limit"])
                        while mask:
                            lane = simd.trailing_zeros(mask)
                            mask &= mask - _ONE
                            d = _distance(table, blocks[b], lane)
                            i = ids[b * BLOCK + lane] if ids.shape[0] else b * BLOCK + lane
                            if _before(d, i, state["limit"], state["limit_id"]):
                                buffer_D[state["count"]], buffer_I[state["count"]] = d, i
                                state["count"] += 1
                                if state["count"] == buffer_D.shape[0]:
                                    _cut(state, buffer_D, buffer_I, keep)

    return scan


_scan_generic = _make_scan(_candidates_generic, by_bytes=False)
_scan_avx2 = _make_scan(_candidates(simd.bound_avx2), by_bytes=True)
_scan_vbmi = _make_scan(_candidates(simd.bound_vbmi), by_bytes=True)


_SCAN = types.void(
    types.Array(types.uint8, 3, "C", readonly=True),
    types.int64,
    types.Array(types.int64, 1, "C", readonly=True),
    types.Array(types.uint64, 1, "C", readonly=True),
    types.Array(types.int64, 1, "C", readonly=True),
    types.Array(types.int64, 2, "C", readonly=True),
    types.Array(types.int64, 1, "C", readonly=True),
    _TABLES,
    _LOWS,
    types.uint8[:, :, ::1],
    _STATES,
    types.float32[:, ::1],
    types.int64[:, ::1],
    types.int64,
)


@kernel(_SCAN)
def scan_generic(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep):  # noqa: E741
    """Let queries look at blocks of codes, and put what comes before their limits into their buffers.

    blocks (nblocks, M, BLOCK) codes; ``n``, ``ids``, ``masks``, ``order``: see ``search.View``. Each row (first, last, r0, r1)
    of ``visits`` sends the queries rows[r0:r1] to the blocks order[first:last]. tables (nq, M, ksub), lows (nq, M), small
    (nq, M, ksub) and states (nq,) are the queries', D and I (nq, capacity > keep) their buffers.
    """
    _scan_generic(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep)


@kernel(_SCAN)
def scan_avx2(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep):  # noqa: E741
    """``scan_generic`` with AVX2."""
    _scan_avx2(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep)


@kernel(_SCAN)
def scan_vbmi(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep):  # noqa: E741
    """``scan_generic`` with AVX-512 VBMI."""
    _scan_vbmi(blocks, n, ids, masks, order, visits, rows, tables, lows, small, states, D, I, keep)


SCANS = {"vbmi": scan_vbmi, "avx2": scan_avx2, "generic": scan_generic}


@kernel(types.void(_STATES, types.float32[:, ::1], types.int64[:, ::1], types.int64))
def take_limits(states, D, I, rank):  # noqa: E741
    """Make the distance of rank ``rank`` in each buffer the query's limit, and empty the buffer; no limit if it holds fewer."""
    for q in range(states.shape[0]):
        state = states[q]
        _cut(state, D[q], I[q], rank)
        if state["count"] < rank:
            state["limit"] = np.inf
        state["limit_id"] = EMPTY
        state["count"] = 0
        state["fresh"] = 0


@kernel(
    types.void(
        types.Array(numba.from_dtype(STATE), 2, "A"),
        types.float32[:, :, :],
        types.int64[:, :, :],
        types.float32[:, ::1],
        types.int64[:, ::1],
        types.int64[::1],
    )
)
def collect(states, part_D, part_I, D, I, found):  # noqa: E741
    """Merge the buffers (parts, nq, capacity) of each query into sorted rows of D and I (nq, k).

    ``found[q]`` = number of entries in the buffers; places beyond it become (inf, -1).
    """
    parts, nq, _ = part_D.shape
    k = D.shape[1]
    for q in range(nq):
        total = 0
        for part in range(parts):
            total += states[part, q]["count"]
        all_D, all_I = np.empty(total, np.float32), np.empty(total, np.int64)
        at = 0
        for part in range(parts):
            count = states[part, q]["count"]
            for j in range(count):
                all_D[at], all_I[at] = part_D[part, q, j], part_I[part, q, j]
                at += 1
        best = min(k, total)
        if total > k:
            _select(all_D, all_I, total, k)
        _sort(all_D, all_I, best)
        for j in range(k):
            if j < best:
                D[q, j], I[q, j] = all_D[j], all_I[j]
            else:
                D[q, j], I[q, j] = np.inf, -1
        found[q] = total

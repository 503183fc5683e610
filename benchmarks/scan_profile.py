"""Where the time of an exact search goes: instructions and bytes of the inner loop, and the parts of a whole search.

The inner loop is found in the assembly that Numba makes of the scan kernel: of the loops that hold no other loop and add up
table entries, the one for 256 codewords. The parts are told apart from outside: a range search whose radius nothing is
within does all that a search does, except for what survives the lower bounds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
from rich.table import Table

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer
from hyperfaiss.kernels.scan import BLOCK, SCANS

from .common import at_level, interleave, median, search_at, seconds_of

__all__ = ["Profile", "assembly", "inner_loop", "measure", "table_of"]

N, M, DSUB, NQ, K = 1_000_000, 8, 8, 256, 100
KSUB = 256
# What adds table entries to sums, and how many at once: bytes for lower bounds, else floats.
_ADDS = (
    {r"vpaddusb.*%zmm": 64, r"vpaddusb.*%ymm": 32, r"vpaddusb.*%xmm": 16},
    {r"v?addps.*%ymm": 8, r"v?addps.*%xmm": 4, r"v?addss": 1},
)
_LABEL, _JUMP = re.compile(r"^(\.\w+):"), re.compile(r"^j\w+\s+(\.\w+)")


@dataclass
class Profile:
    """One level: its inner loop, and the nanoseconds of the parts of a search for each code and query, one thread."""

    level: str
    lookups: int  # of one turn of the inner loop
    instructions: int  # the same
    clock: float  # cycles a second
    tables: float
    bounds: float
    rest: float


def assembly(level: str) -> str:
    """Of the scan kernel at this level, compiled afresh: Numba keeps none of what it cached."""
    kernel = SCANS[level]
    compiled: Any = numba.njit(kernel._signature, nogil=True, error_model="numpy")(kernel._function)
    (text,) = compiled.inspect_asm().values()
    return str(text)


def inner_loop(text: str) -> tuple[int, int]:
    """Look-ups and instructions of one turn of the loop over subspaces in a kernel's assembly."""
    adds = next(adds for adds in _ADDS if any(re.search(pattern, text) for pattern in adds))
    loops = []
    for body in _innermost(text):
        summing = [(line, count) for line in body for pattern, count in adds.items() if re.match(pattern, line)]
        if summing:
            sums = {line.rpartition(",")[2] for line, _ in summing}
            loops.append((sum(count for _, count in summing), len(body), len(sums)))
    if adds is _ADDS[0]:  # of the loops for 16 to 256 codewords, the last takes the most instructions for a look-up
        lookups, instructions, _ = max(loops, key=lambda loop: loop[1] / loop[0])
    else:  # one sum is the exact distance of one vector
        lookups, instructions, _ = max(loop for loop in loops if loop[2] > 1)
    return lookups, instructions


def _innermost(text: str) -> Iterator[list[str]]:
    """The instructions of each loop that holds no other: from a label to the jump back to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    jumps: list[tuple[int, int]] = []
    for line in (raw.strip() for raw in text.splitlines()):
        if match := _LABEL.match(line):
            labels[match[1]] = len(code)
        elif line and line[0] not in ".#" and not line.endswith(":"):
            code.append(line)
            if (match := _JUMP.match(line)) and match[1] in labels:
                jumps.append((labels[match[1]], len(code)))
    for start, stop in jumps:
        if not any((a, b) != (start, stop) and start <= a and b <= stop for a, b in jumps):
            yield code[start:stop]


def _chain(count: Any, factor: Any, term: Any) -> Any:
    # Each step waits for the one before it: a multiplication (3 cycles) and an addition (1) on every x86 of the last decade.
    x = np.uint64(1)
    for _ in range(count):
        x = x * factor + term
    return x


def clock() -> float:
    """Cycles a second, from a chain of operations whose latency is known."""
    chain = numba.njit(nogil=True)(_chain)
    count, factor, term = 500_000, np.uint64(6364136223846793005), np.uint64(1442695040888963407)
    # The fastest of many short runs is one that nothing interrupted.
    return 4 * count / min(seconds_of(lambda: chain(count, factor, term)) for _ in range(200))


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Of this thread, which does all the work of a search with one: what else the machine does hardly matters."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(level: str) -> Profile:
    """Count the inner loop of a level, and time a search's parts."""
    rng = np.random.default_rng(0)
    codec = HyperbolicProductQuantizer.from_codebooks(rng.normal(size=(M, KSUB, DSUB)), curvatures=0.0, metric="squared")
    index = HyperbolicPQIndex.from_codec(codec)
    index.add_sa_codes(rng.integers(0, 256, size=(N, M), dtype=np.uint8))
    queries = rng.normal(size=(NQ, M * DSUB)).astype(np.float32)
    radius = float(search_at(level, 1, index, queries, 1)[0].min())
    parts: dict[str, Callable[[], object]] = {
        "tables": lambda: codec.compute_distance_tables(queries),
        "bounds": lambda: index.range_search(queries, radius),
        "all": lambda: index.search(queries, K),
    }
    with at_level(level, 1):
        times = interleave({name: partial(_cpu_seconds, call) for name, call in parts.items()}, 5)
    tables, bounds, everything = (median(values) * 1e9 / (N * NQ) for values in times.values())
    return Profile(level, *inner_loop(assembly(level)), clock(), tables, bounds - tables, everything - bounds)


def table_of(profiles: list[Profile]) -> Table:
    """All of it, a column a level."""
    title = f"one thread, n = {N:,}, M = {M}, ksub = {KSUB}, nq = {NQ}, k = {K}"
    table = Table("", *(profile.level for profile in profiles), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("inner loop: instructions for 64 look-ups", [f"{64 * p.instructions / p.lookups:.0f}" for p in profiles])
    row(f"inner loop: instructions a code of {M} bytes", [f"{M * p.instructions / p.lookups:.2f}" for p in profiles])
    row("bytes a code, read once for all queries", [f"{M}" for _ in profiles])
    # A turn of the inner loop loads whole byte tables; floats are loaded one by one.
    table_bytes = [4 * BLOCK if p.level == "generic" else max(KSUB, BLOCK * KSUB // p.lookups) for p in profiles]
    row(f"bytes of tables, read from cache for {BLOCK} look-ups", [str(value) for value in table_bytes])
    row("clock", [f"{p.clock / 1e9:.2f} GHz" for p in profiles])
    parts = {"tables": "distance tables", "bounds": "first pass over the codes", "rest": "exact distances, the k best"}
    for name, label in parts.items():
        sums = [(getattr(p, name), p.tables + p.bounds + p.rest) for p in profiles]
        row(f"{label}: ns a code and query", [f"{part:.3f} ({part / total:.0%})" for part, total in sums])
    cycles = [p.bounds * p.clock / 1e9 / M * 64 for p in profiles]
    row("first pass: cycles for 64 look-ups", [f"{value:.1f}" for value in cycles])
    per_cycle = [64 * p.instructions / p.lookups / value for p, value in zip(profiles, cycles, strict=True)]
    row("first pass: instructions a cycle", [f"{value:.1f}" for value in per_cycle])
    return table

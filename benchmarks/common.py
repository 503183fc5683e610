"""What the benchmarks share: the machine's name, fair timing, and where results go."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numba
import numpy as np
import numpy.typing as npt

import hyperfaiss
from hyperfaiss import search

__all__ = [
    "at_level", "cpu", "interleave", "machine", "median", "ratios", "repeats", "search_at", "seconds_of", "spread",
    "with_spread", "write_json",
]  # fmt: skip

FloatArray = npt.NDArray[np.float32]

# A call shorter than this is repeated until it is not: clocks, wake-ups and Python cost microseconds.
_SHORTEST = 0.03


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: processor, versions, and what else the machine was doing."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "cpu": cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "versions": {
            "hyperfaiss": hyperfaiss.__version__,
            "faiss": faiss.__version__,
            "numba": numba.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def repeats(seconds: float) -> int:
    """How often a call of about so many seconds is to be made for one measurement."""
    return max(1, round(_SHORTEST / max(seconds, 1e-6)))


def seconds_of(call: Callable[[], object], count: int = 1) -> float:
    """Wall time of one call, the mean of ``count`` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@contextmanager
def at_level(level: str, threads: int) -> Iterator[None]:
    """Search at a SIMD level and with a number of threads; the level is put back afterwards."""
    before = search._level
    search._level = level
    hyperfaiss.set_num_threads(threads)  # not put back: that would end the threads that wait for the next search
    try:
        yield
    finally:
        search._level = before


def search_at(level: str, threads: int, index: Any, queries: FloatArray, k: int) -> Any:
    """D and I of ``index.search`` at a SIMD level and with a number of threads."""
    with at_level(level, threads):
        return index.search(queries, k)


def interleave(sides: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Measure all sides in turn, ``runs`` times: a machine whose speed drifts favours none of them.

    A side returns its own time. Every other turn goes backwards, so that no side always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for run in range(runs):
        for name in names if run % 2 == 0 else names[::-1]:
            times[name].append(sides[name]())
    return times


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half the distance from least to most, as a part of the median."""
    return (max(values) - min(values)) / 2 / median(values)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow/fast, turn by turn."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def with_spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median and spread for people: ``5.21 ±3%``."""
    return f"{median(values) * scale:.3g} ±{spread(values):.0%}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")

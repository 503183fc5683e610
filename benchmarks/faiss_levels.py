"""FAISS at each of its SIMD levels, each in a process of its own.

FAISS takes its level from the environment variable FAISS_SIMD_LEVEL while it loads, and believes it: a level that the CPU lacks
is accepted, and kills the process at its first search. So one process without that variable tells which levels there are,
and one process for each of them reads the same index file, verifies its level, and sleeps until it is asked to search.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

__all__ = ["Arrays", "FaissLevel", "check_answers", "levels"]

Arrays = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
_VARIABLE = "FAISS_SIMD_LEVEL"
# Threads of OpenMP that have finished may spin for a while; by then they sleep.
_SETTLE = 0.02
_context = get_context("spawn")


class FaissLevel:
    """A process in which FAISS runs at one SIMD level; None: at the one it takes by itself. To be closed."""

    def __init__(self, level: str | None) -> None:
        self._pipe, there = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(there,), daemon=True)
        with _environment(level):
            self._process.start()
        there.close()
        self.level: str = self._ask("level")
        if level is not None and self.level != level:
            self.close()
            raise RuntimeError(f"{_VARIABLE}={level} was asked for, FAISS runs at {self.level}")

    def supported(self) -> list[str]:
        """The levels that this process's FAISS has code for and its CPU can run."""
        names: list[str] = self._ask("supported")
        return names

    def load(self, indexes: Mapping[str, Path], queries: Path) -> None:
        """Hold these indexes, as ``faiss.write_index`` wrote them, and queries (nq, d), a .npy file; forget former ones."""
        self._ask("load", {name: str(path) for name, path in indexes.items()}, str(queries))

    def search(self, index: str, nq: int, k: int, threads: int, count: int = 1) -> float:
        """Seconds of a search for the first ``nq`` of the queries: the mean of ``count`` in a row."""
        seconds: float = self._ask("search", index, nq, k, threads, count)
        return seconds

    def found(self) -> Arrays:
        """D and I of the last search."""
        arrays: Arrays = self._ask("found")
        return arrays

    def _ask(self, *request: Any) -> Any:
        self._pipe.send(request)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of FAISS ended with {self._process.exitcode} at {request}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        self._process.kill()

    def __enter__(self) -> FaissLevel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def levels() -> list[str]:
    """All levels that FAISS has on this CPU, its own choice first."""
    with FaissLevel(None) as worker:
        return [worker.level, *(name for name in worker.supported() if name != worker.level)]


def check_answers(ours: Arrays, theirs: Arrays) -> None:
    """Fail unless distances agree to rounding, and ids wherever their distance is clearly another than its neighbours'."""
    (D, I), (faiss_D, faiss_I) = ours, theirs  # noqa: E741
    np.testing.assert_allclose(D, faiss_D, rtol=1e-5)
    steps = np.diff(D, axis=1) > 4e-5 * D[:, 1:]
    edge = np.ones((len(D), 1), bool)
    # What follows the last is unknown, so the last is never clear.
    clear = np.hstack([edge, steps]) & np.hstack([steps, ~edge])
    np.testing.assert_array_equal(I[clear], faiss_I[clear], "ids of FAISS")


@contextmanager
def _environment(level: str | None) -> Iterator[None]:
    # What a process started meanwhile inherits: the level, and OpenMP as FAISS's users have it.
    saved = {name: os.environ.pop(name, None) for name in (_VARIABLE, "OMP_WAIT_POLICY")}
    if level is not None:
        os.environ[_VARIABLE] = level
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Worker:
    """What runs in the process: one method for each request."""

    def __init__(self) -> None:
        self.indexes: dict[str, Any] = {}
        self.queries = np.empty((0, 0), np.float32)
        self.last: Arrays | None = None

    def level(self) -> str:
        if not hasattr(faiss, "SIMDConfig"):  # before FAISS 1.14 the wheel's file was the level
            return "default"
        name: str = faiss.SIMDConfig.get_level_name()
        if getattr(faiss, f"SIMDLevel_{name}") != faiss.SIMDConfig.get_dispatched_level():
            raise RuntimeError(f"FAISS says {name} and does {faiss.SIMDConfig.get_dispatched_level()}")
        return name

    def supported(self) -> list[str]:
        if not hasattr(faiss, "SIMDConfig"):
            return ["default"]
        known = [name for name in dir(faiss) if name.startswith("SIMDLevel_") and name != "SIMDLevel_COUNT"]
        usable = [name for name in known if faiss.SIMDConfig.is_simd_level_available(getattr(faiss, name))]
        return [name.removeprefix("SIMDLevel_") for name in usable]

    def load(self, indexes: dict[str, str], queries: str) -> None:
        self.indexes.clear()  # the former ones go before their successors come
        self.queries = np.load(queries)
        self.indexes.update({name: faiss.read_index(path) for name, path in indexes.items()})

    def search(self, name: str, nq: int, k: int, threads: int, count: int) -> float:
        faiss.omp_set_num_threads(threads)
        index, queries = self.indexes[name], self.queries[:nq]
        start = time.perf_counter()
        for _ in range(count):
            self.last = index.search(queries, k)
        seconds = (time.perf_counter() - start) / count
        time.sleep(_SETTLE)
        return seconds

    def found(self) -> Arrays | None:
        return self.last


def _serve(pipe: Connection) -> None:
    worker = _Worker()
    while True:
        try:
            name, *arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = getattr(worker, name)(*arguments)
        except Exception as error:
            answer = error
        pipe.send(answer)

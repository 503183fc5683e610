"""How kernels are compiled and run: lazily compiled Numba functions, and one pool of Python threads.

A pool of threads over functions that release the GIL, rather than Numba's ``prange``: Numba's workqueue layer aborts when
two threads call at once, its OpenMP layer does not survive a fork, and one more OpenMP runtime beside those of FAISS and
torch oversubscribes the cores. The pool is rebuilt in a forked child and sees Ctrl-C between chunks of work.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numba

from ..checks import as_integer

__all__ = ["Kernel", "device_function", "get_num_threads", "kernel", "run_tasks", "set_num_threads"]

T = TypeVar("T")

# Seconds of compilation after which a user is told what is going on.
_PATIENCE = 2.0


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call; it is compiled into them."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def kernel(signature: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator: compile ``function`` for this one Numba ``signature``, an object or text, at its first call; cache it on disk.

    No fast-math flag is set, so LLVM neither reorders nor contracts float operations: the same bits on every machine.
    """

    def wrap(function: Callable[..., None]) -> Kernel:
        return Kernel(function, signature)

    return wrap


class Kernel:
    """A lazily compiled function. Arrays of another dtype or layout than its signature's are a TypeError."""

    def __init__(self, function: Callable[..., None], signature: Any) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function = function
        self._signature = signature
        self._compiled: Callable[..., None] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> None:
        (self._compiled or self.compile())(*args)

    def compile(self) -> Callable[..., None]:
        """Compile, or load from the cache: called by the first use."""
        with self._lock:
            if self._compiled is None:
                notice = threading.Timer(_PATIENCE, _announce)
                notice.daemon = True
                notice.start()
                try:
                    # Numba's cache is keyed by the function's own file; a change in another must not leave old code in use.
                    self._function.__qualname__ = f"{self.__name__}_{_version()}"
                    self._compiled = numba.njit(self._signature, nogil=True, cache=True, error_model="numpy")(self._function)
                finally:
                    notice.cancel()
        return self._compiled


@functools.cache
def _version() -> str:
    """A digest of all source files that kernels are made of."""
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.py")), folder.parent / "lorentz.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


_announced = False


def _announce() -> None:
    global _announced  # noqa: PLW0603
    if not _announced:
        _announced = True
        sys.stderr.write("hyperfaiss: compiling kernels for this machine (once; cached on disk) ...\n")


def _cores() -> int:
    # The CPU set this process may use, not what the machine has: containers and taskset count.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_num_threads = _cores()
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def get_num_threads() -> int:
    """Number of threads that training, adding and searching use."""
    return _num_threads


def set_num_threads(n: int) -> None:
    """Use ``n`` threads from now on; the default is the number of CPUs that this process may run on.

    Results never depend on it. Raises InvalidParameterError unless n is a positive integer.
    """
    global _num_threads, _pool  # noqa: PLW0603
    count = as_integer(n, "number of threads", 1)
    with _pool_lock:
        if _pool is not None and count != _num_threads:
            _pool.shutdown(wait=False)
            _pool = None
        _num_threads = count


def run_tasks(function: Callable[[T], Iterator[None]], tasks: Iterable[T]) -> None:
    """Run the generator ``function`` to its end on every task, on the pool's threads, and return when all are done.

    The first exception stops the others at their next ``yield``, waits for that, and is raised here; so does Ctrl-C. So a
    function yields wherever it may be stopped, after at most a tenth of a second of work.
    """
    work = list(tasks)
    stopped = threading.Event()

    def run(task: T) -> None:
        for _ in function(task):
            if stopped.is_set():
                return

    if _num_threads == 1 or len(work) <= 1:
        for task in work:
            run(task)
        return
    futures: list[Future[None]] = []
    try:
        with _pool_lock:
            pool = _get_pool()
            futures = [pool.submit(run, task) for task in work]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        stopped.set()
        for future in futures:
            future.cancel()
        wait(futures)  # kernels write into the caller's arrays until they return
        raise


def _get_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603
    if _pool is None:
        _pool = ThreadPoolExecutor(_num_threads, thread_name_prefix="hyperfaiss")
    return _pool


def _forget_pool() -> None:
    """In a forked child only the forking thread lives: the pool's threads and anyone's hold on the lock are gone."""
    global _pool, _pool_lock  # noqa: PLW0603
    _pool = None
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)

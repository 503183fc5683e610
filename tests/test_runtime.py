"""The pool of threads and the compiled functions."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hyperfaiss
from hyperfaiss import InvalidParameterError, search
from hyperfaiss.kernels import runtime, scan, tables


def test_number_of_threads() -> None:
    if hasattr(os, "sched_getaffinity"):
        assert runtime._cores() == len(os.sched_getaffinity(0))
    for n in (3, np.int64(2), 1):
        hyperfaiss.set_num_threads(n)
        assert hyperfaiss.get_num_threads() == n


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, True])
def test_bad_number_of_threads(n: Any) -> None:
    hyperfaiss.set_num_threads(2)
    with pytest.raises(InvalidParameterError, match="threads"):
        hyperfaiss.set_num_threads(n)
    assert hyperfaiss.get_num_threads() == 2


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 100])
def test_every_task_runs_to_its_end_once(threads: int, tasks: int) -> None:
    hyperfaiss.set_num_threads(threads)
    log: list[tuple[int, int]] = []
    workers = set()

    def work(task: int) -> Iterator[None]:
        for step in range(3):
            log.append((task, step))
            workers.add(threading.get_ident())
            time.sleep(0.0005)
            yield

    runtime.run_tasks(work, iter(range(tasks)))
    assert sorted(log) == [(task, step) for task in range(tasks) for step in range(3)]
    assert len(workers) <= threads
    if threads > 1 and tasks == 100:
        assert len(workers) > 1


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_exception_stops_the_others(threads: int) -> None:
    hyperfaiss.set_num_threads(threads)
    steps, running = [], []

    def work(task: int) -> Iterator[None]:
        running.append(task)
        for step in range(1000):
            if task == 1 and step == 3:
                running.remove(task)
                raise KeyError(task)
            time.sleep(0.001)
            steps.append(task)
            try:
                yield
            except GeneratorExit:
                break
        running.remove(task)

    start = time.monotonic()
    tasks = [1, *range(2, 30)]
    with pytest.raises(KeyError, match="1"):
        runtime.run_tasks(work, tasks)
    assert time.monotonic() - start < 1
    assert not running  # none is left behind to write into the caller's arrays
    assert len(steps) < 100
    runtime.run_tasks(lambda *_: iter(()), range(10))  # the pool lives on


def test_pool_in_several_threads_while_its_size_changes() -> None:
    failures: list[BaseException] = []

    def client() -> None:
        for _ in range(50):
            done: list[int] = []

            def work(task: int, done: list[int] = done) -> Iterator[None]:
                done.append(task)
                yield

            try:
                runtime.run_tasks(work, range(7))
                assert sorted(done) == list(range(7))
            except BaseException as error:  # brought back to the test's thread
                failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    for n in range(100):
        hyperfaiss.set_num_threads(1 + n % 5)
    for thread in clients:
        thread.join(30)
        assert not thread.is_alive()
    assert not failures


def test_kernels_refuse_what_they_were_not_compiled_for() -> None:
    """A wrong dtype or layout would otherwise compile anew, silently, at every new combination."""
    states, I = np.zeros(1, scan.STATE), np.empty((1, 2), np.int64)
    for bad in (np.empty((1, 2), np.float64), np.empty((1, 4), np.float32)[:, ::2]):
        with pytest.raises(TypeError):
            scan.take_limits(states, bad, I, 1)


def test_kernels_do_not_reorder_float_sums() -> None:
    """1e8 + 1 − 1e8 is 0 in float32 from left to right and 1 in any cleverer order."""
    distances = np.zeros((1, 3, 256), np.float32)
    distances[0, :, 0] = 1e8, 1, -1e8
    nothing = np.empty(0, np.int64)
    view = search.View(np.zeros((1, 3, 64), np.uint8), 64, nothing, np.empty(0, np.uint64), nothing, np.array([0, 1]))
    D, I = np.empty((1, 1), np.float32), np.empty((1, 1), np.int64)
    search.nearest(lambda _: distances, 1, view, 1, D, I)
    assert (D[0, 0], I[0, 0]) == (0, 0)


def test_kernels_name_themselves() -> None:
    for module, names in ((scan, {"scan_generic", "collect"}), (tables, {"distance_tables", "assign"})):
        kernels = {name: value for name, value in vars(module).items() if isinstance(value, runtime.Kernel)}
        assert names <= set(kernels)
        for name, kernel in kernels.items():
            assert kernel.__name__ == name
            assert kernel.__doc__


def test_a_change_in_any_kernel_file_makes_old_cached_code_useless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(Path(runtime.__file__).parent, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(runtime.__file__).parent.parent / "lorentz.py", tmp_path)
    monkeypatch.setattr(runtime, "__file__", str(kernels / "runtime.py"))
    version = runtime._version.__wrapped__
    assert version() == runtime._version()
    (kernels / "simd.py").write_text((kernels / "simd.py").read_text() + "# changed")
    assert version() != runtime._version()
    tables.assign.compile()
    assert runtime._version() in tables.assign._function.__qualname__  # which is part of the name of Numba's cache file


def test_a_long_compilation_is_announced(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runtime, "_announced", False)
    for patience, announced in ((60.0, False), (0.05, True)):
        monkeypatch.setattr(runtime, "_PATIENCE", patience)

        def slow(*args: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return lambda function: function

        monkeypatch.setattr(runtime.numba, "njit", slow)
        runtime.kernel("void(int64)")(lambda *_: None)(1)
        assert ("compiling" in capfd.readouterr().err) == announced

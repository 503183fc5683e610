"""Bad input, which an index should refuse with a reason, and survive."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .subjects import XB, XQ, D, N, Subject


def spoiled(value: float) -> npt.NDArray[np.float32]:
    """Vectors, one of them with a bad value."""
    x: npt.NDArray[np.float32] = XB[:10].copy()
    x[3, 2] = value
    return x


REFUSALS: dict[str, Callable[[Subject, Any], Any]] = {
    "add NaN": lambda _, index: index.add(spoiled(np.nan)),
    "add inf": lambda _, index: index.add(spoiled(np.inf)),
    "search NaN": lambda _, index: index.search(spoiled(np.nan), 5),
    "train with NaN": lambda subject, _: subject.new().train(np.concatenate([XB, spoiled(np.nan)])),
    "train on fewer vectors than codewords": lambda subject, _: subject.new().train(XB[:100]),
    "search vectors of another dimension": lambda _, index: index.search(XQ[:, :8].copy(), 5),
    "search one vector that is not a matrix": lambda _, index: index.search(XQ[0], 5),
    "search strings": lambda _, index: index.search(np.full((2, D), "a"), 5),
    "k = 0": lambda _, index: index.search(XQ, 0),
    "k = -1": lambda _, index: index.search(XQ, -1),
    "k = 2.5": lambda _, index: index.search(XQ, 2.5),
    "D of another shape": lambda _, index: index.search(XQ, 5, D=np.empty((1, 5), np.float32), I=np.empty((1, 5), np.int64)),
    "add before train": lambda subject, _: subject.new().add(XB),
    "search before train": lambda subject, _: subject.new().search(XQ, 5),
    "ids that are floats": lambda _, index: index.add_with_ids(XB[:10], np.arange(10) + N + 0.5),
    "uint64 ids beyond int64": lambda _, index: index.add_with_ids(XB[:10], np.arange(10, dtype=np.uint64) + 2**63),
    "the same id twice in a call": lambda _, index: index.add_with_ids(XB[:10], np.full(10, N)),
    "fewer ids than vectors": lambda _, index: index.add_with_ids(XB[:10], np.arange(N, N + 9)),
    "reconstruct an id that is not there": lambda _, index: index.reconstruct(N + 5),
    "reconstruct_n out of range": lambda _, index: index.reconstruct_n(N - 5, 10),
    "d that M does not divide": lambda subject, _: subject.new(D, 5),
    "read a file that is no index": lambda subject, _: _read_junk(subject),
}


def _read_junk(subject: Subject) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junk"
        path.write_bytes(b"no index " * 1000)
        return subject.read(str(path))

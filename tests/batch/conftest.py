"""What the tests of batch jobs share: vectors, a trained codec, and files of every format."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer

D, M, N, NQ = 12, 4, 3000, 170


@pytest.fixture(scope="session")
def xb() -> np.ndarray:
    # Few distinct vectors, so that equal distances are common and the order of ids shows.
    rng = np.random.default_rng(1)
    return rng.normal(size=(N // 3, D)).astype(np.float32)[rng.integers(N // 3, size=N)]


@pytest.fixture(scope="session")
def xq() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(NQ, D)).astype(np.float32)


@pytest.fixture(scope="session")
def codec(xb: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained codec's file."""
    made = HyperbolicProductQuantizer(D, M, 4, clip_radius=2.0)
    made.train(xb)
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    made.save(path)
    return path


@pytest.fixture(scope="session")
def whole(codec: Path, xb: np.ndarray) -> HyperbolicPQIndex:
    """One index of all vectors: what a batch of shards must agree with."""
    index = HyperbolicPQIndex.from_codec(HyperbolicProductQuantizer.load(codec))
    index.add(xb)
    return index


def vector_table(x: np.ndarray, **columns: object) -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(x).ravel()), x.shape[1])
    return pa.table({**columns, "embedding": lists})


@pytest.fixture(scope="session")
def table() -> Callable[..., pa.Table]:
    """A table with the column ``embedding`` (FixedSizeList) after the given ones."""
    return vector_table


@pytest.fixture(scope="session")
def parquet() -> Callable[..., Path]:
    """Write vectors as Parquet files of at most ``rows`` rows in a folder, with further columns cut likewise."""

    def write(folder: Path, x: np.ndarray, rows: int = 700, group: int = 64, **columns: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        whole = vector_table(x, **columns)
        for number, start in enumerate(range(0, len(x), rows)):
            pq.write_table(whole.slice(start, rows), folder / f"{number:03d}.parquet", row_group_size=group)
        return folder

    return write


def save(path: Path, x: np.ndarray) -> Path:
    """Write a matrix in the format that the name asks for."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix.endswith("vecs"):
        path.write_bytes(b"".join(struct.pack("<i", len(row)) + row.tobytes() for row in x))
    else:
        path.write_bytes(struct.pack("<II", *x.shape) + np.ascontiguousarray(x).tobytes())
    return path


@pytest.fixture(scope="session")
def saved() -> Callable[..., Path]:
    return save


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder, by name."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return read

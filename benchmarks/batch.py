"""Batch jobs from Parquet to Parquet, beside a straightforward script that does the same with faiss.

    python -m benchmarks.batch --help

Clustered vectors are written to Parquet files; ``hyperfaiss build`` and ``hyperfaiss search`` go over them, flat and IVF, at
curvature 0, where the codes mean what FAISS's do; and so does the script below, which reads files one after the other, adds
them to an ``IndexPQ`` or ``IndexIVFPQ``, writes the index, and searches blocks of queries. Every step is a process of its own,
watched from outside: wall time, peak of resident memory, and of that the part that is its own (not mapped from files). Recall
is how often the nearest vector, by exact search, is among the results.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from hyperfaiss.batch import Results, open_source
from hyperfaiss.batch.sources import split

from .common import machine, write_json

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)

_CLUSTERS = 4096
_BLOCK = 1 << 16
# Queries that a straightforward script searches at a time, and its parts.
_QUERIES = 8192
_TRAIN_SEED = 1234


@app.command()
def run(
    n: Annotated[int, typer.Option(help="vectors")] = 10_000_000,
    nq: Annotated[int, typer.Option(help="queries")] = 100_000,
    files: Annotated[int, typer.Option(help="Parquet files of vectors")] = 20,
    d: Annotated[int, typer.Option(help="dimension")] = 64,
    m: Annotated[int, typer.Option(help="subspaces, of 8 bits each")] = 8,
    k: Annotated[int, typer.Option(help="neighbours")] = 100,
    nlist: Annotated[int, typer.Option(help="lists of the IVF indexes")] = 4096,
    nprobe: Annotated[int, typer.Option(help="lists that a query visits")] = 32,
    flat_nq: Annotated[int | None, typer.Option(help="queries of the flat searches, if fewer")] = None,
    memory: Annotated[str, typer.Option(help="--memory of the jobs")] = "2GiB",
    exact_nq: Annotated[int, typer.Option(help="queries that recall is measured on")] = 1000,
    only: Annotated[str | None, typer.Option(help="ours or faiss")] = None,
    folder: Annotated[Path, typer.Option(help="where everything goes; vectors are kept for the next run")] = Path(
        "bench-batch"
    ),
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Run all steps, print wall time, memory, rates and recall."""
    console = Console()
    data = folder / f"n{n}-nq{nq}-d{d}-files{files}"
    _make_data(data, n, nq, d, files)
    truth = _exact(data, min(exact_nq, flat_nq or nq))
    steps: list[dict[str, Any]] = []
    for kind in ("flat", "ivf"):
        asked = nq if kind == "ivf" or flat_nq is None else min(nq, flat_nq)
        queries = _some_queries(data, asked)
        for who in ("ours", "faiss"):
            if only not in (None, who):
                continue
            index, found = folder / f"{who}-{kind}", folder / f"{who}-{kind}-results"
            for old in (index, found):
                shutil.rmtree(old, ignore_errors=True)
            if who == "ours":
                factory = f"HPQ{m}" if kind == "flat" else f"IVF{nlist},HPQ{m}"
                build = ["build", "-i", data / "x", "-o", index, "--factory", factory, "--metric", "squared"]
                build += ["--curvature", 0, "--memory", memory]
                search = ["search", "--index", index, "-i", queries, "-o", found, "--k", k, "--memory", memory]
                search += ["--nprobe", nprobe] if kind == "ivf" else []
                commands = [["-c", "from hyperfaiss.cli import app; app()", *step] for step in (build, search)]
            else:
                lists = [nlist, nprobe] if kind == "ivf" else [0, 0]
                commands = [
                    ["-m", "benchmarks.batch", "faiss-build", data / "x", index, m, lists[0]],
                    ["-m", "benchmarks.batch", "faiss-search", index, queries, found, k, lists[1]],
                ]
            for step, command, rows in (("build", commands[0], n), ("search", commands[1], asked)):
                steps.append({"who": who, "index": kind, "step": step, "rows": rows} | _watched(command))
                if step == "search":
                    steps[-1]["recall"] = _recall(found, truth, who)
                console.print(steps[-1])
    table = Table(
        title=f"{n:,} x {d} float32 vectors in {files} files, {m} bytes a code, k = {k}, {nlist} lists, nprobe {nprobe}"
    )
    for column in ("index", "step", "who", "rows", "wall s", "rows/s", "peak MiB", "own MiB", f"1-recall@{k}"):
        table.add_column(column, justify="right")
    for row in steps:
        recall = f"{row['recall']:.3f}" if "recall" in row else ""
        figures = (
            f"{row['seconds']:.1f}",
            f"{row['rows'] / row['seconds']:,.0f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['own_mib']:,.0f}",
        )
        table.add_row(row["index"], row["step"], row["who"], f"{row['rows']:,}", *figures, recall)
    console.print(table)
    if json_path is not None:
        write_json(json_path, machine() | {"n": n, "d": d, "m": m, "k": k, "nlist": nlist, "nprobe": nprobe, "steps": steps})


@app.command()
def faiss_build(inputs: Path, output: Path, m: int, nlist: int) -> None:
    """The straightforward script: Parquet to an IndexPQ (nlist 0) or an IndexIVFPQ in a file."""
    paths = sorted(inputs.glob("*.parquet"))
    first = _vectors(pq.ParquetFile(paths[0]).read_row_group(0))
    train = np.concatenate([_vectors(pq.ParquetFile(path).read_row_group(0)) for path in paths])
    wanted = max(256 * 256, 64 * nlist)
    d = first.shape[1]
    index: Any
    if nlist:
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, nlist, m, 8)
        index.by_residual = False
    else:
        index = faiss.IndexPQ(d, m, 8)
    index.train(train[:wanted])
    for path in paths:
        index.add(_vectors(pq.read_table(path)))
    output.mkdir(parents=True)
    faiss.write_index(index, str(output / "faiss.index"))


@app.command()
def faiss_search(index_folder: Path, queries: Path, output: Path, k: int, nprobe: int) -> None:
    """The straightforward script: k nearest of each query to Parquet parts."""
    index = faiss.read_index(str(index_folder / "faiss.index"))
    if nprobe:
        index.nprobe = nprobe  # type: ignore[attr-defined]
    output.mkdir(parents=True)
    x = _vectors(pq.read_table(queries))
    for number, start in enumerate(range(0, len(x), _QUERIES)):
        D, I = index.search(x[start : start + _QUERIES], k)  # noqa: E741
        offsets = pa.array(np.arange(0, I.size + 1, k), pa.int32())
        columns = {
            "query_id": pa.array(np.arange(start, start + len(I))),
            "ids": pa.ListArray.from_arrays(offsets, pa.array(I.ravel())),
            "distances": pa.ListArray.from_arrays(offsets, pa.array(D.ravel())),
        }
        pq.write_table(pa.table(columns), output / f"part-{number:05d}.parquet", compression="zstd")


def _make_data(folder: Path, n: int, nq: int, d: int, files: int) -> None:
    """Vectors around cluster centres, in files; a file that is there is kept."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(_CLUSTERS, d)).astype(np.float32)
    (folder / "x").mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, n, files + 1).astype(int)
    jobs = [
        (folder / "x" / f"{i:03d}.parquet", i, stop - start)
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    for path, seed, rows in [*jobs, (folder / "queries.parquet", files, nq)]:
        if path.exists():
            continue
        rng = np.random.default_rng(seed + 1)
        temporary = path.with_suffix(".tmp")
        writer = None
        for start in range(0, rows, _BLOCK):
            count = min(_BLOCK, rows - start)
            x = centers[rng.integers(_CLUSTERS, size=count)] + 0.5 * rng.normal(size=(count, d)).astype(np.float32)
            table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), d)})
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
            temporary.rename(path)


def _some_queries(folder: Path, count: int) -> Path:
    """A file of the first queries."""
    path = folder / "queries.parquet"
    if pq.ParquetFile(path).metadata.num_rows == count:
        return path
    fewer = folder / f"queries-{count}.parquet"
    pq.write_table(pq.read_table(path).slice(0, count), fewer)
    return fewer


def _exact(folder: Path, count: int) -> npt.NDArray[np.int64]:
    """The nearest vector of the first queries, by exact search."""
    path = folder / f"nearest-{count}.npy"
    if not path.exists():
        queries = next(open_source(folder / "queries.parquet").read([(0, count)])).vectors
        source = open_source(folder / "x")
        best_D, best_I = np.full(count, np.inf, np.float32), np.full(count, -1)
        for batch in source.read(split(0, source.n, 1 << 18)):
            D, I = faiss.knn(queries, batch.vectors, 1)  # noqa: E741
            nearer = D[:, 0] < best_D
            best_D[nearer], best_I[nearer] = D[nearer, 0], I[nearer, 0] + batch.first
        np.save(path, best_I)
    nearest: npt.NDArray[np.int64] = np.load(path)
    return nearest


def _recall(results: Path, truth: npt.NDArray[np.int64], who: str) -> float:
    """How often the nearest vector is among the results."""
    if who == "ours":
        ids = Results.open(str(results)).read(0, len(truth)).I
    else:
        lists = pq.read_table(results).column("ids").combine_chunks()
        ids = np.asarray(lists.flatten()).reshape(len(lists), -1)[: len(truth)]
    return float((ids == truth[:, None]).any(axis=1).mean())


def _vectors(table: Any) -> npt.NDArray[np.float32]:
    lists = table.column("embedding").combine_chunks()
    vectors: npt.NDArray[np.float32] = np.asarray(lists.flatten()).reshape(len(lists), -1)
    return vectors


def _watched(arguments: list[Any]) -> dict[str, float]:
    """Run a command of this Python; its wall time and its peaks of memory."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    peak = own = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line) if status.exists() else {}
        peak = max(peak, int(fields.get("VmHWM", "0").split()[0]))
        own = max(own, int(fields.get("RssAnon", "0").split()[0]))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed")
    return {"seconds": time.perf_counter() - began, "peak_mib": peak / 1024, "own_mib": own / 1024}


if __name__ == "__main__":
    app()

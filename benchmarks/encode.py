"""Coding and distance tables: HyperbolicPQIndex beside faiss.IndexPQ, same codewords, same vectors, 8 bits a code.

    python -m benchmarks.encode [--json encode.json]

``add`` is the whole call, on an empty index; ``table`` is what a search does first for each query, M · 256 distances. FAISS
does both in flat space; ours is also measured where each part lies in a hyperbolic space. Codes in flat space are compared with
FAISS's before anything is timed: those that differ must be draws in float32. The indexes take turns, and the ratio is of
medians.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import hyperfaiss
from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, lorentz

from .common import FloatArray, interleave, machine, median, repeats, seconds_of, with_spread, write_json

# name, curvature, clip radius, metric
SPACES: tuple[tuple[str, float, float | None, Any], ...] = (
    ("curvature 0, squared", 0.0, None, "squared"),
    ("curvature -1, clip 1", 1.0, 1.0, "geodesic"),
    ("curvature -1, clip 2", 1.0, 2.0, "geodesic"),
)

Times = dict[str, list[float]]


def build(x: FloatArray, M: int) -> tuple[Any, dict[str, HyperbolicPQIndex]]:
    """faiss.IndexPQ trained on x, and an index of ours with the same codewords in each space."""
    theirs = faiss.IndexPQ(x.shape[1], M, 8)
    theirs.train(x)
    centroids = faiss.vector_to_array(theirs.pq.centroids).reshape(M, 256, -1)
    ours = {}
    for name, theta, radius, metric in SPACES:
        books = lorentz.exp0(lorentz.clip(centroids, radius), theta)
        codec = HyperbolicProductQuantizer.from_codebooks(books, theta, metric=metric, clip_radius=radius)
        ours[name] = HyperbolicPQIndex.from_codec(codec)
    return theirs, ours


def check(theirs: Any, ours: HyperbolicPQIndex, x: FloatArray) -> float:
    """Share of codes that differ from FAISS's; fail unless all of these are draws in float32."""
    ref, comp = theirs.pq.compute_codes(x), ours.codec.compute_codes(x)
    parts = x.reshape(len(x), ours.M, -1)
    books = np.asarray(ours.codec.codebooks)
    rows, subspaces = np.nonzero(ref != comp)
    a, b = (
        np.linalg.norm(np.subtract(parts[rows, subspaces], books[subspaces, codes[rows, subspaces]], dtype=np.float64), axis=1)
        for codes in (ref, comp)
    )
    if not ((b <= a) & (a <= b * (1 + 1e-5))).all():
        raise SystemExit("codes differ from FAISS's by more than rounding")
    return float(len(rows) / ref.size)


def set_threads(threads: int) -> None:
    """Of both libraries."""
    hyperfaiss.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def add(index: Any, x: FloatArray) -> float:
    """Seconds of one add to the empty index."""
    index.reset()
    return seconds_of(partial(index.add, x))


def faiss_tables(pq: Any, queries: FloatArray, out: FloatArray) -> None:
    """FAISS's tables of all queries."""
    pq.compute_distance_tables(len(queries), faiss.swig_ptr(queries), faiss.swig_ptr(out))


def time_adds(theirs: Any, ours: dict[str, HyperbolicPQIndex], x: FloatArray, runs: int) -> Times:
    """Seconds of adding x, by index."""
    sides = {name: partial(add, index, x) for name, index in {"faiss": theirs, **ours}.items()}
    for side in sides.values():
        side()
    return interleave(sides, runs)


def time_tables(theirs: Any, ours: dict[str, HyperbolicPQIndex], queries: FloatArray, runs: int) -> Times:
    """Seconds of making the tables of all queries, by index."""
    out = np.empty((len(queries), theirs.pq.M, theirs.pq.ksub), np.float32)
    calls: dict[str, Callable[[], object]] = {"faiss": partial(faiss_tables, theirs.pq, queries, out)}
    calls |= {name: partial(index.codec.tables_of, queries) for name, index in ours.items()}
    return interleave({name: partial(seconds_of, call, repeats(seconds_of(call, 3))) for name, call in calls.items()}, runs)


def measure(d: int, M: int, x: FloatArray, nq: int, threads: list[int], runs: int) -> Iterator[dict[str, Any]]:
    """All rows of one shape."""
    theirs, ours = build(x[:20_000], M)
    differ = check(theirs, ours[SPACES[0][0]], x)
    print(f"d = {d}, M = {M}: {differ:.1e} of the flat codes differ from FAISS's, all of them draws in float32")
    for used in threads:
        set_threads(used)
        yield {"d": d, "M": M, "what": "add", "threads": used, "n": len(x), "seconds": time_adds(theirs, ours, x, runs)}
    set_threads(1)  # in a search, too, one thread makes all of a query's table
    for count in (nq, 1):
        times = time_tables(theirs, ours, x[:count], runs)
        yield {"d": d, "M": M, "what": f"table, nq = {count}", "threads": 1, "n": count, "seconds": times}


def main(
    shapes: Annotated[str, typer.Option(help="d:M, comma-separated")] = "64:8,128:16",
    n: Annotated[int, typer.Option(help="vectors added")] = 50_000,
    nq: Annotated[int, typer.Option(help="queries whose tables are made in one call")] = 256,
    threads: Annotated[list[int] | None, typer.Option(help="threads of add; repeat for several")] = None,
    runs: Annotated[int, typer.Option(help="timed runs of each")] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the raw times to this file")] = None,
) -> None:
    """Time adding and tables; print medians, their spread, and ratios."""
    rng = np.random.default_rng(0)
    table = Table(title="µs a vector (add) or a query (table)")
    for column in ("d, M", "what", "threads", "space", "faiss", "ours", "faiss/ours"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for d, M in (map(int, shape.split(":")) for shape in shapes.split(",")):
        x = rng.normal(size=(n, d)).astype(np.float32)
        for row in measure(d, M, x, nq, threads or [1, 2], runs):
            rows.append(row)
            times, scale = row["seconds"], 1e6 / row["n"]
            for name in list(times)[1:]:
                sides = times["faiss"], times[name]
                table.add_row(
                    f"{d}, {M}",
                    row["what"],
                    str(row["threads"]),
                    name,
                    *(with_spread(side, scale) for side in sides),
                    f"{median(sides[0]) / median(sides[1]):.2f}",
                )
    Console().print(table)
    if json_path is not None:
        write_json(json_path, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)

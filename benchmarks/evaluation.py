"""What evaluating codes costs at the size of a real database: time and memory of each measurement, and what it says.

    python -m benchmarks.evaluation --threads 1

The vectors are tangent vectors in clusters, whose variance falls from direction to direction as that of embeddings does; a
vector's label is its cluster. Codebooks are those of hyperbolic k-means on a sample. Nothing below holds a matrix of all
distances: memory is the index, the vectors and what is counted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

import hyperfaiss
from hyperfaiss import HyperbolicPQIndex
from hyperfaiss.exact import exact_search
from training.evaluate import evaluate_index, order_recall, subspace_statistics

from .common import machine, write_json

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")

CLUSTERS, SAMPLE, AT = 1000, 65_536, (1, 10, 100)
# Mean norm of a subspace's part: about what trained models make of theirs.
NORM = 0.8


def vectors(d: int, M: int, rng: np.random.Generator) -> Callable[[int], tuple[FloatArray, IntArray]]:
    """A mixture of Gaussians in d dimensions, to draw vectors and their components from, so many at a time."""
    scale = np.arange(1, d + 1) ** -0.75
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    centres = rng.normal(size=(CLUSTERS, d)) * scale
    weights = rng.dirichlet(np.ones(CLUSTERS))
    size = NORM * np.sqrt(M / (2 * (scale**2).sum()))

    def draw(count: int) -> tuple[FloatArray, IntArray]:
        labels = rng.choice(CLUSTERS, count, p=weights)
        x = np.empty((count, d), np.float32)
        for start in range(0, count, 65_536):
            rows = labels[start : start + 65_536]
            x[start : start + len(rows)] = (centres[rows] + scale * rng.normal(size=(len(rows), d))) @ rotation * size
        return x, labels

    return draw


def peak_mb() -> float:
    """Most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def main(
    n: Annotated[int, typer.Option(help="vectors in the database")] = 1_000_000,
    queries: Annotated[int, typer.Option(help="queries")] = 1000,
    d: Annotated[int, typer.Option(help="dimension")] = 64,
    m: Annotated[int, typer.Option("--M", help="subspaces, one byte each")] = 8,
    depth: Annotated[int, typer.Option(help="ranks of the long precision-recall curve")] = 10_000,
    threads: Annotated[int | None, typer.Option(help="[default: all]")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Print seconds, memory and results of every measurement."""
    if threads:
        hyperfaiss.set_num_threads(threads)
    draw = vectors(d, m, np.random.default_rng(0))
    (xb, y), (xq, yq), (xt, _) = draw(n), draw(queries), draw(SAMPLE)
    index = HyperbolicPQIndex(d, m)
    rows: list[dict[str, Any]] = []

    def timed(name: str, call: Callable[[], T]) -> T:
        before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
        result = call()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        rows.append({"step": name, "seconds": seconds, "cpu_seconds": cpu_seconds, "before_mb": before, "peak_mb": peak_mb()})
        return result

    exact_search(hyperfaiss.HyperbolicProductQuantizer.from_codebooks(np.ones((m, 16, d // m)), 1.0), xb[:9], xb[:9], 1)
    timed("train", lambda: index.train(xt))
    timed("add", lambda: index.add(xb))
    result = timed("MAP@1000, P@k, curve of 1,000 ranks, speed",
                   lambda: evaluate_index(index, xq, yq, y, 1000, at=AT, repeats=1))  # fmt: skip
    long = timed(f"the same, curve of {depth:,} ranks",
                 lambda: evaluate_index(index, xq, yq, y, 1000, at=AT, repeats=1, depth=depth))  # fmt: skip
    shares = timed("recall@k of the unquantised order", lambda: order_recall(index, xb, xq, AT))
    subspaces = timed("codeword usage and errors", lambda: subspace_statistics(index.codec, xb))

    table = Table(title=f"{n:,} x {d} vectors, {queries:,} queries, M = {m}, threads = {hyperfaiss.get_num_threads()}")
    for column in ("step", "seconds", "of CPU", "peak MB before", "after"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        times, memory = (f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds")), (row["before_mb"], row["peak_mb"])
        table.add_row(row["step"], *times, *(f"{value:,.0f}" for value in memory))
    console = Console()
    console.print(table)
    assert long.curve is not None
    used, entropy = [s.used for s in subspaces], [s.entropy for s in subspaces]
    error = float(np.mean([s.relative_error for s in subspaces]))
    console.print(
        f"MAP@1000 {result.map_at_n:.4f}, P@k {_by_k(result.precision)}, recall@k {_by_k(shares)}; "
        f"within {depth:,} ranks precision {long.curve.precision[-1]:.4f}, recall {long.curve.recall[-1]:.4f}; "
        f"{min(used)} to {max(used)} of {index.ksub} codewords used, entropy {min(entropy):.2f} to {max(entropy):.2f} bits, "
        f"error {error:.3f} of the spread; "
        f"{result.queries_per_second:.0f} queries/s"
    )
    if json_path is not None:
        found = result.to_dict() | {"recall": shares, "subspaces": [vars(s) for s in subspaces], "long_curve": vars(long.curve)}
        write_json(json_path, {"machine": machine(), "steps": rows, "result": found})


def _by_k(values: dict[int, float]) -> str:
    return " / ".join(f"{value:.3f} @{k}" for k, value in values.items())


if __name__ == "__main__":
    typer.run(main)

"""FAISS's 4-bit fast scan, bare and refined, beside exact 8-bit search at the same bytes a code: speed and recall.

The vectors are a mixture of Gaussians, each as wide as their centres lie apart, whose variance falls from direction to
direction, as that of embeddings does; each index learns its codebooks from the same sample. Recall@k is the part of the k
nearest vectors by exact L2 distance that are among the k returned. It is that of these vectors: in narrower clusters, where
8-bit codewords tell clusters apart rather than the vectors of one, 4 bits can be ahead at k = 10.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from rich.progress import track
from rich.table import Table

from hyperfaiss import from_faiss

from .common import interleave, median, ratios, repeats, search_at, seconds_of, with_spread
from .faiss_levels import FaissLevel, check_answers

__all__ = ["Row", "measure", "table_of"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

DIM, NQ, CLUSTERS, SAMPLE = 64, 1024, 1000, 100_000
KS = (10, 100)
# Candidates of the first pass that IndexRefine looks at again, as multiples of k.
K_FACTORS = (2, 8)
OURS = "HyperbolicPQIndex"
# Against IndexPQFastScan at the same bytes, on a CPU with VBMI.
GOAL = 1.5


@dataclass
class Row:
    """One index at one size, k and number of threads."""

    index: str
    code_bytes: int
    k: int
    threads: int
    recall: float
    default: str
    seconds_per_query: dict[str, list[float]] = field(default_factory=dict)  # by SIMD level

    @property
    def best(self) -> str:
        """The fastest level."""
        return min(self.seconds_per_query, key=lambda level: median(self.seconds_per_query[level]))


def vectors(n: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Database (n, DIM), queries (NQ, DIM) and a sample to learn from."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, DIM + 1) ** -0.75
    rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    centres = rng.normal(size=(CLUSTERS, DIM)) * scale
    weights = rng.dirichlet(np.ones(CLUSTERS))

    def draw(count: int) -> FloatArray:
        x = centres[rng.choice(CLUSTERS, count, p=weights)] + scale * rng.normal(size=(count, DIM))
        drawn: FloatArray = (x @ rotation).astype(np.float32)
        return drawn

    return draw(n), draw(NQ), draw(SAMPLE)


def indexes(code_bytes: int, x: FloatArray, sample: FloatArray) -> dict[str, Any]:
    """FAISS's indexes of so many bytes a code that hold ``x``."""
    made = {"IndexPQ": faiss.IndexPQ(DIM, code_bytes, 8), "IndexPQFastScan": faiss.IndexPQFastScan(DIM, 2 * code_bytes, 4)}
    # Half of the bytes to each stage.
    base, refine = faiss.IndexPQFastScan(DIM, code_bytes, 4), faiss.IndexPQ(DIM, code_bytes // 2, 8)
    made["IndexRefine"] = faiss.IndexRefine(base, refine)
    for index in made.values():
        index.train(sample)
        index.add(x)
    return made


def recall(I: IntArray, nearest: IntArray) -> float:  # noqa: E741
    """The part of ``nearest`` (nq, k) that is in I (nq, k)."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(I, nearest, strict=True)]))


def measure(
    n: int, sizes: Sequence[int], threads: Sequence[int], workers: Sequence[FaissLevel], level: str, runs: int
) -> list[Row]:
    """Build, check and time the indexes of each size."""
    x, queries, sample = vectors(n)
    exact = faiss.IndexFlatL2(DIM)
    exact.add(x)
    nearest = exact.search(queries, max(KS))[1]
    rows = []
    for code_bytes in track(sizes, "approximate", transient=True):
        made = indexes(code_bytes, x, sample)
        ours = from_faiss(made["IndexPQ"])
        names = _load(made, queries, workers)
        del made
        for k in KS:
            for count in threads:
                rows += _measure_one(ours, names, code_bytes, k, count, queries, nearest[:, :k], workers, level, runs)
    return rows


def _load(made: dict[str, Any], queries: FloatArray, workers: Sequence[FaissLevel]) -> list[str]:
    """Give the workers their copies; returns the names under which they know them."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "queries.npy", queries)
        files = {}
        for name, index in made.items():
            for factor in K_FACTORS if name == "IndexRefine" else (0,):
                known = f"{name}, k_factor {factor}" if factor else name
                if factor:
                    index.k_factor = factor
                files[known] = Path(folder) / known
                faiss.write_index(index, str(files[known]))
        for worker in workers:
            worker.load(files, Path(folder) / "queries.npy")
        return list(files)


def _measure_one(
    ours: Any, names: Sequence[str], code_bytes: int, k: int, threads: int, queries: FloatArray, nearest: IntArray,
    workers: Sequence[FaissLevel], level: str, runs: int,
) -> list[Row]:  # fmt: skip
    """All indexes at one size, k and number of threads; ours comes first."""

    def timed(worker: FaissLevel, name: str, asked: int) -> Callable[[], float]:
        count = repeats(worker.search(name, asked, k, threads))
        return lambda: worker.search(name, asked, k, threads, count) / asked

    def ours_timed() -> float:
        return seconds_of(lambda: search_at(level, threads, ours, queries, k)) / NQ

    D, I = search_at(level, threads, ours, queries, k)  # noqa: E741
    rows = [Row(OURS, code_bytes, k, threads, recall(I, nearest), level)]
    sides = {f"{level} {OURS}": ours_timed}
    for name in names:
        # Exact search takes ten times as long for each query, and as long for each of few as of many.
        asked = 32 * threads if name == "IndexPQ" else NQ
        workers[0].search(name, asked, k, threads)
        found = workers[0].found()
        if name == "IndexPQ":  # the same answers, so the same recall
            check_answers((D[:asked], I[:asked]), found)
        part = rows[0].recall if name == "IndexPQ" else recall(found[1], nearest)
        rows.append(Row(name, code_bytes, k, threads, part, workers[0].level))
        # Without SIMD the 4-bit scan is an emulation, hundreds of times slower: nobody's best.
        fair = [worker for worker in workers if name == "IndexPQ" or worker.level != "NONE"] or workers
        sides |= {f"{worker.level} {name}": timed(worker, name, asked) for worker in fair}
    for key, times in interleave(sides, runs).items():
        at, _, name = key.partition(" ")
        next(row for row in rows if row.index == name).seconds_per_query[at] = times
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """Recall and milliseconds per query, and how many times longer each takes than we do."""
    table = Table(title=f"at equal bytes, nq = {NQ}: recall, and ms per query", title_justify="left")
    columns = ("index", "bytes", "k", "threads", "recall@k", "default level", "best level", "ours × default", "× best", "goal")
    for column in columns:
        table.add_column(column, justify="left" if column == "index" else "right")
    ours = rows[0].seconds_per_query
    for row in rows:
        cells = [row.index, str(row.code_bytes), str(row.k), str(row.threads), f"{row.recall:.3f}"]
        times = row.seconds_per_query
        if row.index == OURS:
            ours = times
            table.add_section()
            table.add_row(*cells, "", f"{with_spread(times[row.best], 1e3)} {row.best}")
            continue
        (mine,) = ours.values()
        against = [median(ratios(times[at], mine)) for at in (row.default, row.best)]
        goal = row.index == "IndexPQFastScan" and "vbmi" in ours
        table.add_row(
            *cells,
            *(f"{with_spread(times[at], 1e3)} {at}" for at in (row.default, row.best)),
            *(f"{ratio:.2f}" for ratio in against),
            f"[{'green' if against[0] >= GOAL else 'red'}]≥ {GOAL:g} {'✓' if against[0] >= GOAL else '✗'}[/]" if goal else "",
        )
    return table

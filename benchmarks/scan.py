"""The exact 8-bit scan: HyperbolicPQIndex beside faiss.IndexPQ, same codebooks, same codes, same queries.

    python -m benchmarks.scan                    the cases that have goals, and a few more
    python -m benchmarks.scan --full             every case
    python -m benchmarks.scan --n 100000 --k 10 --k 100 --no-approximate --no-profile

Every case is checked before it is timed: our answers are compared with a float32 reference in NumPy to the bit, with each
other at all SIMD levels that are timed, and with FAISS's. All sides are then timed in turn, FAISS at each SIMD level that this
CPU has, and ratios are taken turn by turn. Two more sections follow: FAISS's approximate indexes of the same size, with their
recall (``scan_approximate``), and where our time goes (``scan_profile``). Everything that was measured goes to a JSON file,
and a picture beside it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, simd_level
from hyperfaiss.kernels.simd import supported_levels

from . import scan_approximate, scan_profile
from .common import cpu, interleave, machine, median, ratios, repeats, search_at, seconds_of, with_spread, write_json
from .faiss_levels import FaissLevel, check_answers, levels
from .memory import ReadTest

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

DSUB = 8
# FAISS's time is proportional to the number of queries; it gets as many of them as it can answer in about so many seconds.
FAISS_SECONDS = 0.3
# Codes of one query that are more than any cache holds, so that memory is what bounds it.
BEYOND_CACHES = 64 << 20


class Case(NamedTuple):
    """One search: n codes of M bytes, nq queries, k neighbours."""

    n: int
    M: int
    nq: int
    k: int

    def __str__(self) -> str:
        return f"{short(self.n)} × {self.M}, nq = {self.nq}, k = {self.k}"


class Goal(NamedTuple):
    """How many times faster than faiss.IndexPQ at its default SIMD level, and at its best; and the part of read bandwidth."""

    default: float
    best: float
    bandwidth: float = 0.0
    threads: tuple[int, ...] = (1, 2)


MAIN = Case(1_000_000, 8, 1024, 100)  # timed at every level
GOALS = {
    ("vbmi", Case(1_000_000, 8, 1024, 10)): Goal(20, 10),
    ("vbmi", MAIN): Goal(20, 10),
    ("vbmi", Case(1_000_000, 8, 1024, 1000)): Goal(12, 6),
    ("vbmi", Case(1_000_000, 16, 1024, 100)): Goal(18, 9),
    ("vbmi", Case(1_000_000, 32, 1024, 100)): Goal(18, 9),
    ("vbmi", Case(10_000_000, 8, 1, 10)): Goal(20, 10, bandwidth=0.7, threads=(2,)),
    ("avx2", MAIN): Goal(2.5, 1.5),
    ("generic", MAIN): Goal(1.2, 0.8),
}
MORE = [
    Case(100_000, 8, 1, 10),
    Case(100_000, 8, 1024, 10),
    Case(1_000_000, 4, 1024, 100),
    Case(1_000_000, 8, 1, 10),
    Case(1_000_000, 8, 16, 10),
    Case(1_000_000, 8, 1024, 1),
]
FULL = [
    Case(*values)
    for values in itertools.product((100_000, 1_000_000, 10_000_000), (4, 8, 16, 32), (1, 16, 1024), (1, 10, 100, 1000))
]


def short(n: int) -> str:
    """100k, 1M."""
    return f"{n // 10**6}M" if n % 10**6 == 0 else f"{n // 1000}k" if n % 1000 == 0 else str(n)


# ------------------------------------------------------------------------------------------------ one case


class Setup:
    """Both indexes over the same n random codes of M bytes, in flat space, where they mean the same; and queries."""

    def __init__(self, n: int, M: int, nq: int, workers: Sequence[FaissLevel]) -> None:
        rng = np.random.default_rng([n, M])
        books = rng.normal(size=(M, 256, DSUB)).astype(np.float32)
        self.codes = rng.integers(0, 256, size=(n, M), dtype=np.uint8)
        self.queries: FloatArray = rng.normal(size=(nq, M * DSUB)).astype(np.float32)
        codec = HyperbolicProductQuantizer.from_codebooks(books, curvatures=0.0, metric="squared")
        self.ours = HyperbolicPQIndex.from_codec(codec)
        self.ours.add_sa_codes(self.codes)
        theirs = faiss.IndexPQ(M * DSUB, M, 8)
        faiss.copy_array_to_vector(books.ravel(), theirs.pq.centroids)
        faiss.copy_array_to_vector(self.codes.ravel(), theirs.codes)
        theirs.is_trained, theirs.ntotal = True, n
        with tempfile.TemporaryDirectory() as folder:
            index, queries = Path(folder) / "index", Path(folder) / "queries.npy"
            faiss.write_index(theirs, str(index))
            np.save(queries, self.queries)
            for worker in workers:
                worker.load({"IndexPQ": index}, queries)
        self._distances: dict[int, FloatArray] = {}

    def distances(self, q: int) -> FloatArray:
        """All distances of query q: the float32 sum over the subspaces in their order, nothing else."""
        if q not in self._distances:
            table = self.ours.codec.compute_distance_tables(self.queries[q : q + 1])[0]
            total = table[0, self.codes[:, 0]]
            for m in range(1, self.ours.M):
                total += table[m, self.codes[:, m]]
            self._distances[q] = total
        return self._distances[q]

    def nearest(self, q: int, k: int) -> tuple[FloatArray, IntArray]:
        """The reference's k nearest of query q by (distance, id)."""
        distances = self.distances(q)
        within = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1])
        ids = within[np.lexsort((within, distances[within]))][:k]
        return distances[ids], ids


@dataclass
class Row:
    """What one case gave with one number of threads: seconds per query of each side, turn by turn."""

    case: Case
    threads: int
    default: str  # FAISS's level of its own choice
    faiss_queries: int  # how many of the nq queries FAISS was timed with
    faiss: dict[str, list[float]] = field(default_factory=dict)
    ours: dict[str, list[float]] = field(default_factory=dict)
    bytes_per_second: list[float] = field(default_factory=list)  # of plain reading, where it was measured

    @property
    def best(self) -> str:
        """FAISS's fastest level here."""
        return min(self.faiss, key=lambda level: median(self.faiss[level]))

    def ratios(self, level: str, other: str) -> list[float]:
        """How many times faster than FAISS at its level ``other`` we are, turn by turn."""
        return ratios(self.faiss[other], self.ours[level])

    def bandwidth(self, level: str) -> float | None:
        """The part of the machine's read bandwidth at which we go through the codes."""
        if not self.bytes_per_second:
            return None
        return self.case.n * self.case.M / median(self.ours[level]) / max(self.bytes_per_second)

    def goal(self, level: str) -> Goal | None:
        """What this case should reach."""
        goal = GOALS.get((level, self.case))
        return goal if goal and self.threads in goal.threads else None


def check_equal(comp: tuple[FloatArray, IntArray], ref: tuple[FloatArray, IntArray], what: str) -> None:
    """Fail unless D and I are the same to the bit."""
    np.testing.assert_array_equal(comp[0].view(np.uint32), ref[0].view(np.uint32), f"distances: {what}")
    np.testing.assert_array_equal(comp[1], ref[1], f"ids: {what}")


def measure(setup: Setup, case: Case, threads: int, workers: Sequence[FaissLevel], our_levels: Sequence[str], runs: int) -> Row:
    """Check one case, then time it."""
    queries, k = setup.queries[: case.nq], case.k
    first = min(case.nq, 4 * threads)
    guess = max(worker.search("IndexPQ", first, k, threads) for worker in workers) / first
    timed = min(case.nq, max(8, int(FAISS_SECONDS / guess / threads)) * threads)
    row = Row(case, threads, workers[0].level, timed)
    sides: dict[str, Callable[[], float]] = {}

    def ours(level: str, count: int = 1) -> Callable[[], float]:
        return lambda: seconds_of(lambda: search_at(level, threads, setup.ours, queries, k), count) / case.nq

    def theirs(worker: FaissLevel, count: int) -> Callable[[], float]:
        return lambda: worker.search("IndexPQ", timed, k, threads, count) / timed

    ref: tuple[FloatArray, IntArray] | None = None
    for level in our_levels:
        D, I = search_at(level, threads, setup.ours, queries, k)  # noqa: E741
        if ref is None:
            ref = D, I
            for q in range(1 if case.n * case.M > 10**8 // 2 else min(case.nq, 4)):
                check_equal((D[q], I[q]), setup.nearest(q, k), f"{case}, {threads} threads, {level}, reference")
        check_equal((D, I), ref, f"{case}, {threads} threads, {level}")
        sides[f"ours {level}"] = ours(level, repeats(ours(level)() * case.nq))
    for worker in workers:
        seconds = worker.search("IndexPQ", timed, k, threads)
        check_answers((D[:timed], I[:timed]), worker.found())
        sides[f"faiss {worker.level}"] = theirs(worker, repeats(seconds))
    if case.nq == 1 and case.n * case.M >= BEYOND_CACHES:
        sides["read"] = ReadTest(threads).bytes_per_second
    for name, times in interleave(sides, runs).items():
        side, _, level = name.partition(" ")
        if side == "read":
            row.bytes_per_second = times
        else:
            (row.ours if side == "ours" else row.faiss)[level] = times
    return row


def measure_all(
    cases: Sequence[Case], threads: Sequence[int], workers: Sequence[FaissLevel], chosen: Sequence[str], runs: int
) -> Iterator[Row]:
    """All cases, those on the same codes together."""
    steps = [(case, count) for case in sorted(cases) for count in threads]
    setup, key = None, None
    for case, count in track(steps, "exact", transient=True):
        if (case.n, case.M) != key:
            setup, key = None, (case.n, case.M)  # the former one goes before its successor comes
            setup = Setup(*key, max(other.nq for other in cases if other[:2] == key), workers)
        assert setup is not None
        our_levels = chosen or (supported_levels() if case == MAIN else [simd_level()])
        yield measure(setup, case, count, workers, our_levels, runs)


# ------------------------------------------------------------------------------------------------ showing


def table_of(rows: Sequence[Row]) -> Table:
    """Milliseconds per query with their spread, median ratios with theirs, and goals."""
    default = rows[0].default
    table = Table(title="exact search, 8-bit codes: ms per query, medians ± half the range", title_justify="left")
    columns = ("case", "threads", f"faiss.IndexPQ {default} (default)", "at its best", "ours", "× default", "× best", "goal")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "goal") else "right")
    for row in rows:
        for level, times in row.ours.items():
            fewer = f" of {row.faiss_queries} q" if row.faiss_queries < row.case.nq else ""
            table.add_row(
                str(row.case),
                str(row.threads),
                with_spread(row.faiss[row.default], 1e3) + fewer,
                f"{with_spread(row.faiss[row.best], 1e3)} {row.best}",
                f"{with_spread(times, 1e3)} {level}",
                *(_ratio(row.ratios(level, other)) for other in (row.default, row.best)),
                _judge(row, level),
            )
    return table


def _ratio(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}…{max(values):.1f})"


def _judge(row: Row, level: str) -> str:
    part, goal = row.bandwidth(level), row.goal(level)
    words = [] if part is None else [f"{part:.0%} of {max(row.bytes_per_second) / 1e9:.1f} GB/s"]
    if goal:
        reached = [median(row.ratios(level, row.default)) >= goal.default, median(row.ratios(level, row.best)) >= goal.best]
        wanted = [f"≥ {goal.default:g}", f"≥ {goal.best:g}"]
        if goal.bandwidth:
            reached.append((part or 0.0) >= goal.bandwidth)
            wanted.append(f"≥ {goal.bandwidth:.0%}")
        words += [
            f"[{'green' if met else 'red'}]{text} {'✓' if met else '✗'}[/]" for met, text in zip(reached, wanted, strict=True)
        ]
    return " ".join(words)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG: how many times faster we are in each case, against FAISS's default and best level, and the goals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(row, level) for row in rows for level in row.ours]
    figure = Figure(figsize=(10, 1.6 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (row, level) in enumerate(shown):
        goal = row.goal(level)
        for other, colour, offset, name, wanted in (
            (row.default, "tab:blue", -0.16, f"faiss.IndexPQ, {row.default} (its default)", goal and goal.default),
            (row.best, "tab:orange", 0.16, "faiss.IndexPQ at its best level", goal and goal.best),
        ):
            values = row.ratios(level, other)
            label = name if y == 0 else None
            axes.plot([min(values), max(values)], [y + offset] * 2, color=colour, linewidth=1)
            axes.plot(median(values), y + offset, "o", color=colour, markersize=5, label=label)
            if wanted:
                axes.plot(wanted, y + offset, "|", color=colour, markersize=11, markeredgewidth=2.5, alpha=0.6)
    axes.plot([], [], "|", color="grey", markersize=11, markeredgewidth=2.5, label="goal")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [f"{row.case}, {row.threads} thr, {level}" for row, level in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("times faster (median, least and most of the turns)")
    axes.set_title(f"HyperbolicPQIndex, exact 8-bit search: {cpu()}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def main(
    n: Annotated[list[int] | None, typer.Option(help="codes in the index; repeat for several, as all of these")] = None,
    m: Annotated[list[int] | None, typer.Option(help="bytes of a code, one for each subspace")] = None,
    k: Annotated[list[int] | None, typer.Option(help="neighbours")] = None,
    nq: Annotated[list[int] | None, typer.Option(help="queries of a search")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="threads [default: 1 and 2]")] = None,
    level: Annotated[list[str] | None, typer.Option(help="our SIMD levels [default: the best; in one case all]")] = None,
    full: Annotated[bool, typer.Option(help="every case, the best part of an hour, rather than those with goals")] = False,
    runs: Annotated[int, typer.Option(help="timed turns")] = 5,
    exact: Annotated[bool, typer.Option(help="time exact search")] = True,
    approximate: Annotated[bool, typer.Option(help="time FAISS's approximate indexes of the same size")] = True,
    profile: Annotated[bool, typer.Option(help="show where our time goes")] = True,
    json_path: Annotated[Path, typer.Option("--json", help="raw times go here, the picture beside it")] = Path(
        "runs/bench-scan/scan.json"
    ),
) -> None:
    """Check, time in turn, and show exact 8-bit search of hyperfaiss and FAISS."""
    usable = supported_levels()
    if unknown := set(level or ()) - set(usable):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: this CPU has {', '.join(usable)}")
    chosen_cases = [Case(*v) for v in itertools.product(n or [1_000_000], m or [8], nq or [1024], k or [100])]
    cases = FULL if full else chosen_cases if n or m or nq or k else sorted({case for _, case in GOALS} | set(MORE))
    console = Console()
    console = console if console.is_terminal else Console(width=180)
    report: dict[str, Any] = {"machine": machine(), "runs": runs, "our_levels": usable}
    with ExitStack() as stack:
        workers = [stack.enter_context(FaissLevel(name)) for name in levels()]
        report["faiss_levels"] = [worker.level for worker in workers]
        about = report["machine"]
        console.print(
            f"{about['cpu']}, {about['cpus']} CPUs, load {about['load_average'][0]:.1f}; faiss {faiss.__version__} at "
            f"{', '.join(report['faiss_levels'])}; hyperfaiss {about['versions']['hyperfaiss']} at {', '.join(usable)}"
        )
        used = threads or [1, 2]
        if exact:
            rows = list(measure_all(cases, used, workers, level or [], runs))
            report["exact"] = [asdict(row) | {"case": row.case._asdict()} for row in rows]
            console.print(table_of(rows))
            json_path.parent.mkdir(parents=True, exist_ok=True)
            draw(rows, json_path.with_suffix(".png"))
        if approximate:
            found = scan_approximate.measure(max(n or [1_000_000]), m or [8, 16], used, workers, (level or usable)[0], runs)
            report["approximate"] = [asdict(row) for row in found]
            console.print(scan_approximate.table_of(found))
    if profile:
        profiles = [scan_profile.measure(name) for name in level or [simd_level()]]
        report["profile"] = [asdict(row) for row in profiles]
        console.print(scan_profile.table_of(profiles))
    write_json(json_path, report)
    console.print(f"{json_path}, {json_path.with_suffix('.png').name}" if exact else str(json_path))


if __name__ == "__main__":
    typer.run(main)

"""Memory: what adding many vectors in pieces and searching with many queries take at their peak (Linux).

python -m benchmarks.footprint [--n 10000000] [--nq 100000]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hyperfaiss import HyperbolicIVFPQIndex, HyperbolicPQIndex, HyperbolicProductQuantizer

D, M, NLIST, PIECE = 64, 8, 1024, 500_000


def resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(work: Callable[[], object]) -> tuple[float, float]:
    """MiB by which resident memory grew at the peak of ``work``, and at its end."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the former peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before, resident("VmRSS") - before


def main(
    n: Annotated[int, typer.Option(help="vectors to add")] = 10_000_000,
    nq: Annotated[int, typer.Option(help="queries of the one search")] = 100_000,
    searched: Annotated[int, typer.Option(help="vectors that are searched; the memory does not depend on it")] = 100_000,
) -> None:
    """Add to a flat and to an IVF index, search each with all queries at once, and print the growth of resident memory."""
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((20_000, D), np.float32) / 4
    codec = HyperbolicProductQuantizer(D, M, clip_radius=1.0)
    codec.train(sample)
    piece = rng.standard_normal((min(PIECE, n), D), np.float32) / 4
    queries = rng.standard_normal((nq, D), np.float32) / 4

    def made(kind: str) -> HyperbolicPQIndex | HyperbolicIVFPQIndex:
        if kind == "flat":
            return HyperbolicPQIndex.from_codec(codec)
        index = HyperbolicIVFPQIndex.from_codec(None, codec, NLIST)
        index.train(sample)
        index.nprobe = 16
        return index

    table = Table()
    for column in ("index", "step", "peak, MiB", "stays, MiB", "of which data, MiB"):
        table.add_column(column, justify="left" if column in {"index", "step"} else "right")
    for kind, entry in (("flat", M), (f"IVF{NLIST}", M + 8)):
        small, large = made(kind), made(kind)
        small.add(piece[:searched])
        small.search(queries[:10], 10)

        def add(index: HyperbolicPQIndex | HyperbolicIVFPQIndex = large) -> None:
            for start in range(0, n, len(piece)):
                index.add(piece[: n - start])

        def search(index: HyperbolicPQIndex | HyperbolicIVFPQIndex = small) -> object:
            return index.search(queries, 10)

        for step, work, data in ((f"add {n:,}", add, n * entry), (f"search, nq = {nq:,}, k = 10", search, nq * 10 * 12)):
            peak, left = peak_of(work)
            table.add_row(kind, step, f"{peak:.0f}", f"{left:.0f}", f"{data / 2**20:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

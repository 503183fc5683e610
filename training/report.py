"""Evaluations for people: tables for the terminal, CSV files and figures for a folder."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from hyperfaiss.io import atomic_path
from training.evaluate import Curve, Evaluation

__all__ = ["plot_precision_recall", "summary", "write_report"]


def summary(evaluation: Evaluation, *, code_size: int) -> Group:
    """An evaluation as tables; ``code_size`` is the bytes of a code."""
    figures = Table(show_header=False)
    figures.add_row(f"MAP@{evaluation.n}", f"{100 * evaluation.map_at_n:.2f} %")
    for k, share in evaluation.precision.items():
        figures.add_row(f"precision@{k}", f"{100 * share:.2f} %")
    for k, share in evaluation.recall.items():
        figures.add_row(f"recall@{k} of the unquantised order", f"{100 * share:.2f} %")
    figures.add_row("queries per second", f"{evaluation.queries_per_second:,.0f}")
    figures.add_row("bytes per vector", f"{code_size}")
    figures.add_row("queries, database", f"{evaluation.queries:,}, {evaluation.database:,}")
    if not evaluation.subspaces:
        return Group(figures)
    codebooks = Table("m", "codewords used", "entropy", "sq. error", "of spread", "geodesic error")
    for m, s in enumerate(evaluation.subspaces):
        codebooks.add_row(
            str(m), f"{s.used} of {s.ksub}", f"{s.entropy:.2f} bits", f"{s.squared_error:.4g}",
            f"{100 * s.relative_error:.1f} %", f"{s.geodesic_error:.4g}",
        )  # fmt: skip
    for column in codebooks.columns:
        column.justify = "right"
    return Group(figures, codebooks)


def write_report(evaluations: Mapping[str, Evaluation], folder: str | os.PathLike[str]) -> list[Path]:
    """Write what is known of named evaluations into a folder, made if need be; returns the files.

    precision_recall.csv (name, rank, precision, recall) and .png; subspaces.csv (name, m, and the fields of ``Subspace``) if
    one of them has any.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    curves = {name: e.curve for name, e in evaluations.items() if e.curve is not None}
    written = [out / "precision_recall.csv", out / "precision_recall.png"]
    points = ((name, *row) for name, c in curves.items() for row in zip(c.ranks, c.precision, c.recall, strict=True))
    _write_csv(written[0], ("name", "rank", "precision", "recall"), points)
    plot_precision_recall(curves, written[1])
    rows: list[dict[str, Any]] = [
        {"name": name, "m": m, **asdict(subspace)} for name, e in evaluations.items() for m, subspace in enumerate(e.subspaces)
    ]
    if rows:
        written.append(out / "subspaces.csv")
        _write_csv(written[-1], tuple(rows[0]), (row.values() for row in rows))
    return written


def plot_precision_recall(curves: Mapping[str, Curve], path: str | os.PathLike[str]) -> None:
    """Precision against recall, and precision by rank, as a PNG."""
    # Figures made by hand, not by pyplot: no display, no global state, whatever thread calls.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    by_recall, by_rank = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        by_recall.plot(curve.recall, curve.precision, lw=1.6, label=name)
        by_rank.plot(curve.ranks, curve.precision, lw=1.6, label=name)
    by_recall.set(xlabel="recall", ylabel="precision", title="Precision against recall", ylim=(0, 1.02), xlim=(0, None))
    by_rank.set(xlabel="rank", title="Precision within the first ranks", xscale="log")
    for axes in (by_recall, by_rank):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if curves:
        by_recall.legend(frameon=False)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_path(path) as temporary, Path(temporary).open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(names)
        writer.writerows(rows)

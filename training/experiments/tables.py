"""A table of methods by bits: its runs, and its CSV, Markdown and terminal forms."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hyperfaiss.errors import InvalidParameterError
from hyperfaiss.io import atomic_path
from training.experiments.baselines import FAISS_METHODS
from training.experiments.published import SOURCE, published_map
from training.experiments.runs import Result, Run
from training.methods import VARIANTS, tuned
from training.recipes import recipe

__all__ = ["GROUPS", "METHODS", "Changes", "cells", "expand", "markdown", "mean_and_spread", "table_runs", "terminal_table",
           "write_csv"]  # fmt: skip

# All methods that a table can have, in the order of its rows.
_BASELINES = tuple(m for m, changes in VARIANTS.items() if "method" in changes)
_FULL = ("hihpq-cosine", "hihpq-euclidean", "hihpq", "hihpq-distilled")
METHODS: tuple[str, ...] = (*FAISS_METHODS, *_BASELINES, *(m for m in VARIANTS if m not in _BASELINES + _FULL), *_FULL)
# The paper's tables.
GROUPS: dict[str, tuple[str, ...]] = {
    "table1": (*FAISS_METHODS, *_BASELINES, "hihpq-euclidean", "hihpq", "hihpq-distilled"),
    "table2": tuple(m for m in METHODS if m not in (*FAISS_METHODS, *_BASELINES, "hihpq-distilled")),
}

# Changes of the recipe, by the methods that they are for: a method's name, "hihpq" variants ("") or all that learn ("all").
Changes = Mapping[str, Mapping[str, Any]]


def expand(names: Iterable[str]) -> list[str]:
    """Methods from names of methods and ``GROUPS``, each once, in the order of ``METHODS``; "all" is every method.

    Raises InvalidParameterError for an unknown name.
    """
    asked: set[str] = set()
    for name in names:
        if name != "all" and name not in GROUPS and name not in METHODS:
            raise InvalidParameterError(f"no method {name!r}; there are {', '.join(METHODS)}; all, {', '.join(GROUPS)}")
        asked.update(METHODS if name == "all" else GROUPS.get(name, (name,)))
    return [method for method in METHODS if method in asked]


def configuration(method: str, recipe_name: str, changes: Changes, **more: Any) -> Any:
    """The configuration of a method: a recipe, what suits the method, changes for all, its definition, changes for it alone."""
    definition = VARIANTS[method]
    general = tuned(method) | dict(changes.get("all", {}))
    if "method" not in definition:
        general |= changes.get("", {})
    return recipe(recipe_name, **(general | definition | dict(changes.get(method, {})) | more))


def table_runs(
    methods: Sequence[str],
    bits: Sequence[int],
    seeds: Sequence[int],
    *,
    recipe_name: str = "default",
    changes: Changes | None = None,
) -> list[Run]:
    """The runs of a table: seed by seed, so that the first table is whole soon. Exact search has neither bits nor seeds.

    Raises InvalidParameterError for changes that a configuration refuses, or that are for no method of the table.
    """
    changes = changes or {}
    unused = set(changes) - set(methods) - {"", "all"}
    if unused:
        raise InvalidParameterError(f"changes for {', '.join(sorted(unused))}, which the table does not have")
    runs = []
    for seed in seeds:
        for method in methods:
            if method == "exact":
                if seed == seeds[0]:
                    runs.append(Run(method, "float32", 0, method, 0, None))
                continue
            for b in bits:
                learns = method not in FAISS_METHODS
                config = configuration(method, recipe_name, changes, bits=b, seed=seed) if learns else None
                runs.append(Run(method, f"{b} bits", seed, method, b, config))
    return runs


# ---------------------------------------------------------------------------------------------- figures


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cells(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by row and column, each cell's by seed."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        found.setdefault((result.row, result.column), []).append(result)
    return found


def spell(results: Sequence[Result]) -> str:
    """ "55.12 ± 0.31" percent; "–" of none."""
    if not results:
        return "–"
    mean, spread = mean_and_spread([r.map for r in results])
    return f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def _grid(results: Sequence[Result], published: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text; the paper's figures for the protocol ``published``, if any."""
    methods = [m for m in METHODS if any(r.method == m for r in results)]
    bits = sorted({r.bits for r in results} - {0})
    by_cell = cells(results)
    paper = [b for b in bits if published and any(published_map(published, m, b) is not None for m in methods)]
    header = ["method", *(f"{b} bits" for b in bits), *(f"paper, {b}" for b in paper), "seeds"]
    rows = []
    for method in methods:
        # Exact search has no codes: its one figure stands in every column.
        found = [by_cell.get((method, "float32" if method == "exact" else f"{b} bits"), []) for b in bits or [0]]
        figures = [published_map(published or "", method, b) for b in paper]
        counts = sorted({len(cell) for cell in found if cell})
        seeds = "" if method == "exact" else "–".join(str(c) for c in dict.fromkeys((counts[0], counts[-1])))
        rows.append([method, *map(spell, found), *("" if f is None else f"{f:.2f}" for f in figures), seeds])
    return (header if bits else ["method", "float32", "seeds"]), rows


def terminal_table(results: Sequence[Result], title: str, published: str | None = None) -> Table:
    """The table for a terminal; beside it the paper's figures for the protocol ``published``."""
    header, rows = _grid(results, published)
    table = Table(title=title)
    for name in header:
        style = "dim" if name.startswith("paper") else None
        table.add_column(name, justify="left" if name == "method" else "right", style=style)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: Sequence[Result], title: str, about: Sequence[str] = (), published: str | None = None) -> str:
    """The same for a page, below the lines ``about`` it."""
    header, rows = _grid(results, published)
    lines = [f"# {title}", ""]
    for line in about:
        lines += [line, ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Mean ± sample standard deviation over the seeds; one split for all."]
    if any(name.startswith("paper") for name in header):
        lines[-1] += f' Columns "paper": {SOURCE}.'
    return "\n".join(lines) + "\n"


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The single numbers among a run's metrics: P@k and recall@k by k, and means over the subspaces."""
    found = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    found |= {f"precision@{k}": value for k, value in metrics.get("precision", {}).items()}
    found |= {f"recall@{k}": value for k, value in metrics.get("recall", {}).items()}
    if subspaces := metrics.get("subspaces"):
        for name in ("used", "perplexity", "squared_error", "relative_error"):
            found[f"codebook_{name}"] = statistics.fmean(subspace[name] for subspace in subspaces)
    return found


def write_csv(results: Iterable[Result], path: Path) -> None:
    """A row a run: where it stands, its figures (MAP and the like as fractions), the seconds that it took."""
    rows = []
    for r in results:
        where = {"row": r.row, "column": r.column, "method": r.method, "bits": r.bits or "", "seed": r.seed}
        rows.append(where | _figures(r.metrics) | {f"seconds_{name}": round(value, 2) for name, value in r.seconds.items()})
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue())

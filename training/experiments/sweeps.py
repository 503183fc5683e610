"""How one hyper-parameter changes the figures: which runs a sweep takes, and its picture (the paper's Figure 4 and Table 3)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hyperfaiss.errors import CorruptFileError, InvalidParameterError
from hyperfaiss.io import atomic_path
from training.experiments.runs import Result, Run
from training.experiments.tables import cells, mean_and_spread
from training.methods import VARIANTS
from training.recipes import recipe

__all__ = ["SWEEPS", "Sweep", "draw", "sweep_runs"]


@dataclass(frozen=True)
class Sweep:
    """A measurement of the paper.

    figure : which one; label : of the x axis.
    field : of TrainConfig, the one that takes the values; None: the series alone differ, and the picture is by epoch.
    values : defaults; where the paper gives no numbers, a range around those of its runs.
    series : lines of the picture, as changes of the recipe.
    scale : of the x axis; "names" puts the values side by side.
    """

    figure: str
    label: str
    field: str | None
    values: tuple[Any, ...]
    series: Mapping[str, Mapping[str, Any]]
    scale: Literal["linear", "log", "names"] = "linear"


_FULL: dict[str, dict[str, Any]] = {"hihpq": VARIANTS["hihpq"]}
_WITH_AND_WITHOUT: dict[str, dict[str, Any]] = {
    "with hierarchy": VARIANTS["hihpq"],
    "without hierarchy": VARIANTS["vanilla-hyperbolic"],
}
_LEVELS = (
    *((50,), (100,), (200,), (50, 25), (100, 50), (200, 100)),
    *((50, 25, 10), (100, 50, 25), (200, 100, 50), (200, 100, 50, 25)),
)

SWEEPS: dict[str, Sweep] = {
    "codebooks": Sweep("Figure 4a", "number of codebooks M", "M", (2, 4, 8, 16), _WITH_AND_WITHOUT, "log"),
    "quantization-error": Sweep("Figure 4b", "epoch", None, (), _WITH_AND_WITHOUT),
    "tau-qc": Sweep("Figure 4c", "contrastive temperature τ_qc", "tau_qc", (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0), _FULL),
    "curvature": Sweep("Figure 4d", "initial curvature θ (of −θ)", "curvature", (0.05, 0.1, 0.5, 1.0, 2.0, 5.0), _FULL, "log"),
    "hierarchy": Sweep("Table 3", "clusters of each level", "levels", _LEVELS, _FULL, "names"),
}


def sweep_runs(
    name: str,
    seeds: Sequence[int],
    *,
    bits: int = 32,
    values: Sequence[Any] | None = None,
    recipe_name: str = "default",
    changes: Mapping[str, Any] | None = None,
) -> list[Run]:
    """The runs of a sweep, seed by seed. ``bits`` of a code, where M is not what varies.

    Raises InvalidParameterError for a value that the configuration refuses, values of a sweep that has none, and
    changes of a field that the sweep sets itself.
    """
    sweep = SWEEPS[name]
    if sweep.field is None and values is not None:
        raise InvalidParameterError(f"{name} takes no values: it follows one configuration through its epochs")
    own = {*(key for series in sweep.series.values() for key in series), sweep.field}
    if taken := sorted(key for key in changes or {} if key in own):
        raise InvalidParameterError(f"{name} sets {', '.join(taken)} itself")
    chosen = list(dict.fromkeys(sweep.values if values is None else values)) if sweep.field else [None]
    runs = []
    for seed in seeds:
        for series, of_series in sweep.series.items():
            for value in chosen:
                more = {} if sweep.field is None else {sweep.field: value}
                size = {} if sweep.field == "M" else {"bits": bits}
                config = recipe(recipe_name, seed=seed, **{**(changes or {}), **of_series, **more, **size})
                column = f"{sweep.field}={_spell(value)}" if sweep.field else f"{bits} bits"
                runs.append(Run(series, column, seed, "hihpq", config.bits, config))
    return runs


def draw(name: str, runs: Sequence[Run], results: Sequence[Result], path: Path, *, title: str) -> None:
    """The sweep as a PNG: means over the seeds, with bars of one standard deviation.

    Raises CorruptFileError for a run whose log lacks the quantisation error.
    """
    # Figures made by hand, not by pyplot: no display, no global state, whatever thread calls.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweep = SWEEPS[name]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if sweep.field is None:
        _draw_epochs(axes, sweep, results)
    else:
        _draw_values(axes, sweep, runs, results)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(sweep.label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(sweep.series) > 1:
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7a3e9d")


def _draw_values(axes: Any, sweep: Sweep, runs: Sequence[Run], results: Sequence[Result]) -> None:
    by_cell = cells(results)
    columns = {run.column: getattr(run.config, str(sweep.field)) for run in runs}
    if sweep.scale == "names":
        positions: dict[str, Any] = {column: place for place, column in enumerate(columns)}
    else:
        positions = dict(sorted(columns.items(), key=lambda item: item[1]))
    for series, colour in zip(sweep.series, _COLOURS, strict=False):
        found = [(x, by_cell[series, column]) for column, x in positions.items() if (series, column) in by_cell]
        figures = [mean_and_spread([r.map for r in cell]) for _, cell in found]
        axes.errorbar(
            [x for x, _ in found], [mean for mean, _ in figures], [spread or 0.0 for _, spread in figures],
            color=colour, label=series, marker="o", ms=4.5, lw=0 if sweep.scale == "names" else 1.6, elinewidth=1.2, capsize=3,
        )  # fmt: skip
    if sweep.scale == "log":
        axes.set_xscale("log", base=2 if sweep.field == "M" else 10)
    if sweep.scale == "names":
        axes.set_xticks(list(positions.values()), [_spell(value, ", ") for value in columns.values()], rotation=30)
    elif sweep.scale == "log":
        axes.set_xticks(list(positions.values()), [f"{x:g}" for x in positions.values()])
        axes.minorticks_off()
    axes.set_ylabel(f"MAP@{results[0].metrics['n']} (%)")


def _draw_epochs(axes: Any, sweep: Sweep, results: Sequence[Result]) -> None:
    from matplotlib.ticker import MaxNLocator

    for series, colour in zip(sweep.series, _COLOURS, strict=False):
        histories = [_errors_by_epoch(r.folder / "log.csv") for r in results if r.row == series]
        if not histories:
            continue
        epochs = range(1, 1 + min(map(len, histories)))
        figures = [mean_and_spread([history[e - 1] for history in histories]) for e in epochs]
        mean, spread = [m for m, _ in figures], [s or 0.0 for _, s in figures]
        axes.plot(epochs, mean, color=colour, label=series, marker="o" if len(epochs) < 25 else None, ms=3.5, lw=1.6)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("quantisation error of training items")


def _errors_by_epoch(path: Path) -> list[float]:
    """The trainer's column; see ``TrainResult.history``."""
    try:
        with path.open(newline="") as file:
            return [float(row["quantization_error"]) for row in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
        raise CorruptFileError(f"{path} has no quantisation error by epoch: {error!r}") from error


def _spell(value: Any, separator: str = "-") -> str:
    return separator.join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}"

"""Figures of a training run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperfaiss.errors import InvalidVectorsError
from hyperfaiss.io import atomic_path

__all__ = ["plot_curves"]

_COLOURS = ("#222222", "#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
# What a row of the history holds beside losses.
_NOT_LOSSES = {"epoch", "lr", "theta", "val_loss", "val_map", "quantization_error", "seconds"}


def plot_curves(history: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, best_epoch: int | None = None) -> None:
    """Losses, validation and curvatures by epoch, as a PNG; ``history`` is that of ``TrainResult``.

    Raises InvalidVectorsError for an empty history.
    """
    if not history:
        raise InvalidVectorsError("no epoch to plot")
    # Figures made by hand, not by pyplot: no display, no global state, whatever thread calls.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    measured = any(row["val_loss"] is not None for row in history)
    curved = len(history[0]["theta"]) > 0
    count = 1 + measured + curved
    figure = Figure(figsize=(4.6 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    marker = "o" if len(epochs) < 25 else None

    losses = panels[0]
    names = [name for name in history[0] if name not in _NOT_LOSSES]
    for name, colour in zip(names, itertools.cycle(_COLOURS), strict=False):
        values = [row[name] for row in history]
        if name in names[:2] or any(values):
            losses.plot(epochs, values, color=colour, label=name, marker=marker, ms=3, lw=1.6)
    losses.set_title("Training losses")
    losses.legend(framealpha=0.8, edgecolor="none")

    if curved:
        _plot_curvatures(panels[-1], history, epochs, marker)
    if measured:
        _plot_validation(panels[1], history, epochs, marker)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="#999999", lw=1, ls="--", zorder=0)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _plot_validation(axes: Any, history: Sequence[dict[str, Any]], epochs: list[int], marker: str | None) -> None:
    """MAP where it was measured, on top of the contrastive loss."""
    lines = axes.plot(
        epochs, [row["val_loss"] for row in history], color="#1f77b4", label="contrastive loss", marker=marker, ms=3, lw=1.6
    )
    axes.set_title("Validation (dashed: epoch kept)")
    if all(row["val_map"] is not None for row in history):
        right = axes.twinx()
        lines += right.plot(
            epochs, [row["val_map"] for row in history], color="#7a3e9d", label="MAP (right)", marker=marker, ms=3, lw=1.6
        )
        right.spines["top"].set_visible(False)
    axes.legend(handles=lines, frameon=False)


def _plot_curvatures(axes: Any, history: Sequence[dict[str, Any]], epochs: list[int], marker: str | None) -> None:
    thetas = [[row["theta"][m] for row in history] for m in range(len(history[0]["theta"]))]
    for m, values in enumerate(thetas):
        label = f"m = {m}" if len(thetas) <= 8 else None
        axes.plot(epochs, values, color=f"C{m % 10}", label=label, marker=marker, ms=3, lw=1.6)
    axes.set_title("Curvatures θ (of −θ) by subspace")
    if len(thetas) <= 8:
        axes.legend(frameon=False, ncols=2)

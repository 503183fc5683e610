"""Accuracy of the geodesic distance against a 120-digit oracle, over the range that the library promises.

    python -m benchmarks.accuracy

For each curvature and distance: pairs of float32 points near the origin, far from it, on one ray, on opposite sides, and in
random directions; the oracle takes the coordinates as they stand in float32. Printed: the largest relative error of
``lorentz.distance`` on float32 input, of the compiled distance tables, and of the textbook form ``arcosh(-θ⟨x, y⟩)/√θ``.
Pairs whose coordinates leave the range of float32 are left out, and counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import mpmath
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from hyperfaiss import HyperbolicProductQuantizer, lorentz

CURVATURES = (0.0, 1e-4, 1e-2, 1.0, 10.0)
DISTANCES = (1e-6, 1e-4, 1e-2, 1.0, 10.0, 30.0)
RADII = (0.0, 0.1, 1.0, 3.0)
DIM = 8


def pairs(theta: float, distance: float, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Float32 points (n, DIM) twice, about ``distance`` apart; those beyond float32 removed."""
    x, y = [], []
    for radius in RADII:
        for kind in ("ray", "opposite", "across", "random", "random"):
            u, w = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
            if kind == "random":
                w = u * rng.uniform(-1, 1) + w * rng.uniform(-1, 1)
                w /= np.linalg.norm(w)
            if kind == "opposite":
                base, step = -distance / 2 * u, distance * u
            else:
                base, step = radius * u, distance * (u if kind == "ray" else w)
            # On a ray through the origin tangent lengths are distances; elsewhere the step only has to be about right:
            # a tangent step across of length s at radius r moves s·sinh(√θr)/(√θr).
            stretch = 1.0
            if kind in ("across", "random") and radius * theta > 0:
                stretch = np.sqrt(theta) * radius / np.sinh(np.sqrt(theta) * radius)
            x.append(lorentz.exp0(base, theta))
            y.append(lorentz.exp0(base + step * stretch, theta))
    with np.errstate(over="ignore"):
        x32, y32 = np.array(x, np.float32), np.array(y, np.float32)
    fits = np.isfinite(x32).all(axis=1) & np.isfinite(y32).all(axis=1) & (x32 != y32).any(axis=1)
    return x32[fits], y32[fits]


def oracle(x: npt.NDArray[Any], y: npt.NDArray[Any], theta: float) -> float:
    """arcosh(-θ⟨x, y⟩)/√θ with 120 digits, from the coordinates as they stand."""
    with mpmath.workdps(120):
        a, b = [mpmath.mpf(float(v)) for v in x], [mpmath.mpf(float(v)) for v in y]
        if theta == 0:
            return float(mpmath.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True))))
        t = mpmath.mpf(float(np.float32(theta)))
        time = [mpmath.sqrt(1 / t + sum(p * p for p in v)) for v in (a, b)]
        inner = sum(p * q for p, q in zip(a, b, strict=True)) - time[0] * time[1]
        return float(mpmath.acosh(-t * inner) / mpmath.sqrt(t))


def textbook(x: npt.NDArray[Any], y: npt.NDArray[Any], theta: np.float32) -> npt.NDArray[Any]:
    """The distance as it is usually written, in float32; inf where it overflows."""
    if theta == 0:
        return np.asarray(np.linalg.norm(x - y, axis=1))
    with np.errstate(over="ignore", invalid="ignore"):
        time = np.sqrt(1 / theta + (x * x).sum(1)) * np.sqrt(1 / theta + (y * y).sum(1))
        distance = np.arccosh(np.maximum(theta * (time - (x * y).sum(1)), 1)) / np.sqrt(theta)
        return np.asarray(np.nan_to_num(distance, nan=np.inf, posinf=np.inf))


def tables(x: npt.NDArray[Any], y: npt.NDArray[Any], theta: float) -> npt.NDArray[Any]:
    """The same distances out of the codec's distance tables, whose queries are tangent vectors."""
    out = np.empty(len(x), np.float32)
    for i in range(len(x)):
        codec = HyperbolicProductQuantizer.from_codebooks(np.repeat(y[None, i : i + 1], 16, axis=1), theta)
        out[i] = codec.compute_distance_tables(lorentz.log0(x[i : i + 1], np.float32(theta)))[0, 0, 0]
    return out


def relative(computed: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    """Largest relative error."""
    return float(np.max(np.abs(computed.astype(np.float64) - exact) / exact))


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
    draws: Annotated[int, typer.Option(help="random bases for each cell")] = 5,
    seed: int = 0,
) -> None:
    """Print the largest relative error of each form of the distance, by curvature and distance."""
    rng = np.random.default_rng(seed)
    rows = []
    for theta in CURVATURES:
        for distance in DISTANCES:
            both = [pairs(theta, distance, rng) for _ in range(draws)]
            x, y = (np.concatenate(side) for side in zip(*both, strict=True))
            exact = np.array([oracle(a, b, theta) for a, b in zip(x, y, strict=True)])
            known = exact > 0
            x, y, exact = x[known], y[known], exact[known]
            # The query of a table is a tangent vector, so its point is what float32 makes of that, not x itself.
            seen = lorentz.exp0(lorentz.log0(x, np.float32(theta)), np.float32(theta))
            fits = np.isfinite(seen).all(axis=1)
            seen_exact = np.array([oracle(a, b, theta) for a, b in zip(seen[fits], y[fits], strict=True)])
            positive = seen_exact > 0
            rows.append(
                {
                    "curvature": 0.0 - theta,
                    "distance": distance,
                    "pairs": len(x),
                    "left_out": draws * len(RADII) * 5 - len(x),
                    "distance_error": relative(lorentz.distance(x, y, np.float32(theta)), exact),
                    "table_error": relative(tables(x[fits], y[fits], theta)[positive], seen_exact[positive]),
                    "textbook_error": relative(textbook(x, y, np.float32(theta)), exact),
                }
            )
    table = Table(title="Largest relative error of the geodesic distance, float32 input")
    for column in ("curvature", "distance", "pairs (left out)", "lorentz.distance", "distance tables", "textbook arcosh"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['curvature']:g}",
            f"{row['distance']:g}",
            f"{row['pairs']} ({row['left_out']})",
            *(f"{row[key]:.1e}" for key in ("distance_error", "table_error", "textbook_error")),
        )
    console = Console()
    console.print(table)
    worst = max(row["distance_error"] for row in rows), max(row["table_error"] for row in rows)
    console.print(f"worst: lorentz.distance {worst[0]:.1e}, distance tables {worst[1]:.1e} (promised: 1e-6)")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)

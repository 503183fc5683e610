"""Inverted lists: speed against recall beside FAISS, and which space the lists should be made in.

    python -m benchmarks.ivf curves --help
    python -m benchmarks.ivf coarse --help

``curves`` builds one coarse quantizer over FAISS's synthetic vectors (or those of a file) and on it, with as many bytes a
vector: ``faiss.IndexIVFPQ`` as it comes (codes of residuals) and with ``by_residual = False``, ours over the codes of the
latter, and ``faiss.IndexIVFPQFastScan`` with twice as many subspaces of 4 bits. For each nprobe all are timed in turn.

``coarse`` takes a trained model and raw features, makes lists of the same vectors in several spaces, and counts how many of
the flat index's neighbours lie in the lists that a query visits, against the part of the vectors that lies there. That is
the recall of the inverted file: what is in a visited list is compared with the query by the same distance as in a flat index.
"""

# faiss.contrib has no type hints.
# mypy: allow-untyped-calls
from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import typer
from faiss.contrib.datasets import SyntheticDataset
from faiss.contrib.evaluation import check_ref_knn_with_draws
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hyperfaiss
from hyperfaiss import HyperbolicPQIndex, Model, from_faiss, lorentz

from .common import interleave, machine, write_json

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()
console.width = max(console.width, 160)  # also where it is not a terminal

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def save(out: Path, name: str, figure: Any, data: dict[str, Any]) -> None:
    """Write the plot and the raw figures behind it."""
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=150)
    write_json(out / f"{name}.json", {"machine": machine()} | data)
    console.print(f"wrote {out / name}.png and {out / name}.json")


# ------------------------------------------------------------------------------------------------ curves


class Vectors(NamedTuple):
    """Training vectors, database, queries, and the queries' true neighbours."""

    train: Floats
    base: Floats
    queries: Floats
    truth: Ints


def synthetic(n: int, nq: int, d: int, k: int) -> Vectors:
    """FAISS's synthetic vectors, of about ten intrinsic dimensions."""
    dataset = SyntheticDataset(d, min(n, 200_000), n, nq)
    return Vectors(dataset.get_train(), dataset.get_database(), dataset.get_queries(), dataset.get_groundtruth(k))


def from_file(path: Path, n: int, nq: int, k: int) -> Vectors:
    """The first n rows of a .npy file as database, the next nq as queries."""
    rows = np.load(path, mmap_mode="r")
    base, queries = (np.ascontiguousarray(part, dtype=np.float32) for part in (rows[:n], rows[n : n + nq]))
    if len(queries) < nq:
        raise typer.BadParameter(f"{path} has {len(rows)} rows, {n} and {nq} queries are wanted")
    return Vectors(base[: min(n, 200_000)], base, queries, faiss.knn(queries, base, k)[1])


def indexes(vectors: Vectors, nlist: int, m: int) -> dict[str, Any]:
    """The contestants, over one coarse quantizer."""
    d = vectors.base.shape[1]
    quantizer = faiss.IndexFlatL2(d)
    kmeans = faiss.Kmeans(d, nlist, niter=10, seed=1234, max_points_per_centroid=256)
    kmeans.train(vectors.train)
    quantizer.add(np.asarray(kmeans.centroids))
    residual = faiss.IndexIVFPQ(quantizer, d, nlist, m, 8)
    plain = faiss.IndexIVFPQ(quantizer, d, nlist, m, 8)
    plain.by_residual = False
    fast = faiss.IndexIVFPQFastScan(quantizer, d, nlist, 2 * m, 4)
    for index in (residual, plain, fast):
        index.train(vectors.train)
        index.add(vectors.base)
    return {
        f"faiss.IndexIVFPQ, {m}×8 bits": residual,
        f"faiss.IndexIVFPQ, {m}×8 bits, by_residual=False": plain,
        f"hyperfaiss IVF, {m}×8 bits, the same codes": from_faiss(plain),
        f"faiss.IndexIVFPQFastScan, {2 * m}×4 bits": fast,
    }


def seconds(index: Any, queries: Floats, k: int, batch: int) -> float:
    """Wall time of all queries, ``batch`` at a time."""
    start = time.perf_counter()
    for first in range(0, len(queries), batch):
        index.search(queries[first : first + batch], k)
    return time.perf_counter() - start


def recall(found: Ints, truth: Ints) -> float:
    """The part of the true neighbours that was found; an id that is there twice counts once."""
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1])


@app.command()
def curves(
    n: Annotated[int, typer.Option(help="vectors")] = 1_000_000,
    nlist: Annotated[int, typer.Option(help="lists")] = 1024,
    m: Annotated[int, typer.Option(help="bytes of a vector: subspaces of 8 bits, half the subspaces of 4")] = 8,
    d: Annotated[int, typer.Option(help="dimension of the synthetic vectors")] = 64,
    k: Annotated[int, typer.Option(help="neighbours")] = 10,
    nq: Annotated[int, typer.Option(help="queries")] = 2000,
    batch: Annotated[int, typer.Option(help="queries of a call; 0: all")] = 0,
    threads: Annotated[int, typer.Option(help="threads; 0: all CPUs of this process")] = 0,
    runs: Annotated[int, typer.Option(help="timed runs of each point")] = 5,
    max_nprobe: Annotated[int, typer.Option(help="the largest nprobe, of 1, 2, 4, …")] = 128,
    data: Annotated[Path | None, typer.Option(help=".npy file of vectors to use instead of synthetic ones")] = None,
    out: Annotated[Path, typer.Option(help="folder of ivf-curves.png and .json")] = Path("runs/ivf"),
) -> None:
    """Recall against queries a second of four inverted files over the same lists."""
    threads = threads or hyperfaiss.get_num_threads()
    hyperfaiss.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    batch = batch or nq
    vectors = synthetic(n, nq, d, k) if data is None else from_file(data, n, nq, k)
    contestants = indexes(vectors, nlist, m)
    names = list(contestants)
    points: list[dict[str, Any]] = []
    nprobes = [1 << i for i in range(nlist.bit_length()) if 1 << i <= min(nlist, max_nprobe)]
    for nprobe in track(nprobes, "nprobe", console=console):
        found = {}
        for name, index in contestants.items():
            index.nprobe = nprobe
            found[name] = index.search(vectors.queries, k)
        # The same codes in the same lists: FAISS's answer is ours, draws allowed.
        (ref_D, ref_I), (D, I) = found[names[1]], found[names[2]]  # noqa: E741
        check_ref_knn_with_draws(ref_D, ref_I, D, I, rtol=1e-4)
        times = interleave({name: partial(seconds, contestants[name], vectors.queries, k, batch) for name in names}, runs)
        points += [
            {
                "index": name,
                "nprobe": nprobe,
                "recall": recall(found[name][1], vectors.truth),
                "nearest_found": float((found[name][1] == vectors.truth[:, :1]).any(axis=1).mean()),
                "seconds": times[name],
                "qps": nq / statistics.median(times[name]),
            }
            for name in names
        ]
    table = Table(title=f"n = {n:,}, nlist = {nlist}, k = {k}, {nq} queries by {batch}, {threads} threads: queries a second")
    table.add_column("nprobe", justify="right")
    for name in names:
        table.add_column(f"{name}: recall@{k}, QPS (min..max)", justify="right")
    for nprobe in nprobes:
        row = [point for point in points if point["nprobe"] == nprobe]
        table.add_row(str(nprobe), *(f"{p['recall']:.3f}  {p['qps']:,.0f} ({_spread(p, nq)})" for p in row))
    console.print(table)
    options = {"n": n, "nlist": nlist, "M": m, "d": int(vectors.base.shape[1]), "k": k, "nq": nq, "batch": batch}
    what = "synthetic vectors" if data is None else data.name
    title = f"{n:,} {what}, {m} bytes each, nlist = {nlist}, batches of {batch}, {threads} threads"
    save(out, "ivf-curves", _plot_curves(points, names, k, title), options | {"threads": threads, "points": points})


def _spread(point: dict[str, Any], nq: int) -> str:
    return f"{nq / max(point['seconds']):,.0f}..{nq / min(point['seconds']):,.0f}"


def _plot_curves(points: list[dict[str, Any]], names: list[str], k: int, title: str) -> Any:
    from matplotlib.figure import Figure  # by hand, not by pyplot: no display needed

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(names, "sDo^", strict=True):
        mine = [point for point in points if point["index"] == name]
        axes.plot([p["recall"] for p in mine], [p["qps"] for p in mine], marker=marker, ms=4, label=name)
    for point in points:
        if point["index"] == names[2]:
            axes.annotate(str(point["nprobe"]), (point["recall"], point["qps"]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel=f"recall@{k} of the exact L2 neighbours", ylabel="queries a second", yscale="log", title=title)
    axes.title.set_fontsize(9)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------------------------------------ coarse spaces


class Lists(NamedTuple):
    """The list of each vector (n,), and each query's lists (nq, nlist), the nearest first."""

    of: Ints
    order: Ints


def _by(quantizer: Any, base: Floats, queries: Floats) -> Lists:
    return Lists(quantizer.search(base, 1)[1][:, 0], quantizer.search(queries, quantizer.ntotal)[1])


def tangent_lists(base: Floats, queries: Floats, nlist: int) -> Lists:
    """k-means of tangent vectors, L2."""
    kmeans = faiss.Kmeans(base.shape[1], nlist, niter=20, seed=1234, min_points_per_centroid=1)
    kmeans.train(base)
    return _by(kmeans.index, base, queries)


def normalised_lists(base: Floats, queries: Floats, nlist: int) -> Lists:
    """Spherical k-means of tangent vectors on the unit sphere, inner product."""
    base, queries = base.copy(), queries.copy()
    faiss.normalize_L2(base)
    faiss.normalize_L2(queries)
    kmeans = faiss.Kmeans(base.shape[1], nlist, niter=20, seed=1234, spherical=True, min_points_per_centroid=1)
    kmeans.train(base)
    return _by(kmeans.index, base, queries)


class Product:
    """The product of the codec's Lorentz manifolds, where FAISS compares by inner product.

    The sum over subspaces of squared Lorentzian distances is ``Σ −2/θ − 2⟨x, c⟩``, so the nearest centroid is the one with the
    largest ``Σ ⟨x, c⟩ = Σ x·c − x₀c₀``: an inner product of plain vectors once the time coordinate of one side is negated.
    """

    def __init__(self, model: Model) -> None:
        codec = model.codec
        self._radius, self._theta, self._shape = codec.clip_radius, codec.curvatures, (-1, codec.M, codec.dsub)

    def clipped(self, tangents: Floats) -> Floats:
        """Tangent vectors as the codec sees them."""
        parts: Floats = lorentz.clip(tangents.reshape(self._shape), self._radius)
        return parts.reshape(tangents.shape)

    def lifted(self, tangents: Floats) -> Floats:
        """Points (n, M · (dsub + 1)) with their time coordinates."""
        points = lorentz.lift(lorentz.exp0(self.clipped(tangents).reshape(self._shape), self._theta), self._theta)
        return np.ascontiguousarray(points.reshape(len(tangents), -1), dtype=np.float32)

    def negated(self, points: Floats) -> Floats:
        """The same points with negated time, for the other side of the inner product."""
        parts: Floats = points.reshape(len(points), self._shape[1], -1).copy()
        parts[:, :, 0] *= -1
        return parts.reshape(points.shape)

    def quantizer(self, centroids: Floats) -> Any:
        """A FAISS index over lifted centroids."""
        index = faiss.IndexFlatIP(centroids.shape[1])
        index.add(self.negated(centroids))
        return index

    def lists(self, base: Floats, queries: Floats, nlist: int) -> Lists:
        """Hyperbolic k-means: the nearest centroid, then the Lorentzian midpoint of its points in each subspace."""
        points = self.lifted(base)
        rng = np.random.default_rng(1234)
        centroids = points[np.sort(rng.choice(len(points), nlist, replace=False))]
        for _ in range(20):
            assigned = self.quantizer(centroids).search(points, 1)[1][:, 0]
            sums = np.zeros_like(centroids, dtype=np.float64)
            np.add.at(sums, assigned, points)
            filled = np.bincount(assigned, minlength=nlist) > 0
            parts = sums[filled].reshape(filled.sum(), self._shape[1], -1)
            # The midpoint is the sum scaled onto the manifold, where x₀² − |x|² = 1/θ.
            length = np.sqrt(self._theta * (parts[:, :, 0] ** 2 - (parts[:, :, 1:] ** 2).sum(axis=2)))
            centroids[filled] = (parts / length[:, :, None]).reshape(filled.sum(), -1)
        return _by(self.quantizer(centroids), points, self.lifted(queries))


def coverage(lists: Lists, neighbours: Ints, nlist: int) -> dict[str, list[float]]:
    """For 1 … nlist lists a query: the part of the vectors that is compared and the part of the neighbours that is found."""
    sizes = np.bincount(lists.of, minlength=nlist)
    scanned = np.cumsum(sizes[lists.order], axis=1).mean(axis=0) / sizes.sum()
    rank = np.empty_like(lists.order)
    np.put_along_axis(rank, lists.order, np.arange(nlist)[None], axis=1)
    ranks = np.take_along_axis(rank, lists.of[neighbours], axis=1)
    found = np.cumsum(np.bincount(ranks.ravel(), minlength=nlist)) / ranks.size
    return {"scanned": scanned.tolist(), "recall": found.tolist()}


@app.command()
def coarse(
    model_path: Annotated[Path, typer.Option("--model", help="trained model with a hierarchy")],
    features: Annotated[Path, typer.Option(help=".npy file of raw features (n, d)")],
    nq: Annotated[int, typer.Option(help="rows of it, drawn at random, that are queries")] = 1000,
    k: Annotated[int, typer.Option(help="neighbours")] = 10,
    out: Annotated[Path, typer.Option(help="folder of ivf-coarse.png and .json")] = Path("runs/ivf"),
) -> None:
    """Recall of the flat answer against the part of the vectors that is scanned, by the space that lists are made in."""
    model = Model.load(model_path)
    if not model.prototypes:
        raise typer.BadParameter(f"{model_path} has no hierarchy")
    if not (model.codec.curvatures > 0).all():
        raise typer.BadParameter(f"{model_path} has flat subspaces, which have no Lorentz model: {model.codec.curvatures}")
    tangents = model.projector.transform(np.load(features))
    chosen = np.zeros(len(tangents), np.bool_)
    chosen[np.random.default_rng(1234).choice(len(tangents), nq, replace=False)] = True
    base, queries = tangents[~chosen], tangents[chosen]
    flat = HyperbolicPQIndex.from_codec(model.codec)
    flat.add(base)
    neighbours = flat.search(queries, k)[1]
    product = Product(model)
    results: list[dict[str, Any]] = []
    for level, prototypes in enumerate(model.prototypes):
        centroids = prototypes.centroids
        nlist = len(centroids)
        own_prototypes, clipped_prototypes = faiss.IndexFlatL2(base.shape[1]), faiss.IndexFlatL2(base.shape[1])
        own_prototypes.add(centroids)
        clipped_prototypes.add(product.clipped(centroids))
        spaces = {
            "tangent vectors, L2 k-means": tangent_lists(base, queries, nlist),
            "clipped tangent vectors, L2 k-means": tangent_lists(product.clipped(base), product.clipped(queries), nlist),
            "product of Lorentz manifolds, midpoint k-means": product.lists(base, queries, nlist),
            "normalised tangent vectors, spherical k-means": normalised_lists(base, queries, nlist),
            "the model's prototypes, L2 of tangent vectors": _by(own_prototypes, base, queries),
            "the model's prototypes, L2 of clipped vectors": _by(
                clipped_prototypes, product.clipped(base), product.clipped(queries)
            ),
            "the model's prototypes, Lorentz inner product": _by(
                product.quantizer(product.lifted(centroids)), product.lifted(base), product.lifted(queries)
            ),
        }
        results += [
            {"level": level, "nlist": nlist, "space": name} | coverage(lists, neighbours, nlist)
            for name, lists in spaces.items()
        ]
    table = Table(title=f"{len(base):,} vectors, {nq} queries: part scanned for a recall@{k} of the flat answer")
    for column in ("nlist", "space", "90 %", "95 %", "99 %", "100 %"):
        table.add_column(column, justify="left" if column == "space" else "right")
    for i, result in enumerate(results):
        if i and result["level"] != results[i - 1]["level"]:
            table.add_section()
        needed = [_needed(result, level) for level in (0.9, 0.95, 0.99, 1.0)]
        table.add_row(str(result["nlist"]), result["space"], *(f"{100 * part:.2f} %" for part in needed))
    console.print(table)
    title = f"{len(base):,} vectors of {model_path.name}, {nq} queries"
    save(out, "ivf-coarse", _plot_coarse(results, k, title), {"n": len(base), "nq": nq, "k": k, "results": results})


def _needed(result: dict[str, Any], level: float) -> float:
    """The part scanned at the first number of lists that reaches a recall."""
    first = int(np.searchsorted(result["recall"], level - 1e-12))
    return float(result["scanned"][min(first, len(result["scanned"]) - 1)])


def _plot_coarse(results: list[dict[str, Any]], k: int, title: str) -> Any:
    from matplotlib.figure import Figure

    levels = sorted({result["level"] for result in results})
    figure = Figure(figsize=(5 * len(levels), 4.8), layout="constrained")
    row = figure.subplots(1, len(levels), sharey=True, squeeze=False)
    for level, axes in zip(levels, row[0], strict=True):
        for result in (result for result in results if result["level"] == level):
            axes.plot(result["scanned"], 1 - np.array(result["recall"]), marker=".", ms=3, lw=1, label=result["space"])
            axes.set_title(f"nlist = {result['nlist']}", fontsize=9)
        axes.set(xlabel="part of the vectors that is scanned", xscale="log", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.25)
    row[0, 0].set_ylabel(f"neighbours missed: 1 − recall@{k} of the flat answer")
    row[0, -1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


if __name__ == "__main__":
    app()

"""The whole way on real images: train HiHPQ, export, index, search; beside faiss.IndexPQ and OPQ at the same bits.

    python -m benchmarks.demo --data digits
    python -m benchmarks.demo --data path/to/folder --backbone resnet50 --bits 32

Images go through a frozen backbone; each class gives some queries, the rest is the database. HiHPQ learns from it without
labels: from all of it where pixels are the features, from 500 images a class where a network has to see every view. A view of
an image is an augmented one; among many images of pixels, where every image has near neighbours, it is a neighbour. Prints
MAP, queries per second and bytes per vector; draws queries with their neighbours, and the training curves. The vectors that
faiss gets are the backbone's features, centred and L2-normalised, and it trains on the whole database (OPQ's rotation on
16,384 vectors of it); times include the projection (ours) and the rotation (OPQ).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from hyperfaiss import HyperbolicPQIndex, HyperfaissError, Model
from hyperfaiss.terminal import fields_of
from training.backbones import load_backbone
from training.cache import cache_features, cache_views
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.evaluate import Evaluation, evaluate_index
from training.experiments.baselines import faiss_index, normalized
from training.export import export
from training.recipes import recipe
from training.split import Labels, Split, split_protocol
from training.train import train
from training.views import ViewSource, source_of

FloatArray = npt.NDArray[np.float32]

# Datasets of small grey images need no backbone: their pixels, at this size, are the features.
PIXELS = {"digits": 8, "fashion-mnist": 28, "mnist": 28}
# Training steps: a small set takes more epochs than the recipe's to as many, a large one fewer.
MIN_STEPS, MAX_STEPS = 400, 3300
# Training images of a class that go through a network; pixel images from which on neighbours serve as views.
NETWORK_IMAGES, MANY_IMAGES = 500, 20_000
# The drawing: sides in pixels, and colours.
TILE, FRAME, GAP = 80, 4, 6
WHITE, GREEN, RED = (255, 255, 255), (27, 158, 63), (214, 39, 40)


@dataclass(frozen=True)
class Job:
    """The data of one run: images, their features, and the split."""

    images: ImageSet
    features: FloatArray
    split: Split
    n_results: int

    @property
    def labels(self) -> Labels:
        """Classes (n,) of all images."""
        assert self.images.labels is not None
        return self.images.labels

    def evaluate(self, index: Any, vectors: FloatArray) -> Evaluation:
        """MAP and speed of an index that holds the database."""
        query, database = self.split.query, self.split.database
        return evaluate_index(index, vectors[query], self.labels[query], self.labels[database], self.n_results)


def baselines(job: Job, bits: list[int]) -> list[tuple[str, str, Evaluation]]:
    """faiss on the centred, L2-normalised features: exact search, then IndexPQ and OPQ at each number of bits."""
    x = normalized(job.features, job.split.database)
    database, d = x[job.split.database], x.shape[1]
    wanted = [("exact L2 (faiss.IndexFlatL2)", 4 * d, "exact", 0)]
    for b in bits:
        if d % (b // 8) == 0:
            wanted.append((f"faiss.IndexPQ, {b} bits", b // 8, "pq", b))
        wanted.append((f"OPQ + faiss.IndexPQ, {b} bits", b // 8, "opq", b))
    results = []
    for name, size, method, b in wanted:
        index = faiss_index(method, database, b)
        index.add(database)
        results.append((name, f"{size:,}", job.evaluate(index, x)))
    return results


def draw_neighbours(job: Job, index: HyperbolicPQIndex, path: Path, *, rows: int = 8, neighbours: int = 10) -> None:
    """A PNG: a query a row, then its nearest images; a green frame is a neighbour of the query's class, a red one is not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    query, database, labels = job.split.query, job.split.database, job.labels
    shown = query[np.linspace(0, len(query) - 1, min(rows, len(query))).astype(int)]
    # Queries of different classes where there are as many: the split lists them in the data set's order.
    by_class = [query[labels[query] == c][0] for c in np.unique(labels[query])]
    shown = np.array(by_class[:rows]) if len(by_class) >= min(rows, len(query)) else shown
    _, I = index.search(job.features[shown], neighbours)  # noqa: E741
    side, frame, gap = TILE + 2 * FRAME, FRAME, GAP
    # One picture of all tiles: an axes for each would take matplotlib seconds.
    sheet = np.full((len(shown) * (side + gap), (neighbours + 1) * (side + gap), 3), 255, np.uint8)
    for row, item in enumerate(shown):
        for column, position in enumerate([-1, *I[row]]):
            if column and position < 0:
                continue
            number = int(item if column == 0 else database[position])
            colour = WHITE if column == 0 else GREEN if labels[number] == labels[item] else RED
            tile = sheet[row * (side + gap) :][:side, column * (side + gap) :][:, :side]
            tile[:] = colour
            image = job.images.image(number).convert("RGB")
            small = max(image.size) < TILE
            resized = image.resize((TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR)
            tile[frame:-frame, frame:-frame] = np.asarray(resized)
    figure = Figure(figsize=(sheet.shape[1] / 100 + 1.4, sheet.shape[0] / 100 + 0.4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (1.3 / figure.get_figwidth(), 0, sheet.shape[1] / 100 / figure.get_figwidth(), 1 - 0.4 / figure.get_figheight())
    )
    axes.imshow(sheet, interpolation="nearest", aspect="equal")
    axes.xaxis.tick_top()
    axes.set_xticks(side / 2 + (side + gap) * np.arange(neighbours + 1), ["query", *map(str, range(1, neighbours + 1))])
    axes.set_yticks(side / 2 + (side + gap) * np.arange(len(shown)), [job.images.class_names[labels[i]] for i in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def prepare(data: str, backbone_name: str | None, image_size: int | None, queries: int | None, train_images: int | None,
            n_results: int | None, cache: Path) -> tuple[Job, Any]:  # fmt: skip
    """Images, features and split, and the backbone that made the features."""
    images = load_images(data)
    if images.labels is None:
        raise HyperfaissError(f"{data} has no labels to measure MAP with: give it one folder for each class")
    name = backbone_name or ("pixels" if data in PIXELS else "efficientnet-lite0")
    backbone = load_backbone(name, image_size=image_size or PIXELS.get(data))
    split = split_protocol(images.labels, queries_per_class=queries, train_per_class=train_images)
    smallest = np.unique(images.labels[split.train], return_counts=True)[1].min()
    if train_images is None and name != "pixels" and smallest > NETWORK_IMAGES:
        split = split_protocol(images.labels, queries_per_class=queries, train_per_class=NETWORK_IMAGES)
    features = np.asarray(cache_features(images, backbone, cache))
    return Job(images, features, split, n_results or (1000 if len(split.database) >= 10_000 else 100)), backbone


def fitted(config: TrainConfig, n: int, epochs: int | None) -> TrainConfig:
    """The recipe for n training images: as many epochs as were asked for or make enough steps; warm-ups at most a share."""
    if epochs is None:
        low, high = (steps * config.batch_size // n for steps in (MIN_STEPS, MAX_STEPS))
        epochs = max(1, low, min(high, config.epochs))
    return config.replace(epochs=epochs, warmup=min(config.warmup, epochs // 3), lr_warmup=min(config.lr_warmup, epochs / 8))


def views_of(job: Job, backbone: Any, cache: Path, count: int | None, config: TrainConfig) -> ViewSource:
    """What HiHPQ learns from: augmented views of the training images, or vectors and their neighbours."""
    features = job.features[job.split.train]
    if count is None:
        count = 0 if backbone.name == "pixels" and len(features) >= MANY_IMAGES else 10
    if not count:
        return source_of(config, features)
    views = cache_views(job.images.subset(job.split.train), backbone, cache, views=count, seed=config.seed)
    return source_of(config, features, views)


def main(
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, a torchvision dataset, or a folder of class folders")
    ] = "digits",
    out: Annotated[Path | None, typer.Option(help="where everything goes [default: runs/demo-<data>]")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="bits of a code; repeat for several [default: 16 32 64]")] = None,
    backbone: Annotated[str | None, typer.Option(help="default: pixels for small grey images, else efficientnet-lite0")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the images that the backbone sees")] = None,
    cached_views: Annotated[
        int | None,
        typer.Option(help="augmented views of each training image; 0: neighbours alone [default: 10, of many pixels 0]"),
    ] = None,
    recipe_name: Annotated[
        str, typer.Option("--recipe", help="hyper-parameters: default, or large for whole databases, or a file")
    ] = "default",
    queries_per_class: Annotated[int | None, typer.Option(help="default: a sixth of the smallest class, at most 100")] = None,
    train_per_class: Annotated[
        int | None, typer.Option(help="default: all but the queries; through a network at most 500")
    ] = None,
    n: Annotated[int | None, typer.Option(help="MAP@N [default: 1000 for 10,000 images or more, else 100]")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="of training [default: the recipe's; more for few images, fewer for many]")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="change a hyper-parameter of the recipe; repeatable"),
    ] = None,
    seed: int = 0,
) -> None:
    """Train HiHPQ on images, build an index, and compare it with faiss at the same bits."""
    console = Console()
    out = out or Path("runs") / f"demo-{Path(data).name}"
    sizes = bits or [16, 32, 64]
    # No teacher, for time, unless it is asked for.
    settled = {"teachers": 0, "seed": seed} | fields_of(changes)
    epochs = settled.get("epochs", epochs)
    try:
        job, extractor = prepare(data, backbone, image_size, queries_per_class, train_per_class, n, out / "cache")
        source = views_of(job, extractor, out / "cache", cached_views, recipe(recipe_name, **settled))
        console.print(
            f"{job.images.name}: {len(job.split.train):,} training images, {len(job.split.database):,} in the database, "
            f"{len(job.split.query):,} queries; features: {extractor.name}, {extractor.d_out} dimensions"
        )
        results = baselines(job, sizes)
        for b in sizes:
            run = out / f"{b}bits"
            config = fitted(recipe(recipe_name, bits=b, **settled), source.n, epochs)
            train(source, config, run, backbone=extractor, teachers=out / "teachers", resume=True)
            export(run, run / "model.safetensors")
            index = HyperbolicPQIndex.from_model(Model.load(run / "model.safetensors"))
            index.add(job.features[job.split.database])
            results.append((f"HiHPQ, {b} bits", f"{index.code_size:,}", job.evaluate(index, job.features)))
    except (HyperfaissError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    table = Table()
    for column in ("method", f"MAP@{job.n_results} (%)", "queries/s", "bytes/vector"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, size, result in results:
        style = "bold" if name.startswith("HiHPQ") else None
        table.add_row(name, f"{100 * result.map_at_n:.2f}", f"{result.queries_per_second:,.0f}", size, style=style)
    console.print(table)
    report = [{"method": name, "bytes_per_vector": size} | result.to_dict() for name, size, result in results]
    (out / "results.json").write_text(json.dumps(report, indent=1))
    draw_neighbours(job, index, out / "neighbours.png")
    for what, where in (
        ("nearest neighbours", out / "neighbours.png"),
        ("training curves", out / f"{sizes[-1]}bits" / "curves.png"),
        ("model", out / f"{sizes[-1]}bits" / "model.safetensors"),
        ("figures", out / "results.json"),
    ):
        console.print(f"{what + ':':20}{where}")


if __name__ == "__main__":
    typer.run(main)

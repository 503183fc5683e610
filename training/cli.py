"""The ``hihpq`` command: train, export, eval; table and sweep are in :mod:`training.experiments.cli`.

Each does what the function of the same name does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.terminal import command_line, fields_of, only_one, option, reported_errors
from training.config import TrainConfig
from training.experiments import cli as experiments
from training.recipes import RECIPES, recipe

if TYPE_CHECKING:
    from hyperfaiss.model import Model
    from training.backbones import Backbone
    from training.views import ViewSource

__all__ = ["app"]

app = command_line(
    "\b\nhihpq train --embeddings x.npy --bits 32 --out runs/x\nhihpq export runs/x x.safetensors\n\n"
    "Learn hyperbolic product quantisers without labels (HiHPQ), export them, measure them."
)
experiments.register(app)


@app.command(short_help="Learn codebooks from vectors or images.")
def train(
    out: Annotated[Path, option("DIR", "Folder of the run: checkpoints, log, curves.")],
    embeddings: Annotated[Path | None, option("FILE", "Vectors (n, d): .npy, .npz or Parquet.")] = None,
    labels: Annotated[str | None, option("FILE|NAME", "Their labels: a .npy file, or an array or column of FILE.")] = None,
    data: Annotated[str | None, option("DIR|NAME", "Images: a folder of class folders, or digits, cifar10, ...")] = None,
    split: Annotated[str, option("PART", "Part of the images: train, test or all.")] = "all",
    backbone: Annotated[str, option("NAME", "What makes vectors of images.")] = "efficientnet-lite0",
    weights: Annotated[Path | None, option("FILE", "Its weights, in place of the usual ones.")] = None,
    image_size: Annotated[int | None, option("S", "Side of the images that it sees.")] = None,
    trainable: Annotated[str | None, option("all|PREFIX", "Train the backbone, too: all of it, or layers by prefix.")] = None,
    cached_views: Annotated[int, option("V", "Augmented views kept for each image; 0: made on the fly.", min=0)] = 10,
    cache: Annotated[Path | None, option("DIR", "Where to keep them (default: OUT/cache).")] = None,
    bits: Annotated[int | None, option("B", "Bits of a code (default: 32).", min=4)] = None,
    recipe_name: Annotated[str, option("NAME|FILE", f"Hyper-parameters: {', '.join(RECIPES)}.", "--recipe")] = "default",
    changes: Annotated[list[str] | None, option("NAME=VALUE", "Change one of them; repeatable.", "--set")] = None,
    seed: Annotated[int | None, option("N", "Seed of every random choice (default: 0).", min=0)] = None,
    device: Annotated[str, option("NAME", "cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this run stopped.")] = False,
) -> None:
    """\b
    hihpq train --embeddings x.npy --bits 32 --out runs/x
    hihpq train --data path/to/images --image-size 160 --bits 64 --out runs/y

    Learn codebooks, without labels; with --set val_fraction=0.1 they choose the epoch. Give --embeddings or --data.
    """
    only_one(embeddings=embeddings, data=data)
    if recipe_name not in RECIPES and Path(recipe_name).suffix not in {".toml", ".json"}:
        raise typer.BadParameter(f"no recipe {recipe_name!r}; there are {', '.join(RECIPES)}", param_hint="--recipe")
    if labels is not None and data is not None:
        raise typer.BadParameter("--labels goes with --embeddings; folders of images have their own")
    with reported_errors():
        config = _config(out, recipe_name, bits, seed, changes, resume=resume)
        if embeddings is not None:
            source, y, network = *_embeddings(embeddings, labels, config), None
        else:
            source, y, network = _images(
                str(data), split, backbone, weights, image_size, trainable, cached_views, cache or out / "cache", device, config
            )
        from training.train import train as run

        name = Path(embeddings).name if embeddings is not None else Path(str(data)).name
        result = run(source, config, out, labels=y, backbone=network, data=name, resume=resume, device=device)
        row = result.history[result.best_epoch - 1]
        quality = f", validation MAP {100 * row['val_map']:.1f} %" if row["val_map"] is not None else ""
        typer.echo(f"kept epoch {result.best_epoch} of {len(result.history)}: loss {row['total']:.3f}{quality}")
        typer.echo(f"wrote {out / 'best.pt'}, {out / 'log.csv'}, {out / 'curves.png'}")
        typer.echo(f"next: hihpq export {out} model.safetensors")


@app.command(short_help="Write a run's best epoch as a model file.")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or a checkpoint.")],
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="The model file to write.")],
) -> None:
    """\b
    hihpq export runs/x x.safetensors

    Write the best epoch as a model file, for HyperbolicPQIndex.from_model.
    """
    with reported_errors():
        from training.export import export as write

        model = write(run, path)
        typer.echo(f"wrote {path}: {model.projector}, {model.codec.M} x {model.codec.nbits} bits")


@app.command(name="eval", short_help="Precision, recall and codeword usage of a model.")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model file.")],
    database: Annotated[Path | None, option("FILE", "Vectors to search: .npy, .npz or Parquet.")] = None,
    database_labels: Annotated[str | None, option("FILE|NAME", "Their labels: .npy, or a name in FILE.")] = None,
    queries: Annotated[Path | None, option("FILE", "Vectors to search with.")] = None,
    query_labels: Annotated[str | None, option("FILE|NAME", "Their labels.")] = None,
    data: Annotated[str | None, option("DIR|NAME", "Images: a folder of class folders, or digits, ...")] = None,
    split: Annotated[str, option("PART", "Part of them: train, test or all.")] = "all",
    query_split: Annotated[str | None, option("PART", "Part to search with (default: some of each).")] = None,
    queries_per_class: Annotated[int | None, option("Q", "How many (default: a sixth, at most 100).", min=1)] = None,
    weights: Annotated[Path | None, option("FILE", "The backbone's weights, not the usual ones.")] = None,
    image_size: Annotated[int | None, option("S", "Side of the images (default: as in training).")] = None,
    cache: Annotated[Path | None, option("DIR", "Where features are kept, such as RUN/cache.")] = None,
    device: Annotated[str, option("NAME", "Where the backbone computes: cpu or cuda.")] = "cpu",
    n: Annotated[int, option("N", "Length of the result lists.", "-n", min=1)] = 1000,
    at: Annotated[list[int] | None, option("K", "P@K, recall@K; repeatable (default: 1, 10, 100).", "-k", min=1)] = None,
    recall_queries: Annotated[int, option("Q", "Queries to measure recall with; 0: none.", min=0)] = 1000,
    depth: Annotated[int | None, option("R", "Ranks of the curve; 0: all (default: N, or plotted 10000).", min=0)] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit the codebooks to the database first.")] = False,
    plots: Annotated[Path | None, option("DIR", "Write the precision-recall curve here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """\b
    hihpq eval x.safetensors --database db.npy --database-labels y.npy --queries q.npy --query-labels yq.npy
    hihpq eval y.safetensors --data path/to/images --split train --query-split test --plots out

    How well a model's index finds what shares the query's labels, and what its codes lose. Give vectors, or --data.
    """
    only_one(database=database, data=data)
    of_vectors = database_labels, queries, query_labels
    of_images = query_split, queries_per_class, weights, image_size, cache
    if database is not None and None in of_vectors:
        raise typer.BadParameter("--database needs --database-labels, --queries and --query-labels")
    if any(value is not None for value in (of_images if database is not None else of_vectors)):
        raise typer.BadParameter("options of images go with --data, those of vectors with --database")
    if query_split is not None and queries_per_class is not None:
        raise typer.BadParameter("give --query-split or --queries-per-class, not both")
    with reported_errors():
        from hyperfaiss.model import Model
        from training.evaluate import evaluate_model
        from training.report import summary, write_report

        loaded = Model.load(model)
        if data is not None:
            found = _labelled_images(loaded, data, split, query_split, queries_per_class, weights, image_size, cache, device)
        else:
            found = *_labelled(database, database_labels), *_labelled(queries, query_labels)
        x, y, xq, yq = found
        figures = evaluate_model(
            loaded, x, xq, y, yq, n,
            quantisation=True,
            refit=refit,
            at=at or (1, 10, 100),
            depth=len(x) if depth == 0 else depth or (max(n, 10_000) if plots else n),
            recall_queries=recall_queries,
            verbose=sys.stderr.isatty(),
        )  # fmt: skip
        written = write_report({model.stem: figures}, plots) if plots else []
    if as_json:
        typer.echo(json.dumps(figures.to_dict()))
        return
    Console().print(summary(figures, code_size=loaded.codec.code_size))
    for path in written:
        typer.echo(f"wrote {path}")


def _labelled(path: Any, labels: Any) -> tuple[Any, Any]:
    """Vectors (n, d) of a file and their labels (n,)."""
    from training.embeddings import load_embeddings

    found = load_embeddings(path, labels)
    return found.vectors, _by_name(found, path)


def _labelled_images(
    model: Model,
    data: str,
    split: Any,
    query_split: Any,
    queries_per_class: int | None,
    weights: Path | None,
    image_size: int | None,
    cache: Path | None,
    device: str,
) -> tuple[Any, Any, Any, Any]:
    """Features and labels of a database of images, then those of the queries."""
    import numpy as np

    from training.backbones import backbone_of, extract_features
    from training.cache import cache_features
    from training.data import load_images
    from training.split import split_protocol

    images = load_images(data, split=split)
    y = _by_name(images, data)
    asked = None if query_split is None else load_images(data, split=query_split)
    backbone = backbone_of(model.backbone, model.metadata.get("features"), weights=weights, image_size=image_size)

    def features(of: Any) -> Any:
        if cache is None:
            return extract_features(backbone, of, device=device)
        return np.asarray(cache_features(of, backbone, cache, device=device))

    if asked is not None:
        if y.ndim == 2 and asked.class_names != images.class_names:
            raise InvalidVectorsError(f"parts {split} and {query_split} of {data} have different labels")
        return features(images), y, features(asked), _by_name(asked, data)
    numbers = y if y.ndim == 2 else np.unique(y, return_inverse=True)[1]
    drawn = split_protocol(numbers, queries_per_class=queries_per_class)
    x = features(images)
    return x[drawn.database], y[drawn.database], x[drawn.query], y[drawn.query]


def _by_name(found: Any, where: Any) -> Any:
    """Labels that compare across files and folders: (n,), names if there are any, as each numbers its classes for itself; or
    bool (n, L) of several labels."""
    import numpy as np

    if found.labels is None:
        raise InvalidVectorsError(f"{where} has no labels to measure MAP with")
    named = found.class_names and found.labels.ndim == 1
    return np.asarray(found.class_names)[found.labels] if named else found.labels


def _config(
    out: Path, name: str, bits: int | None, seed: int | None, changes: list[str] | None, *, resume: bool
) -> TrainConfig:
    """The configuration that the options spell; on resuming without any, the run's."""
    fields = fields_of(changes)
    if seed is not None:
        fields["seed"] = seed
    if resume and name == "default" and bits is None and (out / "config.json").exists():
        name = str(out / "config.json")
    return recipe(name, bits=bits, **fields)


def _embeddings(path: Path, labels: str | None, config: TrainConfig) -> tuple[ViewSource, Any]:
    from training.embeddings import load_embeddings
    from training.views import source_of

    found = load_embeddings(path, labels)
    source = source_of(config, found.vectors)
    return source, found.labels


def _images(
    data: str,
    split: Any,
    backbone: str,
    weights: Path | None,
    image_size: int | None,
    trainable: str | None,
    cached_views: int,
    cache: Path,
    device: str,
    config: TrainConfig,
) -> tuple[ViewSource, Any, Backbone]:
    """Views of images, their labels (n,) or None, and what makes their features."""
    from training.backbones import extract_features, load_backbone
    from training.cache import cache_features, cache_views
    from training.data import load_images
    from training.views import ImageViews, neighbours_of, source_of

    if split not in ("train", "test", "all"):
        raise InvalidParameterError(f"split must be train, test or all, got {split!r}")
    images = load_images(data, split=split)
    # "all" is also a prefix of no layer's name: every parameter.
    network = load_backbone(
        backbone, weights=weights, image_size=image_size, trainable=trainable == "all" or trainable or False
    )
    if network.trainable or not cached_views:
        features = extract_features(network, images, device=device)
        source = ImageViews(images, network, features=features, **neighbours_of(config, features), device=device)
        return source, images.labels, network
    features = cache_features(images, network, cache, device=device)
    views = cache_views(images, network, cache, views=cached_views, seed=config.seed, device=device)
    return source_of(config, features, views), images.labels, network

"""The ``hyperfaiss`` command: encode, build, search, merge, eval, info; each is the function of hyperfaiss.batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Annotated, Any

try:
    import fsspec  # noqa: F401
    import pyarrow  # noqa: F401
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"hyperfaiss: the command needs more packages: pip install 'hyperfaiss[batch]' ({error})") from error

from . import batch
from .terminal import command_line, json_or_text, only_one, option, reported_errors

__all__ = ["app"]

app = command_line(
    "\b\nhyperfaiss build --codec model.safetensors --input 'x/*.parquet' --output shards/\n"
    "hyperfaiss search --index shards/ --input queries.parquet --k 100 --output results/\n\n"
    "Batch jobs over vectors in files. A job that was killed goes on when it is started again."
)


class _Engine(str, Enum):
    local = "local"
    ray = "ray"


class _Format(str, Enum):
    parquet = "parquet"
    npy = "npy"
    ibin = "ibin"


class _Matrix(str, Enum):
    parquet = "parquet"
    npy = "npy"


class _Content(str, Enum):
    embeddings = "embeddings"
    tangents = "tangents"
    codes = "codes"


def _errors() -> AbstractContextManager[None]:
    return reported_errors("stopped; the same command goes on from here")


Input = Annotated[list[str], option("PATH", "Files, folders, globs or URLs; repeatable.", "--input", "-i")]
Output = Annotated[str, option("DIR", "Folder of the parts and _job.json.", "--output", "-o")]
Column = Annotated[str | None, option("NAME", "Parquet column of vectors (default: the only one).")]
IdColumn = Annotated[str | None, option("NAME", "Parquet column of ids: integers or strings (default: row numbers).")]
Where = Annotated[list[str] | None, option("'NAME OP VALUE'", "Rows to take, like 'year >= 2020'; repeatable.")]
Memory = Annotated[str, option("SIZE", "What the job may allocate, in each process.")]
EngineOption = Annotated[_Engine, option(None, "Where the work is done.")]
Address = Annotated[str | None, option("ADDR", "Ray cluster: auto, or host:port (default: a new one, here).")]
Workers = Annotated[int | None, option("N", "Ray workers (default: what the cluster has CPUs for).", min=1)]
Cpus = Annotated[int, option("N", "CPUs of a Ray worker.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew, whatever the output holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]
PartRows = Annotated[int | None, option("N", "Rows of a part.", min=1)]


@app.command(short_help="Vectors to index shards.")
def build(
    inputs: Input,
    output: Output,
    codec: Annotated[str | None, option("FILE", "Trained model, codec or index to encode with.")] = None,
    factory: Annotated[str | None, option("TEXT", "Train here instead: HPQ8, IVF1024,HPQ8, ...")] = None,
    nlist: Annotated[int | None, option("N", "With --codec: make IVF shards of N lists, trained here.", min=1)] = None,
    metric: Annotated[str, option("NAME", "Of --factory: geodesic, squared or inner_product.")] = "geodesic",
    curvature: Annotated[float, option("C", "Of --factory: the curvature is -C.", min=0)] = 1.0,
    clip_radius: Annotated[float | None, option("R", "Of --factory: longest tangent vector of a subspace.")] = None,
    train_rows: Annotated[int | None, option("N", "Vectors to train on.", min=1)] = None,
    seed: Annotated[int, option("N", "Of --factory.", min=0)] = 1234,
    content: Annotated[_Content, option(None, "What the vectors are.")] = _Content.embeddings,
    column: Column = None,
    id_column: IdColumn = None,
    where: Where = None,
    shard_rows: Annotated[int | None, option("N", "Vectors of a shard (default: what fits into memory).", min=1)] = None,
    memory: Memory = "2GiB",
    engine: EngineOption = _Engine.local,
    address: Address = None,
    workers: Workers = None,
    cpus_per_worker: Cpus = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss build --codec model.safetensors -i 'x/*.parquet' --id-column id -o shards/
    hyperfaiss build --factory IVF1024,HPQ8 -i s3://bucket/x/ -o shards/

    Encode vectors into index shards. Give --codec or --factory.
    """
    only_one(codec=codec, factory=factory)
    with _errors():
        source = _source(inputs, column, id_column, where)
        summary = batch.build(
            source, output, codec=codec, factory=factory, nlist=nlist, metric=metric, curvature=curvature,
            clip_radius=clip_radius, train_rows=train_rows, seed=seed, content=content.value,
            shard_rows=shard_rows, memory=memory, engine=engine.value, address=address, workers=workers,
            cpus_per_worker=cpus_per_worker, overwrite=overwrite,
        )  # fmt: skip
        _print(summary, as_json)


@app.command(short_help="Queries to k-lists.")
def search(
    index: Annotated[list[str], option("PATH", "Folder of a build, or index files; repeatable.")],
    inputs: Input,
    output: Output,
    k: Annotated[int, option("K", "Neighbours of a query.", "--k", "-k", min=1)] = 100,
    nprobe: Annotated[int | None, option("N", "Lists that an IVF index visits.", min=1)] = None,
    form: Annotated[_Format, option(None, "Of the results.", "--format")] = _Format.parquet,
    column: Column = None,
    id_column: IdColumn = None,
    where: Where = None,
    part_rows: PartRows = None,
    memory: Memory = "2GiB",
    engine: EngineOption = _Engine.local,
    address: Address = None,
    workers: Workers = None,
    cpus_per_worker: Cpus = 1,
    cache: Annotated[str | None, option("DIR", "Where copies of remote shards stay (default: temporary).")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss search --index shards/ -i queries.parquet --id-column id --k 100 -o results/
    hyperfaiss search --index shards/ -i s3://bucket/queries/ -o results/ --engine ray --address auto

    The exact k nearest of every query over all shards, as Parquet: query_id, ids, distances.
    """
    with _errors():
        source = _source(inputs, column, id_column, where)
        summary = batch.search(
            index, source, output, k=k, nprobe=nprobe, format=form.value, part_rows=part_rows, memory=memory,
            engine=engine.value, address=address, workers=workers, cpus_per_worker=cpus_per_worker, cache=cache,
            overwrite=overwrite,
        )  # fmt: skip
        _print(summary, as_json)


@app.command(short_help="Embeddings or images to codes or tangent vectors.")
def encode(
    output: Output,
    inputs: Annotated[list[str] | None, option("PATH", "Embeddings: files, folders, globs, URLs.", "--input", "-i")] = None,
    images: Annotated[str | None, option("DIR|NAME", "Images instead: a folder, or digits, cifar10, ...")] = None,
    codec: Annotated[str | None, option("FILE", "Trained model, codec or index to encode with.")] = None,
    content: Annotated[_Content, option(None, "What to write; embeddings are for images.")] = _Content.codes,
    column: Column = None,
    id_column: IdColumn = None,
    where: Where = None,
    split: Annotated[str, option("PART", "Part of the images: train, test or all.")] = "all",
    backbone: Annotated[str | None, option("NAME", "What makes vectors of images (default: the model's).")] = None,
    weights: Annotated[str | None, option("FILE", "Its weights.")] = None,
    image_size: Annotated[int | None, option("S", "Side of the images that it sees (default: the model's).", min=1)] = None,
    device: Annotated[str, option("NAME", "cpu or cuda.")] = "cpu",
    form: Annotated[_Matrix, option(None, "Of the parts.", "--format")] = _Matrix.parquet,
    part_rows: PartRows = None,
    memory: Memory = "2GiB",
    engine: EngineOption = _Engine.local,
    address: Address = None,
    workers: Workers = None,
    cpus_per_worker: Cpus = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss encode --codec model.safetensors --images photos/ -o codes/
    hyperfaiss encode --codec model.safetensors -i 'x/*.parquet' --content tangents -o tangents/

    Embeddings or images to codes, tangent vectors or embeddings. Give --input or --images.
    """
    only_one(input=inputs, images=images)
    with _errors():
        source: Any
        if images is None:
            source = _source(inputs or [], column, id_column, where)
        else:
            source = batch.Images(images, split, backbone, weights, image_size, device)
        summary = batch.encode(
            source, output, codec=codec, content=content.value, format=form.value, part_rows=part_rows, memory=memory,
            engine=engine.value, address=address, workers=workers, cpus_per_worker=cpus_per_worker, overwrite=overwrite,
        )  # fmt: skip
        _print(summary, as_json)


@app.command(short_help="Shards to one index, results to one result.")
def merge(
    inputs: Annotated[list[str], typer.Argument(metavar="PATH...", help="Shards, or folders of results.")],
    output: Annotated[str, option("PATH", "A file x.index for shards, a folder for results.", "--output", "-o")],
    k: Annotated[int | None, option("K", "Length of the merged lists (default: of the shortest).", "--k", "-k", min=1)] = None,
    form: Annotated[_Format | None, option(None, "Of merged results (default: parquet).", "--format")] = None,
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss merge shards/ -o all.index
    hyperfaiss merge results-a/ results-b/ -o results/

    All shards as one index file, or the results of the same queries over different shards as one.
    """
    with _errors():
        more = {} if form is None else {"format": form.value}
        _print(batch.merge(inputs, output, k=k, memory=memory, overwrite=overwrite, **more), as_json)


@app.command(name="eval", short_help="Recall, precision and MAP of results.")
def evaluate(
    results: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a search or of merged results.")],
    ground_truth: Annotated[str | None, option("PATH", "True neighbours: .npy, .ivecs, .ibin, Parquet, or results.")] = None,
    labels: Annotated[list[str] | None, option("PATH", "Labels of the database: .npy or Parquet; repeatable.")] = None,
    query_labels: Annotated[list[str] | None, option("PATH", "Labels of the queries.")] = None,
    label_column: Annotated[str, option("NAME", "Their Parquet column.")] = "label",
    id_column: Annotated[str | None, option("NAME", "Column of --labels with ids (default: row i is id i).")] = None,
    at: Annotated[str, option("N,N,...", "Lengths of lists to judge.")] = "1,10,100",
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss eval results/ --ground-truth gt.ivecs
    hyperfaiss eval results/ --labels x.parquet --query-labels queries.parquet --label-column class

    Recall against true neighbours; precision and mean average precision against labels.
    """
    try:
        lengths = [int(n) for n in at.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--at takes whole numbers, got {at!r}") from None
    if ground_truth is None and labels is None:
        raise typer.BadParameter("give --ground-truth, or --labels and --query-labels")
    with _errors():
        scores = batch.evaluate(
            results, ground_truth=ground_truth, labels=labels, query_labels=query_labels, label_column=label_column,
            id_column=id_column, at=lengths,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(scores.to_dict()))
        else:
            _table(
                {"queries": f"{scores.queries:,}"} | {name: f"{value:.4f}" for name, value in sorted(scores.metrics.items())}
            )


@app.command(short_help="What a file is.")
def info(
    path: Annotated[str, typer.Argument(metavar="FILE", help="An index, model, codec, job folder, or vectors.")],
    checksums: Annotated[bool, typer.Option("--checksums/--no-checksums", help="Read all of it and compare.")] = True,
    as_json: AsJson = False,
) -> None:
    """\b
    hyperfaiss info shards/shard-00000.index

    Kind, shapes, metric, number of vectors, and whether the checksums hold (exit code 1 if not).
    """
    with _errors():
        described = batch.info(path, checksums=checksums)
        if as_json:
            typer.echo(json.dumps(described))
        else:
            _table(described)
    if described.get("checksums_ok") is False:
        raise typer.Exit(1)


def _source(inputs: Sequence[str], column: str | None, id_column: str | None, where: Sequence[str] | None) -> batch.Source:
    return batch.open_source(inputs, column=column, id_column=id_column, filters=[_condition(text) for text in where or []])


def _condition(text: str) -> tuple[str, str, Any]:
    """(column, operator, value) of ``NAME OP VALUE``; the value is JSON, or else a string."""
    for operator in ("not in", "in", "=", "==", "!=", "<", "<=", ">", ">="):
        name, found, value = text.partition(f" {operator} ")
        if found:
            return name.strip(), operator, json_or_text(value)
    raise typer.BadParameter(f"--where takes 'NAME OP VALUE' with OP one of = != < <= > >= in 'not in', got {text!r}")


def _print(summary: batch.Summary, as_json: bool) -> None:
    typer.echo(json.dumps(summary.to_dict()) if as_json else str(summary))


def _table(rows: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        shown = "\n".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console(soft_wrap=True).print(table)

"""``hihpq table`` and ``hihpq sweep``. Heavy imports wait until a command runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hyperfaiss.io import atomic_path
from hyperfaiss.terminal import fields_of, option, reported_errors

if TYPE_CHECKING:
    from training.experiments.runs import Experiment, Run
    from training.experiments.setting import SettingOptions

__all__ = ["register"]

Protocol = Annotated[str, option("NAME", "cifar10-i, cifar10-ii, flickr25k or nus-wide.")]
Out = Annotated[Path, option("DIR", "Folder of the experiment, a folder a run below it.")]
Data = Annotated[str | None, option("DIR|NAME", "Its images (default: the public ones).")]
QueriesPerClass = Annotated[int | None, option("Q", "Queries of each class (default: the protocol's).", min=1)]
TrainPerClass = Annotated[int | None, option("T", "Training images of each class (default: the protocol's).", min=1)]
SplitSeed = Annotated[int, option("N", "Seed of the draw of queries and training images.", min=0)]
At = Annotated[int | None, option("N", "MAP@N (default: the protocol's).", "-n", min=1)]
BackboneName = Annotated[str, option("NAME", "What makes vectors of images; it stays frozen.", "--backbone")]
Weights = Annotated[Path | None, option("FILE", "Its weights, in place of the usual ones.")]
ImageSize = Annotated[int | None, option("S", "Side of the images that it sees.")]
CachedViews = Annotated[int, option("V", "Augmented views kept for each training image.", min=1)]
EmbeddingsOnly = Annotated[bool, typer.Option("--embeddings-only", help="Learn from the vectors alone, without views.")]
Cache = Annotated[Path | None, option("DIR", "Where vectors and views are kept (default: OUT/cache).")]
Recipe = Annotated[str, option("NAME|FILE", "Hyper-parameters: default, paper-cifar10-ii, ...", "--recipe")]
Seeds = Annotated[str, option("N,...", "A run for each; the split is the same for all.")]
ByLabels = Annotated[bool, typer.Option("--by-labels", help="Held-out images' labels choose the epoch (needs val_fraction).")]
Jobs = Annotated[int, option("J", "Runs at a time, each in a process of its own.", min=1)]
Device = Annotated[str, option("NAME", "cpu or cuda.")]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command(short_help="A table of methods by bits, over seeds.")(table)
    app.command(short_help="What one hyper-parameter does: a CSV and a picture.")(sweep)


def table(
    protocol: Protocol,
    out: Out,
    bits: Annotated[list[str], option("B,...", "Bits of a code; a list, or repeat the option.")] = ["16,32,64"],  # noqa: B006
    methods: Annotated[list[str], option("NAME,...", "Methods, table1, table2 or all; a list, or repeat.")] = ["table1"],  # noqa: B006
    seeds: Seeds = "0,1,2",
    data: Data = None,
    queries_per_class: QueriesPerClass = None,
    train_per_class: TrainPerClass = None,
    split_seed: SplitSeed = 0,
    n: At = None,
    backbone: BackboneName = "efficientnet-lite0",
    weights: Weights = None,
    image_size: ImageSize = None,
    cached_views: CachedViews = 10,
    embeddings_only: EmbeddingsOnly = False,
    cache: Cache = None,
    recipe: Recipe = "default",
    changes: Annotated[
        list[str] | None, option("[METHOD:]NAME=VALUE", "Change HiHPQ's variants, a METHOD, or all:; repeatable.", "--set")
    ] = None,
    by_labels: ByLabels = False,
    jobs: Jobs = 1,
    device: Device = "cpu",
) -> None:
    """\b
    hihpq table --protocol cifar10-ii --bits 16,32,64 --methods hihpq,mecoq,pq --seeds 0,1,2 --out runs/table

    Train and judge each method, into OUT/table.csv and OUT/table.md. Stopped or failed, the same command goes on.
    """
    sizes, numbers = _integers("--bits", bits), _integers("--seeds", [seeds])
    with reported_errors():
        from training.experiments import tables

        chosen = tables.expand(_words(methods))
        runs = tables.table_runs(chosen, sizes, numbers, recipe_name=recipe, changes=_changes(changes or []))
        options = _options(
            protocol, out, cache, cached_views, embeddings_only, data=data, n=n, queries_per_class=queries_per_class,
            train_per_class=train_per_class, split_seed=split_seed, backbone=backbone, weights=weights,
            image_size=image_size, by_labels=by_labels, device=device,
        )  # fmt: skip

        # The paper's figures are of the protocol's own images: not of another data set by name.
        published = protocol if data is None or Path(data).expanduser().is_dir() else None

        def write(experiment: Experiment) -> None:
            results = experiment.results()
            tables.write_csv(results, out / "table.csv")
            about = [experiment.setting.describe() + ".", f"Recipe: {', '.join([recipe, *(changes or [])])}."]
            with atomic_path(out / "table.md") as temporary:
                temporary.write_text(tables.markdown(results, title(experiment), about, published))

        def title(experiment: Experiment) -> str:
            return f"MAP@{experiment.setting.n} (%), {protocol}"

        experiment, failed = _run(options, out, runs, jobs, write)
        if results := experiment.results():
            Console().print(tables.terminal_table(results, title(experiment), published))
            typer.echo(f"wrote {out / 'table.csv'}, {out / 'table.md'}")
    raise typer.Exit(1 if failed else 0)


def sweep(
    name: Annotated[str, typer.Argument(metavar="NAME", help="codebooks, quantization-error, tau-qc, curvature or hierarchy.")],
    protocol: Protocol,
    out: Out,
    values: Annotated[str | None, option("V,...", "Other values than the usual; levels as 100-50-25,50.")] = None,
    bits: Annotated[int, option("B", "Bits of a code, unless codebooks vary.", min=4)] = 32,
    seeds: Seeds = "0",
    data: Data = None,
    queries_per_class: QueriesPerClass = None,
    train_per_class: TrainPerClass = None,
    split_seed: SplitSeed = 0,
    n: At = None,
    backbone: BackboneName = "efficientnet-lite0",
    weights: Weights = None,
    image_size: ImageSize = None,
    cached_views: CachedViews = 10,
    embeddings_only: EmbeddingsOnly = False,
    cache: Cache = None,
    recipe: Recipe = "default",
    changes: Annotated[list[str] | None, option("NAME=VALUE", "Change a hyper-parameter; repeatable.", "--set")] = None,
    by_labels: ByLabels = False,
    jobs: Jobs = 1,
    device: Device = "cpu",
) -> None:
    """\b
    hihpq sweep codebooks --protocol cifar10-ii --values 2,4,8,16 --seeds 0,1,2 --out runs/codebooks

    Train HiHPQ for each value, into OUT/NAME.csv and OUT/NAME.png. Stopped or failed, the same command goes on.
    """
    numbers = _integers("--seeds", [seeds])
    with reported_errors():
        from training.experiments import sweeps, tables

        if name not in sweeps.SWEEPS:
            raise typer.BadParameter(f"no sweep {name!r}; there are {', '.join(sweeps.SWEEPS)}")
        chosen = None if values is None else _values(sweeps.SWEEPS[name].field, values)
        runs = sweeps.sweep_runs(name, numbers, bits=bits, values=chosen, recipe_name=recipe, changes=fields_of(changes))
        options = _options(
            protocol, out, cache, cached_views, embeddings_only, data=data, n=n, queries_per_class=queries_per_class,
            train_per_class=train_per_class, split_seed=split_seed, backbone=backbone, weights=weights,
            image_size=image_size, by_labels=by_labels, device=device,
        )  # fmt: skip
        asked = {(run.row, run.column, run.seed) for run in runs}

        def write(experiment: Experiment) -> None:
            results = [r for r in experiment.results() if (r.row, r.column, r.seed) in asked]
            if not results:
                return
            tables.write_csv(results, out / f"{name}.csv")
            size = "" if name == "codebooks" else f", {bits} bits"
            about = f"{experiment.setting.protocol.name}{size} (the paper's {sweeps.SWEEPS[name].figure})"
            sweeps.draw(name, runs, results, out / f"{name}.png", title=about)

        _, failed = _run(options, out, runs, jobs, write)
        for path in (out / f"{name}.csv", out / f"{name}.png"):
            if path.exists():
                typer.echo(f"wrote {path}")
    raise typer.Exit(1 if failed else 0)


# ---------------------------------------------------------------------------------------------- what both do


def _run(
    options: SettingOptions, out: Path, runs: Sequence[Run], jobs: int, write: Callable[[Experiment], None]
) -> tuple[Experiment, bool]:
    """Do the runs, with ``write`` after each; whether one failed."""
    from training.experiments.runs import Experiment
    from training.experiments.setting import Setting

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    experiment = Experiment(out, Setting(options))
    try:
        failures = experiment.run(runs, jobs=jobs, say=console.print, after=lambda: write(experiment))
    except KeyboardInterrupt as stop:
        where = str(stop).partition(";")[0] or "stopped"
        raise KeyboardInterrupt(f"{where}; the same command goes on from there") from stop
    write(experiment)
    if failures:
        console.print(f"{len(failures)} of {len(runs)} runs failed; the same command tries them again:")
        for failure in failures:
            console.print(f"  {failure.run}: {failure.message}")
    return experiment, bool(failures)


def _options(
    protocol: str, out: Path, cache: Path | None, cached_views: int, embeddings_only: bool, **more: Any
) -> SettingOptions:
    from training.experiments.setting import SettingOptions

    return SettingOptions(protocol, cache or out / "cache", cached_views=0 if embeddings_only else cached_views, **more)


def _words(given: Iterable[str]) -> list[str]:
    """Words between commas or blanks."""
    return [word for text in given for word in re.split(r"[,\s]+", text) if word]


def _integers(name: str, given: Iterable[str]) -> list[int]:
    words = _words(given)
    if not words or not all(word.isdecimal() for word in words):
        raise typer.BadParameter(f"{name} takes numbers between commas, got {', '.join(given)!r}")
    return list(dict.fromkeys(map(int, words)))


def _values(field: str | None, text: str) -> list[Any]:
    """Numbers, or for ``levels`` numbers with "-" between them."""
    try:
        if field == "levels":
            return [tuple(int(part) for part in word.split("-")) for word in _words([text])]
        return [int(word) if field == "M" else float(word) for word in _words([text])]
    except ValueError as error:
        raise typer.BadParameter(f"--values takes numbers between commas, levels as 100-50-25; got {text!r}") from error


def _changes(given: list[str]) -> dict[str, dict[str, Any]]:
    """By method; see ``tables.Changes``."""
    found: dict[str, list[str]] = {}
    for change in given:
        method, colon, rest = change.partition(":")
        # A ":" may be part of a value.
        own = colon and "=" not in method
        found.setdefault(method if own else "", []).append(rest if own else change)
    return {method: fields_of(changes) for method, changes in found.items()}

"""The encode job: embeddings or images → embeddings, tangent vectors or codes, in parts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..checks import as_integer
from ..errors import InvalidParameterError, InvalidVectorsError
from . import files
from .build import Content, load_empty
from .engines import Advance, EngineName, open_engine
from .job import Job, Summary, versions
from .memory import Budget
from .progress import Bar, prefetch
from .shards import ShardReader, file_header
from .sources import Batch, Paths, Source, as_source, split

__all__ = ["Images", "encode"]

# Bytes of a part, whatever the memory.
_PART_BYTES = 1 << 26
_MOST_ROWS, _FEWEST_ROWS = 1 << 16, 1 << 10
_COLUMNS = {"embeddings": "embedding", "tangents": "tangent", "codes": "code"}


@dataclass(frozen=True)
class Images:
    """Images as the training package loads them; reading them needs the extra ``train``.

    data : a folder of images or of class folders, or the name of a data set (``training.data.load_images``).
    split : "train", "test" or "all".
    backbone : its name; by default the one that the model names. Another than the model's is refused.
    weights : a file of its weights.
    image_size : side of the images that it sees; by default what the model was trained with.
    device : of torch.
    """

    data: str
    split: str = "all"
    backbone: str | None = None
    weights: str | None = None
    image_size: int | None = None
    device: str = "cpu"


class _ImageSource:
    """The part of ``Source`` that encoding needs, over the features of images. Ids are numbers in the collection's order."""

    string_ids = False

    def __init__(self, images: Images, facts: Mapping[str, Any]) -> None:
        self._asked = images, json.dumps(facts)
        self._images = images
        collection, backbone = _load(*self._asked)
        self.n, self.d, self._fingerprint = collection.n, backbone.d_out, collection.fingerprint
        self._backbone = backbone.fingerprint()

    def describe(self) -> dict[str, Any]:
        """JSON-able, for the job's fingerprint."""
        return {
            "images": self._images.data,
            "split": self._images.split,
            "content": self._fingerprint,
            "backbone": self._backbone,
        }

    def labels(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """The class of each image, if they have any."""
        labels = _load(*self._asked)[0].labels
        return None if labels is None else labels[rows]

    def read(self, ranges: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        """Features of ranges of images."""
        collection, backbone = _load(*self._asked)
        extractor = _extractor(*self._asked)
        for first, stop in ranges:
            blocks = extractor.blocks(lambda i: backbone.prepare(collection.image(i)), stop, start=first)
            rows = np.arange(first, stop)
            yield Batch(first, stop, rows, rows, np.concatenate([block for _, block in blocks]))

    def checked(self, batch: Batch) -> Batch:
        """Features are float32 and finite already."""
        return batch


@functools.lru_cache(maxsize=1)
def _load(images: Images, facts: str) -> tuple[Any, Any]:
    """The collection, and the backbone that the model's ``facts`` (JSON) allow; once in a process."""
    try:
        from training.backbones import backbone_of
        from training.data import load_images
    except ImportError as error:
        raise InvalidParameterError(f"images need more packages: pip install 'hyperfaiss[train]' ({error})") from error
    collection = load_images(images.data, split=images.split)  # type: ignore[arg-type]
    return collection, backbone_of(images.backbone, json.loads(facts), weights=images.weights, image_size=images.image_size)


@functools.lru_cache(maxsize=1)
def _extractor(images: Images, facts: str) -> Any:
    from training.backbones import FeatureExtractor

    return FeatureExtractor(_load(images, facts)[1], device=images.device)


@dataclass(frozen=True)
class _Plan:
    """What a worker must know to encode any part."""

    source: Any
    folder: str
    codec: str | None
    content: Content
    form: str
    names: tuple[tuple[str, ...], ...]
    ranges: tuple[tuple[int, int], ...]
    batch_rows: int

    def part(self, number: int, advance: Advance) -> None:
        """Encode and write one part."""
        transform, pieces, ids, rows = self._transform(), [], [], []
        for batch in prefetch(self.source.read(split(*self.ranges[number], self.batch_rows))):
            pieces.append(transform(self.source.checked(batch).vectors))
            ids.append(batch.ids)
            rows.append(batch.rows)
            advance(batch.stop - batch.first)
        numbers = np.concatenate(rows)
        labels = self.source.labels(numbers) if isinstance(self.source, _ImageSource) else None
        all_ids = pa.concat_arrays(ids) if self.source.string_ids else np.concatenate(ids)
        write_vectors(
            self.folder, self.names[number], self.form, _COLUMNS[self.content], all_ids, np.concatenate(pieces), labels
        )

    def _transform(self) -> Callable[[Any], npt.NDArray[Any]]:
        if self.content == "embeddings":
            return lambda x: x
        index = load_empty(str(self.codec))
        if self.content == "codes":
            return index.sa_encode  # type: ignore[no-any-return]
        if index.projector is None:
            return lambda x: x
        return index.projector.transform  # type: ignore[no-any-return]


def encode(
    vectors: Source | Images | Paths,
    output: str,
    *,
    codec: str | None = None,
    content: Content = "codes",
    format: Literal["parquet", "npy"] = "parquet",  # noqa: A002
    part_rows: int | None = None,
    memory: str | int = "2GiB",
    engine: EngineName = "local",
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Turn embeddings or images into codes, tangent vectors or (images only) embeddings, in parts in the folder ``output``.

    Parts of Parquet have the columns ``id`` (of the source, or row numbers), ``code``, ``tangent`` or ``embedding``
    (FixedSizeList), and ``label`` for images in class folders; ``npy`` writes matrices, and ids beside them. A :func:`build`
    with the same ``codec`` and ``content`` takes them.

    Parameters
    ----------
    vectors : a source of embeddings, paths for ``open_source``, or :class:`Images`.
    codec : a file of a model, a codec or an index. For images it should be a model, which names their backbone.
    content : what to write: "codes", "tangents", or "embeddings", which takes no codec if the backbone is given.
    part_rows : rows of a part; by default about 64 MiB of them.
    output, format, memory, engine, address, workers, cpus_per_worker, overwrite, progress : as in :func:`search`.

    Raises the errors of ``open_source``, ``training.data.load_images`` and ``Job``; InvalidVectorsError for vectors that the
    codec refuses, InvalidParameterError for an option out of its range.
    """
    if content not in _COLUMNS:
        raise InvalidParameterError(f"content must be one of {', '.join(_COLUMNS)}, got {content!r}")
    if format not in ("parquet", "npy"):
        raise InvalidParameterError(f"format must be 'parquet' or 'npy', got {format!r}")
    if codec is None and content != "embeddings":
        raise InvalidParameterError(f"{content} need a codec: the file of a model, a codec or an index")
    codec = None if codec is None else files.absolute(codec)
    source = _open(vectors, codec, content)
    if format != "parquet" and source.string_ids:
        raise InvalidParameterError(f"format {format!r} has no room for string ids: use format 'parquet'")
    empty = None if codec is None else load_empty(codec)
    if empty is not None and source.d != empty.d:
        raise InvalidVectorsError(f"the inputs have {source.d} dimensions, {codec} takes {empty.d}")
    width = (
        source.d * 4
        if empty is None
        else {"codes": empty.sa_code_size, "tangents": empty.codec.d * 4}.get(content, source.d * 4)
    )
    default = min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (_PART_BYTES // width).bit_length() - 1))
    rows = default if part_rows is None else as_integer(part_rows, "part_rows", 1)
    ranges = tuple(split(0, source.n, rows))
    names = tuple(tuple(_names(f"part-{i:05d}", format, content)) for i in range(len(ranges)))
    fingerprint = {
        "vectors": source.describe(), "codec": None if codec is None else file_header(codec).digest,
        "options": {"content": content, "format": format, "part_rows": rows}, "versions": versions(),
    }  # fmt: skip
    batch_rows = Budget(memory).rows(source.d * 4 * 6 + width * 4, 0.4, 1, rows)
    folder = files.absolute(output)
    plan = _Plan(source, folder, codec, content, format, names, ranges, batch_rows)
    with (
        Job(folder, "encode", fingerprint, {"content": content, "parts": names}, names, overwrite=overwrite) as job,
        ShardReader() as reader,
        open_engine(engine, address, reader, workers=workers, cpus=cpus_per_worker) as runner,
        Bar("encode", source.n, source.n - job.rows(ranges), shown=progress) as bar,
    ):
        runner.run(plan.part, job.todo, bar.advance)
        return job.finish(source.n, job.rows(ranges), {"vectors": source.n, "bytes_per_vector": width}, {})


def write_vectors(
    folder: str, names: tuple[str, ...], form: str, column: str, ids: Any, vectors: npt.NDArray[Any], labels: Any = None
) -> None:
    """Write one part of vectors (n, d) with their ids."""
    if form == "npy":
        for name, array in zip(names, (ids, vectors), strict=True):
            with files.writing(files.join(folder, name)) as path, path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        return
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
    columns = {"id": pa.array(ids), column: values} | ({} if labels is None else {"label": pa.array(labels)})
    with files.writing(files.join(folder, names[0])) as path:
        pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)


def _names(stem: str, form: str, content: str) -> list[str]:
    return [f"{stem}.parquet"] if form == "parquet" else [f"{stem}.ids.npy", f"{stem}.{content}.npy"]


def _open(vectors: Source | Images | Paths, codec: str | None, content: Content) -> Any:
    if not isinstance(vectors, Images):
        if content == "embeddings":
            raise InvalidParameterError("the inputs are embeddings already: content 'embeddings' is for images")
        return as_source(vectors)
    named: str | None = None
    facts: dict[str, Any] = {}
    if codec is not None and (header := file_header(codec)).kind == "model":
        named, facts = header.fields.get("backbone"), header.fields.get("metadata", {}).get("features") or {}
    if vectors.backbone is None and named is None:
        raise InvalidParameterError(f"{codec or 'without a model, nothing'} names no backbone: give one")
    if None not in (vectors.backbone, named) and vectors.backbone != named:
        raise InvalidParameterError(f"{codec} takes features of {named}, not of {vectors.backbone}")
    return _ImageSource(replace(vectors, backbone=vectors.backbone or named), facts)

"""Batch jobs over more vectors than fit into memory: encode, build, search, merge, evaluate.

From files to files (Parquet, .npy and the formats of big-ann; local or any URL of fsspec), on one machine or a Ray cluster,
with the same bytes out of both. A job that is killed goes on when it is started again. Needs the extra ``batch``, and
``batch-ray`` for Ray. The ``hyperfaiss`` command does the same from a shell.
"""

from __future__ import annotations

from .build import build
from .encode import Images, encode
from .evaluate import Scores, evaluate
from .info import info
from .job import Job, Summary
from .merge import merge, merge_results, merge_shards
from .results import Results
from .search import search
from .sources import Batch, Source, open_source

__all__ = [
    "Batch",
    "Images",
    "Job",
    "Results",
    "Scores",
    "Source",
    "Summary",
    "build",
    "encode",
    "evaluate",
    "info",
    "merge",
    "merge_results",
    "merge_shards",
    "open_source",
    "search",
]

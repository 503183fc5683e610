"""Product quantization in hyperbolic space, searched exactly, with FAISS's interface. See README.md."""

from __future__ import annotations

from . import lorentz
from ._version import __version__
from .codec import HyperbolicProductQuantizer
from .errors import (
    CorruptFileError,
    FileFormatError,
    HyperfaissError,
    InvalidParameterError,
    InvalidVectorsError,
    NotTrainedError,
    UnknownIdError,
    UnsupportedVersionError,
)
from .factory import index_factory
from .index import HyperbolicPQIndex, read_index, write_index
from .interop import faiss_query, from_faiss, projector_from_faiss, to_faiss
from .ivf import HyperbolicIVFPQIndex
from .kernels.runtime import get_num_threads, set_num_threads
from .model import Model, Projector, PrototypeLevel
from .search import simd_level
from .selectors import SearchParameters

__all__ = [
    "CorruptFileError",
    "FileFormatError",
    "HyperbolicIVFPQIndex",
    "HyperbolicPQIndex",
    "HyperbolicProductQuantizer",
    "HyperfaissError",
    "InvalidParameterError",
    "InvalidVectorsError",
    "Model",
    "NotTrainedError",
    "Projector",
    "PrototypeLevel",
    "SearchParameters",
    "UnknownIdError",
    "UnsupportedVersionError",
    "__version__",
    "faiss_query",
    "from_faiss",
    "get_num_threads",
    "index_factory",
    "lorentz",
    "projector_from_faiss",
    "read_index",
    "set_num_threads",
    "simd_level",
    "to_faiss",
    "write_index",
]

"""What codes are compared with: faiss's exact search, IndexPQ and OPQ on the backbone's features."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import InvalidParameterError

__all__ = ["FAISS_METHODS", "faiss_index", "normalized"]

FAISS_METHODS = ("exact", "pq", "opq")

# OPQ rotates to this many dimensions a subspace, and learns the rotation from at most so many vectors.
_OPQ_DSUB, _OPQ_VECTORS = 16, 16_384

FloatArray = npt.NDArray[np.float32]


def normalized(features: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> FloatArray:
    """Features (n, d) minus the mean of these rows, divided by their L2 norm: what the faiss methods get."""
    x = np.array(features, dtype=np.float32, order="C")
    x -= x[rows].mean(axis=0, dtype=np.float64).astype(np.float32)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x


def faiss_index(method: str, vectors: FloatArray, bits: int, *, seed: int = 0) -> Any:
    """An index of one of ``FAISS_METHODS``, trained on ``vectors`` (n, d), empty.

    Args:
        bits: of a code, in codewords of 8 bits; "exact" has none.
        seed: of the k-means; the rotation that OPQ starts from is faiss's own.

    Raises:
        InvalidParameterError: another method; bits that are no multiple of 8; PQ of vectors that M = bits / 8 does not divide;
            fewer vectors than codewords.
    """
    n, d = vectors.shape
    if method not in FAISS_METHODS:
        raise InvalidParameterError(f"method must be one of {', '.join(FAISS_METHODS)}, got {method!r}")
    if method == "exact":
        return faiss.IndexFlatL2(d)
    if bits < 8 or bits % 8:
        raise InvalidParameterError(f"faiss's codes have 8 bits for each subspace: bits must be a multiple of 8, got {bits}")
    M = bits // 8
    if n < 256:
        raise InvalidParameterError(f"256 codewords can't be learnt from {n} vectors")
    if method == "pq":
        if d % M:
            raise InvalidParameterError(f"IndexPQ of {bits} bits needs a dimension that {M} divides, got {d}")
        index = _pq(d, M, seed)
        index.train(vectors)
        return index
    if d < M:
        raise InvalidParameterError(f"OPQ of {bits} bits needs at least {M} dimensions, got {d}")
    rotation = faiss.OPQMatrix(d, M, min(d - d % M, M * _OPQ_DSUB))
    learner = _pq(rotation.d_out, M, seed)
    rotation.pq, rotation.max_train_points = learner.pq, _OPQ_VECTORS
    rotation.train(vectors)
    rotation.pq = None  # it does not own the learner, which ends here
    index = faiss.IndexPreTransform(rotation, _pq(rotation.d_out, M, seed))
    index.train(vectors)
    return index


def _pq(d: int, M: int, seed: int) -> Any:
    index = faiss.IndexPQ(d, M, 8)
    index.pq.cp.min_points_per_centroid = 1  # small databases are fine here
    index.pq.cp.seed = 1234 + seed  # 1234 is faiss's own default
    return index

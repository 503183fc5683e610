"""The codec: a product quantizer whose codebooks live on a product of Lorentz manifolds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import lorentz
from .checks import FloatArray, as_codes, as_integer, as_positive, as_vectors
from .errors import InvalidParameterError, InvalidVectorsError, NotTrainedError
from .io import Reader, write_tensors
from .kernels import tables as kernels
from .kernels.runtime import run_tasks
from .progress import track

__all__ = ["HyperbolicProductQuantizer", "Metric"]

Metric = Literal["geodesic", "squared", "inner_product"]
_METRICS: dict[str, int] = {
    "geodesic": kernels.GEODESIC, "squared": kernels.SQUARED, "inner_product": kernels.INNER_PRODUCT,
}  # fmt: skip

# Vectors encoded at a time: milliseconds of work, and their points stay in the cache.
_ENCODE_ROWS = 1024
_TRAIN_ITERATIONS = 25
_MAX_POINTS_PER_CENTROID = 256  # as faiss.ClusteringParameters


class HyperbolicProductQuantizer:
    """Product quantizer over M subspaces of curvature ``-curvatures[m]``; names follow ``faiss.ProductQuantizer``.

    It takes tangent vectors at the origin, (n, d) float32: each of the M parts of ``dsub`` floats is clipped to
    ``clip_radius``, mapped onto its manifold (``lorentz.exp0``), and stands for the nearest of ``ksub`` codewords there.

    Parameters
    ----------
    d : dimension of the vectors, a multiple of M.
    M : number of subspaces; one code each.
    nbits : bits of a code, 4 to 8; ksub = 2**nbits. Codes take one byte each, whatever nbits is.
    curvatures : theta >= 0, one number or one per subspace; 0 is Euclidean.
    metric : "geodesic" (sum over subspaces of geodesic distances, Eq. 8) or "squared" (sum of squared geodesic distances;
        with curvature 0 this is FAISS's L2), "inner_product" (minus the inner product, so that smaller is better, as everywhere
        here; only with all curvatures 0. Codes are those of the nearest codewords all the same, as in FAISS).
    clip_radius : largest norm of a subspace's tangent vector (None: no limit).
    seed : of the training's random choices.

    Attributes
    ----------
    d, M, nbits, ksub, dsub, code_size : int
    curvatures : float32 (M,)
    codebooks : float32 (M, ksub, dsub), space coordinates of the codewords; None until trained.
    is_trained, verbose : bool
    """

    def __init__(
        self,
        d: int,
        M: int,
        nbits: int = 8,
        *,
        curvatures: npt.ArrayLike = 1.0,
        metric: Metric = "geodesic",
        clip_radius: float | None = None,
        seed: int = 1234,
    ) -> None:
        self.d = as_integer(d, "d", 1)
        self.M = as_integer(M, "M", 1)
        self.nbits = as_integer(nbits, "nbits", 4, 8)
        if self.d % self.M:
            raise InvalidParameterError(f"d must be a multiple of M, got d = {self.d} and M = {self.M}")
        if not isinstance(metric, str) or metric not in _METRICS:
            raise InvalidParameterError(f"metric must be one of {sorted(_METRICS)}, got {metric!r}")
        self.curvatures = _as_curvatures(curvatures, self.M)
        if metric == "inner_product" and self.curvatures.any():
            raise InvalidParameterError(f"metric 'inner_product' takes curvatures = 0 only, got {curvatures!r}")
        self.metric = metric
        self.clip_radius = None if clip_radius is None else as_positive(clip_radius, "clip_radius")
        self.seed = as_integer(seed, "seed", 0)
        self.verbose = False
        self.codebooks: FloatArray | None = None

    @classmethod
    def from_codebooks(
        cls,
        codebooks: npt.ArrayLike,
        curvatures: npt.ArrayLike,
        *,
        metric: Metric = "geodesic",
        clip_radius: float | None = None,
    ) -> HyperbolicProductQuantizer:
        """A trained codec from codewords (M, ksub, dsub), given as space coordinates of points, ksub = 16 to 256."""
        try:
            with np.errstate(over="ignore"):
                books = np.array(codebooks, dtype=np.float32, order="C")
        except (TypeError, ValueError) as error:
            raise InvalidVectorsError(f"codebooks can't be read as an array (M, ksub, dsub): {error}") from error
        if books.ndim != 3 or books.shape[1] not in (16, 32, 64, 128, 256) or 0 in books.shape:
            raise InvalidVectorsError(
                f"codebooks must have shape (M, ksub, dsub) with ksub = 16, 32, 64, 128 or 256, got {books.shape}"
            )
        if not np.isfinite(books).all():
            raise InvalidVectorsError("codebooks must be finite")
        M, ksub, dsub = books.shape
        codec = cls(M * dsub, M, ksub.bit_length() - 1, curvatures=curvatures, metric=metric, clip_radius=clip_radius)
        codec._set_codebooks(books)
        return codec

    def __repr__(self) -> str:
        low, high = float(self.curvatures.min()), float(self.curvatures.max())
        curvature = f"{-low:g}" if low == high else f"{-high:g}..{-low:g}"
        return (
            f"HyperbolicProductQuantizer(d={self.d}, M={self.M}, nbits={self.nbits}, curvature={curvature}, "
            f"metric={self.metric!r}, clip_radius={self.clip_radius}, is_trained={self.is_trained})"
        )

    @property
    def ksub(self) -> int:
        """Number of codewords of a subspace."""
        return 1 << self.nbits

    @property
    def dsub(self) -> int:
        """Dimension of a subspace."""
        return self.d // self.M

    @property
    def code_size(self) -> int:
        """Bytes of a vector's codes: one per subspace."""
        return self.M

    @property
    def is_trained(self) -> bool:
        """Whether there are codebooks."""
        return self.codebooks is not None

    # ---------------------------------------------------------------------------------------------- training

    def train(self, x: npt.ArrayLike) -> None:
        """Fit the codebooks by hyperbolic k-means in each subspace, at the given curvatures.

        ``x`` (n, d) are tangent vectors, n >= ksub; of more than 256·ksub a seeded sample is used. Seeding is k-means++, a
        centre is the Lorentzian midpoint of its points, which lowers the sum of squared Lorentzian distances at each step,
        and an empty cluster takes the point that is farthest from its centre. The result depends on ``x`` and ``seed`` only,
        not on the number of threads. If it fails or is interrupted, the codec keeps its former codebooks.
        """
        vectors = as_vectors(x, self.d)
        if len(vectors) < self.ksub:
            raise InvalidVectorsError(f"training needs at least ksub = {self.ksub} vectors, got {len(vectors)}")
        rng = np.random.default_rng(self.seed)
        limit = _MAX_POINTS_PER_CENTROID * self.ksub
        rows = np.arange(len(vectors))
        if len(vectors) > limit:
            rows = np.sort(rng.choice(len(vectors), limit, replace=False))
        points = self._points(vectors[rows], rows)
        books = np.empty((self.M, self.ksub, self.dsub), np.float32)
        seeds = rng.integers(2**63, size=self.M)
        for m in track(range(self.M), "hyperbolic k-means", self.verbose):
            books[m] = _kmeans(points[:, m], float(self.curvatures[m]), self.ksub, np.random.default_rng(seeds[m]))
        self._set_codebooks(books)

    # ---------------------------------------------------------------------------------------------- coding

    def compute_codes(self, x: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Codes (n, M) uint8 of tangent vectors (n, d): the nearest codeword of each subspace, ties to the smaller."""
        self._require_trained()
        vectors = as_vectors(x, self.d)
        codes = np.empty((len(vectors), self.M), np.uint8)

        def encode(start: int) -> Iterator[None]:
            rows = slice(start, start + _ENCODE_ROWS)
            points = self._points(vectors[rows], start)
            yield
            kernels.assign(points, *self._prepared, self.curvatures, codes[rows])
            yield

        starts = range(0, len(vectors), _ENCODE_ROWS)
        if self.verbose and len(starts) > 1:
            # A batch of chunks at a time, so that there is something to show between them.
            for batch in track([starts[i : i + 16] for i in range(0, len(starts), 16)], "encoding", verbose=True):
                run_tasks(encode, batch)
        else:
            run_tasks(encode, starts)
        return codes

    def decode(self, codes: npt.ArrayLike) -> FloatArray:
        """Tangent vectors (n, d) of the codewords that codes (n, M) uint8 stand for."""
        books = self._require_trained()
        checked = as_codes(codes, self.M, self.ksub)
        tangents = lorentz.log0(books, self.curvatures[:, None])
        vectors: FloatArray = tangents[np.arange(self.M), checked]
        return vectors.reshape(len(checked), self.d)

    def compute_distance_tables(self, x: npt.ArrayLike) -> FloatArray:
        """Distances of each query's parts to all codewords: (nq, d) tangent vectors to (nq, M, ksub) float32.

        Geodesic distances, their squares or negated inner products, by ``metric``: computed in float64 and rounded once, with a
        relative error below 1e-6 even between points that are far out and close together. What float32 can't hold is inf, or,
        of inner products, its largest number. A query's table does not depend on the other queries, nor on the CPU.
        """
        self._require_trained()
        return self.tables_of(as_vectors(x, self.d))

    def tables_of(self, vectors: FloatArray, first_row: int = 0) -> FloatArray:
        """``compute_distance_tables`` of vectors that are checked already (the index's path)."""
        tables = np.empty((len(vectors), self.M, self.ksub), np.float32)
        points = self._points(vectors, first_row)
        kernels.distance_tables(points, *self._prepared, self.curvatures, _METRICS[self.metric], tables)
        return tables

    # ---------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trained codec to one file (see ``hyperfaiss.io``)."""
        fields, tensors = self.to_parts()
        write_tensors(path, "codec", fields, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HyperbolicProductQuantizer:
        """Read a codec that ``save`` wrote; the errors are those of ``hyperfaiss.io.Reader``."""
        with Reader(path, "codec") as reader:
            return cls.from_parts(reader)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Header fields and tensors of a file that holds this codec."""
        books = self._require_trained()
        fields = {
            "d": self.d, "M": self.M, "nbits": self.nbits, "metric": self.metric, "clip_radius": self.clip_radius,
            "seed": self.seed,
        }  # fmt: skip
        return {"codec": fields}, {"codec.codebooks": books, "codec.curvatures": self.curvatures}

    @classmethod
    def from_parts(cls, reader: Reader) -> HyperbolicProductQuantizer:
        """The codec in an open file."""
        fields = reader.field("codec", dict)

        def build(curvatures: npt.ArrayLike) -> HyperbolicProductQuantizer:
            try:
                return cls(**fields, curvatures=curvatures)
            except (TypeError, ValueError) as error:
                raise reader.corrupt(f"unusable codec: {error}") from error

        codec = build(reader.tensor("codec.curvatures", np.float32, (build(0.0).M,)))
        books = reader.tensor("codec.codebooks", np.float32, (codec.M, codec.ksub, codec.dsub))
        if not np.isfinite(books).all():
            raise reader.corrupt("codebooks must be finite")
        codec._set_codebooks(books)
        return codec

    # ---------------------------------------------------------------------------------------------- inside

    def _require_trained(self) -> FloatArray:
        if self.codebooks is None:
            raise NotTrainedError("the codec has no codebooks yet: call train(x), or build it with from_codebooks")
        return self.codebooks

    def _set_codebooks(self, books: FloatArray) -> None:
        self._prepared = kernels.prepare(books, self.curvatures)
        self.codebooks = books

    def clip(self, vectors: FloatArray) -> FloatArray:
        """Tangent vectors (n, d) float32 with each subspace's part clipped to ``clip_radius``, as coding does it first."""
        flat = np.zeros(self.M, np.float32)  # at curvature 0 the map is the identity
        return self._mapped(vectors, flat).reshape(vectors.shape)

    def _mapped(self, vectors: FloatArray, curvatures: FloatArray) -> FloatArray:
        """Points (n, M, dsub) of tangent vectors (n, d), clipped and mapped; inf where they leave float32."""
        parts = vectors.reshape(len(vectors), self.M, self.dsub)
        points = np.empty_like(parts)
        kernels.map_points(parts, self.clip_radius or np.inf, curvatures, points)
        return points

    def _points(self, vectors: FloatArray, numbers: int | npt.NDArray[np.int64] = 0) -> FloatArray:
        """Points (n, M, dsub) of tangent vectors (n, d). An error names a row by ``numbers``: of the first, or of each."""
        points = self._mapped(vectors, self.curvatures)
        if not np.isfinite(points).all():
            row, m, _ = np.argwhere(~np.isfinite(points))[0]
            part = vectors[row].reshape(self.M, self.dsub)[m]
            number = numbers + row if isinstance(numbers, int) else numbers[row]
            raise InvalidVectorsError(
                f"row {number}: a tangent vector of norm {np.linalg.norm(part):.4g} maps beyond "
                f"float32 at curvature -{self.curvatures[m]:g}; scale the vectors or set clip_radius"
            )
        return points


def _as_curvatures(curvatures: npt.ArrayLike, M: int) -> FloatArray:
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(curvatures, dtype=np.float32)
        filled = np.array(np.broadcast_to(values, (M,)))
    except (TypeError, ValueError):
        raise InvalidParameterError(f"curvatures must be a number or {M} numbers, got {curvatures!r}") from None
    if not np.isfinite(filled).all() or (filled < 0).any():
        raise InvalidParameterError(f"curvatures (theta; the curvature is -theta) must be finite and >= 0, got {values}")
    return filled


def _kmeans(x: FloatArray, theta: float, ksub: int, rng: np.random.Generator) -> FloatArray:
    """Centres (ksub, dsub) of hyperbolic k-means over the points x (n, dsub)."""
    x = np.ascontiguousarray(x)
    curvature = np.array([theta], np.float32)
    centers = x[_seed_centers(x, theta, ksub, rng)]
    codes, previous = np.zeros((len(x), 1), np.uint8), np.zeros(0)
    for _ in range(_TRAIN_ITERATIONS):
        prepared = kernels.prepare(centers[None], curvature)

        def encode(start: int, prepared: kernels.Prepared = prepared) -> Iterator[None]:
            rows = slice(start, start + _ENCODE_ROWS)
            kernels.assign(x[rows, None], *prepared, curvature, codes[rows])
            yield

        run_tasks(encode, range(0, len(x), _ENCODE_ROWS))
        if np.array_equal(codes, previous):
            break
        previous = codes.copy()
        empty = np.flatnonzero(np.bincount(codes[:, 0], minlength=ksub) == 0)
        distances = lorentz.squared_distance(x, centers[codes[:, 0]], theta) if len(empty) else np.zeros(0)
        kernels.move_centers(x, theta, codes[:, 0], centers)
        _repair(centers, empty, x, distances)
    return centers


def _seed_centers(x: FloatArray, theta: float, ksub: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """k-means++: each next centre is drawn with probability proportional to the squared distance to the nearest one."""
    n, dsub = x.shape
    nblocks = -(-n // kernels.LANES)
    blocks = np.zeros((nblocks, kernels.LANES, dsub), np.float32)
    blocks.reshape(-1, dsub)[:n] = x
    prepared = kernels.prepare(blocks, np.full(nblocks, theta, np.float32))
    squared = np.empty((nblocks, kernels.LANES))
    chosen = np.empty(ksub, np.int64)
    chosen[0] = rng.integers(n)
    nearest = np.full(n, np.inf)
    for j in range(1, ksub):
        kernels.chords(x[chosen[j - 1]], *prepared, theta, squared)
        np.minimum(nearest, squared.reshape(-1)[:n], out=nearest)
        cumulative = np.cumsum(nearest)
        if cumulative[-1] > 0:
            # searchsorted to the right never lands on a point of distance 0.
            draw = rng.random() * cumulative[-1]
            chosen[j] = min(int(np.searchsorted(cumulative, draw, side="right")), n - 1)
        else:  # fewer distinct points than centres
            chosen[j] = rng.integers(n)
    return chosen


def _repair(centers: FloatArray, empty: npt.NDArray[np.int64], x: FloatArray, distances: npt.NDArray[Any]) -> None:
    """Give each empty cluster the point that is farthest from its centre, a different point each."""
    if not len(empty):
        return
    order = np.argsort(-distances, kind="stable")
    _, first = np.unique(x[order[: 64 * len(empty)]], axis=0, return_index=True)
    candidates = order[np.sort(first)][: len(empty)]
    far = candidates[distances[candidates] > 0]
    centers[empty[: len(far)]] = x[far]

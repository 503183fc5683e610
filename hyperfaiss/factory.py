"""Indexes from a line of text, as ``faiss.index_factory`` makes them."""

from __future__ import annotations

import re
from typing import Any

import numpy.typing as npt

from .checks import as_integer
from .codec import HyperbolicProductQuantizer, Metric
from .errors import InvalidParameterError
from .index import HyperbolicPQIndex
from .interop import projector_from_faiss
from .ivf import HyperbolicIVFPQIndex

__all__ = ["index_factory"]

_NUMBER = r"([0-9]{1,9})"
_TRANSFORMS = {"L2norm": re.compile(r"L2norm"), "RR": re.compile(rf"RR{_NUMBER}?")}
_IVF = re.compile(rf"IVF{_NUMBER}(?:_HNSW{_NUMBER}?)?")
_CODES = re.compile(rf"HPQ{_NUMBER}(?:x{_NUMBER})?")
_KNOWN = (
    "known are, in this order and separated by commas: L2norm (normalise vectors) and RR or RR<d> (random rotation, to d "
    "dimensions), both optional; IVF<nlist> or IVF<nlist>_HNSW<links>, optional; HPQ<M> or HPQ<M>x<nbits>. "
    "Examples: HPQ8; HPQ16x4; IVF1024,HPQ8; IVF65536_HNSW32,HPQ8; L2norm,RR64,HPQ8"
)
# What FAISS's factory knows and this one does not, and what to do instead.
_HINTS = {
    re.compile(r"PQ[0-9].*"): "a hyperbolic product quantizer is HPQ; for FAISS's own, use faiss.index_factory and from_faiss",
    re.compile(r"(OPQ|PCA|PCAR|PCAW|PCAWR|ITQ|LT)[0-9].*"): "a projection that must learn comes from a trained model "
    "(from_model), from a trained faiss index (from_faiss), or from a trained transform "
    "(index.projector = projector_from_faiss(transform))",
}
_HNSW_LINKS = 32  # as faiss.index_factory


def index_factory(
    d: int,
    description: str,
    metric: Metric = "geodesic",
    *,
    curvatures: npt.ArrayLike = 1.0,
    clip_radius: float | None = None,
    seed: int = 1234,
) -> HyperbolicPQIndex | HyperbolicIVFPQIndex:
    """An untrained index for vectors (n, d), described in a line.

    ==========================  =================================================================================
    ``HPQ8``, ``HPQ16x4``       product quantizer of M = 8 subspaces of 8 bits; of 16 subspaces of 4 bits
    ``IVF1024,HPQ8``            the same in 1024 inverted lists; coarse quantizer ``faiss.IndexFlatL2``
    ``IVF65536_HNSW32,HPQ8``    coarse quantizer ``faiss.IndexHNSWFlat`` with 32 links
    ``L2norm,…``                vectors are divided by their norms first
    ``RR64,…``                  vectors are rotated at random, to 64 dimensions
    ==========================  =================================================================================

    For metric "inner_product" the coarse quantizer compares by inner product, too. ``metric``, ``curvatures``,
    ``clip_radius`` and ``seed`` are those of :class:`HyperbolicProductQuantizer`.

    Raises InvalidParameterError: a description that is not understood (it lists what is), or a parameter out of its range.
    """
    d = as_integer(d, "d", 1)
    transforms, ivf, codes = _parse(description)
    seed = as_integer(seed, "seed", 0)
    chain: list[Any] = []
    for name, size in transforms:
        chain.append(_transform(name, d, size, seed))
        d = chain[-1].d_out
    M, nbits = codes
    codec = HyperbolicProductQuantizer(d, M, nbits, curvatures=curvatures, metric=metric, clip_radius=clip_radius, seed=seed)
    index: HyperbolicPQIndex | HyperbolicIVFPQIndex
    if ivf is None:
        index = HyperbolicPQIndex.from_codec(codec)
    else:
        nlist, links = ivf
        index = HyperbolicIVFPQIndex.from_codec(_quantizer(d, links, metric), codec, nlist)
    if chain:
        index.projector = projector_from_faiss(chain)
    return index


def _parse(description: str) -> tuple[list[tuple[str, int | None]], tuple[int, int | None] | None, tuple[int, int]]:
    """Transforms (name, size), lists (nlist, links of the HNSW graph), codes (M, nbits)."""
    if not isinstance(description, str):
        raise InvalidParameterError(f"description must be a string, got {type(description).__name__}; {_KNOWN}")
    transforms: list[tuple[str, int | None]] = []
    ivf: tuple[int, int | None] | None = None
    *front, last = description.replace(" ", "").split(",")
    codes = _CODES.fullmatch(last)
    if not codes:
        raise _unknown(last, description)
    for part in front:
        name = next((name for name, pattern in _TRANSFORMS.items() if pattern.fullmatch(part)), None)
        if name is not None and ivf is None:
            match = _TRANSFORMS[name].fullmatch(part)
            size = match.group(1) if match and match.groups() else None
            transforms.append((name, int(size) if size else None))
        elif ivf is None and (match := _IVF.fullmatch(part)):
            links = match.group(2) or _HNSW_LINKS
            ivf = int(match.group(1)), int(links) if "_HNSW" in part else None
        else:
            raise _unknown(part, description)
    return transforms, ivf, (int(codes.group(1)), int(codes.group(2) or 8))


def _unknown(part: str, description: str) -> InvalidParameterError:
    hint = next((f": {hint}" for pattern, hint in _HINTS.items() if pattern.fullmatch(part)), "")
    return InvalidParameterError(f"{part!r} in {description!r} is not understood{hint}; {_KNOWN}")


def _transform(name: str, d: int, size: int | None, seed: int) -> Any:
    import faiss

    if name == "L2norm":
        return faiss.NormalizationTransform(d)
    size = as_integer(d if size is None else size, "the dimension of RR", 1, d)
    rotation = faiss.RandomRotationMatrix(d, size)
    rotation.init(seed)
    return rotation


def _quantizer(d: int, links: int | None, metric: Metric) -> Any:
    import faiss

    similar = metric == "inner_product"
    if links is None:
        return faiss.IndexFlatIP(d) if similar else faiss.IndexFlatL2(d)
    number = faiss.METRIC_INNER_PRODUCT if similar else faiss.METRIC_L2
    return faiss.IndexHNSWFlat(d, as_integer(links, "the links of HNSW", 2), number)

"""index_factory: what a line makes, and what it says of lines that it does not know."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest

from hyperfaiss import HyperbolicIVFPQIndex, HyperbolicPQIndex, InvalidParameterError
from hyperfaiss.factory import index_factory
from tests.toys import vectors


@pytest.mark.parametrize(
    ("description", "M", "nbits"),
    [("HPQ8", 8, 8), ("HPQ16x4", 16, 4), ("HPQ4x6", 4, 6), (" HPQ1x5 ", 1, 5), ("HPQ32x8", 32, 8)],
)
def test_flat(description: str, M: int, nbits: int) -> None:
    index = index_factory(32, description)
    assert isinstance(index, HyperbolicPQIndex)
    assert (index.d, index.M, index.nbits, index.ntotal) == (32, M, nbits, 0)
    assert index.projector is None
    assert not index.is_trained
    assert index.codec.metric == "geodesic"


@pytest.mark.parametrize(
    ("description", "nlist", "quantizer", "links"),
    [
        ("IVF7,HPQ4x4", 7, faiss.IndexFlatL2, None),
        ("IVF20_HNSW,HPQ4x4", 20, faiss.IndexHNSWFlat, 32),
        ("IVF65536_HNSW16, HPQ4x4", 65536, faiss.IndexHNSWFlat, 16),
    ],
)
def test_ivf(description: str, nlist: int, quantizer: Any, links: int | None) -> None:
    index = index_factory(16, description)
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert (index.d, index.M, index.nbits, index.nlist) == (16, 4, 4, nlist)
    assert type(index.quantizer) is quantizer
    assert index.quantizer.d == 16
    if links is not None:
        assert index.quantizer.hnsw.nb_neighbors(1) == links
    if nlist < 100:
        x = vectors(1000, 16)
        index.train(x)
        index.add(x)
        index.nprobe = nlist
        np.testing.assert_array_equal(np.sort(index.search(x[:2], 1000)[1], axis=1), np.arange(1000)[None].repeat(2, axis=0))


def test_options_are_passed_on() -> None:
    index = index_factory(8, "HPQ2x4", "squared", curvatures=[0, 2], clip_radius=1.25, seed=99)
    codec = index.codec
    assert (codec.metric, codec.clip_radius, codec.seed) == ("squared", 1.25, 99)
    np.testing.assert_array_equal(codec.curvatures, [0, 2])
    index = index_factory(8, "IVF4,HPQ2x4", metric="inner_product", curvatures=0)
    assert index.codec.metric == "inner_product"
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert type(index.quantizer) is faiss.IndexFlatIP
    index = index_factory(8, "IVF4_HNSW8,HPQ2x4", metric="inner_product", curvatures=0)
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert index.quantizer.metric_type == faiss.METRIC_INNER_PRODUCT


def test_numpy_integers_and_the_seed_of_the_rotation() -> None:
    index = index_factory(np.int64(12), "RR8,HPQ2x4", seed=np.int32(3))  # type: ignore[arg-type]
    assert (index.d, index.codec.d) == (12, 8)
    assert index.projector is not None
    weights = [index_factory(12, "RR8,HPQ2x4", seed=seed).projector.layers[0][0] for seed in (3, 3, 4)]  # type: ignore[union-attr]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
    np.testing.assert_allclose(weights[0] @ weights[0].T, np.eye(8), atol=1e-5)


def test_normalised_and_rotated() -> None:
    x = vectors(500, 12) * 7
    index = index_factory(12, "L2norm,RR,HPQ4x4")
    index.train(x)
    index.add(x)
    assert index.projector is not None
    tangents = index.projector.transform(x)
    np.testing.assert_allclose(np.linalg.norm(tangents, axis=1), 1, rtol=1e-6)
    # a scaled query is the same query, to the rounding of its norm
    D, I = index.search(x[:20], 5)
    scaled_D, scaled_I = index.search(x[:20] * 4, 5)
    np.testing.assert_array_equal(scaled_I, I)
    np.testing.assert_array_equal(scaled_D, D)


def test_an_ivf_index_behind_a_projection() -> None:
    index = index_factory(12, "RR8,IVF5,HPQ4x4")
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert (index.d, index.codec.d, index.quantizer.d) == (12, 8, 8)
    x = vectors(500, 12)
    index.train(x)
    index.add(x)
    assert index.search(x[:3], 4)[1].shape == (3, 4)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ("", "''"),
        ("HPQ", "'HPQ'"),
        ("hpq8", "'hpq8'"),
        ("HPQ8x", "'HPQ8x'"),
        ("HPQ-8", "'HPQ-8'"),
        ("HPQ8,", "''"),
        ("HPQ8,IVF4", "'IVF4'"),
        ("HPQ8,HPQ8", "'HPQ8'"),
        ("IVF4", "'IVF4'"),
        ("IVF,HPQ8", "'IVF'"),
        ("IVF4,IVF4,HPQ8", "'IVF4'"),
        ("IVF4,L2norm,HPQ8", "'L2norm'"),
        ("IVF4_NSG32,HPQ8", "'IVF4_NSG32'"),
        ("IVF4,PQ8", "faiss.index_factory and from_faiss"),
        ("PQ8x4", "faiss.index_factory and from_faiss"),
        ("OPQ8,HPQ8", "projector_from_faiss"),
        ("PCA16,IVF4,HPQ8", "projector_from_faiss"),
        ("Flat", "'Flat'"),
    ],
)
def test_unknown_descriptions(description: str, says: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        index_factory(32, description)
    message = str(caught.value)
    assert says in message
    for known in ("L2norm", "RR<d>", "IVF<nlist>", "IVF<nlist>_HNSW<links>", "HPQ<M>x<nbits>", "IVF65536_HNSW32,HPQ8"):
        assert known in message


@pytest.mark.parametrize(
    ("d", "description", "options", "says"),
    [
        (0, "HPQ8", {}, "d must be an integer >= 1, got 0"),
        (8.0, "HPQ8", {}, "d must be an integer >= 1, got 8.0"),
        (10, "HPQ8", {}, "d = 10 and M = 8"),
        (16, "HPQ0", {}, "M must be an integer >= 1, got 0"),
        (16, "HPQ8x3", {}, "nbits must be an integer from 4 to 8, got 3"),
        (16, "HPQ8x12", {}, "nbits must be an integer from 4 to 8, got 12"),
        (16, "IVF0,HPQ8", {}, "nlist must be an integer from 1 to"),
        (16, "IVF4_HNSW1,HPQ8", {}, "the links of HNSW must be an integer >= 2, got 1"),
        (16, "RR17,HPQ8", {}, "the dimension of RR must be an integer from 1 to 16, got 17"),
        (16, "RR,L2norm,HPQ8", {}, "NormalizationTransform follows a linear"),
        (16, "HPQ8", {"metric": "cosine"}, "got 'cosine'"),
        (16, "HPQ8", {"curvatures": -1}, "curvatures"),
        (16, "HPQ8", {"clip_radius": 0}, "clip_radius"),
        (16, "HPQ8", {"seed": -1}, "seed must be an integer >= 0, got -1"),
        (16, None, {}, "description must be a string, got NoneType"),
        (16, b"HPQ8", {}, "description must be a string, got bytes"),
    ],
)
def test_parameters_out_of_range(d: Any, description: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        index_factory(d, description, **options)
    assert says in str(caught.value)

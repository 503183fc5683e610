"""Bad input, case by case, on both indexes: a typed error that says what came and what was expected; nothing has changed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from hyperfaiss import (
    HyperbolicIVFPQIndex,
    HyperbolicPQIndex,
    HyperbolicProductQuantizer,
    HyperfaissError,
    InvalidParameterError,
    InvalidVectorsError,
    NotTrainedError,
    Projector,
    SearchParameters,
    UnknownIdError,
    read_index,
    write_index,
)
from tests.toys import Index, empty_index, flat_quantizer

Vectors, Parameter, Unknown = InvalidVectorsError, InvalidParameterError, UnknownIdError

D, NTOTAL, NLIST = 12, 300, 5
RNG = np.random.default_rng(0)
CODEC = HyperbolicProductQuantizer.from_codebooks(RNG.normal(size=(3, 16, 4)), 1.0)
DATA = RNG.normal(size=(NTOTAL, D)).astype(np.float32)
COARSE = flat_quantizer(DATA[:NLIST])
X = np.ones((2, D), np.float32)
NAN = np.where(np.arange(D) == 3, np.nan, X)
BIG = X * np.float32(1e6)
CODES = np.zeros((2, 2), np.uint8)


def empty(kind: str, codec: HyperbolicProductQuantizer = CODEC) -> Index:
    return empty_index(kind, codec, COARSE)


def build(kind: str) -> Index:
    index = empty(kind)
    index.add(DATA)
    return index


def call(name: str, *args: Any, **options: Any) -> Callable[[Index], Any]:
    return lambda index: getattr(index, name)(*args, **options)


def searches(*args: Any, **options: Any) -> Callable[[Index], Any]:
    return call("search", *args, **options)


def filtered(sel: Any) -> Callable[[Index], Any]:
    return call("search", X, 3, params=SearchParameters(sel))


def merged(other: Callable[[Index], Any], *args: Any) -> Callable[[Index], Any]:
    return lambda index: index.merge_from(other(index), *args)


def of_same_kind(index: Index, codec: HyperbolicProductQuantizer = CODEC) -> Index:
    other = empty("flat" if isinstance(index, HyperbolicPQIndex) else "ivf", codec)
    if other.is_trained:
        other.add_with_ids(X, [7, 1000])
    return other


def projected(index: Index) -> Index:
    other = of_same_kind(index)
    other.projector = Projector([(np.eye(D), np.zeros(D))])
    return other


OTHER_CODEC = HyperbolicProductQuantizer.from_codebooks(RNG.normal(size=(3, 16, 4)), 1.0)
OTHER_METRIC = HyperbolicProductQuantizer.from_codebooks(CODEC.codebooks, 1.0, metric="squared")  # type: ignore[arg-type]


class Weird:
    """Nothing that NumPy would take for numbers."""


Case = tuple[Callable[[Index], Any], type[Exception], str]
CASES: list[Case] = [
    # vectors
    (call("add", X[:, :5]), Vectors, r"\(n, 12\), got \(2, 5\)"),
    (call("add", X[0]), Vectors, r"got \(12,\).*None"),
    (call("add", X[None]), Vectors, r"got \(1, 2, 12\)"),
    (call("add", np.float32(1)), Vectors, r"got \(\)"),
    (call("add", NAN), Vectors, "2 of 2 rows are not, first row 0"),
    (call("add", X * np.inf), Vectors, "finite"),
    (call("add", np.full((1, D), 1e300)), Vectors, "finite in float32"),
    (call("add", BIG), Vectors, "row 0: .*curvature"),
    (call("add", None), Vectors, "x"),
    (call("add", "vectors"), Vectors, "dtype"),
    (call("add", [[1.0] * D, [1.0]]), Vectors, "x can't be read"),
    (call("add", X.astype(complex)), Vectors, "complex"),
    (call("add", X.astype(bool)), Vectors, "bool"),
    (call("add", X.astype(object)), Vectors, "object"),
    (call("add", torch.ones(2, D, device="meta")), Vectors, "x can't be read"),
    (call("add", Weird()), Vectors, "object"),
    (call("sa_encode", NAN), Vectors, "finite"),
    (call("sa_encode", X[:, :5]), Vectors, r"\(2, 5\)"),
    (call("train", X), Parameter, r"300 codes .* reset\(\) first"),
    # search
    (searches(X[:, :5], 3), Vectors, r"\(n, 12\), got \(2, 5\)"),
    (searches(X[0], 3), Vectors, r"\(12,\).*None"),
    (searches(NAN, 3), Vectors, "finite"),
    (searches(BIG, 3), Vectors, "row [01]: .*curvature"),
    (searches(X, 0), Parameter, "k must be an integer >= 1, got 0"),
    (searches(X, -1), Parameter, "got -1"),
    (searches(X, np.int64(-1)), Parameter, "got -1"),
    (searches(X, 2.0), Parameter, r"got 2\.0"),
    (searches(X, np.float32(2)), Parameter, "k must be an integer"),
    (searches(X, True), Parameter, "got True"),
    (searches(X, np.bool_(True)), Parameter, "k must be"),
    (searches(X, None), Parameter, "got None"),
    (searches(X, "3"), Parameter, "got '3'"),
    (searches(X, [3]), Parameter, r"got \[3\]"),
    (searches(X, 3, D=np.empty((2, 4), np.float32)), Parameter, r"D must .*\(2, 3\), got .*\(2, 4\)"),
    (searches(X, 3, D=np.empty((2, 3))), Parameter, "D must .*float32.*got float64"),
    (searches(X, 3, I=np.empty((2, 3), np.int32)), Parameter, "I must .*int64.*got int32"),
    (searches(X, 3, I=np.empty((3, 2), np.int64).T), Parameter, "I must .*contiguous"),
    (searches(X, 3, I=[[0] * 3] * 2), Parameter, "I must .*list"),
    (searches(X, 3, D=np.broadcast_to(np.float32(0), (2, 3))), Parameter, "D must .*writeable"),
    (call("range_search", X, "near"), Parameter, "radius must be a number, got 'near'"),
    (call("range_search", X, np.nan), Parameter, "got nan"),
    (call("range_search", X, None), Parameter, "got None"),
    (call("range_search", X, True), Parameter, "got True"),
    (call("range_search", X, [1.0, 2.0]), Parameter, r"got \[1\.0, 2\.0\]"),
    (call("range_search", NAN, 1.0), Vectors, "finite"),
    (call("range_search", X[:, :5], 1.0), Vectors, r"\(2, 5\)"),
    (call("search_and_reconstruct", X, 0), Parameter, "got 0"),
    (call("assign", X, 0), Parameter, "got 0"),
    # filters
    (searches(X, 3, params={"sel": None}), Parameter, "dict"),
    (searches(X, 3, params=faiss.SearchParametersHNSW()), Parameter, "SearchParametersHNSW"),
    (searches(X, 3, params=SearchParameters(nprobe=0)), Parameter, "nprobe .*got 0"),
    (searches(X, 3, params=SearchParameters(nprobe="all")), Parameter, "nprobe .*got 'all'"),  # type: ignore[arg-type]
    (searches(X, 3, params=faiss.SearchParametersIVF(nprobe=0)), Parameter, "nprobe .*got 0"),
    (filtered(np.ones(299, bool)), Vectors, r"\(300,\), got \(299,\)"),
    (filtered(np.ones((300, 1), bool)), Vectors, r"\(300,\), got \(300, 1\)"),
    (filtered(np.array([1.5])), Vectors, "got float64"),
    (filtered(np.array([1], np.uint64)), Vectors, "got uint64"),
    (filtered(7), Vectors, r"\(n,\), got \(\)"),
    (filtered(Weird()), Parameter, "Weird"),
    # ids
    (call("add_with_ids", X, [1.0, 2.0]), Vectors, "ids must be int64, got float64"),
    (call("add_with_ids", X, np.array([1, 2], np.uint64)), Vectors, "got uint64"),
    (call("add_with_ids", X, np.array([True, False])), Vectors, "got bool"),
    (call("add_with_ids", X, ["a", "b"]), Vectors, "got <U1"),
    (call("add_with_ids", X, [2**63, 1]), Vectors, "ids must be int64, got"),
    (call("add_with_ids", X, [[1, 2]]), Vectors, r"\(n,\), got \(1, 2\)"),
    (call("add_with_ids", X, 1), Vectors, r"\(n,\), got \(\)"),
    (call("add_with_ids", X, [1]), Vectors, "2 vectors need 2 ids, got 1"),
    (call("add_with_ids", X, [1, 2, 3]), Vectors, "2 vectors need 2 ids, got 3"),
    (call("add_with_ids", X, [-1, 2]), Vectors, "got -1 to 2"),
    (call("add_with_ids", X, [1, 2**63 - 1]), Vectors, f"got 1 to {2**63 - 1}"),
    (call("add_with_ids", X, [999, 999]), Vectors, "got 1 repeats, first 999"),
    (call("add_with_ids", X, None), Vectors, "got object"),
    (call("add_with_ids", NAN, [1, 2]), Vectors, "finite"),
    (call("remove_ids", [1.0]), Vectors, "got float64"),
    (call("remove_ids", np.array([1], np.uint64)), Vectors, "got uint64"),
    (call("remove_ids", 3), Vectors, r"got \(\)"),
    (call("remove_ids", np.ones(5, bool)), Vectors, r"\(300,\), got \(5,\)"),
    (call("remove_ids", None), Parameter, "NoneType"),
    (call("update_vectors", [1, 300], X), Unknown, "1 of 2 ids are unknown, first 300; the index holds"),
    (call("update_vectors", [1, 1], X), Vectors, "first 1"),
    (call("update_vectors", [1], X), Vectors, "2 vectors need 2 ids, got 1"),
    (call("update_vectors", [1, 2], NAN), Vectors, "finite"),
    (call("update_vectors", [1.0, 2.0], X), Vectors, "float64"),
    # reconstruction
    (call("reconstruct", -1), Unknown, "-1"),
    (call("reconstruct", 300), Unknown, "first 300"),
    (call("reconstruct", 2**70), Unknown, str(2**70)),
    (call("reconstruct", 1.5), Parameter, "got 1.5"),
    (call("reconstruct", True), Parameter, "got True"),
    (call("reconstruct", None), Parameter, "got None"),
    (call("reconstruct_n", 299, 2), Unknown, "299 to 300"),
    (call("reconstruct_n", 301, -1), Unknown, "301"),
    (call("reconstruct_n", -5, 5), Unknown, "-5"),
    (call("reconstruct_n", 0, 2**40), Unknown, str(2**40 - 1)),
    (call("reconstruct_n", 0, -2), Parameter, "ni must be an integer >= -1, got -2"),
    (call("reconstruct_n", 2**70, 1), Unknown, str(2**70)),
    (call("reconstruct_n", 0.0, 1), Parameter, r"n0 .*got 0\.0"),
    (call("reconstruct_batch", [0, 300, 301]), Unknown, "2 of 3 ids are unknown, first 300"),
    (call("reconstruct_batch", [0, -1]), Unknown, "1 of 2 ids are unknown, first -1"),
    (call("reconstruct_batch", [0.0]), Vectors, "float64"),
    (call("reconstruct_batch", [[0]]), Vectors, r"\(1, 1\)"),
    # codes
    (call("add_sa_codes", CODES.astype(np.int64)), Vectors, "uint8 .*got int64"),
    (call("add_sa_codes", np.zeros((2, 9), np.uint8)), Vectors, r"\(n, [23]\), got uint8 of shape \(2, 9\)"),
    (call("add_sa_codes", CODES[0]), Vectors, r"shape \(2,\)"),
    (call("add_sa_codes", [[1], [2, 3]]), Vectors, "codes can't be read"),
    (call("add_sa_codes", None), Vectors, "object"),
    (call("sa_decode", np.zeros((2, 9), np.uint8)), Vectors, r"shape \(2, 9\)"),
    (call("sa_decode", CODES.astype(np.float32)), Vectors, "float32"),
    # merging
    (merged(lambda index: index), Parameter, "the index itself"),
    (merged(lambda index: None), Parameter, "NoneType"),  # noqa: ARG005
    (merged(lambda index: build("ivf" if isinstance(index, HyperbolicPQIndex) else "flat")), Parameter, "only another Hyper"),
    (merged(lambda index: of_same_kind(index, OTHER_CODEC)), Parameter, "the same codec"),
    (merged(lambda index: of_same_kind(index, OTHER_METRIC)), Parameter, "'geodesic'.*'squared'"),
    (merged(projected), Parameter, "the same projector"),
    (merged(lambda index: of_same_kind(index, HyperbolicProductQuantizer(D, 3, 4))), NotTrainedError, "train"),
    (merged(of_same_kind), Parameter, r"both indexes hold id 7 \(1 in common\): pass add_id=300"),
    (merged(of_same_kind, -8), Parameter, "add_id = -8 makes ids -1 to 992"),
    (merged(of_same_kind, 2**63 - 1000), Parameter, "makes ids"),
    (merged(of_same_kind, 2**64), Parameter, f"add_id .*got {2**64}"),
    (merged(of_same_kind, 0.5), Parameter, "add_id .*got 0.5"),
    # attributes and files
    (lambda index: setattr(index, "projector", Projector([(np.ones((5, 3)), np.ones(5))])), Parameter, "makes 5 .* takes 12"),
    (lambda index: write_index(index, 3), Parameter, "int"),  # type: ignore[arg-type]
    (lambda index: write_index(index, io.StringIO()), Parameter, "StringIO"),  # type: ignore[arg-type]
    (lambda index: write_index("index", "file"), Parameter, "an index of hyperfaiss, got str"),  # type: ignore[arg-type] # noqa: ARG005
    (lambda index: write_index(index.codec, "file"), Parameter, "HyperbolicProductQuantizer"),  # type: ignore[arg-type]
    (lambda index: read_index(None), Parameter, "NoneType"),  # type: ignore[arg-type] # noqa: ARG005
]  # fmt: skip


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_bad_input(number: int, kind: str) -> None:
    attempt, error, words = CASES[number]
    index = build(kind)
    codes, ids, ref = index.codes, index.ids, index.search(DATA[:7], 9)
    reach = index.range_search(DATA[:7], 4.0)
    with pytest.raises(error, match=words) as caught:
        attempt(index)
    assert isinstance(caught.value, HyperfaissError)
    assert (index.ntotal, index.next_id, index.is_trained, index.projector) == (NTOTAL, NTOTAL, True, None)
    np.testing.assert_array_equal(index.codes, codes)
    np.testing.assert_array_equal(index.ids, ids)
    for comp, before in zip((*index.search(DATA[:7], 9), *index.range_search(DATA[:7], 4.0)), (*ref, *reach), strict=True):
        np.testing.assert_array_equal(comp, before)
    index.add(X)  # and it goes on from there
    assert index.next_id == NTOTAL + 2


def test_there_are_cases_enough() -> None:
    assert len(CASES) >= 60


def test_automatic_ids_end() -> None:
    for kind in ("flat", "ivf"):
        index = build(kind)
        index.add_with_ids(X[:1], [2**63 - 3])
        with pytest.raises(Parameter, match="2 automatic ids from 9223372036854775806 on"):
            index.add(X)
        assert (index.ntotal, index.next_id) == (NTOTAL + 1, 2**63 - 2)
        index.add(X[:1])
        assert index.ids.max() == 2**63 - 2


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize(
    "attempt",
    [
        call("add", X), call("add_with_ids", X, [1, 2]), searches(X, 3), call("range_search", X, 1.0), call("sa_encode", X),
        call("sa_decode", CODES), call("add_sa_codes", CODES), call("update_vectors", [0, 1], X),
        call("search_and_reconstruct", X, 3), call("assign", X), lambda index: write_index(index, io.BytesIO()),
        lambda index: index.merge_from(of_same_kind(index)),
    ],
)  # fmt: skip
def test_untrained(attempt: Callable[[Index], Any], kind: str) -> None:
    index = HyperbolicPQIndex(D, 3, 4) if kind == "flat" else HyperbolicIVFPQIndex(None, D, NLIST, 3, 4)
    with pytest.raises(NotTrainedError, match="train"):
        attempt(index)
    with pytest.raises(UnknownIdError, match="no vectors"):
        index.reconstruct(0)
    assert index.ntotal == 0
    index.train(DATA)
    index.add(DATA)
    assert index.ntotal == NTOTAL


def test_nothing_is_not_an_error() -> None:
    """Empty input is no mistake: no vectors, no queries, no ids, an empty index."""
    for kind in ("flat", "ivf"):
        index, none = empty(kind), np.empty((0, D), np.float32)
        for _ in range(2):
            ntotal = index.ntotal
            index.add(none)
            index.add_with_ids(none, [])
            index.update_vectors([], none)
            index.add_sa_codes(index.sa_encode(none))
            assert index.remove_ids([]) == 0
            assert index.remove_ids(np.zeros(index.next_id, bool)) == 0
            assert index.reconstruct_batch([]).shape == (0, D)
            assert index.reconstruct_n(0, 0).shape == (0, D)
            assert [a.shape for a in index.search(none, 3)] == [(0, 3), (0, 3)]
            assert [a.shape for a in index.range_search(none, 3)] == [(1,), (0,), (0,)]
            assert [a.shape for a in index.search_and_reconstruct(none, 3)] == [(0, 3), (0, 3), (0, 3, D)]
            assert index.ntotal == ntotal
            index.add(X)

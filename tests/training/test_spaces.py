"""Cosine geometry and the named departures of released code, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hyperfaiss.errors import InvalidParameterError
from tests import naive_training as naive
from training.config import TrainConfig
from training.export import to_model
from training.losses import batch_prototype_loss, first_partners, instance_loss
from training.model import BatchHierarchy, HiHPQ
from training.train import train
from training.views import EmbeddingViews

M, DSUB, B, D_IN = 2, 3, 5, 6
COSINE = TrainConfig(M=M, nbits=4, dsub=DSUB, hidden=7, geometry="cosine", tau=0.1, tau_qc=0.4, lambda1=0.7, lambda2=0.3)


def unit(v):
    norm = math.sqrt(sum(a * a for a in v))
    return [a / norm for a in v]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine_model():
    torch.manual_seed(0)
    return HiHPQ(D_IN, COSINE).double()


def naive_reconstruction(model, row):
    """Σ w c of each subspace, weights softmax(inner product / tau); the subspaces joined."""
    joined = []
    for m, part in enumerate(row.view(M, DSUB).tolist()):
        books = [unit(c) for c in model.codewords[m].tolist()]
        weights = naive.softmax([dot(unit(part), c) / model.config.tau for c in books])
        joined += [sum(w * c[i] for w, c in zip(weights, books, strict=True)) for i in range(DSUB)]
    return joined


def test_cosine_geometry_quantises_and_compares_as_mecoq_does():
    model = cosine_model()
    rng = np.random.default_rng(1)
    view1, view2 = torch.from_numpy(rng.normal(size=(2, B, D_IN)))
    prototypes = [torch.from_numpy(rng.normal(size=(k, M * DSUB))) for k in (4, 2)]
    hierarchy = BatchHierarchy(
        prototypes, torch.tensor([[0, 0, 3, 1, 0], [0, 0, 1, 0, 0]]), torch.from_numpy(rng.random((2, B, B)))
    )
    with torch.no_grad():
        comp = model(view1, view2, hierarchy)
        tangents = model.tangents(torch.cat([view1, view2]))
    soft = [naive_reconstruction(model, row) for row in tangents]
    gaps = [[1 - dot(unit(a), unit(b)) for b in soft] for a in soft]
    assert float(comp["contrastive"]) == pytest.approx(naive.contrastive(gaps, 0.4), rel=1e-9)
    points = [[unit(row.view(M, DSUB).tolist()[0]) + unit(row.view(M, DSUB).tolist()[1]) for row in p] for p in prototypes]
    to_prototypes = [[[1 - dot(unit(a), unit(p)) for p in level] for a in soft[:B]] for level in points]
    assert float(comp["prototype"]) == pytest.approx(
        naive.prototype(to_prototypes, hierarchy.assignments.tolist(), 0.4), rel=1e-9
    )
    assert float(comp["total"]) == pytest.approx(
        float(comp["contrastive"] + 0.7 * comp["prototype"] + 0.3 * comp["instance"]), rel=1e-12
    )


def test_the_index_of_cosine_geometry_ranks_by_inner_product():
    model = cosine_model().float()
    x = model.encode(np.random.default_rng(0).normal(size=(40, D_IN)).astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(x.reshape(40, M, DSUB), axis=2), 1, rtol=1e-6)
    index = model.index()
    index.add(x)
    D, I = index.search(x[:5], 40)  # noqa: E741
    books = model.codebooks().detach().numpy()
    products = np.einsum("nmd,mkd->nmk", x.reshape(40, M, DSUB), books)
    codes = products.argmax(2)
    scores = np.stack([[sum(products[q, m, codes[i, m]] for m in range(M)) for i in range(40)] for q in range(5)])
    np.testing.assert_allclose(D, -np.take_along_axis(scores, I, 1), rtol=1e-5, atol=1e-6)
    assert (np.diff(D, axis=1) >= 0).all()


def test_cosine_geometry_trains_with_clusters_and_is_not_exported():
    x = np.random.default_rng(0).normal(size=(90, D_IN)).astype(np.float32)
    config = COSINE.replace(epochs=2, warmup=0, batch_size=16, levels=[4, 2], val_fraction=0.2)
    result = train(EmbeddingViews(x, neighbours=3, dropout=0.1), config, labels=np.arange(90) % 3, progress=False)
    assert all(row["theta"] == [0.0] * M and row["val_map"] > 0 for row in result.history)
    assert 0 < result.history[-1]["quantization_error"] < 1
    with pytest.raises(InvalidParameterError, match=r"only hyperbolic and Euclidean HiHPQ can be exported, got .*'cosine'"):
        to_model(result.model)


def test_quantisation_error_is_that_of_the_codes():
    model = HiHPQ(D_IN, COSINE.replace(geometry="hyperbolic", curvature=2.0))
    x = model.encode(np.random.default_rng(0).normal(size=(30, D_IN)).astype(np.float32))
    books, points = model.codebooks().tolist(), model.points(torch.from_numpy(x)).tolist()

    def lift(p):
        return [math.sqrt(0.5 + dot(p, p)), *p]

    gaps = [min(naive.squared_lorentzian(lift(p), lift(c), 2.0) for c in books[m]) for row in points for m, p in enumerate(row)]
    assert model.quantization_error(x) == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


# ------------------------------------------------------------------------------------------ quirks

ASSIGNMENTS = torch.tensor([[2, 0, 2, 0, 1]])


def test_first_positive_is_the_first_of_the_batch():
    assert first_partners(ASSIGNMENTS).tolist() == [[0, 1, 0, 1, 4]]


def test_self_negative_leaves_the_anchor_in_the_denominator():
    distances = torch.tensor(np.random.default_rng(0).random((5, 5)), dtype=torch.float64).fill_diagonal_(0)
    partners = torch.tensor([[2, 3, 0, 1, -1]])
    expected = 0.0
    for i, p in enumerate([2, 3, 0, 1]):
        expected -= math.log(math.exp(-distances[i, p] / 0.3) / sum(math.exp(-d / 0.3) for d in distances[i])) / 5
    assert float(instance_loss(distances, partners, 0.3, with_self=True)) == pytest.approx(expected)
    assert float(instance_loss(distances, partners, 0.3)) < expected


def test_batch_prototypes_count_as_often_as_they_come():
    distances = torch.tensor(np.random.default_rng(0).random((5, 3)), dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        own = distances[i, ASSIGNMENTS[0, i]]
        expected -= math.log(math.exp(-own / 0.3) / sum(math.exp(-distances[i, a] / 0.3) for a in ASSIGNMENTS[0])) / 5
    assert float(batch_prototype_loss([distances], ASSIGNMENTS, 0.3)) == pytest.approx(expected)


@pytest.mark.parametrize("quirk", ["first-positive", "self-negative", "batch-prototypes", "raw-curvature", "ward-on-all"])
def test_each_quirk_changes_what_is_learnt(quirk):
    x = np.random.default_rng(0).normal(size=(90, D_IN)).astype(np.float32)
    config = TrainConfig(
        M=M, nbits=4, dsub=DSUB, epochs=1, warmup=0, batch_size=16, levels=[4, 2], subclusters=6, val_fraction=0
    )
    totals = []
    for quirks in ((), (quirk,)):
        source = EmbeddingViews(x, neighbours=3, dropout=0.1)
        result = train(source, config.replace(quirks=quirks, lr_curvature=0.5, curvature=3.0), progress=False)
        totals.append(result.model.encode(x))
    assert np.abs(totals[0] - totals[1]).max() > 1e-7


def test_raw_curvature_is_clamped_where_it_is():
    model = HiHPQ(D_IN, TrainConfig(M=M, nbits=4, dsub=DSUB, quirks=["raw-curvature"], curvature=2.5))
    assert model.theta.tolist() == [2.5] * M
    assert {group for group, _ in model.groups()} == {"head", "codebook", "curvature"}
    with torch.no_grad():
        model.raw_theta.copy_(torch.tensor([-1.0, 11.0]))
    model.after_step()
    np.testing.assert_allclose(model.theta.tolist(), [0.01, 10.0], rtol=1e-6)

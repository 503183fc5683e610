"""The losses against the paper's formulas written out in loops, and their gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hyperfaiss import lorentz
from tests import naive_training as naive
from training.config import TrainConfig
from training.losses import draw_partners, instance_loss, product_distance, prototype_loss, quantized_contrastive_loss
from training.model import BatchHierarchy, HiHPQ

M, KSUB, DSUB, B, D_IN = 2, 16, 3, 5, 6
THETA = [0.3, 2.0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = TrainConfig(
        M=M, nbits=4, dsub=DSUB, hidden=7, power=0.5, clip_radius=0.9, tau=0.2, tau_qc=0.4, lambda1=0.7, lambda2=0.3
    )
    module = HiHPQ(D_IN, config).double()
    module.fit_inputs(np.random.default_rng(0).normal(size=(30, D_IN)).astype(np.float32))
    with torch.no_grad():
        module.log_theta.copy_(torch.tensor(THETA, dtype=torch.float64).log())
        module.head[-1].weight.mul_(3)  # so that some parts are clipped and others are not
    return module


def distances_between(x, y):
    return [[naive.product_distance(a, b, THETA) for b in y] for a in x]


def naive_quantized(model, tangents):
    codewords = model.codewords.tolist()
    parts = tangents.view(len(tangents), M, DSUB).tolist()
    return [naive.quantize(p, codewords, THETA, model.config.tau, model.config.clip_radius) for p in parts]


def batch():
    rng = np.random.default_rng(1)
    views = torch.from_numpy(rng.normal(size=(2, B, D_IN)))
    prototypes = [torch.from_numpy(rng.normal(size=(k, M * DSUB))) * 0.4 for k in (4, 2)]
    assignments = torch.tensor([[0, 0, 3, 1, 0], [0, 0, 1, 0, 0]])
    keys = torch.from_numpy(rng.random((2, B, B)))
    return views, BatchHierarchy(prototypes, assignments, keys)


def test_forward_equals_the_formulas(model):
    (view1, view2), hierarchy = batch()
    with torch.no_grad():
        comp = model(view1, view2, hierarchy)
        tangents = model.tangents(torch.cat([view1, view2]))
    norms = tangents.view(-1, DSUB).norm(dim=-1)
    assert (norms > 0.9).any()
    assert (norms < 0.9).any()  # both branches of the clip are under test

    quantized = naive_quantized(model, tangents)
    distances = distances_between(quantized, quantized)
    contrastive = naive.contrastive(distances, 0.4)
    points = [
        [
            [naive.exp0(naive.clip(part, 0.9), t) for part, t in zip(row, THETA, strict=True)]
            for row in p.view(-1, M, DSUB).tolist()
        ]
        for p in hierarchy.prototypes
    ]
    to_prototypes = [distances_between(quantized[:B], p) for p in points]
    prototype = naive.prototype(to_prototypes, hierarchy.assignments.tolist(), 0.4)
    partners = draw_partners(hierarchy.assignments, hierarchy.keys).tolist()
    instance = naive.instance([row[:B] for row in distances[:B]], partners, 0.4)
    ref = [contrastive + 0.7 * prototype + 0.3 * instance, contrastive, prototype, instance]
    np.testing.assert_allclose([float(comp[name]) for name in model.loss_names], ref, rtol=1e-9)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("contrast", ["geodesic", "squared"])
def test_what_the_contrastive_loss_compares_and_how(model, contrast, asymmetric):
    model.config = model.config.replace(contrast=contrast, asymmetric=asymmetric)
    (view1, view2), hierarchy = batch()
    with torch.no_grad():
        comp = model(view1, view2, hierarchy)
        tangents = model.tangents(torch.cat([view1, view2]))
    quantized = naive_quantized(model, tangents)
    parts = tangents.view(len(tangents), M, DSUB).tolist()
    points = [[naive.exp0(naive.clip(part, 0.9), t) for part, t in zip(row, THETA, strict=True)] for row in parts]
    measure = naive.distance if contrast == "geodesic" else naive.squared_lorentzian
    anchors = points if asymmetric else quantized
    share = 1 if contrast == "geodesic" else M
    distances = [
        [sum(measure(p, q, t) for p, q, t in zip(a, b, THETA, strict=True)) / share for b in quantized] for a in anchors
    ]
    assert float(comp["contrastive"]) == pytest.approx(naive.contrastive(distances, 0.4), rel=1e-9)
    partners = draw_partners(hierarchy.assignments, hierarchy.keys).tolist()
    assert float(comp["instance"]) == pytest.approx(naive.instance([row[:B] for row in distances[:B]], partners, 0.4), rel=1e-9)


def test_soft_quantiser_equals_the_formula(model):
    tangents = torch.randn(4, M * DSUB, dtype=torch.float64)
    with torch.no_grad():
        comp = model.quantize(model.points(tangents))
    ref = [[part[1:] for part in row] for row in naive_quantized(model, tangents)]
    np.testing.assert_allclose(comp, ref, rtol=1e-9)


def test_product_distance_is_the_sum_of_geodesic_distances(model):
    tangents = torch.randn(6, M * DSUB, dtype=torch.float64)
    with torch.no_grad():
        points = model.points(tangents)
        comp = product_distance(points[:4], points[4:], model.theta)
    lifted = [
        [naive.exp0(naive.clip(p, 0.9), t) for p, t in zip(row, THETA, strict=True)]
        for row in tangents.view(-1, M, DSUB).tolist()
    ]
    np.testing.assert_allclose(comp, distances_between(lifted[:4], lifted[4:]), rtol=1e-7)


@pytest.mark.parametrize("theta", [0.0, 0.01, 1.0, 10.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_product_distance_and_its_gradients_are_those_of_lorentz(theta, dtype, rtol):
    rng = np.random.default_rng(4)
    scale = 10 ** rng.uniform(-2, 0, size=(40, 1, 1))  # near and far
    points = torch.from_numpy(rng.normal(size=(40, M, DSUB)) * scale).to(dtype)
    weights = torch.from_numpy(rng.normal(size=(25, 15))).to(dtype)
    results = []
    for distance in (product_distance, lambda x, y, theta: lorentz.distance(x[:, None], y[None], theta).sum(-1)):
        x, y = points[:25].clone().requires_grad_(), points[25:].clone().requires_grad_()
        curvatures = torch.full((M,), theta, dtype=dtype, requires_grad=theta > 0)
        d = distance(x, y, curvatures)
        (d * weights).sum().backward()
        results.append([d.detach(), x.grad, y.grad, *([curvatures.grad] if theta else [])])
    for comp, ref in zip(*results, strict=True):
        torch.testing.assert_close(comp, ref, rtol=rtol, atol=rtol * float(ref.abs().max()))


def test_gradients_of_every_parameter_equal_finite_differences(model):
    (view1, view2), hierarchy = batch()
    model(view1, view2, hierarchy)["total"].backward()
    rng = np.random.default_rng(2)
    step = 1e-6
    for name, parameter in model.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        assert gradient.abs().max() > 0, name
        for i in rng.choice(len(flat), size=min(6, len(flat)), replace=False):
            value = float(flat[i])
            sides = []
            for moved in (value + step, value - step):
                flat[i] = moved
                with torch.no_grad():
                    sides.append(float(model(view1, view2, hierarchy)["total"]))
            flat[i] = value
            assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-8), (name, i)


def test_gradcheck_of_the_losses_themselves():
    raw = torch.rand(6, 6, dtype=torch.float64, requires_grad=True)
    partners = torch.tensor([[1, 0, 3, 2, -1, 0]])
    assignments = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert torch.autograd.gradcheck(lambda d: quantized_contrastive_loss(d + d.T, 0.3), raw)
    assert torch.autograd.gradcheck(lambda d: instance_loss(d + d.T, partners, 0.3), raw)
    assert torch.autograd.gradcheck(lambda d: prototype_loss([d], assignments, 0.3), raw)


def test_prototypes_count_once():
    # All anchors at distance 0 of the same prototype: with duplicates in the denominator the loss would be log 4.
    distances = torch.full((4, 3), 1e3)
    distances[:, 1] = 0
    assert float(prototype_loss([distances], torch.ones(1, 4, dtype=torch.int64), 0.2)) == pytest.approx(0, abs=1e-6)


def test_the_anchor_is_no_candidate():
    # Two items at distance 0, the third far away: if the anchor were in its own denominator the loss would be log 2.
    distances = torch.tensor([[0.0, 0, 1e3], [0, 0, 1e3], [1e3, 1e3, 0]])
    assert float(instance_loss(distances, torch.tensor([[1, 0, -1]]), 0.2)) == pytest.approx(0, abs=1e-6)


def test_partners_share_the_prototype_and_are_drawn_evenly():
    rng = np.random.default_rng(0)
    assignments = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 1]])
    counts = np.zeros((2, 6, 6))
    for _ in range(600):
        partners = draw_partners(assignments, torch.from_numpy(rng.random((2, 6, 6))))
        assert partners[0, 3] == -1
        for level in range(2):
            for i, p in enumerate(partners[level].tolist()):
                if p >= 0:
                    counts[level, i, p] += 1
    same = (assignments[:, :, None] == assignments[:, None, :]).numpy() & ~np.eye(6, dtype=bool)
    assert (counts[~same] == 0).all()
    expected = 600 / np.maximum(same.sum(-1, keepdims=True), 1)
    assert (np.abs(counts - expected)[same] < 5 * np.sqrt(600 * 0.25)).all()
    assert (counts[same] > 0).all()


@pytest.mark.parametrize("geometry", ["hyperbolic", "euclidean"])
def test_gradients_are_finite_where_points_coincide(geometry):
    config = TrainConfig(M=M, nbits=4, dsub=DSUB, hidden=0, power=1, center=False, normalize=False, geometry=geometry)
    torch.manual_seed(0)
    model = HiHPQ(D_IN, config)
    with torch.no_grad():
        model.codewords[:, 1:3] = 0  # codewords at the origin, and equal ones
        model.head[0].bias.zero_()
    x = torch.randn(4, D_IN)
    x[0] = 0  # tangent vector 0
    x[2] = x[1]
    hierarchy = BatchHierarchy([torch.zeros(2, M * DSUB)], torch.tensor([[0, 0, 1, 1]]), torch.rand(1, 4, 4))
    losses = model(x, x.clone(), hierarchy)
    losses["total"].backward()
    assert torch.isfinite(losses["total"])
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_euclidean_twin_is_the_flat_limit():
    (view1, view2), hierarchy = batch()
    torch.manual_seed(0)
    flat = HiHPQ(D_IN, TrainConfig(M=M, nbits=4, dsub=DSUB, geometry="euclidean")).double()
    curved = HiHPQ(D_IN, TrainConfig(M=M, nbits=4, dsub=DSUB)).double()
    curved.load_state_dict(flat.state_dict() | {"log_theta": torch.full((M,), -20.0)})
    with torch.no_grad():
        ref, comp = flat(view1, view2, hierarchy), curved(view1, view2, hierarchy)
        np.testing.assert_allclose([float(comp[name]) for name in ref], [float(x) for x in ref.values()], rtol=1e-6)
        # And it is what one would write down for Euclidean space: a softmax over squared distances, a weighted mean.
        x = flat.points(flat.tangents(view1))
        books = flat.codebooks()
        weights = torch.softmax(-((x[:, :, None] - books[None]) ** 2).sum(-1) / flat.config.tau, -1)
        np.testing.assert_allclose(flat.quantize(x), torch.einsum("bmk,mkd->bmd", weights, books), rtol=1e-9)

"""The module: preprocessing, clip and maps, curvatures, modes, autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hyperfaiss import lorentz
from hyperfaiss.errors import InvalidVectorsError
from training.config import TrainConfig
from training.model import CURVATURE_RANGE, HiHPQ, Preprocessing

SMALL = TrainConfig(M=2, nbits=4, dsub=3, hidden=8)


def make(d_in=6, **changes):
    torch.manual_seed(0)
    return HiHPQ(d_in, SMALL.replace(**changes))


def test_preprocessing_in_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    comp = Preprocessing(4, power=0.5, center=True, normalize=True)
    comp.fit(x)
    ref = np.sign(x) * np.sqrt(np.abs(x))
    ref -= ref.mean(0)
    ref /= np.linalg.norm(ref, axis=1, keepdims=True)
    np.testing.assert_allclose(comp(torch.from_numpy(x)), ref, atol=1e-6)


@pytest.mark.parametrize("switch", [{"power": 0.5}, {"center": True}, {"normalize": True}])
def test_each_preprocessing_takes_effect(switch):
    x = torch.arange(1.0, 9).view(2, 4)
    options = {"power": 1.0, "center": False, "normalize": False}
    plain, changed = Preprocessing(4, **options), Preprocessing(4, **(options | switch))
    for module in (plain, changed):
        module.fit(x.numpy())
    np.testing.assert_array_equal(plain(x), x)
    assert not torch.allclose(changed(x), x)


def test_rows_of_zeros_stay_zeros_and_have_gradients():
    comp = Preprocessing(3, power=0.5, center=False, normalize=True)
    x = torch.zeros(2, 3)
    x[1, 0] = 2
    x.requires_grad_()
    out = comp(x)
    assert (out[0] == 0).all()
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_mean_of_many_rows_is_that_of_all():
    x = np.random.default_rng(0).normal(size=(10_000, 3)).astype(np.float32) + 5
    comp = Preprocessing(3, power=1, center=True, normalize=False)
    comp.fit(x)
    np.testing.assert_allclose(comp.mean, x.mean(0, dtype=np.float64), rtol=1e-6)


def test_points_are_clipped_and_mapped_and_codewords_alike():
    model = make(clip_radius=0.8)
    tangents = torch.randn(5, 6) * 2
    with torch.no_grad():
        points, books = model.points(tangents), model.codebooks()
        np.testing.assert_allclose(
            lorentz.log0(points, 1.0).norm(dim=-1), tangents.view(5, 2, 3).norm(dim=-1).clamp(max=0.8), rtol=1e-5
        )
        np.testing.assert_allclose(books, lorentz.exp0(lorentz.clip(model.codewords, 0.8), 1.0), rtol=1e-6)
    np.testing.assert_allclose(model.codewords.detach().norm(dim=-1), 1, rtol=1e-6)  # only at the start


def test_codewords_can_start_from_data():
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    model = make(codebook_init="data")
    random = model.codewords.detach().clone()
    model.fit_inputs(features)
    tangents = model.encode(features).reshape(40, 2, 3)
    for m in range(2):
        gaps = np.abs(model.codewords[m].detach().numpy()[:, None] - tangents[None, :, m]).max(-1)
        assert (gaps.min(1) < 1e-6).all()
        assert len(set(gaps.argmin(1))) == 16
    assert not torch.equal(model.codewords, random)


def test_curvatures_start_learn_and_are_clamped():
    model = make(curvature=2.5)
    np.testing.assert_allclose(model.theta.detach(), 2.5, rtol=1e-6)
    with torch.no_grad():
        model.log_theta.copy_(torch.tensor([-50.0, 50.0]))
    model.after_step()
    np.testing.assert_allclose(model.theta.detach(), CURVATURE_RANGE, rtol=1e-6)


def test_euclidean_geometry_has_no_curvature_to_learn():
    model = make(geometry="euclidean")
    assert model.log_theta is None
    assert (model.theta == 0).all()
    tangents = torch.randn(4, 6) * 0.1
    np.testing.assert_allclose(model.points(tangents), tangents.view(4, 2, 3), rtol=1e-6)


def test_codec_holds_points_curvatures_and_clip_radius():
    model = make(clip_radius=0.7, curvature=3)
    codec = model.codec()
    np.testing.assert_array_equal(codec.codebooks, model.codebooks().detach())
    np.testing.assert_allclose(codec.curvatures, 3, rtol=1e-6)
    assert codec.clip_radius == 0.7


@pytest.mark.parametrize("training", [True, False])
def test_encode_leaves_the_mode_and_splits_into_blocks(training):
    model = make().train(training)
    x = np.random.default_rng(0).normal(size=(5000, 6)).astype(np.float32)
    comp = model.encode(x)
    assert model.training is training
    np.testing.assert_allclose(comp, model.tangents(torch.from_numpy(x)).detach(), atol=1e-6)


def test_autocast_reaches_the_head_only_and_only_in_training():
    x = torch.randn(3, 6)
    plain, amp = make(), make(amp=True)
    exact = plain.tangents(x)
    rounded = amp.tangents(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    np.testing.assert_allclose(rounded.detach(), exact.detach(), atol=0.02)
    assert torch.equal(amp.eval().tangents(x), exact)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's autocast does not reach the geometry
        np.testing.assert_array_equal(plain.quantize(plain.points(exact)).detach(), amp.quantize(amp.points(exact)).detach())


def test_images_go_through_the_backbone():
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    model = HiHPQ(6, SMALL, backbone)
    images = torch.randn(2, 3, 2, 2)
    np.testing.assert_allclose(model.tangents(images).detach(), model.tangents(backbone(images)).detach(), atol=1e-6)
    with pytest.raises(InvalidVectorsError, match=r"takes features \(B, 6\), got \(2, 3, 2, 2\)"):
        make().tangents(images)


def test_wrong_widths_are_refused():
    with pytest.raises(InvalidVectorsError, match=r"shape \(B, 6\), got \(2, 5\)"):
        make().tangents(torch.zeros(2, 5))
    with pytest.raises(InvalidVectorsError, match=r"shape \(n, 6\), got \(2, 5\)"):
        make().fit_inputs(np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("geometry", ["hyperbolic", "euclidean"])
def test_overfits_one_batch(geometry):
    model = make(d_in=16, M=4, nbits=4, dsub=4, hidden=128, geometry=geometry)
    # The two views of an item have nothing in common: pairing them can only be learnt by heart.
    features = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
    model.fit_inputs(features)
    one, two = torch.from_numpy(features).split(24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(80):
        loss = model(one, two)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4  # log(47) = 3.9 is chance
    assert losses[-1] < 0.1
    codes = model.codec().compute_codes(model.encode(features))
    assert (codes[:24] == codes[24:]).all(1).mean() > 0.2  # both views have the same code
    assert len(np.unique(codes[:24], axis=0)) > 20  # which tells items apart

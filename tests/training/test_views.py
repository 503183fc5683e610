"""Views: their contract, whom they show, what they change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from tests.training.toys import brute_force_neighbours, colour_backbone
from training.backbones import extract_features
from training.data import from_arrays
from training.views import CachedViews, EmbeddingViews, ImageViews, ViewSource

ALL = np.arange(30, dtype=np.int64)


# Sources


def numbered_views(n: int = 30, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features with neighbours, and views whose two columns say (view, item)."""
    angle = np.arange(n) * 2 * np.pi / n
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    views = np.stack(np.meshgrid(np.arange(count), np.arange(n), indexing="ij"), axis=2)
    return features, views.astype(np.float16)


def sources(tmp_path: Path) -> dict[str, ViewSource]:
    features, views = numbered_views()
    colour = from_arrays("colour", np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3)).astype(np.uint8))
    return {
        "cached": CachedViews(features, views, neighbours=3),
        "embedding": EmbeddingViews(features, neighbours=3, dropout=0.2, noise=0.1, mixup=0.5),
        "frozen": ImageViews(colour, colour_backbone(), neighbours=3, progress=False),
        "trainable": ImageViews(colour, colour_backbone(trainable=True), neighbours=3, threads=3, progress=False),
    }


@pytest.mark.parametrize("name", ["cached", "embedding", "frozen", "trainable"])
def test_every_source_keeps_the_contract(tmp_path: Path, name: str) -> None:
    source = sources(tmp_path)[name]
    assert isinstance(source, ViewSource)
    features = source.features()
    assert features.shape == (source.n, source.d_in)
    assert features.dtype == np.float32
    indices = np.array([3, 0, 29, 3], dtype=np.int64)
    one, two, partners = source.views(indices, np.random.default_rng(1))
    assert partners.shape == (4,)
    assert partners.dtype == np.int64
    shape = (4, 3, 16, 16) if name == "trainable" else (4, source.d_in)
    for view in (one, two):
        assert view.shape == shape
        assert view.dtype == torch.float32
        assert not view.requires_grad
    assert not torch.equal(one, two)
    again = sources(tmp_path)[name].views(indices, np.random.default_rng(1))
    assert torch.equal(one, again[0])
    assert torch.equal(two, again[1])
    assert (partners == again[2]).all()
    other = source.views(indices, np.random.default_rng(2))
    assert not (torch.equal(one, other[0]) and torch.equal(two, other[1]))
    assert (source.backbone is not None) == (name == "trainable")


def test_cached_views_of_the_item_itself_are_two_different_ones() -> None:
    source = CachedViews(*numbered_views())
    rng = np.random.default_rng(0)
    pairs = np.concatenate([np.stack([v.numpy() for v in source.views(ALL, rng)[:2]], axis=1) for _ in range(50)])
    assert (pairs[:, :, 1] == np.tile(ALL, 50)[:, None]).all()
    assert (pairs[:, 0, 0] != pairs[:, 1, 0]).all()
    assert {tuple(p) for p in pairs[:, :, 0].astype(int).tolist()} == {(a, b) for a in range(4) for b in range(4) if a != b}


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_second_view_shows_a_neighbour(probability: float) -> None:
    features, views = numbered_views()
    source = CachedViews(features, views, neighbours=4, neighbour_probability=probability)
    near = brute_force_neighbours(features, 4)
    rng, seen = np.random.default_rng(0), []
    for _ in range(60):
        one, two, partners = source.views(ALL, rng)
        np.testing.assert_array_equal(one[:, 1].numpy(), ALL)
        np.testing.assert_array_equal(two[:, 1].numpy(), partners)
        seen.append(two[:, 1].numpy().astype(int))
    found = np.stack(seen)
    own = found == ALL
    assert ((found[..., None] == near).any(axis=2) | own).all()
    assert abs(1 - own.mean() - probability) < 0.04
    if probability == 1:
        assert all(set(found[:, i]) == set(near[i]) for i in ALL)


def test_cached_views_are_checked() -> None:
    features, views = numbered_views()
    for bad in (views[:, :-1], views[..., :1], views[:0], views[0], views.astype(np.int64)):
        with pytest.raises(InvalidVectorsError, match="as the features are"):
            CachedViews(features, bad)
    with pytest.raises(InvalidVectorsError, match=r"shape \(30,\)"):
        CachedViews(features[:, 0], views)
    with pytest.raises(InvalidParameterError, match="use V >= 2"):
        CachedViews(features, views[:1])
    assert CachedViews(features, views[:1], neighbours=1).n == 30
    with pytest.raises(InvalidParameterError, match=r"got 3 and 1\.5"):
        CachedViews(features, views, neighbours=3, neighbour_probability=1.5)
    with pytest.raises(InvalidParameterError, match="got 30"):
        CachedViews(features, views, neighbours=30)


def test_embedding_dropout_noise_and_mixup_do_what_they_say() -> None:
    features = np.random.default_rng(0).normal(3, 2, (300, 50)).astype(np.float32)
    everything = np.arange(300, dtype=np.int64)
    mean, spread = features.mean(axis=0), features.std(axis=0)

    dropped = [v.numpy() for v in EmbeddingViews(features, dropout=0.25).views(everything, np.random.default_rng(0))[:2]]
    for view in dropped:
        gone = view != features
        assert abs(gone.mean() - 0.25) < 0.02
        np.testing.assert_allclose(view[gone], np.broadcast_to(mean, view.shape)[gone], rtol=1e-5)
    assert (dropped[0] != dropped[1]).any(axis=1).all()

    noisy = EmbeddingViews(features, noise=0.1).views(everything, np.random.default_rng(0))
    for view in noisy[:2]:
        np.testing.assert_allclose((view.numpy() - features).std(axis=0) / spread, 0.1, rtol=0.3)

    one, two, _ = EmbeddingViews(features, neighbours=1, mixup=1.0).views(everything, np.random.default_rng(0))
    np.testing.assert_array_equal(one.numpy(), features)
    towards = features[brute_force_neighbours(features, 1)[:, 0]] - features
    moved = two.numpy() - features
    share = (moved * towards).sum(axis=1) / np.square(towards).sum(axis=1)
    np.testing.assert_allclose(moved, share[:, None] * towards, atol=1e-4)
    assert share.min() >= 0
    assert share.max() <= 1
    assert abs(share.mean() - 0.5) < 0.06


def test_embedding_views_do_not_change_the_features() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    kept = features.copy()
    for view in EmbeddingViews(features, neighbours=2).views(ALL, np.random.default_rng(0))[:2]:
        view.add_(1)
    np.testing.assert_array_equal(features, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "else both views are equal"),
        ({"neighbours": 3, "neighbour_probability": 0.0}, "else both views are equal"),
        ({"mixup": 0.5}, "mixup needs neighbours"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"noise": -0.1}, "noise >= 0"),
        ({"neighbours": -1}, "neighbours must be at least 0"),
    ],
)
def test_embedding_parameters_are_checked(options: dict[str, float], message: str) -> None:
    features = np.zeros((30, 4), np.float32)
    with pytest.raises(InvalidParameterError, match=message):
        EmbeddingViews(features, **options)  # type: ignore[arg-type]


def test_image_views_of_a_trainable_backbone_follow_its_weights() -> None:
    colour = from_arrays("colour", np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3)).astype(np.uint8))
    backbone = colour_backbone(trainable=True)
    source = ImageViews(colour, backbone, progress=False)
    before = source.features()
    images, _, _ = source.views(np.arange(12), np.random.default_rng(0))
    assert source.backbone is not None
    loss = source.backbone(images).square().mean()
    loss.backward()
    optimizer = torch.optim.SGD(source.backbone.parameters(), lr=1.0)
    optimizer.step()
    after = source.features()
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, extract_features(backbone, colour, progress=False))


def test_image_views_of_a_frozen_backbone_are_its_features_of_augmented_images() -> None:
    colour = from_arrays("colour", np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3)).astype(np.uint8))
    frozen, trained = (
        ImageViews(colour, colour_backbone(trainable=t), progress=False) for t in (False, True)
    )  # fmt: skip
    np.testing.assert_allclose(frozen.features(), trained.features(), rtol=1e-6)
    indices = np.arange(12)
    comp = frozen.views(indices, np.random.default_rng(3))
    images = trained.views(indices, np.random.default_rng(3))
    assert trained.backbone is not None
    with torch.inference_mode():
        for view, ref in zip(comp[:2], images[:2], strict=True):
            torch.testing.assert_close(view, trained.backbone(ref), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidVectorsError, match=r"features must be \(12, 5\), got \(12, 4\)"):
        ImageViews(colour, colour_backbone(), features=np.zeros((12, 4), np.float32))

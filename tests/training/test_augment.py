"""Augmentations: what they depend on, what each part does, their distributions."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.toys import PIXELS, colour_backbone, colour_image, grey_images
from training.augment import AUGMENTATIONS, MildAugmentation, PaperAugmentation, augment, augmentation_for
from training.data import ImageSet


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_augmented_image_depends_on_its_seed_alone(name: str, mode: str) -> None:
    backbone = dataclasses.replace(colour_backbone(), mean=(0.0,) * len(mode), std=(1.0,) * len(mode))
    image = colour_image().convert(mode)
    kept = np.asarray(image).copy()
    jobs = [[0, v, i] for v in range(4) for i in range(10)]
    ref = [augment(image, backbone, AUGMENTATIONS[name], seed) for seed in jobs]
    before = torch.random.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        comp = list(pool.map(lambda seed: augment(image, backbone, AUGMENTATIONS[name], seed), jobs[::-1]))[::-1]
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(ref, comp)
    assert ref[0].shape == (16, 16, len(mode))
    assert ref[0].dtype == np.uint8
    assert len({x.tobytes() for x in ref}) == len(jobs)
    np.testing.assert_array_equal(np.asarray(image), kept)


def test_paper_augmentation_switched_off_is_a_resize() -> None:
    off = PaperAugmentation(scale=(1, 1), flip=0, jitter=0, grey=0, blur=0)
    image = Image.new("RGB", (32, 32), (10, 200, 30))
    crops = {off._crop(32, 32, np.random.default_rng(i)) for i in range(50)}
    assert crops == {(0, 0, 32, 32)}
    out = off(image, 16, np.random.default_rng(0))
    assert out.size == (16, 16)
    assert out.getpixel((5, 5)) == (10, 200, 30)


def test_each_part_of_the_paper_augmentation_takes_effect() -> None:
    image, off = colour_image((16, 16)), {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
    ref = np.asarray(PaperAugmentation(**off)(image, 16, np.random.default_rng(2)), dtype=int)  # type: ignore[arg-type]

    def changed(seed: int = 2, **parts: Any) -> np.ndarray:
        return np.asarray(PaperAugmentation(**{**off, **parts})(image, 16, np.random.default_rng(seed)), dtype=int)

    np.testing.assert_array_equal(changed(flip=1.0), ref[:, ::-1])
    grey = changed(grey=1.0)
    assert (grey == grey[..., :1]).all()
    assert changed(blur=1.0, sigma=(2.0, 2.0)).std() < 0.6 * ref.std()
    for only in ("brightness", "contrast", "saturation", "hue"):
        none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
        np.testing.assert_allclose(changed(jitter=1.0, **none), ref, atol=8)  # the way to HSV and back rounds
        assert max(np.abs(changed(seed, jitter=1.0, **{**none, only: 0.4}) - ref).mean() for seed in range(5)) > 8, only


def test_crops_have_torchvisions_areas_and_ratios() -> None:
    crops = np.array([PaperAugmentation()._crop(400, 300, np.random.default_rng(i)) for i in range(2000)])
    top, left, height, width = crops.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 300).all()
    share, ratio = height * width / 120_000, width / height
    assert 0.49 < share.min() < 0.51
    assert 0.95 < share.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    # so flat that no crop of this area fits: the centre, as wide as 4/3 allows
    assert PaperAugmentation()._crop(10, 100, np.random.default_rng(0)) == (0, 43, 10, 13)


def test_mild_augmentation_moves_little_and_flips_only_when_told() -> None:
    left_lit = np.zeros((28, 28), np.uint8)
    left_lit[8:20, 6:12] = 255
    image = Image.fromarray(left_lit)

    def lit_left(augmentation: MildAugmentation) -> float:
        out = [np.asarray(augmentation(image, 28, np.random.default_rng(i)), dtype=float) for i in range(100)]
        return float(np.mean([x[:, :14].sum() > x[:, 14:].sum() for x in out]))

    assert lit_left(MildAugmentation()) == 1
    assert 0.3 < lit_left(MildAugmentation(flip=0.5)) < 0.7
    still = MildAugmentation(shift=0, rotation=0, zoom=0, shear=0)
    np.testing.assert_array_equal(np.asarray(still(image, 28, np.random.default_rng(0))), left_lit)
    assert still(image, 8, np.random.default_rng(0)).size == (8, 8)


def test_augmentation_suits_the_data() -> None:
    def named(name: str) -> ImageSet:
        return dataclasses.replace(grey_images(), name=name)

    assert augmentation_for(named("digits"), PIXELS) == "mild"
    assert augmentation_for(named("fashion-mnist"), PIXELS) == augmentation_for(named("fashionmnist"), PIXELS)
    assert augmentation_for(named("fashion-mnist"), PIXELS) == "mild-flip"
    assert augmentation_for(named("fashion-mnist"), colour_backbone()) == "paper"

"""Small images and backbones that the tests of training share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from training.backbones import Backbone, load_backbone
from training.data import ImageSet, from_arrays

PIXELS = load_backbone("pixels", image_size=8)


def grey_images(n: int = 30, size: int = 8, seed: int = 0) -> ImageSet:
    return from_arrays("grey", np.random.default_rng(seed).integers(0, 256, (n, size, size)).astype(np.uint8))


def colour_image(size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def colour_backbone(*, trainable: bool = False) -> Backbone:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.requires_grad_(trainable)
    return Backbone("toy", 5, 16, (0.5,) * 3, (0.2,) * 3, net, trainable)


def brute_force_neighbours(features: np.ndarray, k: int) -> np.ndarray:
    x = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]

"""On real images HiHPQ's codes find more neighbours of the right class than faiss's at the same bits."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from hyperfaiss import HyperbolicPQIndex
from training.backbones import load_backbone
from training.cache import cache_features
from training.data import load_images
from training.evaluate import evaluate_index
from training.export import export
from training.recipes import recipe
from training.split import split_protocol
from training.train import train
from training.views import EmbeddingViews

BITS = 32


@pytest.mark.slow
def test_fashion_mnist_beats_index_pq(tmp_path: Path) -> None:
    """10,000 images, 3,000 of them to learn from without labels; both sides get the same raw pixels."""
    images = load_images("fashion-mnist", split="test")
    split = split_protocol(images.labels, queries_per_class=100, train_per_class=300, seed=0)
    x = np.asarray(cache_features(images, load_backbone("pixels", image_size=28), tmp_path, progress=False))
    labels = images.labels
    assert labels is not None
    database, wanted, found = x[split.database], labels[split.query], labels[split.database]

    theirs = faiss.IndexPQ(x.shape[1], BITS // 8, 8)
    theirs.train(database)
    theirs.add(database)
    ref = evaluate_index(theirs, x[split.query], wanted, found, 1000, repeats=1)

    source = EmbeddingViews(x[split.train], neighbours=20, dropout=0.2)
    train(source, recipe(bits=BITS, teachers=0), tmp_path / "run", backbone="pixels", progress=False)
    ours = HyperbolicPQIndex.from_model(export(tmp_path / "run", tmp_path / "model.safetensors"))
    ours.add(database)
    comp = evaluate_index(ours, x[split.query], wanted, found, 1000, repeats=1)

    assert ours.code_size == theirs.code_size == BITS // 8
    assert comp.map_at_n > ref.map_at_n + 0.01, f"HiHPQ {comp.map_at_n:.4f}, IndexPQ {ref.map_at_n:.4f}"

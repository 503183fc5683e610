from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training import data
from training.data import from_arrays, load_images, read_idx


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P", "I;16", "F", "I") else (value,) * len(mode)).save(path)


# Datasets by name


def test_digits_are_scikit_learns_digits() -> None:
    from sklearn.datasets import load_digits

    ref = load_digits()
    comp = load_images("digits")
    assert (comp.n, len(comp), comp.class_names) == (1797, 1797, tuple("0123456789"))
    np.testing.assert_array_equal(comp.labels, ref.target)
    pixels = np.stack([np.asarray(comp.image(i)) for i in range(50)])
    np.testing.assert_allclose(pixels / 255, ref.images[:50] / 16, atol=0.5 / 255)
    with pytest.raises(InvalidParameterError, match="digits has no 'train' split"):
        load_images("digits", split="train")


HAVE_FASHION_MNIST = data.FASHION_MNIST_DEBIAN.is_dir() or (data.default_root() / "FashionMNIST" / "raw").is_dir()


@pytest.mark.skipif(not HAVE_FASHION_MNIST, reason="Fashion-MNIST is neither installed (Debian) nor downloaded")
def test_fashion_mnist_begins_with_an_ankle_boot() -> None:
    train, test = load_images("fashion-mnist", split="train"), load_images("fashion-mnist", split="test")
    assert (train.n, test.n) == (60_000, 10_000)
    assert train.labels is not None
    assert test.labels is not None
    np.testing.assert_array_equal(train.labels[:10], [9, 0, 0, 3, 0, 2, 7, 2, 5, 5])
    np.testing.assert_array_equal(test.labels[:10], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7])
    np.testing.assert_array_equal(np.bincount(train.labels), [6000] * 10)
    assert train.class_names[train.labels[0]] == "Ankle boot"
    image = np.asarray(train.image(0))
    assert (image.shape, image.dtype, int(image.sum(dtype=np.int64))) == ((28, 28), np.uint8, 76_247)
    both = load_images("fashion-mnist")
    assert both.n == 70_000
    np.testing.assert_array_equal(np.asarray(both.image(60_003)), np.asarray(test.image(3)))
    assert len({train.fingerprint, test.fingerprint, both.fingerprint}) == 3


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_round_trip_plain_and_gzipped(tmp_path: Path) -> None:
    ref = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx_bytes(ref))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx_bytes(ref)))
    for name in ("a", "a.gz"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), ref)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the header"),
        (b"\0\0\x0d\x01" + bytes(8), "expected the header"),  # floats
        (b"\0\0\x08\x03\0\0", "ends inside its header"),
        (idx_bytes(np.zeros((3, 3), np.uint8))[:-1], "holds 20 bytes"),
        (idx_bytes(np.zeros((3, 3), np.uint8)) + b"\0", "asks for 21"),
        (struct.pack(">BBBB2I", 0, 0, 8, 2, 2**31, 2**31), "asks for"),
        (gzip.compress(idx_bytes(np.zeros((9, 9), np.uint8)))[:-12], "can't be unpacked"),
        (b"\x1f\x8b" + bytes(30), "can't be unpacked"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x-ubyte"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    with pytest.raises(InvalidParameterError, match="no file"):
        read_idx(tmp_path / "absent")


class FakeSplitByTrain:
    """Looks like torchvision's CIFAR10."""

    classes: ClassVar = ["cold", "warm"]

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        assert Path(root).is_dir()
        self.targets = [0, 1, 1] if train else [1, 0]
        self.base = 100 if train else 200

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (2, 2), (self.base + i, 0, 0)), self.targets[i]


class FakeSplitByName(FakeSplitByTrain):
    """Looks like torchvision's STL10."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        super().__init__(root, split == "train", download)
        self.labels = np.array(self.targets)
        del self.targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (2, 2), (self.base + i, 0, 0)), int(self.labels[i])


@pytest.mark.parametrize("fake", [FakeSplitByTrain, FakeSplitByName])
def test_torchvision_datasets_train_then_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    fake.__name__ = "CIFAR10"
    root = tmp_path / "new" / "root"
    both = load_images("cifar-10", root=root)
    assert both.labels is not None
    assert both.labels.tolist() == [0, 1, 1, 1, 0]
    assert both.class_names == ("cold", "warm")
    assert [both.image(i).getpixel((0, 0))[0] for i in range(5)] == [100, 101, 102, 200, 201]
    test = load_images("CIFAR10", split="test", root=root)
    assert test.labels is not None
    assert test.labels.tolist() == [1, 0]


def test_failed_download_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:  # noqa: ARG002
            raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", Offline)
    with pytest.raises(InvalidParameterError, match="no route to host"):
        load_images("mnist", root=tmp_path)


def test_known_names_are_classification_datasets() -> None:
    known = data._torchvision_datasets()
    assert {"cifar10", "cifar100", "mnist", "fashionmnist", "stl10", "svhn", "flowers102"} <= set(known)
    assert not {"cococaptions", "vocdetection", "vocsegmentation", "kinetics", "imagefolder"} & set(known)


# Folders


def test_folder_order_is_classes_then_files_by_name(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPG", "a/z.png", "a/sub/y.png", "B/q.png", "a/.hidden.png", ".cache/x.png"):
        write_image(tmp_path / "set" / name)
    (tmp_path / "set" / "a" / "notes.txt").write_text("not an image")
    images = load_images(tmp_path / "set")
    assert images.name == "set"
    assert images.class_names == ("B", "a", "b")
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [0, 1, 1, 2, 2]


def test_folder_order_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    rng = np.random.default_rng(0)
    for c in ("x", "Y", "z1", "z10"):
        for i in rng.permutation(12):
            write_image(tmp_path / c / f"{i}.png", value=int(rng.integers(256)))
    ref, comp = ImageFolder(str(tmp_path)), load_images(tmp_path)
    assert comp.labels is not None
    assert comp.labels.tolist() == ref.targets
    assert list(comp.class_names) == ref.classes
    assert all(comp.image(i).getpixel((0, 0)) == ref[i][0].getpixel((0, 0)) for i in range(comp.n))


def test_plain_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("2.png", "1.png"):
        write_image(tmp_path / name, value=int(name[0]))
    images = load_images(str(tmp_path))
    assert images.labels is None
    assert images.class_names == ()
    assert [images.image(i).getpixel((0, 0))[0] for i in range(2)] == [1, 2]
    assert images.subset([1]).labels is None


def test_folder_with_splits(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a" / "0.png")
    write_image(tmp_path / "test" / "a" / "0.png")
    write_image(tmp_path / "test" / "b" / "0.png")
    assert load_images(tmp_path, split="train").n == 1
    assert load_images(tmp_path, split="test").class_names == ("a", "b")
    with pytest.raises(InvalidParameterError, match="no subfolder 'test'"):
        load_images(tmp_path / "train", split="test")


def test_folder_of_parts_is_train_then_test(tmp_path: Path) -> None:
    for i, name in enumerate(("train/b/0.png", "train/a/0.png", "test/a/0.png", "test/b/1.png", "test/b/0.png")):
        write_image(tmp_path / "set" / name, value=i)
    (tmp_path / "set" / "README").write_text("not an image")
    images = load_images(tmp_path / "set")
    assert (images.name, images.class_names) == ("set", ("a", "b"))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0, 1, 1]
    assert [images.image(i).getpixel((0, 0))[0] for i in range(5)] == [1, 0, 2, 4, 3]
    before = images.fingerprint
    write_image(tmp_path / "set" / "test" / "b" / "2.png")
    assert load_images(tmp_path / "set").fingerprint != before
    write_image(tmp_path / "set" / "test" / "c" / "0.png")
    with pytest.raises(InvalidParameterError, match="different classes: a, b; a, b, c"):
        load_images(tmp_path / "set")


def test_folder_with_one_part(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a" / "0.png")
    write_image(tmp_path / "train" / "b" / "0.png")
    assert load_images(tmp_path).class_names == ("a", "b")


@pytest.mark.parametrize(
    "names", [("train/0.png", "test/0.png"), ("train/a/0.png", "test/0.png"), ("train/a/0.png", "ship/0.png")]
)
def test_classes_may_be_called_train_and_test(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_image(tmp_path / name)
    assert set(load_images(tmp_path).class_names) == {name.split("/")[0] for name in names}


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="no folder at"):
        load_images(tmp_path / "absent")
    with pytest.raises(InvalidParameterError, match="holds no images"):
        load_images(tmp_path)
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(InvalidParameterError, match="classes without images: b"):
        load_images(tmp_path)
    write_image(tmp_path / "0.png")
    with pytest.raises(InvalidParameterError, match="both images"):
        load_images(tmp_path)
    with pytest.raises(InvalidParameterError, match="is a file"):
        load_images(tmp_path / "0.png")
    with pytest.raises(InvalidParameterError, match=r"called 'cifar11'; known datasets: digits, .*cifar10, "):
        load_images("cifar11")
    with pytest.raises(InvalidParameterError, match="'val'"):
        load_images(tmp_path, split="val")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"not an image", b"truncated"])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    write_image(tmp_path / "a" / "0.png", size=(50, 50))
    whole = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[:60] if content == b"truncated" else content)
    images = load_images(tmp_path)
    assert images.image(0).size == (50, 50)
    with pytest.raises(CorruptFileError, match=r"1\.png"):
        images.image(1)


def test_modes_become_l_or_rgb(tmp_path: Path) -> None:
    write_image(tmp_path / "grey.png", 77, mode="L")
    write_image(tmp_path / "alpha.png", 77, mode="RGBA")
    write_image(tmp_path / "cmyk.jpg", 77, mode="CMYK")
    write_image(tmp_path / "palette.png", 3, mode="P")
    write_image(tmp_path / "sixteen.png", 77 * 256 + 5, mode="I;16")
    images = load_images(tmp_path)
    assert [images.image(i).mode for i in range(5)] == ["RGB", "RGB", "L", "RGB", "L"]
    assert images.image(4).getpixel((0, 0)) == 77
    write_image(tmp_path / "zfloat.tiff", 1, mode="F")
    with pytest.raises(CorruptFileError, match=r"zfloat.*no known range"):
        load_images(tmp_path).image(5)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.new("RGB", (6, 4)).save(tmp_path / "0.jpg", exif=exif)
    assert load_images(tmp_path).image(0).size == (4, 6)


# ImageSet


def test_subset_and_bounds() -> None:
    images = from_arrays("x", np.arange(5, dtype=np.uint8).repeat(4).reshape(5, 2, 2), [0, 1, 2, 1, 0])
    part = images.subset(np.array([3, 1]))
    assert part.labels is not None
    assert part.labels.tolist() == [1, 1]
    assert [part.image(i).getpixel((0, 0)) for i in range(2)] == [3, 1]
    assert part.subset([0]).image(0).getpixel((0, 0)) == 3
    fingerprints = {images.fingerprint, part.fingerprint, images.subset([1, 3]).fingerprint}
    assert len(fingerprints) == 3
    assert images.subset([3, 1]).fingerprint == part.fingerprint
    for i in (-1, 2):
        with pytest.raises(IndexError, match="which has 2"):
            part.image(i)
    with pytest.raises(InvalidParameterError, match=r"indices are 1\.\.5, images 0\.\.4"):
        images.subset([1, 5])
    with pytest.raises(InvalidParameterError, match="float64"):
        images.subset([0.5])
    with pytest.raises(InvalidParameterError, match="bool"):
        images.subset(np.ones(5, bool))


def test_several_labels_an_image() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=bool)
    images = from_arrays("x", np.zeros((3, 2, 2), np.uint8), labels)
    assert images.class_names == ("0", "1", "2")
    part = images.subset([2, 0])
    assert part.labels is not None
    np.testing.assert_array_equal(part.labels, labels[[2, 0]])
    assert part.class_names == images.class_names


def test_arrays_are_checked() -> None:
    pixels = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(InvalidVectorsError, match="float32"):
        from_arrays("x", pixels.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(InvalidVectorsError, match=r"\(3, 4, 4, 2\)"):
        from_arrays("x", np.zeros((3, 4, 4, 2), np.uint8))
    with pytest.raises(InvalidVectorsError, match=r"shape \(3,\)"):
        from_arrays("x", pixels, [0, 1])


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "0.png", 1)
    write_image(tmp_path / "a" / "1.png", 2)
    before = load_images(tmp_path).fingerprint
    assert load_images(tmp_path).fingerprint == before
    write_image(tmp_path / "a" / "1.png", 3)
    assert load_images(tmp_path).fingerprint != before
    ones = from_arrays("x", np.ones((2, 2, 2), np.uint8))
    assert ones.fingerprint != from_arrays("x", np.zeros((2, 2, 2), np.uint8)).fingerprint

"""Data sets: every source, the splits, and one clear error for everything that can be wrong."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.cli import make_images, write_npz

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.dataset import load_dataset


def write_folder(root: Path, per_class: int = 12, mode: str = "L", side: int = 8) -> Path:
    images, labels = make_images(3 * per_class, side)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).save(folder / f"{number:03}.png")
    return root


# The splits


def test_mnist5k_is_3600_400_1000_digits():
    data = load_dataset("mnist5k", 0.1)
    test = data.load_test()
    assert (len(data.train), len(data.val), len(test)) == (3600, 400, 1000)
    assert tuple(data.shape) == (1, 28, 28)
    assert data.classes == 10
    assert data.train.images.dtype == torch.uint8
    together = torch.cat([data.train.labels, data.val.labels, test.labels])
    assert torch.bincount(together).tolist() == [500] * 10


def test_the_split_is_the_same_every_time_and_disjoint(tmp_path):
    path = write_npz(tmp_path / "d.npz", count=90, test=0)
    first, second = load_dataset(str(path), 0.25), load_dataset(str(path), 0.25)
    for one, other in ((first.train, second.train), (first.val, second.val)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    test = first.load_test()
    assert (len(test), len(first.val), len(first.train)) == (18, 18, 54)
    rows = torch.cat([first.train.images, first.val.images, test.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 90  # nothing is in two splits


def test_images_of_an_npz_with_a_test_set_all_train_or_validate(tmp_path):
    data = load_dataset(str(write_npz(tmp_path / "d.npz")), 0.1)
    assert (len(data.train), len(data.val), len(data.load_test())) == (81, 9, 30)
    assert torch.equal(data.load_test().images[:, 0], torch.from_numpy(make_images(30, seed=1)[0]))


def test_normalisation_gives_mean_0_deviation_1(tmp_path):
    data = load_dataset(str(write_npz(tmp_path / "d.npz")), 0.1)
    values = data.normalise(data.train.images)
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 1e-5
    assert abs(values.std() - 1) < 1e-3


def test_a_constant_channel_stays_finite(tmp_path):
    images = np.zeros((60, 8, 8, 3), np.float64)
    images[..., 1] = np.random.default_rng(0).normal(size=(60, 8, 8))
    images[..., 2] = 7.25
    path = write_npz(tmp_path / "d.npz", 60, 0, x_train=images, y_train=np.arange(60) % 3)
    data = load_dataset(str(path), 0.1)
    assert tuple(data.shape) == (3, 8, 8)
    values = data.normalise(data.train.images)
    assert values.isfinite().all()
    assert values[:, 0].abs().max() == 0
    assert values[:, 2].abs().max() < 1e-5


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    one = load_dataset(str(write_npz(tmp_path / "one.npz")), 0.1).fingerprint
    two = load_dataset(str(write_npz(tmp_path / "two.npz")), 0.1).fingerprint
    images, labels = make_images(90)
    images[5, 0, 0] += 1
    other = load_dataset(str(write_npz(tmp_path / "three.npz", x_train=images)), 0.1).fingerprint
    assert one == two != other


# Layouts


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30, 8, 8), (1, 8, 8)),
        ((30, 1, 8, 8), (1, 8, 8)),
        ((30, 3, 8, 8), (3, 8, 8)),
        ((30, 8, 8, 3), (3, 8, 8)),
        ((30, 12), (1, 1, 12)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_npz_layouts(tmp_path, shape, expected, dtype):
    images = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = write_npz(tmp_path / "d.npz", 30, 0, x_train=images, y_train=np.arange(30)[:, None] % 3)
    data = load_dataset(str(path), 0.1)
    assert tuple(data.shape) == expected
    assert data.train.images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert data.train.labels.dtype == torch.int64


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder(tmp_path, mode, channels):
    data = load_dataset(str(write_folder(tmp_path / "images", mode=mode)), 0.1)
    assert tuple(data.shape) == (channels, 8, 8)
    assert data.classes == 3
    assert len(data.train) + len(data.val) + len(data.load_test()) == 36


def test_folder_with_its_own_test_images(tmp_path):
    write_folder(tmp_path / "images" / "train")
    write_folder(tmp_path / "images" / "test", per_class=4)
    data = load_dataset(str(tmp_path / "images"), 0.25)
    assert (len(data.train), len(data.val), len(data.load_test())) == (27, 9, 12)


def test_folder_images_are_resized_on_request(tmp_path):
    write_folder(tmp_path / "images")
    Image.new("L", (10, 9)).save(tmp_path / "images" / "class2" / "other.png")
    with pytest.raises(UserError, match=r"got 8 x 8 and, in .*other.png, 10 x 9; --image-size"):
        load_dataset(str(tmp_path / "images"), 0.1)
    data = load_dataset(str(tmp_path / "images"), 0.1, image_size=6)
    assert tuple(data.shape) == (1, 6, 6)


# torchvision, by a module that has its interface


class FakeMNIST:
    calls: list = []

    def __init__(self, root, train=True, transform=None, download=False):
        assert download and Path(root).is_dir()
        self.calls.append(train)
        images, labels = make_images(60 if train else 20)
        self.data, self.targets = torch.from_numpy(images), torch.from_numpy(labels.astype(int))


class FakeSVHN:
    def __init__(self, root, split="train", transform=None, download=False):
        self.images, self.labels = make_images(60 if split == "train" else 20)
        self.data = np.repeat(self.images[:, None], 3, axis=1)


class FakePairs:
    classes = ("x", "y", "z")

    def __init__(self, root, split="train", download=False):
        self.images, self.numbers = make_images(30)

    def __iter__(self):
        for image, label in zip(self.images, self.numbers, strict=True):
            yield Image.fromarray(image), label


class FakeOffline:
    def __init__(self, root, train=True, download=False):
        raise RuntimeError("Error downloading fake.gz")


class FakeNoSplit:
    def __init__(self, root, download=False):
        pass


@pytest.fixture
def torchvision(monkeypatch):
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    for fake in (FakeMNIST, FakeSVHN, FakePairs, FakeOffline, FakeNoSplit):
        setattr(datasets, fake.__name__.removeprefix("Fake"), fake)
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setattr(FakeMNIST, "calls", [])


@pytest.mark.parametrize(
    ("name", "channels", "test"), [("MNIST", 1, 20), ("SVHN", 3, 20), ("Pairs", 1, 30)]
)
def test_torchvision(torchvision, tmp_path, name, channels, test):
    data = load_dataset(f"torchvision:{name}", 0.1, cache=tmp_path / "cache")
    assert tuple(data.shape) == (channels, 8, 8)
    assert data.classes == 3
    assert len(data.load_test()) == test


def test_torchvision_reads_test_images_only_on_request(torchvision, tmp_path):
    data = load_dataset("torchvision:MNIST", 0.1, cache=tmp_path)
    assert FakeMNIST.calls == [True]
    data.load_test()
    assert FakeMNIST.calls == [True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "torchvision has no data set 'Nothing'"),
        ("Offline", r"torchvision:Offline: cannot be read into .*: Error downloading"),
        ("NoSplit", "expected a data set that downloads and has train and test images"),
    ],
)
def test_torchvision_errors(torchvision, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_dataset(f"torchvision:{name}", 0.1, cache=tmp_path)


def test_torchvision_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'rlscuda\[vision\]'"):
        load_dataset("torchvision:MNIST", 0.1)


# Errors


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.zeros(89, int)}, "one label an image, got 90 images, 89 labels"),
        ({"y_test": np.zeros(29, int)}, "x_test and y_test must have one label an image"),
        ({"y_train": np.zeros(90)}, "integer class numbers, got float64"),
        ({"y_train": np.zeros((90, 3), int)}, r"must be \[N\] or \[N, 1\], got \[90, 3\]"),
        ({"y_train": np.arange(90) % 3 - 1}, r"labels must lie in \[0, 1\], got \[-1, 1\]"),
        ({"y_train": np.zeros(90, int)}, "at least 2 classes, got 1"),
        ({"x_train": np.zeros(90)}, r"x_train must be \[N, n\].*got \[90\]"),
        ({"x_train": np.zeros((90, 0, 8))}, "without an empty dimension"),
        ({"x_train": np.zeros((90, 8, 8), complex)}, "floating point, got complex128"),
        ({"x_train": np.full((90, 8, 8), np.nan)}, "NaN or infinity in 90 of 90 images"),
        ({"x_train": np.full((90, 8, 8), None)}, "floating point, got object"),
        ({"classes": np.array(["a", "b"])}, r"labels must lie in \[0, 1\], got \[0, 2\]"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, message):
    path = write_npz(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_dataset(str(path), 0.1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": np.full(30, 5)}, r"\(test\): labels must lie in \[0, 2\]"),
        ({"x_test": np.zeros((30, 9, 9))}, r"test images must be \[1, 8, 8\]"),
    ],
)
def test_wrong_test_images_are_found_before_any_training(tmp_path, arrays, message):
    path = write_npz(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_dataset(str(path), 0.1)


def test_unknown_keys_are_listed(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros(3), y_train=np.zeros(3))
    with pytest.raises(UserError, match="expected the keys x_train and y_train.*got images, y_tr"):
        load_dataset(str(tmp_path / "d.npz"), 0.1)


def test_half_a_test_set_is_refused(tmp_path):
    x_train, y_train = make_images(30)
    np.savez(tmp_path / "d.npz", x_train=x_train, y_train=y_train, x_test=x_train)
    with pytest.raises(UserError, match="expected all of x_test, y_test or none, got x_test"):
        load_dataset(str(tmp_path / "d.npz"), 0.1)


@pytest.mark.parametrize("damage", ["truncated", "text", "flipped"])
def test_corrupt_npz(tmp_path, damage):
    path = write_npz(tmp_path / "d.npz")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "text":
        content = bytearray(b"no archive")
    else:
        content[400:420] = bytes(byte ^ 0xFF for byte in content[400:420])
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.npz: (not a readable .npz archive|cannot read)"):
        load_dataset(str(path), 0.1)


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_dataset(str(tmp_path / "missing.npz"), 0.1)
    with pytest.raises(UserError, match="--data must be mnist5k, a .npz file"):
        load_dataset("mnist", 0.1)


def test_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected one subfolder of images a class, got none"):
        load_dataset(str(tmp_path / "empty"), 0.1)
    root = write_folder(tmp_path / "images")
    (root / "class9").mkdir()
    with pytest.raises(UserError, match="no images in the class folder class9"):
        load_dataset(str(root), 0.1)
    (root / "class9" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png: not a readable image"):
        load_dataset(str(root), 0.1)


def test_folder_with_other_classes_in_its_test(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    (tmp_path / "test" / "extra").mkdir()
    with pytest.raises(UserError, match="must have the class folders of train"):
        load_dataset(str(tmp_path), 0.1)


def test_image_size_is_for_folders(tmp_path):
    with pytest.raises(UserError, match="--image-size applies to a folder"):
        load_dataset(str(write_npz(tmp_path / "d.npz")), 0.1, image_size=8)


def test_too_few_images_for_a_split(tmp_path):
    path = write_npz(tmp_path / "d.npz", count=6, test=0)
    with pytest.raises(UserError, match="holding 0.05 of 5 images out leaves an empty split"):
        load_dataset(str(path), 0.05)

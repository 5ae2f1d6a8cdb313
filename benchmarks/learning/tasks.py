"""Networks and image subsets of the quality benchmark, all in memory as normalised tensors."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TRAIN, VALIDATION, TEST = 10_000, 5_000, 5_000


@dataclass(frozen=True)
class Task:
    """A network, the images it learns from and for how many epochs."""

    title: str
    data: str
    epochs: int
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] float32, normalised by the training images, and labels [N] int64."""

    x: Tensor
    y: Tensor


def mlp() -> nn.Module:
    """784-300-100-10."""
    sizes = (784, 300, 100, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small_cnn() -> nn.Module:
    """Two convolutions and two linear layers for 28 x 28 grey images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(800, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def cifar_cnn(norm: bool = False) -> nn.Module:
    """Three 3 x 3 convolutions, each pooled, and two linear layers; ``norm`` adds batch norm."""
    layers: list[nn.Module] = []
    channels = (3, 24, 48, 64)
    for a, b in zip(channels, channels[1:], strict=False):
        layers.append(nn.Conv2d(a, b, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(b)] if norm else []
        layers += [nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a 1 x 1 shortcut where the shape changes."""

    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()),
            *(nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)),
        )
        self.skip = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet8() -> nn.Module:
    """One residual block at each of 16, 32 and 64 channels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


TASKS = {
    "mlp": Task("MLP", "mnist", 5, mlp),
    "small_cnn": Task("small CNN", "mnist", 4, small_cnn),
    "cifar_cnn": Task("CIFAR CNN", "cifar10", 6, cifar_cnn),
    "cifar_bn": Task("CIFAR CNN, batch norm", "cifar10", 6, lambda: cifar_cnn(norm=True)),
    "resnet8": Task("ResNet-8", "cifar10", 6, resnet8),
}


def load(data: str, folder: Path) -> dict[str, Split]:
    """Read the train, validation and test subsets of ``mnist`` or ``cifar10``.

    The validation images are training images that follow the ones trained on, so the test images
    play no part in any choice.

    Raises:
        FileNotFoundError: If the archive is missing from ``folder``.
    """
    path = folder / {"mnist": "mnist.npz", "cifar10": "cifar10_jpeg.npz"}[data]
    if not path.is_file():
        raise FileNotFoundError(f"expected the image archive {path}; pass its folder by --data-dir")
    read = _mnist if data == "mnist" else _cifar
    with np.load(path) as archive:
        x, y = read(archive, "train", TRAIN + VALIDATION)
        x_test, y_test = read(archive, "test", TEST)
    mean = x[:TRAIN].mean((0, 2, 3), keepdim=True)
    std = x[:TRAIN].std((0, 2, 3), keepdim=True)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    return {
        "train": Split(x[:TRAIN], y[:TRAIN]),
        "validation": Split(x[TRAIN:], y[TRAIN:]),
        "test": Split(x_test, y_test),
    }


def _mnist(archive, split: str, count: int) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(archive[f"x_{split}"][:count]).unsqueeze(1)
    return x.float().div_(255), torch.from_numpy(archive[f"y_{split}"][:count]).long()


def _cifar(archive, split: str, count: int) -> tuple[Tensor, Tensor]:
    from PIL import Image

    jpeg, ends = archive[f"{split}_jpeg"], archive[f"{split}_ends"][:count]
    images = np.empty((count, 32, 32, 3), np.uint8)
    start = 0
    for i, end in enumerate(ends):
        images[i] = np.asarray(Image.open(io.BytesIO(jpeg[start:end].tobytes())))
        start = end
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return x.contiguous(), torch.from_numpy(archive[f"{split}_labels"][:count]).long()

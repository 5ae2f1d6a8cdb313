"""Small networks of every structure that a step of training or pruning tells apart, and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A convolution and batch norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), _norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.shortcut(x))


class Attention(nn.Module):
    """A transformer's block over patches, with a position embedding."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.expand, self.project = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.project(F.gelu(self.expand(self.norm2(x))))).mean(1))


class Branches(nn.Module):
    """A layer called twice, ties, a frozen bias, a concatenation, a gate; some cannot be pruned."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding="same"), nn.GroupNorm(2, 8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.grown, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 12, 3)
        self.shuffled, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.first, self.second = nn.Linear(4, 7), nn.Linear(4, 7)
        self.second.weight = self.first.weight
        self.norm.bias.requires_grad_(False)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.shared(F.relu(self.shared(x))))
        value, gate = self.gate(torch.cat([x, self.grown(x).softmax(1)], 1)).chunk(2, 1)
        x = self.shuffled(value * torch.sigmoid(gate))
        x = self.last(x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)).mean((2, 3))
        return self.head(F.relu(self.first(x)) * torch.sigmoid(self.second(x)))


class Noisy(nn.Module):
    """Draws from PyTorch's and NumPy's random streams, which a resume must restore."""

    def __init__(self, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), _norm(6), nn.ReLU(True), Residual(6, 8), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + 0.01 * np.random.rand() if self.training else x)  # noqa: NPY002


def noisy(num_classes: int) -> nn.Module:
    return Noisy(num_classes)


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 12), nn.LayerNorm(12),
        nn.Tanh(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip


def cnn() -> nn.Module:
    """Strides, paddings, dilation, groups, batch norm, a residual sum and max pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), _norm(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.PReLU(12), Residual(12, 12),
        nn.MaxPool2d(2), nn.Conv2d(12, 8, (2, 3), stride=(1, 2), dilation=(2, 1), bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 5),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), _norm(8), nn.ReLU6(True),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), _norm(8), nn.ReLU6(True),
        nn.Conv2d(8, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def wide() -> nn.Module:
    """Of a matrix that is inverted in blocks."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 800), nn.ReLU(), nn.Linear(800, 40), nn.ReLU(),
        nn.Linear(40, 5),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "depthwise": depthwise, "attention": Attention, "branches": Branches,
}  # fmt: skip
WIDE = {"wide": wide}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return {**NETWORKS, **WIDE}[name]().to(dtype)


def images(seed: int = 0, count: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """Of a batch of images with random labels."""
    x = images(seed, dtype=next(model.parameters()).dtype)
    labels = torch.randint(5, (len(x),), generator=torch.Generator().manual_seed(seed + 1))
    return F.cross_entropy(model(x), labels)


def write_archive(path: Path) -> None:
    """90 training and 30 test images of three classes, told apart by a bright block on noise."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(pixels, labels):
            image[:, 3 * label : 3 * label + 2] += 100
        arrays |= {f"x_{split}": pixels, f"y_{split}": labels.astype(np.uint8)}
    np.savez(path, **arrays)


def write_folders(path: Path) -> None:
    """Twelve coloured pictures of two classes, in a folder a class."""
    from PIL import Image

    rng = np.random.default_rng(1)
    for number in range(24):
        folder = path / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (10, 12, 3), dtype=np.uint8)
        pixels[..., number % 2] += 100
        Image.fromarray(pixels).save(folder / f"{number:02}.png")

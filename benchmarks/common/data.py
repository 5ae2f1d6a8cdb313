"""Images that networks learn from, in memory as normalised tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlscuda.zoo import ImageShape

CLASSES = 10
SHAPES = {"mnist": ImageShape(1, 28, 28), "cifar10": ImageShape(3, 32, 32)}
ARCHIVES = {"mnist": "mnist.npz", "cifar10": "cifar10_jpeg.npz"}
TRAIN, VALIDATION, TEST = 10_000, 5_000, 5_000
COUNTS = {"train_images": TRAIN, "validation_images": VALIDATION, "test_images": TEST}


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] float32, normalised by the training images, and labels [N] int64."""

    x: Tensor
    y: Tensor


@lru_cache(maxsize=1)
def load(
    data: str, folder: Path, train: int = TRAIN, validation: int = VALIDATION, test: int = TEST
) -> dict[str, Split]:
    """Read the train, validation and test subsets of `mnist` or `cifar10`, of so many images.

    The validation images are training images that follow the ones trained on, so the test images
    play no part in any choice.

    Raises:
        FileNotFoundError: The archive is missing from `folder`.
    """
    path = folder / ARCHIVES[data]
    if not path.is_file():
        raise FileNotFoundError(f"expected the image archive {path}; pass its folder by --data-dir")
    with np.load(path) as archive:
        x, y = _read(archive, "train", train + validation)
        x_test, y_test = _read(archive, "test", test)
    mean = x[:train].mean((0, 2, 3), keepdim=True)
    std = x[:train].std((0, 2, 3), keepdim=True)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    return {
        "train": Split(x[:train], y[:train]),
        "validation": Split(x[train:], y[train:]),
        "test": Split(x_test, y_test),
    }


def _read(archive: Mapping[str, np.ndarray], split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of a split, in [0, 1], and their labels."""
    if f"{split}_jpeg" in archive:
        pixels, labels = _decode(archive, split, count), archive[f"{split}_labels"]
    else:
        pixels, labels = archive[f"x_{split}"][:count, :, :, None], archive[f"y_{split}"]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    return x.contiguous(), torch.from_numpy(labels[:count]).long()


def _decode(archive: Mapping[str, np.ndarray], split: str, count: int) -> np.ndarray:
    """The pixels [count, H, W, 3] of JPEG files kept end to end; `*_ends` says where each ends."""
    from PIL import Image

    data, ends = archive[f"{split}_jpeg"], archive[f"{split}_ends"][:count]
    files = (data[start:end].tobytes() for start, end in zip((0, *ends), ends))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])

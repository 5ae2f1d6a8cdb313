"""A data set for a run: training and validation images in memory, the test images behind a call."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.arrays import Labelled, check_labelled, check_labels, check_test_shape
from rlscuda.cli.data.sources import read_source
from rlscuda.zoo import ImageShape

TEST_FRACTION = 0.2
SPLIT_SEED = 20_000


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] (uint8 or float32) and labels [N] (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run needs to know of its data.

    Attributes:
        shape: Of one image.
        classes: Number of classes.
        train: Images that the weights see.
        val: Images held out of the training images; they decide.
        load_test: Reads the test images; a run calls it once, at its end.
        mean: Of each channel of the training images, [C, 1, 1].
        std: Of each channel, [C, 1, 1]; 1 where a channel is constant.
        fingerprint: Hash of the training and validation images and labels.
        notes: Where the test images come from, in words.
    """

    shape: ImageShape
    classes: int
    train: Split
    val: Split
    load_test: Callable[[], Split]
    mean: Tensor
    std: Tensor
    fingerprint: str
    notes: str

    def to(self, device: torch.device) -> Dataset:
        """The data set with its images on a device; the test images follow when read."""
        load_test = self.load_test
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            val=self.val.to(device),
            load_test=lambda: load_test().to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] as float32 with the training images' mean 0 and deviation 1."""
        return (images.to(torch.float32) - self.mean) / self.std


def load_dataset(
    name: str, val_fraction: float, image_size: int | None = None, cache: Path | None = None
) -> Dataset:
    """Reads a data set and splits it, the same way every time and for every seed.

    A data set without test images of its own gives up a fifth of its images for the test, before
    the validation split is taken from the rest.

    Args:
        name: `mnist5k`, a `.npz` file, `torchvision:NAME` or a folder of class folders.
        val_fraction: Share of the training images that validates, in (0, 1).
        image_size: Side that the images of a folder are resized to.
        cache: Where torchvision keeps downloads.

    Raises:
        UserError: The data are missing, unreadable, or do not fit together.
    """
    source = read_source(name, image_size, cache)
    labelled, notes = source.train, "the data set's own test images"
    classes = len(source.classes) or _classes(name, labelled.labels)
    if classes < 2:
        raise UserError(f"{name} must have at least 2 classes, got {classes}")
    check_labelled(name, labelled, classes)
    if source.test_labels is not None:
        check_labels(f"{name} (test)", source.test_labels, classes)
    if source.load_test is None:
        held_out, rest = _split(len(labelled.labels), TEST_FRACTION, name)
        labelled = labelled.take(rest)
        notes = f"{len(held_out)} images held out, the data set has none of its own"
    val_rows, train_rows = _split(len(labelled.labels), val_fraction, name)
    train = _tensors(labelled.take(train_rows))
    mean, std = _channel_statistics(train.images)
    shape = ImageShape(*train.images.shape[1:])

    def load_test() -> Split:
        test = source.load_test() if source.load_test else source.train.take(held_out)
        check_labelled(f"{name} (test)", test, classes)
        check_test_shape(name, tuple(shape), test.images.shape[1:])
        return _tensors(test)

    return Dataset(
        shape=shape,
        classes=classes,
        train=train,
        val=_tensors(labelled.take(val_rows)),
        load_test=load_test,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(labelled),
        notes=notes,
    )


def _classes(name: str, labels: np.ndarray) -> int:
    """How many classes labels without names stand for: no more than there are images."""
    highest = int(labels.max())
    if highest >= len(labels):
        raise UserError(
            f"{name}: labels must be class numbers counted from 0, below the {len(labels)} images; "
            f"got {highest}"
        )
    return highest + 1


def _split(count: int, fraction: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows held out and rows kept, in their original order.

    The draw uses the only generator whose stream the language promises to keep.
    """
    held_out = round(count * fraction)
    if not 0 < held_out < count:
        raise UserError(f"{name}: holding {fraction:g} of {count} images out leaves an empty split")
    stream = random.Random(SPLIT_SEED)
    order = np.argsort([stream.random() for _ in range(count)], kind="stable")
    return np.sort(order[:held_out]), np.sort(order[held_out:])


def _tensors(labelled: Labelled) -> Split:
    images = labelled.images
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
    return Split(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(labelled.labels.astype(np.int64)),
    )


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel [C, 1, 1], accumulated in float64, image by image block."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in images.split(1024):
        values = block.to(torch.float64)
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-30), std, torch.ones_like(std))
    return mean.to(torch.float32).view(-1, 1, 1), std.to(torch.float32).view(-1, 1, 1)


def _fingerprint(labelled: Labelled) -> str:
    digest = hashlib.sha256(repr((labelled.images.shape, str(labelled.images.dtype))).encode())
    digest.update(np.ascontiguousarray(labelled.images).data)
    digest.update(np.ascontiguousarray(labelled.labels.astype(np.int64)).data)
    return digest.hexdigest()

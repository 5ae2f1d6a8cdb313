"""Labelled images as NumPy arrays, and the checks they pass before anything trains on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.memory import check_fits

_BLOCK = 1024  # images looked at in one go


class Header(NamedTuple):
    """What a file says of an array before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Labelled:
    """Images [N, C, H, W] of a real or uint8 dtype and labels [N] of an integer dtype."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        """The images and labels at `rows`."""
        return Labelled(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Source:
    """Labelled training images, and how to read the test images.

    Attributes:
        train: Training images and labels.
        load_test: Reads the test images; None where the data set has none.
        classes: Names of the classes; empty where only their numbers are known.
        test_labels: Labels [M] of the test images, where they can be had without the images.
    """

    train: Labelled
    load_test: Callable[[], Labelled] | None = None
    classes: tuple[str, ...] = ()
    test_labels: np.ndarray | None = None


def as_images(what: str, array: np.ndarray) -> np.ndarray:
    """Brings images to [N, C, H, W].

    Args:
        what: The array's name, for messages.
        array: Of [N, n] (one row of n features), [N, H, W], [N, C, H, W] or [N, H, W, C] with
            C = 1, 3 or 4; uint8, integer or floating point.

    Raises:
        UserError: Another rank or dtype, or no images.
    """
    check_image_header(what, Header(array.shape, array.dtype))
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        check_fits(f"{what} as float32", 4 * array.size)
        array = array.astype(np.float32)
    shape = image_shape(array.shape)
    if array.ndim == 4 and shape != array.shape[1:]:
        return array.transpose(0, 3, 1, 2)
    return array.reshape(len(array), *shape)


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[C, H, W] of one of the images that `as_images` makes of an array of a shape."""
    if len(shape) == 2:
        return (1, 1, shape[1])
    if len(shape) == 3:
        return (1, *shape[1:])
    if shape[1] not in (1, 3, 4) and shape[3] in (1, 3, 4):
        return (shape[3], *shape[1:3])
    return shape[1:]


def as_labels(what: str, array: np.ndarray) -> np.ndarray:
    """Brings labels [N] or [N, 1] of an integer dtype to [N]."""
    check_label_header(what, Header(array.shape, array.dtype))
    return array.reshape(-1)


def check_image_header(what: str, header: Header) -> None:
    """Checks what can be checked of images without reading them."""
    shape, dtype = header
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise UserError(
            f"{what} must be [N, n], [N, H, W], [N, C, H, W] or [N, H, W, C] without an empty "
            f"dimension, got {list(shape)}"
        )
    if dtype.kind not in "uif":
        raise UserError(f"{what} must be uint8, integer or floating point, got {dtype}")


def check_label_header(what: str, header: Header) -> None:
    """Checks what can be checked of labels without reading them."""
    shape, dtype = header
    if len(shape) != 1 and not (len(shape) == 2 and shape[1] == 1):
        raise UserError(f"{what} must be [N] or [N, 1], got {list(shape)}")
    if dtype.kind not in "ui":
        raise UserError(f"{what} must hold integer class numbers, got {dtype}")


def check_lengths(what: str, images: int, labels: int) -> None:
    """One label an image."""
    if images != labels:
        raise UserError(
            f"{what} must have one label an image, got {images} images, {labels} labels"
        )


def check_test_shape(what: str, train: tuple[int, ...], test: tuple[int, ...]) -> None:
    """The test images are like the training images."""
    if test != train:
        raise UserError(
            f"{what}: test images must be {list(train)} like the training images, got {list(test)}"
        )


def check_labels(what: str, labels: np.ndarray, classes: int) -> None:
    """Labels lie in [0, classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{what}: labels must lie in [0, {classes - 1}], got [{low}, {high}]")


def check_labelled(what: str, labelled: Labelled, classes: int) -> None:
    """Checks the values: labels in [0, classes), images that are finite in float32.

    Raises:
        UserError: The first that does not hold.
    """
    check_labels(what, labelled.labels, classes)
    images = labelled.images
    if images.dtype.kind == "f":
        blocks = (images[i : i + _BLOCK] for i in range(0, len(images), _BLOCK))
        with np.errstate(over="ignore"):
            finite = [np.isfinite(b.astype(np.float32)).all(axis=(1, 2, 3)) for b in blocks]
        bad = ~np.concatenate(finite)
        if bad.any():
            raise UserError(
                f"{what}: images must be finite, got NaN or infinity in {int(bad.sum())} of "
                f"{len(bad)} images, the first being number {int(bad.argmax())}"
            )

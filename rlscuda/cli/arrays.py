"""Labelled images as NumPy arrays, and the checks they pass before anything trains on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlscuda.cli.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """Images [N, C, H, W] of a real or uint8 dtype and labels [N] of an integer dtype."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        """The images and labels at ``rows``."""
        return Labelled(self.images[rows], self.labels[rows])


def as_images(what: str, array: np.ndarray) -> np.ndarray:
    """Bring images to [N, C, H, W].

    Args:
        what: the array's name, for messages.
        array: [N, n] (one row of n features), [N, H, W], [N, C, H, W] or [N, H, W, C] with
            C = 1, 3 or 4; uint8, integer or floating point.

    Raises:
        UserError: another rank or dtype, or no images.
    """
    check_image_header(what, array.shape, array.dtype)
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.float32)
    if array.ndim == 2:
        return array[:, None, None, :]
    if array.ndim == 3:
        return array[:, None]
    if array.shape[1] not in (1, 3, 4) and array.shape[3] in (1, 3, 4):
        return array.transpose(0, 3, 1, 2)
    return array


def as_labels(what: str, array: np.ndarray) -> np.ndarray:
    """Bring labels [N] or [N, 1] of an integer dtype to [N]."""
    check_label_header(what, array.shape, array.dtype)
    return array.reshape(-1)


def check_image_header(what: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check what can be checked of images without reading them."""
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise UserError(
            f"{what} must be [N, n], [N, H, W], [N, C, H, W] or [N, H, W, C] without an empty "
            f"dimension, got {list(shape)}"
        )
    if dtype.kind not in "uif":
        raise UserError(f"{what} must be uint8, integer or floating point, got {dtype}")


def check_label_header(what: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check what can be checked of labels without reading them."""
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


def check_labelled(what: str, labelled: Labelled, classes: int) -> None:
    """Check the values: labels in [0, classes), finite images.

    Raises:
        UserError: the first that does not hold.
    """
    low, high = int(labelled.labels.min()), int(labelled.labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{what}: labels must lie in [0, {classes - 1}], got [{low}, {high}]")
    if labelled.images.dtype.kind == "f":
        bad = ~np.isfinite(labelled.images).reshape(len(labelled.images), -1).all(axis=1)
        if bad.any():
            raise UserError(
                f"{what}: images must be finite, got NaN or infinity in {int(bad.sum())} of "
                f"{len(bad)} images, the first being number {int(bad.argmax())}"
            )

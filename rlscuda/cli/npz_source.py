"""NumPy archives: ``x_train, y_train[, x_test, y_test]``, or images kept as JPEG bytes."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from rlscuda.cli.arrays import (
    Labelled,
    as_images,
    as_labels,
    check_image_header,
    check_label_header,
    check_lengths,
)
from rlscuda.cli.errors import UserError
from rlscuda.cli.extras import require
from rlscuda.cli.sources import Source

Headers = dict[str, tuple[tuple[int, ...], np.dtype]]

_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError)
_EXPECTED = (
    "x_train and y_train (x_test and y_test too, if there are test images), or "
    "train_jpeg, train_ends and train_labels (and the same with test_)"
)


def read_npz(path: Path) -> Source:
    """Read the training arrays of an archive; the test arrays only by their headers.

    Raises:
        UserError: no such file, a corrupt archive, unknown keys, or lengths that differ.
    """
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    headers = _headers(path)
    if {"x_train", "y_train"} <= headers.keys():
        read, check, names = _read_arrays, _check_arrays, ["x_{}", "y_{}"]
    elif {"train_jpeg", "train_ends", "train_labels"} <= headers.keys():
        read, check, names = _read_jpeg, _check_jpeg, ["{}_jpeg", "{}_ends", "{}_labels"]
    else:
        raise UserError(
            f"--data {path}: expected the keys {_EXPECTED}, got {', '.join(headers) or 'none'}"
        )
    check(path, headers, "train")
    test_keys = [name.format("test") for name in names]
    present = [key for key in test_keys if key in headers]
    if present and present != test_keys:
        raise UserError(
            f"--data {path}: expected all of {', '.join(test_keys)} or none, got "
            f"{', '.join(present)}"
        )
    if present:
        check(path, headers, "test")
    classes: tuple[str, ...] = ()
    if "classes" in headers:
        classes = tuple(str(entry) for entry in _load(path, "classes").reshape(-1))
    return Source(read(path, "train"), (lambda: read(path, "test")) if present else None, classes)


def _read_arrays(path: Path, split: str) -> Labelled:
    images = as_images(f"{path}: x_{split}", _load(path, f"x_{split}"))
    labels = as_labels(f"{path}: y_{split}", _load(path, f"y_{split}"))
    return Labelled(images, labels)


def _read_jpeg(path: Path, split: str) -> Labelled:
    """Decode the files in ``{split}_jpeg``, end to end; ``{split}_ends`` says where each ends."""
    image_module = require("PIL.Image")
    data, ends = _load(path, f"{split}_jpeg"), _load(path, f"{split}_ends")
    labels = as_labels(f"{path}: {split}_labels", _load(path, f"{split}_labels"))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    if len(ends) == 0 or (ends <= starts).any() or ends[-1] != len(data):
        raise UserError(
            f"{path}: {split}_ends must rise to the length of {split}_jpeg, {len(data)}, got "
            f"{'no entries' if len(ends) == 0 else f'a last entry of {ends[-1]}'}"
        )
    images = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        try:
            with image_module.open(io.BytesIO(data[start:end].tobytes())) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: image {number} of {split}_jpeg: {error}") from None
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{path}: images of {split}_jpeg must have one size, got "
                f"{images[0].shape[:2]} and, at {number}, {images[-1].shape[:2]}"
            )
    return Labelled(np.stack(images).transpose(0, 3, 1, 2), labels)


def _check_arrays(path: Path, headers: Headers, split: str) -> None:
    (x_shape, x_dtype), (y_shape, y_dtype) = headers[f"x_{split}"], headers[f"y_{split}"]
    check_image_header(f"{path}: x_{split}", x_shape, x_dtype)
    check_label_header(f"{path}: y_{split}", y_shape, y_dtype)
    check_lengths(f"{path}: x_{split} and y_{split}", x_shape[0], y_shape[0])


def _check_jpeg(path: Path, headers: Headers, split: str) -> None:
    (e_shape, _), (y_shape, y_dtype) = headers[f"{split}_ends"], headers[f"{split}_labels"]
    check_label_header(f"{path}: {split}_labels", y_shape, y_dtype)
    check_lengths(f"{path}: {split}_ends and {split}_labels", e_shape[0], y_shape[0])


def _headers(path: Path) -> Headers:
    """Shape and dtype of every array, without reading one."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stream:
                    version = npy.read_magic(stream)
                    read = (
                        npy.read_array_header_1_0
                        if version == (1, 0)
                        else npy.read_array_header_2_0
                    )
                    shape, _, dtype = read(stream)
                    headers[name.removesuffix(".npy")] = (shape, dtype)
    except _UNREADABLE as error:
        raise UserError(f"--data {path}: not a readable .npz archive: {error}") from None
    return headers


def _load(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key]
    except _UNREADABLE as error:
        raise UserError(f"--data {path}: cannot read {key}: {error}") from None

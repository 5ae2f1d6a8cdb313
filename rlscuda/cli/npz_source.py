"""NumPy archives: ``x_train, y_train[, x_test, y_test]``, or images kept as JPEG bytes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from rlscuda.cli.arrays import (
    Header,
    Labelled,
    as_images,
    as_labels,
    check_image_header,
    check_label_header,
    check_lengths,
    check_test_shape,
    image_shape,
)
from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.files import is_there
from rlscuda.cli.images import ImageReader
from rlscuda.cli.memory import check_fits
from rlscuda.cli.sources import Source

Headers = dict[str, Header]

_CHUNK = 2**20  # bytes

_EXPECTED = (
    "x_train and y_train (x_test and y_test too, if there are test images), or "
    "train_jpeg, train_ends and train_labels (and the same with test_)"
)


def read_npz(path: Path) -> Source:
    """Read the training arrays of an archive; of the test arrays the headers and the labels.

    Raises:
        UserError: no such file, a corrupt archive, unknown keys, lengths or shapes that differ, or
            more than the memory can hold.
    """
    if not is_there(path):
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
    test_labels = None
    if present:
        check(path, headers, "test")
        for key in test_keys:
            _verify(path, headers, key)
        if "x_test" in headers:
            shapes = [image_shape(headers[f"x_{split}"].shape) for split in ("train", "test")]
            check_test_shape(str(path), *shapes)
        test_labels = as_labels(f"{path}: {test_keys[-1]}", _load(path, headers, test_keys[-1]))
    classes: tuple[str, ...] = ()
    if "classes" in headers:
        classes = tuple(str(entry) for entry in _load(path, headers, "classes").reshape(-1))
    load_test = (lambda: read(path, headers, "test")) if present else None
    return Source(read(path, headers, "train"), load_test, classes, test_labels)


def _read_arrays(path: Path, headers: Headers, split: str) -> Labelled:
    images = as_images(f"{path}: x_{split}", _load(path, headers, f"x_{split}"))
    labels = as_labels(f"{path}: y_{split}", _load(path, headers, f"y_{split}"))
    return Labelled(images, labels)


def _read_jpeg(path: Path, headers: Headers, split: str) -> Labelled:
    """Decode the files in ``{split}_jpeg``, end to end; ``{split}_ends`` says where each ends."""
    data, ends = _load(path, headers, f"{split}_jpeg"), _load(path, headers, f"{split}_ends")
    labels = as_labels(f"{path}: {split}_labels", _load(path, headers, f"{split}_labels"))
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    if len(ends) == 0 or (ends <= starts).any() or ends[-1] != len(data):
        raise UserError(
            f"{path}: {split}_ends must rise to the length of {split}_jpeg, {len(data)}, got "
            f"{'no entries' if len(ends) == 0 else f'a last entry of {ends[-1]}'}"
        )
    reader = ImageReader(f"{path}: {split}_jpeg", "RGB", count=len(ends))
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        reader.add(io.BytesIO(data[start:end].tobytes()), f"image {number} of {path}")
    return Labelled(reader.images(), labels)


def _check_arrays(path: Path, headers: Headers, split: str) -> None:
    x, y = headers[f"x_{split}"], headers[f"y_{split}"]
    check_image_header(f"{path}: x_{split}", x)
    check_label_header(f"{path}: y_{split}", y)
    check_lengths(f"{path}: x_{split} and y_{split}", x.shape[0], y.shape[0])


def _check_jpeg(path: Path, headers: Headers, split: str) -> None:
    for key, kinds, words in (("jpeg", "u", "uint8"), ("ends", "ui", "whole numbers")):
        shape, dtype = headers[f"{split}_{key}"]
        if len(shape) != 1 or dtype.kind not in kinds or (key == "jpeg" and dtype.itemsize != 1):
            raise UserError(
                f"{path}: {split}_{key} must be [N] of {words}, got {list(shape)} of {dtype}"
            )
    labels = headers[f"{split}_labels"]
    check_label_header(f"{path}: {split}_labels", labels)
    ends = headers[f"{split}_ends"].shape[0]
    check_lengths(f"{path}: {split}_ends and {split}_labels", ends, labels.shape[0])


def _headers(path: Path) -> Headers:
    """Shape and dtype of every array, without reading one; what it promises, it must hold."""
    headers = {}
    problem = f"--data {path}: not a readable .npz archive"
    with reading(problem), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                old = npy.read_magic(stream) == (1, 0)
                read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
                shape, _, dtype = read(stream)
                header = Header(shape, dtype)
                held = entry.file_size - stream.tell()
            if not dtype.hasobject and header.bytes != held:
                raise ValueError(
                    f"{entry.filename} must hold {header.bytes} bytes for {list(shape)} of "
                    f"{dtype}, got {held}"
                )
            headers[entry.filename.removesuffix(".npy")] = header
    return headers


def _verify(path: Path, headers: Headers, key: str) -> None:
    """Check that an array which is read later can be, by its checksum."""
    check_fits(f"--data {path}: {key}", headers[key].bytes)
    with (
        reading(f"--data {path}: cannot read {key}"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{key}.npy") as stream,
    ):
        while stream.read(_CHUNK):
            pass


def _load(path: Path, headers: Headers, key: str) -> np.ndarray:
    check_fits(f"--data {path}: {key}", headers[key].bytes)
    with (
        reading(f"--data {path}: cannot read {key}"),
        np.load(path, allow_pickle=False) as archive,
    ):
        return archive[key]

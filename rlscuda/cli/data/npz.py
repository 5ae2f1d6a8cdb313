"""NumPy archives: `x_train, y_train[, x_test, y_test]`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.files import is_there
from rlscuda.cli.common.memory import check_fits
from rlscuda.cli.data.arrays import (
    Header,
    Labelled,
    Source,
    as_images,
    as_labels,
    check_image_header,
    check_label_header,
    check_lengths,
    check_test_shape,
    image_shape,
)

Headers = dict[str, Header]
_CHUNK = 2**20  # bytes


def read_npz(path: Path) -> Source:
    """Reads the training arrays of an archive; of the test arrays the headers and the labels.

    Raises:
        UserError: No such file, a corrupt archive, unknown keys, lengths or shapes that differ, or
            more than the memory can hold.
    """
    if not is_there(path):
        raise UserError(f"--data {path}: no such file")
    headers = _headers(path)
    if not {"x_train", "y_train"} <= headers.keys():
        raise UserError(
            f"--data {path}: expected the keys x_train and y_train (x_test and y_test too, if "
            f"there are test images), got {', '.join(headers) or 'none'}"
        )
    _check(path, headers, "train")
    present = [key for key in ("x_test", "y_test") if key in headers]
    if len(present) == 1:
        raise UserError(
            f"--data {path}: expected all of x_test, y_test or none, got {', '.join(present)}"
        )
    test_labels = None
    if present:
        _check(path, headers, "test")
        for key in present:
            _verify(path, headers, key)
        shapes = [image_shape(headers[f"x_{split}"].shape) for split in ("train", "test")]
        check_test_shape(str(path), *shapes)
        test_labels = as_labels(f"{path}: y_test", _load(path, headers, "y_test"))
    classes: tuple[str, ...] = ()
    if "classes" in headers:
        classes = tuple(str(entry) for entry in _load(path, headers, "classes").reshape(-1))
    load_test = (lambda: _read(path, headers, "test")) if present else None
    return Source(_read(path, headers, "train"), load_test, classes, test_labels)


def _read(path: Path, headers: Headers, split: str) -> Labelled:
    images = as_images(f"{path}: x_{split}", _load(path, headers, f"x_{split}"))
    labels = as_labels(f"{path}: y_{split}", _load(path, headers, f"y_{split}"))
    return Labelled(images, labels)


def _check(path: Path, headers: Headers, split: str) -> None:
    x, y = headers[f"x_{split}"], headers[f"y_{split}"]
    check_image_header(f"{path}: x_{split}", x)
    check_label_header(f"{path}: y_{split}", y)
    check_lengths(f"{path}: x_{split} and y_{split}", x.shape[0], y.shape[0])


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
    """Checks that an array which is read later can be, by its checksum."""
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

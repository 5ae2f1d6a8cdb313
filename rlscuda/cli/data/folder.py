"""A folder with one subfolder of images a class.

`torchvision.datasets.ImageFolder` is no help here: it is of another extra, reads no header before
the pixels of all, and takes pipes, bombs and images of several sizes without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.files import is_there
from rlscuda.cli.common.memory import check_fits
from rlscuda.cli.data.arrays import Labelled, Source
from rlscuda.optional import optional

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Files = list[tuple[Path, int]]  # of an image, and its label
Size = tuple[int, int]  # width, height


def read_folder(folder: Path, side: int | None) -> Source:
    """Reads `folder/CLASS/IMAGE`, or `folder/train/CLASS/IMAGE` with `folder/test` beside it.

    Images are read in the order of their names and kept in memory, as grey levels if all of them
    are grey, else as RGB. Of the test images only the headers are read at first.

    Args:
        folder: The folder.
        side: To resize each image to; None expects all to have one size.

    Raises:
        UserError: No class folders, no images, an unreadable image, or sizes that differ.
    """
    train, test = folder / "train", folder / "test"
    has_own_test = train.is_dir() and test.is_dir()
    root = train if has_own_test else folder
    classes = _classes(root)
    files = _files(root, classes)
    mode, size = _look(root, files, side, None)
    labelled = decoded(root, files, mode, size, side)
    if not has_own_test:
        return Source(labelled, None, classes)
    if _classes(test) != classes:
        raise UserError(
            f"--data {folder}: test must have the class folders of train, {', '.join(classes)}, "
            f"got {', '.join(_classes(test))}"
        )
    test_files = _files(test, classes)
    _look(test, test_files, side, size)
    return Source(labelled, lambda: decoded(test, test_files, mode, size, side), classes)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An image of which only the header has been read.

    Raises:
        UserError: It is no image, it has more pixels than Pillow takes for honest, or it proves
            damaged in the block.
    """
    if not is_there(file):
        raise UserError(f"{file}: no such file")
    pillow = optional("PIL.Image", "cli")
    with reading(f"{file}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says what is wrong
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(file) as image:
            yield image


def decoded(root: Path, files: Files, mode: str, size: Size, side: int | None) -> Labelled:
    """Images [N, C, H, W] uint8 and their labels.

    Args:
        root: Where they come from, for errors.
        files: Of the images.
        mode: `L` or `RGB`.
        size: Of each image, or of the first where they are resized.
        side: To resize each to.

    Raises:
        UserError: One is no image or of another size, or they are too large for the memory.
    """
    width, height = size if side is None else (side, side)
    what = f"--data {root}: {len(files)} images of {width} x {height}"
    check_fits(what, len(files) * width * height * len(mode))
    images = np.empty((len(files), height, width, len(mode)), np.uint8)
    for place, (file, _) in enumerate(files):
        with opened(file) as image:
            _check_size(root, size, image.size, file, side)
            image = image.convert(mode)
            pixels = np.asarray(image.resize((width, height)) if side else image)
        images[place] = pixels.reshape(images.shape[1:])
    return Labelled(images.transpose(0, 3, 1, 2), np.array([label for _, label in files]))


def _classes(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    if not names:
        raise UserError(f"--data {root}: expected one subfolder of images a class, got none")
    return names


def _files(root: Path, classes: tuple[str, ...]) -> Files:
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        raise UserError(f"--data {root}: no images in the class folder {classes[empty[0]]}")
    return files


def _look(root: Path, files: Files, side: int | None, size: Size | None) -> tuple[str, Size]:
    """Mode and size of all images, by their headers; the size is that of the training images."""
    grey = True
    for file, _ in files:
        with opened(file) as image:
            grey &= image.mode in ("1", "L")
            size = size or image.size
            _check_size(root, size, image.size, file, side)
    assert size is not None
    return "L" if grey else "RGB", size


def _check_size(root: Path, first: Size, other: Size, file: Path, side: int | None) -> None:
    if side is None and first != other:
        raise UserError(
            f"--data {root}: images must have one size, got {first[0]} x {first[1]} and, in "
            f"{file}, {other[0]} x {other[1]}; --image-size resizes those of a folder"
        )

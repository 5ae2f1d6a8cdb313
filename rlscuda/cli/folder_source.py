"""A folder with one subfolder of images a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlscuda.cli.arrays import Labelled
from rlscuda.cli.errors import UserError
from rlscuda.cli.images import ImageReader, Size, check_one_size, opened
from rlscuda.cli.sources import Source

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
Files = list[tuple[Path, int]]  # of an image, and its label


def read_folder(folder: Path, image_size: int | None) -> Source:
    """Read ``folder/CLASS/IMAGE``, or ``folder/train/CLASS/IMAGE`` with ``folder/test`` beside it.

    Images are read in the order of their names and kept in memory, as grey levels if all of them
    are grey, else as RGB. Of the test images only the headers are read at first.

    Args:
        folder: the folder.
        image_size: side to resize to; None expects all images to have one size.

    Raises:
        UserError: no class folders, no images, an unreadable image, or sizes that differ.
    """
    train, test = folder / "train", folder / "test"
    has_own_test = train.is_dir() and test.is_dir()
    root = train if has_own_test else folder
    classes = _classes(root)
    files = _files(root, classes)
    mode, size = _look(root, files, image_size, None)
    labelled = _read(root, files, mode, image_size)
    if not has_own_test:
        return Source(labelled, None, classes)
    if _classes(test) != classes:
        raise UserError(
            f"--data {folder}: test must have the class folders of train, {', '.join(classes)}, "
            f"got {', '.join(_classes(test))}"
        )
    test_files = _files(test, classes)
    _look(test, test_files, image_size, size)
    return Source(labelled, lambda: _read(test, test_files, mode, image_size), classes)


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
        with opened(file, file) as image:
            grey &= image.mode in ("1", "L")
            size = size or image.size
            if side is None:
                check_one_size(f"--data {root}", size, image.size, file)
    assert size is not None
    return "L" if grey else "RGB", size


def _read(root: Path, files: Files, mode: str, image_size: int | None) -> Labelled:
    """Images [N, C, H, W] uint8 and labels."""
    reader = ImageReader(f"--data {root}", mode, len(files), image_size)
    for file, _ in files:
        reader.add(file, file)
    return Labelled(reader.images(), np.array([label for _, label in files]))

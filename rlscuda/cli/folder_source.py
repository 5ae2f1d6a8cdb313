"""A folder with one subfolder of images a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlscuda.cli.arrays import Labelled
from rlscuda.cli.errors import UserError
from rlscuda.cli.extras import require
from rlscuda.cli.sources import Source

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def read_folder(folder: Path, image_size: int | None) -> Source:
    """Read ``folder/CLASS/IMAGE``, or ``folder/train/CLASS/IMAGE`` with ``folder/test`` beside it.

    Images are read in the order of their names and kept in memory, as grey levels if all of them
    are grey, else as RGB.

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
    labelled, mode = _read(root, classes, image_size, mode=None)
    if not has_own_test:
        return Source(labelled, None, classes)
    if _classes(test) != classes:
        raise UserError(
            f"--data {folder}: test must have the class folders of train, {', '.join(classes)}, "
            f"got {', '.join(_classes(test))}"
        )
    return Source(labelled, lambda: _read(test, classes, image_size, mode)[0], classes)


def _classes(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    if not names:
        raise UserError(f"--data {root}: expected one subfolder of images a class, got none")
    return names


def _read(
    root: Path, classes: tuple[str, ...], image_size: int | None, mode: str | None
) -> tuple[Labelled, str]:
    """Images [N, C, H, W] uint8 and their mode, ``L`` or ``RGB``; None chooses it."""
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        raise UserError(f"--data {root}: no images in the class folder {classes[empty[0]]}")
    if mode is None:
        mode = "L" if all(_mode(file) in ("1", "L") for file, _ in files) else "RGB"
    images = []
    for file, _ in files:
        images.append(_decode(file, mode, image_size))
        if images[-1].shape != images[0].shape:
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (images[0], images[-1])]
            raise UserError(
                f"--data {root}: images must have one size, got {sizes[0]} and, in {file}, "
                f"{sizes[1]}; --image-size resizes them"
            )
    stacked = np.stack(images)
    stacked = stacked[:, None] if mode == "L" else stacked.transpose(0, 3, 1, 2)
    return Labelled(stacked, np.array([label for _, label in files])), mode


def _mode(file: Path) -> str:
    with _open(file) as image:
        return image.mode


def _decode(file: Path, mode: str, image_size: int | None) -> np.ndarray:
    with _open(file) as image:
        try:
            converted = image.convert(mode)
        except (OSError, SyntaxError) as error:
            raise UserError(f"{file}: not a readable image: {error}") from None
        if image_size is not None:
            converted = converted.resize((image_size, image_size))
        return np.asarray(converted)


def _open(file: Path):
    try:
        return require("PIL.Image").open(file)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{file}: not a readable image: {error}") from None

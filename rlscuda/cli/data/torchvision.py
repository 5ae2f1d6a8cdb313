"""Data sets of torchvision, by class name: `torchvision:CIFAR10`."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.out_folder import check_writable
from rlscuda.cli.data.arrays import Labelled, Source, as_images, as_labels, check_lengths
from rlscuda.optional import optional


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/rlscuda`, else `~/.cache/rlscuda`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlscuda"


def read_torchvision(name: str, cache: Path | None) -> Source:
    """Downloads (once) and reads the training images of `torchvision.datasets.NAME`.

    Args:
        name: A data set with a `train` or `split` argument and images of one size, such as MNIST,
            FashionMNIST, KMNIST, CIFAR10, CIFAR100 or SVHN.
        cache: Where the files are kept; None means `default_cache`.

    Raises:
        UserError: torchvision is not installed, has no such data set, or cannot download it.
    """
    datasets = optional("torchvision.datasets", "vision")
    factory = getattr(datasets, name, None)
    if not inspect.isclass(factory):
        raise UserError(
            f"torchvision has no data set {name!r}; names are those of its classes, such as "
            "MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN"
        )
    parameters = inspect.signature(factory).parameters
    if "download" not in parameters or not {"train", "split"} & parameters.keys():
        raise UserError(
            f"torchvision:{name} cannot be used: expected a data set that downloads and has "
            "train and test images (arguments download and train or split)"
        )
    construct: Any = factory
    root = cache or default_cache()
    check_writable(root, "--cache")
    root.mkdir(parents=True, exist_ok=True)
    which = "train" if "train" in parameters else "split"

    def read(train: bool) -> tuple[Labelled, tuple[str, ...]]:
        chosen: Any = train if which == "train" else ("train" if train else "test")
        with reading(f"torchvision:{name}: cannot be read into {root}"):
            dataset = construct(root=str(root), download=True, **{which: chosen})
            classes = tuple(str(entry) for entry in getattr(dataset, "classes", ()))
            return _labelled(f"torchvision:{name}", dataset), classes

    labelled, classes = read(train=True)
    return Source(labelled, lambda: read(train=False)[0], classes)


def _labelled(what: str, dataset: Any) -> Labelled:
    """Takes the arrays a data set holds, else decode its (PIL image, label) pairs."""
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    images = getattr(dataset, "data", None)
    if images is None or labels is None:
        pairs = [(np.asarray(image), int(label)) for image, label in dataset]
        if len({image.shape for image, _ in pairs}) != 1:
            raise UserError(f"{what}: images must have one size, got several")
        images, labels = np.stack([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    images, labels = np.asarray(images), np.asarray(labels)
    check_lengths(what, len(images), len(labels))
    return Labelled(as_images(what, images), as_labels(what, labels))

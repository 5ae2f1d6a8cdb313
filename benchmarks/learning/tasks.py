"""The tasks of the quality benchmark: a network, its images and its epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from benchmarks.common.data import CLASSES, SHAPES
from rlscuda import zoo


@dataclass(frozen=True)
class Task:
    """A network by its builder in `rlscuda.zoo`, the images it learns from, its epochs."""

    title: str
    data: str
    epochs: int
    network: Callable[..., nn.Module]

    def build(self) -> nn.Module:
        return self.network(SHAPES[self.data], CLASSES)


SMALL_CNN = partial(zoo.lenet5, widths=(16, 32), hidden=(100,))
_three_convolutions = partial(
    zoo.vgg, widths=(24, 48, 64), depths=(1, 1, 1), hidden=(128,), pixels=4
)
CIFAR_CNN = partial(_three_convolutions, norm=False, bias=True)

TASKS = {
    "mlp": Task("MLP", "mnist", 5, zoo.mlp),
    "small_cnn": Task("small CNN", "mnist", 4, SMALL_CNN),
    "cifar_cnn": Task("CIFAR CNN", "cifar10", 6, CIFAR_CNN),
    "cifar_bn": Task("CIFAR CNN, batch norm", "cifar10", 6, _three_convolutions),
    "resnet8": Task("ResNet-8", "cifar10", 6, partial(zoo.resnet, widths=(16, 32, 64), blocks=1)),
}

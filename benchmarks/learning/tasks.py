"""The ten tasks of the learning benchmark: a network, its data, its steps, its metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.data import CLASSES, SHAPES, Split
from benchmarks.learning import networks, sources
from benchmarks.learning.sources import CODES, WINDOW, Splits
from rlscuda import zoo


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what is read: `score` is a metric's sum over the examples."""

    metric: str
    higher_is_better: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]

    @property
    def sign(self) -> int:
        """1 where the metric is to be high, else -1."""
        return 1 if self.higher_is_better else -1


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def _squared_error(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum() / len(y)


def _right(output: Tensor, y: Tensor) -> Tensor:
    return 100 * (output.argmax(1) == y).sum()


def _times_count(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, y: loss(output, y) * len(y)


ACCURACY = Objective("accuracy %", True, _cross_entropy, _right)
NATS = Objective("nats a character", False, _cross_entropy, _times_count(_cross_entropy))
SQUARED_ERROR = Objective("squared error", False, _squared_error, _times_count(_squared_error))


@dataclass(frozen=True)
class Task:
    """A network learns from the training split of its source for `steps` minibatches.

    `ends` names the layers that Muon's users leave to AdamW with the vectors: embeddings, the
    first convolution and the classifier (none where inputs and outputs are dense features).
    `bfloat16` is for long runs of image networks: products in that format, weights channels-last.
    """

    name: str
    title: str
    objective: Objective
    steps: int
    batch: int
    network: Callable[[], nn.Module]
    source: Callable[[Path], Splits]
    ends: tuple[str, ...] = ()
    augment: bool = False
    bfloat16: bool = False

    def build(self, seed: int) -> nn.Module:
        """The network, with the initial weights of a seed."""
        torch.manual_seed(seed)
        network = self.network()
        return network.to(memory_format=torch.channels_last) if self.bfloat16 else network

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Of one minibatch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.objective.loss(model(x), y)

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split, count: int | None = None) -> float:
        """The metric over a split, or over about `count` examples spread over it."""
        model.eval()
        stride = max(1, len(split.y) // count) if count else 1
        x, y = split.x[::stride], split.y[::stride]
        pairs = zip(x.split(500), y.split(500), strict=True)
        total = sum(float(self.objective.score(model(x), y)) for x, y in pairs)
        model.train()
        return total / len(y)


def image_network(network: Callable[..., nn.Module], data: str) -> Callable[[], nn.Module]:
    """A network for the images and the classes of `mnist` or `cifar10`."""
    return partial(network, SHAPES[data], CLASSES)


_MNIST = partial(sources.images, "mnist", (10_000, 2_000, 5_000))
_CIFAR = partial(sources.images, "cifar10", (10_000, 2_000, 5_000))
_SMALL_CIFAR = partial(sources.images, "cifar10", (5_000, 2_000, 5_000))
_RESNET8 = partial(zoo.resnet, widths=(8, 16, 32), blocks=1)
_ALL = (
    Task(
        "gpt",
        "character GPT",
        NATS,
        500,
        16,
        partial(networks.GPT, CODES, WINDOW),
        sources.documentation,
        ("tokens.weight", "positions", "head.weight"),
    ),
    Task(
        "vit",
        "ViT",
        ACCURACY,
        312,
        32,
        image_network(networks.ViT, "cifar10"),
        _SMALL_CIFAR,
        ("patches.weight", "positions", "head.weight"),
    ),
    Task(
        "autoencoder",
        "MNIST autoencoder",
        SQUARED_ERROR,
        800,
        128,
        networks.autoencoder,
        sources.own_pixels,
    ),
    Task(
        "resnet8",
        "ResNet-8",
        ACCURACY,
        390,
        64,
        image_network(_RESNET8, "cifar10"),
        _SMALL_CIFAR,
        ("conv.weight", "fc.weight"),
        augment=True,
    ),
    Task(
        "mobilenet",
        "MobileNet-like",
        ACCURACY,
        468,
        64,
        image_network(networks.mobilenet, "cifar10"),
        _CIFAR,
        ("0.weight", "29.weight"),
    ),
    Task(
        "friedman1",
        "friedman1 regression",
        SQUARED_ERROR,
        480,
        64,
        partial(networks.multilayer, 10, 64, 64, 1),
        sources.friedman1,
        ("4.weight",),
    ),
    Task(
        "digits",
        "digits MLP",
        ACCURACY,
        360,
        64,
        partial(networks.multilayer, 64, 64, 32, 10),
        sources.digits,
        ("4.weight",),
    ),
    Task(
        "small_cnn",
        "small CNN",
        ACCURACY,
        468,
        64,
        image_network(networks.SMALL_CNN, "mnist"),
        _MNIST,
        ("conv1.weight", "fc2.weight"),
    ),
    Task(
        "cifar_cnn",
        "CIFAR CNN",
        ACCURACY,
        312,
        64,
        image_network(networks.CIFAR_CNN, "cifar10"),
        _CIFAR,
        ("conv11.weight", "fc2.weight"),
    ),
    Task(
        "gru",
        "GRU text classifier",
        ACCURACY,
        468,
        64,
        partial(networks.TextClassifier, CODES, len(sources.MODULES)),
        sources.modules,
        ("tokens.weight", "head.weight"),
    ),
)
TASKS = {task.name: task for task in _ALL}

"""The networks of the pruning benchmark, and their training: once a seed, kept on disk.

A base network is trained by `RLSOptimizer(model)` with cosine decay; a `SketchTracker` watches the
last epochs, which start from a saved state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlscuda
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import SketchTracker
from rlscuda.zoo import ImageShape, lenet5, resnet20

BATCH = 64
RANK, TRACKED = 16, 2  # of the sketch that is tracked, and the last epochs that it sees
IMAGES = {"mnist": ImageShape(1, 28, 28), "cifar10": ImageShape(3, 32, 32)}


@dataclass(frozen=True)
class Case:
    """A network, the images it learns from, its epochs and the shares of channels to remove.

    `slow` is one of which Adam's recovery and training from new weights are run at the middle
    share alone.
    """

    title: str
    data: str
    epochs: int
    build: Callable[[], nn.Module]
    ratios: tuple[float, ...]
    slow: bool = False

    @property
    def example(self) -> Tensor:
        """One image, for tracing."""
        return torch.zeros(1, *IMAGES[self.data])


def vgg_small() -> nn.Module:
    """VGG's pattern at a sixth of VGG-16's depth and width: six convolutions with batch norm."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU())
            inputs = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(128, 10))


HIGH, LOW = (0.5, 0.7, 0.9), (0.3, 0.5, 0.7)
CASES = {
    "lenet5": Case("LeNet-5", "mnist", 4, lambda: lenet5(IMAGES["mnist"], 10), LOW),
    "small_cnn": Case("small CNN", "mnist", 4, tasks.small_cnn, HIGH),
    "cifar_cnn": Case("CIFAR CNN", "cifar10", 6, tasks.cifar_cnn, HIGH),
    "vgg_small": Case("small VGG", "cifar10", 8, vgg_small, LOW, True),
    "resnet20": Case(
        "ResNet-20", "cifar10", 12, lambda: resnet20(IMAGES["cifar10"], 10), LOW, True
    ),
}


class Run:
    """A training run that can be saved after any epoch and gone on with.

    Args:
        case: What is trained.
        seed: Of the initial weights, the order of the images and the optimizer's draws.
        count: Images in the training set.
        model: A pruned one, trained in place of a new network.
    """

    def __init__(self, case: Case, seed: int, count: int, model: nn.Module | None = None):
        torch.manual_seed(seed)
        self.epoch = 0
        self.memory_format = torch.channels_last if model is None else torch.contiguous_format
        self.model = case.build() if model is None else model
        self.optimizer = rlscuda.RLSOptimizer(self.model, seed=seed)
        steps = case.epochs * (count // BATCH)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.order = torch.Generator().manual_seed(seed)

    def train_epoch(self, split: tasks.Split) -> float:
        """Train for one epoch and return the mean loss."""
        loss = epoch(
            self.model, self.optimizer, self.schedule, split, self.order, self.memory_format
        )
        self.epoch += 1
        return loss

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on bit by bit."""
        parts = (self.model, self.optimizer, self.schedule)
        return {
            "epoch": self.epoch,
            "parts": [part.state_dict() for part in parts],
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up the state of an earlier run of the same case and seed."""
        for part, saved in zip((self.model, self.optimizer, self.schedule), state["parts"]):
            part.load_state_dict(saved)
        self.epoch = state["epoch"]
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])


def epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    split: tasks.Split,
    order: torch.Generator,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> float:
    """Train for one epoch in whole batches and return the mean loss.

    Pruned networks keep to the plain memory format: in channels_last, the CPU convolutions of
    torch 2.13 corrupt the heap in the backward pass at widths such as 5.
    """
    model.train()
    steps, total = len(split.y) // BATCH, 0.0
    for index in torch.randperm(len(split.y), generator=order).split(BATCH)[:steps]:
        x = split.x[index].contiguous(memory_format=memory_format)
        loss = F.cross_entropy(model(x), split.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / steps


def train_to(name: str, seed: int, epochs: int, split: tasks.Split, cache: Path) -> Run:
    """The run of `CASES[name]` after some epochs, from the cache or trained and written there."""
    run = Run(CASES[name], seed, len(split.y))
    path = cache / f"{name}-{seed}-epoch{epochs}.pt"
    if path.is_file():
        run.load(load(path))
        return run
    while run.epoch < epochs:
        run.train_epoch(split)
    save(run.state(), path)
    return run


def tracked(name: str, seed: int, split: tasks.Split, cache: Path) -> tuple[Run, SketchTracker]:
    """The run of `CASES[name]` at its end, and the sketch tracked beside its last epochs."""
    case, path = CASES[name], cache / f"{name}-{seed}-tracked.pt"
    if path.is_file():
        saved = load(path)
        run = Run(case, seed, len(split.y))
        run.load(saved["run"])
        tracker = SketchTracker(run.model, rank=RANK)
        tracker.load_state_dict(saved["tracker"])
        return run, tracker
    run = train_to(name, seed, case.epochs - TRACKED, split, cache)
    tracker = SketchTracker(run.model, rank=RANK)
    while run.epoch < case.epochs:
        run.train_epoch(split)
    save({"run": run.state(), "tracker": tracker.state_dict()}, path)
    return run, tracker


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state, whole or not at all."""
    write_atomically(path, lambda stream: save_archive(state, stream))


def load(path: Path) -> dict[str, Any]:
    """Read a state, if every bit is as it was written."""
    with open(path, "rb") as stream:
        return load_archive(stream)

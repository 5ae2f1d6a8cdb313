"""The networks of the pruning benchmark, and their training: once a seed, kept on disk.

A base network is trained by `RLSOptimizer(model, form="adaptive")` with cosine decay; a
`SketchTracker` watches the last epochs, which start from a saved state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rlscuda
from benchmarks.common.data import CLASSES, SHAPES, Split
from benchmarks.common.training import Run
from benchmarks.learning.networks import CIFAR_CNN, SMALL_CNN
from rlscuda import zoo
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import SketchTracker

RANK, TRACKED = 16, 2  # of the sketch that is tracked, and the last epochs that it sees


@dataclass(frozen=True)
class Case:
    """A network, the images it learns from, its epochs, and the shares of channels to remove.

    `slow` is one of which recoveries and training from new weights are run at the middle share
    alone.
    """

    title: str
    data: str
    epochs: int
    network: Callable[..., nn.Module]
    ratios: tuple[float, ...]
    slow: bool = False

    def build(self) -> nn.Module:
        """The network, with weights of the current random state."""
        return self.network(SHAPES[self.data], CLASSES)

    @property
    def example(self) -> Tensor:
        """One image, for tracing."""
        return torch.zeros(1, *SHAPES[self.data])


# VGG's pattern at a sixth of VGG-16's depth and width
SMALL_VGG = partial(zoo.vgg, widths=(32, 64, 128), depths=(2, 2, 2), hidden=(128,), pixels=2)
HIGH, LOW = (0.5, 0.7, 0.9), (0.3, 0.5, 0.7)
CASES = {
    "lenet5": Case("LeNet-5", "mnist", 4, zoo.lenet5, LOW),
    "small_cnn": Case("small CNN", "mnist", 4, SMALL_CNN, HIGH),
    "cifar_cnn": Case("CIFAR CNN", "cifar10", 6, CIFAR_CNN, HIGH),
    "vgg_small": Case("small VGG", "cifar10", 8, SMALL_VGG, LOW, slow=True),
    "resnet20": Case("ResNet-20", "cifar10", 12, zoo.resnet20, LOW, slow=True),
}


def begin(case: Case, seed: int, count: int, model: nn.Module | None = None) -> Run:
    """The run of a case before its first step.

    Args:
        case: What is trained.
        seed: Of the initial weights, the order of the images and the optimizer's draws.
        count: Images in the training set.
        model: A pruned one, trained in place of a new network.
    """
    torch.manual_seed(seed)
    memory_format = torch.channels_last if model is None else torch.contiguous_format
    model = case.build() if model is None else model
    optimizer = rlscuda.RLSOptimizer(model, form="adaptive", seed=seed)
    return Run(model, optimizer, case.epochs, count, seed, memory_format)


def train_to(name: str, seed: int, epochs: int, split: Split, cache: Path) -> Run:
    """The run of `CASES[name]` after some epochs, from the cache or trained and written there."""
    run = begin(CASES[name], seed, len(split.y))
    path = cache / f"{name}-{seed}-epoch{epochs}.pt"
    if path.is_file():
        run.load(load(path))
        return run
    while run.epoch < epochs:
        run.train_epoch(split)
    save(run.state(), path)
    return run


def tracked(name: str, seed: int, split: Split, cache: Path) -> tuple[Run, SketchTracker]:
    """The run of `CASES[name]` at its end, and the sketch tracked beside its last epochs."""
    case, path = CASES[name], cache / f"{name}-{seed}-tracked.pt"
    if path.is_file():
        saved = load(path)
        run = begin(case, seed, len(split.y))
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

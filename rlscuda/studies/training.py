"""The trainings of a study: what one arm sees depends on the seed alone, and so does its pair."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.matrices.own import own_matrices
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.running.calls import rng_kept
from rlscuda.studies.protocol import Protocol, Split, Task

_EVALUATED = 500  # images at once
_LOOKS = 10  # at the validation images, an epoch, where a training ends at an accuracy


@dataclass
class Trained:
    """A network at the end of its training, and how it came there.

    Attributes:
        model: In eval mode.
        matrices: The inverse autocorrelation matrices that the training has tracked; none where it
            diverged.
        rate: Its step size.
        steps: Steps taken.
        accuracy: On the validation images, in [0, 1].
        order: Hash of all rows seen up to the end of each epoch.
        reached: Whether it came to the accuracy at which it was to end; None where there is none.
    """

    model: nn.Module
    matrices: dict[str, Tensor]
    rate: float
    steps: int
    accuracy: float
    order: list[str] = field(default_factory=list)
    reached: bool | None = None


class Training:
    """One training on a task; its batches are a function of the seed alone.

    Args:
        model: Trained in place.
        task: What it learns.
        protocol: Optimizer and batch size.
        seed: Of the batches and of all else that is random.
        rate: Step size.
        epochs: Of cosine decay; None for a constant step size.
        head: What is trained alone for the protocol's frozen epochs, the rest being frozen and in
            eval mode; None for nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        protocol: Protocol,
        seed: int,
        rate: float,
        epochs: int | None,
        head: nn.Module | None = None,
    ):
        self.model, self.task, self.protocol, self.rate = model, task, protocol, rate
        self._head = head
        self._tracker = None
        if protocol.optimizer == "rls":
            self.optimizer: torch.optim.Optimizer = RLSOptimizer(model, lr=rate, seed=seed)
        else:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            self._tracker = SketchTracker(model, seed=seed)
        self.size = min(protocol.batch_size, len(task.train))
        self.per_epoch = len(task.train) // self.size
        self._schedule = None
        if epochs is not None:
            self._schedule = CosineAnnealingLR(self.optimizer, epochs * self.per_epoch)
        self._shuffler = torch.Generator().manual_seed(seed)
        self._digest = hashlib.sha256()
        self.order: list[str] = []
        self.steps = 0

    def epoch(self) -> Generator[int, None, None]:
        """Trains for one epoch of whole batches.

        Yields:
            The steps done, after each.
        """
        train, device = self.task.train, self.task.train.x.device
        rows = torch.randperm(len(train), generator=self._shuffler)
        head = self._head if len(self.order) < self.protocol.frozen_epochs else None
        with _only(self.model, head):
            for batch in rows.split(self.size)[: self.per_epoch]:
                self._digest.update(batch.numpy().tobytes())
                batch = batch.to(device)
                if head is None:
                    self.model.train()
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(train.x[batch]), train.y[batch]).backward()
                self.optimizer.step()
                if self._schedule is not None:
                    self._schedule.step()
                self.steps += 1
                yield self.steps
        self.order.append(self._digest.hexdigest())

    def trained(self, accuracy: float, reached: bool | None = None) -> Trained:
        """The network now, as a copy."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            matrices = {}
        elif isinstance(self.optimizer, RLSOptimizer):
            matrices = own_matrices(self.optimizer)
        else:
            assert self._tracker is not None
            matrices = self._tracker.matrices()
        model = copy.deepcopy(self.model).eval()
        return Trained(model, matrices, self.rate, self.steps, accuracy, list(self.order), reached)


def train_epochs(training: Training, epochs: int) -> Trained:
    """Trains for so many epochs."""
    for _ in range(epochs):
        _whole_epoch(training)
    return training.trained(evaluate(training.model, training.task.val)[1])


def train_to_plateau(training: Training) -> Trained:
    """Trains until the validation loss does not improve any more, and takes the best epoch."""
    best, least, since = None, math.inf, 0
    for _ in range(training.protocol.most_epochs):
        _whole_epoch(training)
        loss, accuracy = evaluate(training.model, training.task.val)
        since += 1
        if best is None or loss < least:
            best, least, since = training.trained(accuracy), loss, 0
        if since == training.protocol.patience:
            break
    assert best is not None
    return best


def train_to_accuracy(training: Training, goal: float) -> Trained:
    """Trains until the validation accuracy reaches a goal, or the epochs are over."""
    pause = max(1, training.per_epoch // _LOOKS)
    for _ in range(training.protocol.epochs):
        steps = training.epoch()
        for step in steps:
            if step % pause == 0:
                accuracy = evaluate(training.model, training.task.val)[1]
                if accuracy >= goal:
                    steps.close()
                    return training.trained(accuracy, reached=True)
    accuracy = evaluate(training.model, training.task.val)[1]
    return training.trained(accuracy, reached=accuracy >= goal)


def _whole_epoch(training: Training) -> None:
    for _ in training.epoch():
        pass


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in [0, 1] of a model in eval mode, which keeps its mode."""
    was_training = model.training
    model.eval()
    loss, right = 0.0, 0
    for x, y in zip(split.x.split(_EVALUATED), split.y.split(_EVALUATED)):
        outputs = model(x)
        loss += float(F.cross_entropy(outputs, y, reduction="sum"))
        right += int((outputs.argmax(1) == y).sum())
    model.train(was_training)
    return loss / len(split), right / len(split)


@contextmanager
def _only(model: nn.Module, head: nn.Module | None) -> Iterator[None]:
    """Freezes all but a head, in eval mode: no statistics and no matrices move."""
    if head is None:
        yield
        return
    own = set(head.parameters())
    frozen = [p for p in model.parameters() if p.requires_grad and p not in own]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def best_rate(accuracy_of: Callable[[float], float], rates: tuple[float, ...]) -> float:
    """The step size of the highest validation accuracy, the first of several."""
    return rates[0] if len(rates) == 1 else max(rates, key=accuracy_of)


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random streams that are a function of a seed; those of before go on afterwards."""
    with rng_kept(model):
        torch.manual_seed(seed)
        yield

"""The training loop of every network that is trained for its accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.common.data import Split

BATCH = 64


class Run:
    """A training run with cosine decay, which can be saved after any epoch and gone on with.

    Pruned networks must have the plain memory format: in channels_last, the CPU convolutions of
    torch 2.13 corrupt the heap in the backward pass at widths such as 5.

    Args:
        model: The network.
        optimizer: Of its parameters.
        epochs: Those of the whole run.
        count: Images in the training set.
        seed: Of the order of the images.
        memory_format: That of the minibatches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        count: int,
        seed: int,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        self.model, self.optimizer, self.memory_format = model, optimizer, memory_format
        self.schedule = CosineAnnealingLR(optimizer, epochs * (count // BATCH))
        self.order = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def train_epoch(
        self, split: Split, before_step: Callable[[Callable[[], Tensor], Tensor], Any] | None = None
    ) -> float:
        """Train for one epoch in whole batches and return the mean loss.

        Args:
            split: The training set.
            before_step: Called after each backward with what gives the loss of its batch again, and
                the loss.
        """
        self.model.train()
        steps, total = len(split.y) // BATCH, 0.0
        for index in torch.randperm(len(split.y), generator=self.order).split(BATCH)[:steps]:
            x = split.x[index].contiguous(memory_format=self.memory_format)
            criterion = partial(self._loss, x, split.y[index])
            loss = criterion()
            self.optimizer.zero_grad()
            loss.backward()
            if before_step:
                before_step(criterion, loss)
            self.optimizer.step()
            self.schedule.step()
            total += loss.item()
        self.epoch += 1
        return total / steps

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

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
        """Take up the state of an earlier run that was begun in the same way."""
        for part, saved in zip((self.model, self.optimizer, self.schedule), state["parts"]):
            part.load_state_dict(saved)
        self.epoch = state["epoch"]
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])


def accuracy(model: nn.Module, split: Split) -> float:
    """Percentage of the split's images that a model labels correctly."""
    model.eval()
    with torch.no_grad():
        pairs = zip(split.x.split(500), split.y.split(500), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return 100 * right / len(split.y)

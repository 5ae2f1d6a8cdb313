"""What all ways to prune while a network trains have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.dataset import Dataset
from rlscuda.cli.report.record import KINDS, Stage, size_of
from rlscuda.pruning.files.manifest import Described

MEASURED = 256  # training images that measure branches and settle norms
Validate = Callable[[], tuple[float, float]]


class Config(Protocol):
    """What a pruning asks of the options of the run."""

    @property
    def model(self) -> str:
        """The network, as it was asked for."""

    @property
    def epochs(self) -> int:
        """Of the run."""

    @property
    def seed(self) -> int:
        """Of all that is random."""


class Training(Protocol):
    """What a pruning asks of the training that it is part of, as `Trainer` does it."""

    data: Dataset
    device: torch.device
    model: nn.Module
    optimizer: Optimizer
    epoch: int
    steps_per_epoch: int
    history: list[dict[str, Any]]

    @property
    def config(self) -> Config:
        """The options of the run."""

    @property
    def diverged(self) -> bool:
        """Whether its loss is not finite any more."""

    def whole_model(self) -> nn.Module:
        """The network as it was at the start."""

    def new_optimizer(self, model: nn.Module) -> Optimizer:
        """An optimizer as that of the start, for a network."""

    def rebuild(self, network: Described) -> None:
        """Replaces the network by a described one, and the optimizer by a new one for it."""


class Pruning(ABC):
    """One way to prune, in one training.

    Args:
        training: Of the RLS optimizer, at its start.

    Attributes:
        flag: The option that asks for it.
        stages: What was seen before and after each removal; none before the first.
    """

    flag: str

    def __init__(self, training: Training):
        self.training = training
        self.stages: list[Stage] = []

    def refused(self, error: ValueError) -> UserError:
        """The error of an option that the network cannot have."""
        return UserError(f"{self.flag}: {self.training.config.model}: {error}")

    @property
    def example(self) -> Tensor:
        """One training image, as the network is given it."""
        return self.images(1)

    def images(self, count: int) -> Tensor:
        """The first training images, as the network is given them."""
        return self.training.data.normalise(self.training.data.train.images[:count])

    def batches(self) -> list[Tensor]:
        """Training images that measure branches and settle norms."""
        return list(self.images(MEASURED).split(MEASURED // 2))

    def size(self) -> dict[str, int]:
        """Parameters of the network now, and FLOPs of the forward of one image."""
        return size_of(self.training.model, self.example)

    @property
    @abstractmethod
    def total(self) -> int:
        """Rounds at most, for what is printed."""

    def after_backward(  # noqa: B027
        self, closure: Callable[[], Tensor], loss: Tensor
    ) -> None:
        """Does what comes between the backward and the optimizer's step.

        Args:
            closure: Gives the loss of the same batch again.
            loss: What it was.
        """

    def after_step(self) -> None:  # noqa: B027
        """Does what follows the optimizer's step."""

    @abstractmethod
    def after_epoch(self, row: dict[str, Any], validate: Validate) -> None:
        """Takes out what is to go; says so in the row of the epoch.

        Args:
            row: Of the epoch that has just ended; it is given `parameters`, `flops` (of one image)
                and `pruning`, and after a change `changed_val_loss` and `changed_val_accuracy`, of
                the changed network.
            validate: Gives the validation loss and accuracy of the network now.
        """

    def changed(self, row: dict[str, Any], kind: str, number: int, validate: Validate) -> Stage:
        """The stage after a change, which the row of the epoch is told of."""
        loss, accuracy = validate()
        row |= {"changed_val_loss": loss, "changed_val_accuracy": accuracy}
        return Stage(kind, number, **self.size(), val_loss=loss, val_accuracy=accuracy)

    @abstractmethod
    def rounds(self) -> list[dict[str, Any]]:
        """All rounds that were made, as plain data."""

    def stages_saved(self) -> list[dict[str, Any]]:
        """The stages as a checkpoint has them."""
        return [dataclasses.asdict(stage) for stage in self.stages]

    def stages_of(self, saved: list[Any]) -> list[Stage]:
        """The stages of a checkpoint, which has passed `check`.

        Raises:
            ValueError: A kind is none.
        """
        kinds = {stage["kind"] for stage in saved}
        if not kinds <= set(KINDS):
            raise ValueError(f"a stage must be one of {', '.join(KINDS)}, got {sorted(kinds)}")
        own = [field.name for field in dataclasses.fields(Stage)]
        return [Stage(**{name: stage[name] for name in own}) for stage in saved]

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, and the record of those done."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the pruning was; the training's network becomes that of the moment.

        Raises:
            ValueError: The state is not one of this network.
        """


def stage_of(kind: str, number: int, row: dict[str, Any]) -> Stage:
    """The stage that the row of an epoch shows."""
    seen = ("parameters", "flops", "val_loss", "val_accuracy")
    return Stage(kind, number, **{name: row[name] for name in seen})

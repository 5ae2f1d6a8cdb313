"""Adaptive pruning while a network trains: its steps, what was seen of it, and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

from rlscuda.cli.report.record import Stage
from rlscuda.cli.train.pruning.base import Pruning, Training, Validate, stage_of
from rlscuda.cli.train.pruning.specs import AdaptiveSpec
from rlscuda.files.documents import check
from rlscuda.pruning.adaptive.pruner import AdaptivePruner
from rlscuda.pruning.files.manifest import Described, describe

_TITLES = {"output": "the output penalty", "scale": "the scale penalty"}


class SavedPlan(TypedDict):
    """Of `Plan.state_dict`."""

    original: dict[str, int]
    why: dict[str, str]
    ledger: dict[str, dict[str, Tensor]]
    penalty: dict[str, Any]


class SavedAdaptive(TypedDict):
    """Of `AdaptivePruner.state_dict`."""

    epoch: int
    steps: int
    steps_before: int
    steps_of_epoch: int
    paused: int
    best: float
    rho: float
    target: float
    whole: float
    history: list[dict[str, Any]]
    plan: SavedPlan


class SavedAdaptation(TypedDict):
    """Of `Adaptation.state_dict`."""

    network: Described
    pruner: SavedAdaptive
    stages: list[Stage]


class Adaptation(Pruning):
    """The adaptive pruning of one training.

    Args:
        training: Of the RLS optimizer, at its start.
        spec: How much, and by what.

    Raises:
        UserError: The network cannot be pruned so far.
    """

    flag = "--prune-adaptive"

    def __init__(self, training: Training, spec: AdaptiveSpec):
        super().__init__(training)
        self.spec = spec
        self.pruner = self._pruner()

    def _pruner(self) -> AdaptivePruner:
        spec = self.spec
        try:
            return AdaptivePruner(
                self.training.model, self.training.optimizer, self.example,
                target_params=spec.left, penalty=spec.penalty, what=spec.what,
                warmup=spec.start(self.training.config.epochs), epochs=spec.epochs,
                loader=self.batches(),
            )  # fmt: skip
        except ValueError as error:
            raise self.refused(error) from None

    @property
    def total(self) -> int:
        """Rounds at most, for what is printed: each epoch of pruning."""
        return self.spec.epochs

    def after_backward(self, closure: Callable[[], Tensor], loss: Tensor) -> None:
        """Takes the steps of the scales.

        Raises:
            UserError: The target is out of reach.
        """
        try:
            self.pruner.after_backward()
        except ValueError as error:
            raise self.refused(error) from None

    def after_step(self) -> None:
        """Takes those that follow the optimizer's."""
        self.pruner.after_step()

    def after_epoch(self, row: dict[str, Any], validate: Validate) -> None:
        """Takes out what is to go; says so in the row of the epoch.

        Nothing goes after the last epoch, when nothing could recover, nor once the training loss is
        not finite any more.
        """
        row |= {**self.size(), "pruning": ""}
        last = self.training.epoch >= self.training.config.epochs
        if self.pruner.finished or last or self.training.diverged:
            return
        try:
            row["pruning"] = outcome = self.pruner.after_epoch(row["val_loss"])
        except ValueError as error:
            raise self.refused(error) from None
        if outcome == "pruned":
            number = sum(stage.kind == "pruned" for stage in self.stages)
            self.stages.append(stage_of("recovering" if number else "whole", number, row))
            self.stages.append(self.changed(row, "pruned", number + 1, validate))

    def rounds(self) -> list[dict[str, Any]]:
        """All that was done, as the one round of a record."""
        report = self.pruner.report()
        channels = [fate for fate in report.fates if fate.kind == "channels"]
        gone = [fate for fate in report.fates if fate.kind == "block" and not fate.after]
        couplings = [
            {"name": f.name, "members": [], "before": f.before, "after": f.after, "removed": [],
             "cost": []}
            for f in channels
        ]  # fmt: skip
        done = {
            "couplings": couplings,
            "importance": _TITLES[report.penalty],
            "selection": "adaptive",
            "source": self.pruner.options.source,
            "disagreement": None,
            "uncompensated": {},
            "refused": {f.name: f.why for f in report.fates if f.after == f.before and f.why},
            "blocks": [{"name": fate.name, "how": "delete", "why": fate.why} for fate in gone],
            "history": report.history,
        }
        losses = [row["loss"] for row in report.history if row["loss"] is not None]
        ratio = 1 - report.after / report.before
        return [{"ratio": ratio, "outcome": "adaptive", "losses": losses, "report": done}]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, and the record of those done."""
        return {
            "network": describe(self.training.model),
            "pruner": self.pruner.state_dict(),
            "stages": self.stages_saved(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the pruning was; the training's network becomes that of the moment.

        Raises:
            ValueError: The state is not one of this network.
        """
        check(state, SavedAdaptation, "the pruning")
        stages = self.stages_of(state["stages"])
        self.training.rebuild(state["network"])
        self.pruner = self._pruner()
        self.pruner.load_state_dict(state["pruner"])
        self.stages = stages

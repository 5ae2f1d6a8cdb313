"""Pruning while a network trains: the rounds, what was seen of them, and their checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, TypedDict

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.rng import capture_rng, restore_rng
from rlscuda.cli.report.record import Stage
from rlscuda.cli.train.pruning.base import Pruning, Training, Validate, stage_of
from rlscuda.cli.train.pruning.specs import ScheduleSpec
from rlscuda.files.documents import check
from rlscuda.pruning.files.manifest import Described, describe, rebuild
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.pruning.report import PruneReport
from rlscuda.pruning.running.calls import running
from rlscuda.pruning.schedule import PruneSchedule, Round
from rlscuda.pruning.structure.trace import trace


class SavedPoint(TypedDict):
    """Of `Point`."""

    network: Described
    optimizer: dict[str, Any]


class SavedSchedule(TypedDict):
    """Of `PruneSchedule.state_dict`."""

    epochs: int
    reference: float | None
    finished: bool
    rounds: list[Round]


class SavedPruner(TypedDict):
    """Of `RLSPruner.state_dict`."""

    original: dict[str, int]


class SavedPruning(TypedDict):
    """Of `Rounds.state_dict`."""

    network: Described
    before: SavedPoint | None
    schedule: SavedSchedule
    pruner: SavedPruner
    stages: list[Stage]


@dataclasses.dataclass(frozen=True)
class Point:
    """A network and its optimizer at one moment, as a checkpoint can hold them.

    Step sizes are not part of it: the schedule of the training goes on.

    Attributes:
        training: What `restore` brings back to it.
        state: The network, described, and the optimizer's state, copies.
    """

    training: Training
    state: SavedPoint

    def check(self) -> None:
        """Checks that `restore` will find what it needs.

        Raises:
            ValueError: The state is not one of the training's network.
        """
        streams = capture_rng(self.training.device)
        model = rebuild(self.training.whole_model, self.state["network"])
        optimizer = self.training.new_optimizer(model)
        optimizer.load_state_dict(self.state["optimizer"])
        restore_rng(streams, self.training.device)

    def restore(self) -> None:
        """Replaces the network and the optimizer by those of the moment."""
        groups = copy.deepcopy(self.training.optimizer.state_dict()["param_groups"])
        self.training.rebuild(self.state["network"])
        optimizer = {**self.state["optimizer"], "param_groups": groups}
        self.training.optimizer.load_state_dict(optimizer)


class Rounds(Pruning):
    """The rounds of pruning of one training.

    Args:
        training: Of the RLS optimizer, at its start.
        spec: How much, in how many rounds.

    Raises:
        UserError: The network cannot be pruned.
    """

    flag = "--prune-schedule"

    def __init__(self, training: Training, spec: ScheduleSpec):
        super().__init__(training)
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        self.schedule = PruneSchedule(self, **options)
        self.before: Point | None = None
        self.pruner = self._pruner()
        try:
            with running("the model cannot be traced"):
                found = trace(training.model, self.example)
        except ValueError as error:
            raise self.refused(error) from None
        if not found.couplings:
            reasons = "".join(f"; {name}: {why}" for name, why in found.refused.items())
            raise UserError(
                f"{self.flag}: {training.config.model} has no channels that can be removed{reasons}"
            )
        self.units = {coupling.name: coupling.units for coupling in found.couplings}

    def _pruner(self) -> RLSPruner:
        return RLSPruner(self.training.model, self.training.optimizer, self.example, ratio=0.0)

    def snapshot(self) -> Point:
        """The present moment, to which a round that fails returns."""
        state = SavedPoint(
            network=describe(self.training.model), optimizer=self.training.optimizer.state_dict()
        )
        self.before = Point(self.training, copy.deepcopy(state))
        return self.before

    def step(self, ratio: float) -> PruneReport:
        """Prunes until `ratio` of the original channels is gone.

        Raises:
            UserError: It cannot be done; network and optimizer are as they were.
        """
        try:
            return self.pruner.step(ratio=ratio)
        except ValueError as error:
            raise UserError(f"{self.training.config.model} was not pruned: {error}") from None

    def after_epoch(self, row: dict[str, Any], validate: Validate) -> None:
        """Prunes, waits or rolls back, by the validation loss of an epoch; says so in its row.

        Nothing is pruned after the last epoch, when nothing could recover, and nothing changes
        once the training loss is not finite any more.
        """
        row |= {**self.size(), "pruning": ""}
        schedule, number = self.schedule, len(self.schedule.rounds)
        last = self.training.epoch >= self.training.config.epochs and number < schedule.total
        if schedule.finished or last or self.training.diverged:
            return
        if not number and not math.isfinite(row["val_loss"]):
            return
        row["pruning"] = outcome = schedule.after_epoch(row["val_loss"])
        if outcome in ("pruned", "finished"):
            self.stages.append(stage_of("recovered" if number else "whole", number, row))
        if schedule.finished:
            self.before = None
        if outcome in ("pruned", "rolled back"):
            self.stages.append(self.changed(row, outcome, len(schedule.rounds), validate))

    @property
    def total(self) -> int:
        """Rounds that were asked for."""
        return self.schedule.total

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds that were made, as plain data."""
        return [done.to_dict() for done in self.schedule.rounds]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rounds to come depend on, and the record of those done."""
        return {
            "network": describe(self.training.model),
            "before": None if self.before is None else self.before.state,
            "schedule": self.schedule.state_dict(),
            "pruner": self.pruner.state_dict(),
            "stages": self.stages_saved(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the rounds were; the training's network becomes that of the moment.

        Raises:
            ValueError: The state is not one of this network and schedule.
        """
        self._check(state)
        stages = self.stages_of(state["stages"])
        self.training.rebuild(state["network"])
        self.pruner = self._pruner()
        self.pruner.load_state_dict(state["pruner"])
        self.before = None if state["before"] is None else Point(self.training, state["before"])
        self.schedule.load_state_dict(state["schedule"], self.before)
        self.stages = stages

    def _check(self, state: Any) -> None:
        check(state, SavedPruning, "the pruning")
        rounds = state["schedule"]["rounds"]
        units = self.units if rounds else {}
        if state["pruner"]["original"] != units:
            raise ValueError(f"the units before pruning must be {units}, got "
                             f"{state['pruner']['original']}")  # fmt: skip
        if len(rounds) > self.schedule.total:
            raise ValueError(f"at most {self.schedule.total} rounds, got {len(rounds)}")
        for done in rounds:
            if not done["report"]["couplings"]:
                raise ValueError("the report of a round must have couplings, got none")
            for change in done["report"]["couplings"]:
                if not (change["before"] >= max(1, change["after"]) and change["after"] >= 0):
                    raise ValueError(f"the widths of {change['name']!r} must shrink, got "
                                     f"{change['before']} to {change['after']}")  # fmt: skip
        if state["before"] is not None:
            Point(self.training, state["before"]).check()

"""Pruning while a trainer trains: the rounds, what was seen of them, and their checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from rlscuda.cli.errors import UserError
from rlscuda.cli.optimizers import build_optimizer
from rlscuda.cli.prune_files import MODELS, PruneFiles
from rlscuda.cli.prune_options import ScheduleSpec
from rlscuda.cli.prune_record import KINDS, PruneRecord, Stage, gains_of, size_of
from rlscuda.cli.prune_report import write_report
from rlscuda.cli.rng import capture_rng, restore_rng
from rlscuda.files.documents import check
from rlscuda.pruning.files.manifest import Described, describe, rebuild
from rlscuda.pruning.files.saving import save_pruned
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.pruning.report import PruneReport
from rlscuda.pruning.schedule import PruneSchedule
from rlscuda.pruning.structure.trace import trace

if TYPE_CHECKING:
    from rlscuda.cli.training import Trainer


class SavedPoint(TypedDict):
    """Of :class:`Point`."""

    network: Described
    optimizer: dict[str, Any]


class SavedRound(TypedDict):
    """Of :meth:`rlscuda.pruning.schedule.Round.to_dict`."""

    ratio: float
    report: PruneReport
    losses: list[float]
    outcome: str


class SavedSchedule(TypedDict):
    """Of :meth:`rlscuda.pruning.schedule.PruneSchedule.state_dict`."""

    epochs: int
    reference: float | None
    finished: bool
    rounds: list[SavedRound]


class SavedPruner(TypedDict):
    """Of :meth:`rlscuda.pruning.pruner.RLSPruner.state_dict`."""

    original: dict[str, int]


class SavedPruning(TypedDict):
    """Of :meth:`ScheduledPruning.state_dict`."""

    network: Described
    before: SavedPoint | None
    schedule: SavedSchedule
    pruner: SavedPruner
    stages: list[Stage]


class Point:
    """A trainer's network and optimizer at one moment, as a checkpoint can hold them.

    Step sizes are not part of it: the schedule of the trainer goes on.

    Args:
        trainer: what :meth:`restore` brings back to it.
        state: ``network`` and ``optimizer``, copies.
    """

    def __init__(self, trainer: Trainer, state: dict[str, Any]):
        self.trainer, self.state = trainer, state

    @classmethod
    def now(cls, trainer: Trainer) -> Point:
        """The present moment."""
        state = {"network": describe(trainer.model), "optimizer": trainer.optimizer.state_dict()}
        return cls(trainer, copy.deepcopy(state))

    def check(self) -> None:
        """Check that :meth:`restore` will find what it needs.

        Raises:
            ValueError: the state is not one of the trainer's network.
        """
        streams = capture_rng(self.trainer.device)
        model = rebuild(self.trainer.whole_model, self.state["network"])
        optimizer = build_optimizer(self.trainer.config, self.trainer.name, model)
        optimizer.load_state_dict(self.state["optimizer"])
        restore_rng(streams, self.trainer.device)

    def restore(self) -> None:
        """Replace the trainer's network and optimizer by those of the moment."""
        groups = copy.deepcopy(self.trainer.optimizer.state_dict()["param_groups"])
        self.trainer.rebuild(self.state["network"])
        optimizer = {**self.state["optimizer"], "param_groups": groups}
        self.trainer.optimizer.load_state_dict(optimizer)


class ScheduledPruning:
    """The rounds of pruning of one trainer.

    Args:
        trainer: of the RLS optimizer, at its start.
        spec: how much, in how many rounds.

    Raises:
        UserError: the network cannot be pruned.
    """

    def __init__(self, trainer: Trainer, spec: ScheduleSpec):
        self.trainer = trainer
        self.schedule = PruneSchedule(
            self,
            spec.ratio,
            spec.rounds,
            spec.curve,
            warmup=spec.warmup,
            tolerance=spec.tolerance,
            budget=spec.budget,
        )
        self.stages: list[Stage] = []
        self.before: Point | None = None
        self.pruner = self._pruner()
        try:
            couplings = trace(trainer.model, self.example).couplings
        except ValueError as error:
            raise UserError(f"--prune-schedule: {trainer.config.model}: {error}") from None
        if not couplings:
            raise UserError(
                f"--prune-schedule: {trainer.config.model} has no channels that can be removed"
            )
        self.units = {coupling.name: coupling.units for coupling in couplings}

    @property
    def example(self) -> Tensor:
        """One training image, as the network is given it."""
        return self.trainer.data.normalise(self.trainer.data.train.images[:1])

    def _pruner(self) -> RLSPruner:
        return RLSPruner(self.trainer.model, self.trainer.optimizer, self.example, ratio=0.0)

    def snapshot(self) -> Point:
        """The present moment, to which a round that fails returns."""
        self.before = Point.now(self.trainer)
        return self.before

    def step(self, ratio: float) -> PruneReport:
        """Prune until ``ratio`` of the original channels is gone.

        Raises:
            UserError: it cannot be done; network and optimizer are as they were.
        """
        try:
            return self.pruner.step(ratio=ratio)
        except ValueError as error:
            raise UserError(f"{self.trainer.config.model} was not pruned: {error}") from None

    def after_epoch(self, row: dict[str, Any], evaluate: Any) -> None:
        """Prune, wait or roll back, by the validation loss of an epoch; say so in its row.

        Nothing is pruned after the last epoch, when nothing could recover, and nothing changes
        once the training loss is not finite any more.

        Args:
            row: of the epoch that has just ended; it is given ``parameters``, ``flops`` (of one
                image) and ``pruning``, and after a change ``changed_val_loss`` and
                ``changed_val_accuracy``, of the changed network.
            evaluate: the validation loss and accuracy of the network now.
        """
        size = self.size()
        row |= {**size, "pruning": ""}
        schedule, number = self.schedule, len(self.schedule.rounds)
        last = self.trainer.epoch >= self.trainer.config.epochs and number < schedule.total
        if schedule.finished or last or self.trainer.diverged:
            return
        if not number and not math.isfinite(row["val_loss"]):
            return
        seen = {"val_loss": row["val_loss"], "val_accuracy": row["val_accuracy"]}
        row["pruning"] = outcome = schedule.after_epoch(row["val_loss"])
        if outcome == "pruned":
            kind = "recovered" if number else "whole"
            self.stages.append(Stage(kind, number, **size, **seen))
        elif outcome == "finished":
            self.stages.append(Stage("recovered", number, **size, **seen))
        if schedule.finished:
            self.before = None
        if outcome in ("pruned", "rolled back"):
            loss, accuracy = evaluate()
            row |= {"changed_val_loss": loss, "changed_val_accuracy": accuracy}
            size = self.size()
            number = len(schedule.rounds)
            self.stages.append(Stage(outcome, number, **size, val_loss=loss, val_accuracy=accuracy))

    def size(self) -> dict[str, int]:
        """Parameters of the network now, and FLOPs of the forward of one image."""
        return size_of(self.trainer.model, self.example)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rounds to come depend on, and the record of those done."""
        return {
            "network": describe(self.trainer.model),
            "before": None if self.before is None else self.before.state,
            "schedule": self.schedule.state_dict(),
            "pruner": self.pruner.state_dict(),
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the rounds were; the trainer's network becomes that of the moment.

        Raises:
            ValueError: the state is not one of this network and schedule.
        """
        self._check(state)
        self.trainer.rebuild(state["network"])
        self.pruner = self._pruner()
        self.pruner.load_state_dict(state["pruner"])
        self.before = None if state["before"] is None else Point(self.trainer, state["before"])
        self.schedule.load_state_dict(state["schedule"], self.before)
        own = [field.name for field in dataclasses.fields(Stage)]
        self.stages = [Stage(**{name: stage[name] for name in own}) for stage in state["stages"]]

    def _check(self, state: Any) -> None:
        check(state, SavedPruning, "the pruning")
        rounds, stages = state["schedule"]["rounds"], state["stages"]
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
        kinds = {stage["kind"] for stage in stages}
        if not kinds <= set(KINDS):
            raise ValueError(f"a stage must be one of {', '.join(KINDS)}, got {sorted(kinds)}")
        if state["before"] is not None:
            Point(self.trainer, state["before"]).check()


def write_pruning(
    trainer: Trainer, title: str, result: dict[str, Any], files: PruneFiles
) -> PruneRecord:
    """Save the pruned network of a finished training and the report of its rounds.

    Args:
        trainer: at its end, after one round or more.
        title: what network on what data.
        result: its entry in ``summary.json``.
        files: where to.

    Returns:
        what the report tells.
    """
    pruning = trainer.pruning
    assert pruning is not None
    size = trainer.config.batch_size
    gains = gains_of(trainer.whole_model(), trainer.model, pruning.example, size)
    seen = {key: result[key] for key in ("val_loss", "val_accuracy", "test_accuracy")}
    rounds = pruning.schedule.rounds
    stages = [*pruning.stages, Stage("final", len(rounds), **pruning.size(), **seen)]
    record = PruneRecord(
        title=title,
        optimizer=trainer.name,
        stages=stages,
        rounds=[done.to_dict() for done in rounds],
        gains=gains,
        epochs=trainer.history,
        files={"pruned.safetensors": MODELS["pruned.safetensors"]},
        planned=pruning.schedule.total,
    )
    with files.replaced() as new:
        save_pruned(trainer.model, new / "pruned.safetensors", optimizer=trainer.optimizer)
        write_report(new, record, {"prune_schedule": trainer.config.prune_schedule})
    return record

"""Event files for TensorBoard: every number of an epoch, and the health of the matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlscuda.cli.train.trainer import Trainer
from rlscuda.optimizer import RLSOptimizer


class Board:
    """The event files of one training, to be closed at its end.

    An epoch is written when the checkpoint holds it. Where a run is resumed, epochs that its files
    lack are added, and what they hold beyond the checkpoint counts no more.

    Args:
        folder: Of the files.
        trainer: At the position that it starts from.
    """

    def __init__(self, folder: Path, trainer: Trainer):
        from torch.utils.tensorboard import SummaryWriter

        recorded = _recorded(folder)
        self._writer = SummaryWriter(str(folder), purge_step=trainer.steps_done + 1)
        for row in trainer.history:
            if row["steps"] not in recorded:
                self._add(row, trainer if row["steps"] == trainer.steps_done else None)

    def add_epoch(self, trainer: Trainer) -> None:
        """Writes the epoch that a trainer has just finished."""
        self._add(trainer.history[-1], trainer)

    def close(self) -> None:
        """Ends the files."""
        self._writer.close()

    def _add(self, row: dict[str, Any], trainer: Trainer | None) -> None:
        """Writes a row, and the health that its trainer shows now if there is one."""
        values = dict(row)
        if trainer is not None and isinstance(trainer.optimizer, RLSOptimizer):
            values |= trainer.optimizer.health().as_dict()
        for name, value in values.items():
            if name not in ("epoch", "steps") and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["steps"])
        self._writer.flush()


def _recorded(folder: Path) -> set[int]:
    """The steps of the epochs that the files in a folder hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return set()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "val_loss" not in events.Tags()["scalars"]:
        return set()
    return {event.step for event in events.Scalars("val_loss")}

"""The options of `rlscuda study pretraining`, read from their texts and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import check_options, option, read_list, resumed
from rlscuda.cli.study.cells import CELLS, Cell
from rlscuda.studies.protocol import FAIRNESS, LADDER, RATES, Protocol, rules_of

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class StudyOptions:
    """What decides the result of a study; what is None is as the cell has it."""

    cell: str = option("mnist", f"What is learned: {', '.join(CELLS)}.", choices=tuple(CELLS))
    data: str | None = option(
        None, "mnist5k, PATH.npz or torchvision:NAME of the cell's classes; the cell's own else."
    )
    network: str | None = option(None, "One of the cell's; its first by default.")
    seeds: str = option("0,1,2", "Comma list; a pair of networks each.")
    ratios: str = option(
        ",".join(f"{ratio:g}" for ratio in LADDER), "The ladder: shares removed, from 0."
    )
    rules: str = option(
        "saliency+,saliency,l1,l2,random",
        "Comma list of importances, + where the remaining weights make up for what goes.",
    )
    granularity: str = option("channels", "channels or weights.", choices=("channels", "weights"))
    recovery: str = option("0", "Comma list of epochs that a pruned network is trained on.")
    fairness: str = option(
        "epochs,plateau",
        "What ends a training, comma list: epochs, plateau (of the validation loss), accuracy (of "
        "the arm from scratch).",
    )
    optimizer: str = option("rls", "rls or adam, of all trainings.", choices=tuple(RATES))
    rates: str | None = option(None, "Comma list of step sizes, of which validation chooses.")
    epochs: int | None = option(None, "On the target.", least=1)
    source_epochs: int | None = option(None, "On the source.", least=1)
    frozen_epochs: int = option(
        1, "Of those on the target, with all but the new head frozen.", least=0
    )
    most_epochs: int = option(30, "Bound of the fairness plateau.", least=1)
    source_images: int | None = option(None, "Training images of the source.", least=1)
    train_images: int | None = option(None, "Training images of the target.", least=1)
    val_images: int | None = option(None, "Validation images, of source and target.", least=1)
    test_images: int | None = option(None, "Test images of the target.", least=1)
    batch_size: int = option(64, "Images a step.", least=1)
    calibration_images: int = option(500, "Training images that calibrate.", least=1)

    def __post_init__(self) -> None:
        """Checks all that can be checked without the data."""
        check_options(self)
        if self.network is not None and self.network not in CELLS[self.cell].networks:
            known = ", ".join(CELLS[self.cell].networks)
            raise UserError(f"--network of {self.cell} must be one of {known}, got "
                            f"{self.network!r}")  # fmt: skip
        _ = self.protocol

    @property
    def settings(self) -> Cell:
        """The cell, with the numbers of images and epochs that are given in place of its own."""
        cell = CELLS[self.cell]
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(cell)}
        own = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(cell, **own)

    @property
    def protocol(self) -> Protocol:
        """The study's protocol.

        Raises:
            UserError: A text is no such list, or a number out of its range.
        """
        cell = self.settings
        rates = cell.step_sizes.get(self.optimizer, ())
        if self.rates is not None:
            rates = _numbers("--rates", self.rates, float)
        rules = read_list("--rules", self.rules, rules_of(self.granularity), "rule")
        fairness = read_list("--fairness", self.fairness, FAIRNESS, "end")
        try:
            return Protocol(
                seeds=_numbers("--seeds", self.seeds, int),
                ratios=_numbers("--ratios", self.ratios, float),
                recovery=_numbers("--recovery", self.recovery, int),
                rules=rules, fairness=fairness, rates=rates, granularity=self.granularity,
                optimizer=self.optimizer, epochs=cell.epochs, source_epochs=cell.source_epochs,
                frozen_epochs=self.frozen_epochs, most_epochs=self.most_epochs,
                batch_size=self.batch_size, calibration=self.calibration_images,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--{error}") from None

    @classmethod
    def resumed(cls, stored: Any, given: Mapping[str, Any]) -> StudyOptions:
        """The options of a study that was begun, which those given again agree with.

        Raises:
            UserError: They do not, or those stored are of another version; `data` may differ, as
                files move.
        """
        return resumed(cls, "study", stored, given)


def _numbers(flag: str, text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} must be a comma list of numbers, got {text!r}") from None

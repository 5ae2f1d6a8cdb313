"""What a run is: the options that decide its result, and those that only decide how it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from rlscuda.cli.errors import UserError, in_range, reading
from rlscuda.cli.prune_options import ScheduleSpec
from rlscuda.files.documents import check

OPTIMIZERS = ("rls", "sgd", "adam")
SCHEDULES = ("cosine", "constant")
FORMS = ("adaptive", "paper", "natural")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options of ``rlscuda train`` that decide the result of a run.

    Attributes:
        model: a named model or ``module:factory``.
        data: ``mnist5k``, a ``.npz`` file, ``torchvision:NAME`` or a folder.
        optimizer: comma list of ``rls``, ``sgd``, ``adam``; each is trained in turn.
        epochs: passes over the training images.
        batch_size: images a step.
        seed: of the initial weights, the data order and every other random choice.
        lr: ``0.1`` or ``rls=0.1,sgd=0.05``; None leaves every optimizer its default.
        weight_decay: the same for the weight decay.
        schedule: ``cosine`` (to zero, by step) or ``constant``.
        form: form of the RLS update.
        val_fraction: share of the training images that validates.
        image_size: side that folder images are resized to; None expects one size.
        prune_schedule: rounds of pruning while RLS trains, see
            :class:`rlscuda.cli.prune_options.ScheduleSpec`; None for none.
    """

    model: str = "lenet5"
    data: str = "mnist5k"
    optimizer: str = "rls"
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    lr: str | None = None
    weight_decay: str | None = None
    schedule: str = "cosine"
    form: str = "adaptive"
    val_fraction: float = 0.1
    image_size: int | None = None
    prune_schedule: str | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without reading the data."""
        in_range("--epochs", self.epochs, 1)
        in_range("--batch-size", self.batch_size, 1)
        in_range("--seed", self.seed, 0, 2**63 - 1)
        if self.image_size is not None:
            in_range("--image-size", self.image_size, 1)
        if not 0.0 < self.val_fraction < 1.0:
            raise UserError(
                f"--val-fraction must lie between 0 and 1, both excluded, got {self.val_fraction}"
            )
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--form", self.form, FORMS)
        names = self.optimizers
        for name in names:
            _one_of("--optimizer", name, OPTIMIZERS)
        if self.prune_schedule is not None:
            ScheduleSpec.read(self.prune_schedule)
            if "rls" not in names:
                raise UserError(
                    f"--prune-schedule prunes while rls trains; --optimizer is {self.optimizer}"
                )
        if len(set(names)) != len(names):
            raise UserError(f"--optimizer names one optimizer twice: {self.optimizer}")
        for name, value in self.overrides("lr").items():
            if not 0.0 < value < float("inf"):
                raise UserError(f"--lr of {name} must be a positive number, got {value}")
        for name, value in self.overrides("weight_decay").items():
            if not 0.0 <= value < float("inf"):
                raise UserError(f"--weight-decay of {name} must be a number >= 0, got {value}")

    def check_new(self) -> None:
        """Check what only a run that starts must fulfil; an older one can be resumed without.

        Raises:
            UserError: the schedule of pruning would never prune.
        """
        if self.prune_schedule is None:
            return
        warmup = ScheduleSpec.read(self.prune_schedule).warmup
        if warmup >= self.epochs:
            raise UserError(
                f"--prune-schedule {self.prune_schedule} first prunes after epoch {warmup} and "
                f"trains on: --epochs must be at least {warmup + 1}, got {self.epochs}"
            )

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers, in the order they are trained."""
        return tuple(name.strip() for name in self.optimizer.split(","))

    def overrides(self, option: str) -> dict[str, float]:
        """Values given on the command line for ``lr`` or ``weight_decay``, by optimizer.

        Raises:
            UserError: the text is not ``VALUE`` or ``NAME=VALUE,…`` of this run's optimizers.
        """
        flag = "--" + option.replace("_", "-")
        text = getattr(self, option)
        if text is None:
            return {}
        if "=" not in text:
            if len(self.optimizers) > 1:
                raise UserError(
                    f"{flag} {text} does not say which of {self.optimizer} it is for: expected "
                    + ",".join(f"{name}=VALUE" for name in self.optimizers)
                )
            return {self.optimizers[0]: _number(flag, text)}
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            _one_of(flag, name, self.optimizers)
            if name in values:
                raise UserError(f"{flag} names {name} twice: {text}")
            values[name] = _number(flag, value)
        return values

    def fingerprint(self, data_fingerprint: str) -> str:
        """Hash that a checkpoint carries: same options and same data give the same hash.

        The place of the data does not count, its content does.
        """
        options = dataclasses.asdict(self)
        del options["data"]
        options["data_fingerprint"] = data_fingerprint
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()

    @classmethod
    def resumed(cls, stored: dict[str, Any], given: dict[str, Any]) -> RunConfig:
        """The config of an existing run, checked against the options given again.

        Args:
            stored: the options in the run's ``config.json``.
            given: the options written on the command line now.

        Raises:
            UserError: the stored options are not those of a run, or an option given now differs
                from the stored one. Only ``data`` may: the files can have moved, and their
                fingerprint is checked.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            raise UserError("config.json does not hold the options of this version of rlscuda")
        with reading("config.json"):
            check(stored, cls, "the options")
        for name, value in given.items():
            if name != "data" and stored[name] != value:
                raise UserError(
                    f"--resume continues the run as it was started: --{name.replace('_', '-')} "
                    f"was {stored[name]}, got {value}; start another run with --out"
                )
        if "data" in given:
            stored = {**stored, "data": given["data"]}
        return cls(**stored)


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} expects a number, got {text!r}") from None

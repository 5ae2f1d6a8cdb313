"""What the options of pruning while a network trains say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import (
    Option,
    one_of,
    read_amount,
    read_count,
    read_pairs,
    read_ratio,
    read_rise,
)
from rlscuda.pruning.adaptive.options import PENALTIES, WHAT
from rlscuda.pruning.gates.branches import SIZES
from rlscuda.pruning.schedule import CURVES

_POSITIVE = Option("Of a price.", above=0)


@dataclass(frozen=True)
class ScheduleSpec:
    """`CURVE:RATIO:ROUNDS[,warmup=EPOCHS][,tolerance=SHARE][,budget=EPOCHS]`, read.

    Attributes:
        curve: How the ratio grows.
        ratio: Share of the channels gone after the last round.
        rounds: Rounds of pruning.
        warmup: Epochs before the first.
        tolerance: How far above the remembered validation loss counts as recovered.
        budget: Epochs that a round may take to recover.
    """

    curve: str
    ratio: float
    rounds: int
    warmup: int = 1
    tolerance: float = 0.0
    budget: int = 5

    @classmethod
    def read(cls, text: str) -> ScheduleSpec:
        """Reads the text of `--prune-schedule`.

        Raises:
            UserError: It is not of that form, or a number is out of its range.
        """
        flag = "--prune-schedule"
        main, *extra = (part.strip() for part in text.split(","))
        pieces = main.split(":")
        if len(pieces) != 3:
            raise UserError(f"{flag} must be CURVE:RATIO:ROUNDS, such as cubic:0.7:4, got {text!r}")
        curve, ratio_text, rounds = pieces
        one_of(flag, curve, CURVES)
        ratio = read_ratio(ratio_text, flag)
        if isinstance(ratio, dict) or ratio == 0:
            raise UserError(f"{flag}: the ratio must lie between 0 and 1, got {ratio_text!r}")
        values: dict[str, Any] = {"rounds": read_count(flag, "rounds", rounds)}
        for name, value in read_pairs(flag, extra, text).items():
            one_of(flag, name, ("warmup", "tolerance", "budget"))
            if name == "tolerance":
                values[name] = read_rise(f"{flag}: tolerance", value)
            else:
                values[name] = read_count(flag, name, value)
        return cls(curve, ratio, **values)


@dataclass(frozen=True)
class AdaptiveSpec:
    """`LEFT[,penalty=NAME][,what=NAMES][,warmup=EPOCHS][,epochs=EPOCHS]`, read.

    Attributes:
        left: Parameters that are left; a share, or from 1 on a number.
        penalty: What a channel or branch pays for.
        what: What may go.
        warmup: Epochs before that; None for half of the training, or as many as leave an epoch
            after it.
        epochs: Epochs in which it does.
    """

    left: float
    penalty: str = "output"
    what: tuple[str, ...] = WHAT
    warmup: int | None = None
    epochs: int = 3

    def start(self, epochs: int) -> int:
        """Epochs before anything goes, of a training of so many."""
        if self.warmup is not None:
            return self.warmup
        return max(1, min(epochs // 2, epochs - self.epochs - 1))

    @classmethod
    def read(cls, text: str) -> AdaptiveSpec:
        """Reads the text of `--prune-adaptive`.

        Raises:
            UserError: It is not of that form, or a number is out of its range.
        """
        flag = "--prune-adaptive"
        left, *extra = (part.strip() for part in text.split(","))
        values: dict[str, Any] = {}
        for name, value in read_pairs(flag, extra, text).items():
            one_of(flag, name, ("penalty", "what", "warmup", "epochs"))
            if name == "penalty":
                one_of(flag, value, PENALTIES)
                values[name] = value
            elif name == "what":
                values[name] = tuple(dict.fromkeys(value.split("+")))
                for part in values[name]:
                    one_of(flag, part, WHAT)
            else:
                values[name] = read_count(flag, name, value)
        return cls(read_amount(flag, left), **values)


@dataclass(frozen=True)
class GateSpec:
    """`PRICE[,by=SIZE][,epochs=EPOCHS]`, read.

    Attributes:
        price: What a branch must lower the loss by, on average over the branches.
        by: What the price of a branch is a share by.
        epochs: Epochs in which the gates learn; None for four fifths of the run's.
    """

    price: float
    by: str = "equal"
    epochs: int | None = None

    @classmethod
    def read(cls, text: str) -> GateSpec:
        """Reads the text of `--gates`.

        Raises:
            UserError: It is not of that form, or a number is out of its range.
        """
        flag = "--gates"
        price, *extra = (part.strip() for part in text.split(","))
        values: dict[str, Any] = {}
        for name, value in read_pairs(flag, extra, text).items():
            one_of(flag, name, ("by", "epochs"))
            if name == "by":
                one_of(flag, value, SIZES)
                values[name] = value
            else:
                values[name] = read_count(flag, name, value)
        try:
            number = float(price)
        except ValueError:
            raise UserError(f"{flag} must be a price such as 0.03, got {text!r}") from None
        _POSITIVE.check(f"{flag}: the price", number)
        return cls(number, **values)

    def learning(self, epochs: int) -> int:
        """Epochs in which the gates learn, of so many."""
        return max(1, epochs * 4 // 5) if self.epochs is None else self.epochs

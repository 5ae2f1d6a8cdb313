"""The options of pruning, read from their texts and checked before anything is touched."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from rlscuda.cli.errors import UserError, in_range
from rlscuda.pruning.schedule import CURVES

IMPORTANCES = (
    "saliency", "l1", "l2", "taylor",
    "bn_scale", "random",
)  # fmt: skip
SOURCES = ("own", "calibration")
EXPORTS = {"onnx": "model.onnx", "pt2": "model.pt2"}
_POWERS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TARGETS = ("ratio", "target_flops", "target_params", "max_loss")


@dataclass(frozen=True)
class PruneOptions:
    """The options of ``rlscuda prune`` that decide what is removed.

    Attributes:
        ratio: ``0.7``, or ``conv*=0.5,fc1=0.8``.
        target_flops: ``1.5M`` an image, or a share: ``0.5x``, ``50%``.
        target_params: ``250k`` or a share.
        max_loss: how far the validation loss may rise, relative to it: ``0.1`` or ``10%``.
        importance: what ranks the channels.
        selection: ``greedy`` or ``one-shot``; None for the importance's default.
        scope: ``layer`` or ``global``.
        source: ``own`` or ``calibration``; None for what the run's optimizer has.
        round_to: what stays of each layer is a multiple of it.
        compensate: whether the remaining weights change.
        adapt_norms: whether the statistics of batch norms follow the cut.
        calibration_images: training images that calibrate.
        recover: epochs of training on.
        recover_lr: step size they start with; None for .3 of the run's for RLS, else a fifth.
        export: comma list of ``onnx`` and ``pt2``.
        measure_batch: images of the forward that memory and latency are measured on; None for the
            run's batch.
    """

    ratio: str | None = None
    target_flops: str | None = None
    target_params: str | None = None
    max_loss: str | None = None
    importance: str = "saliency"
    selection: str | None = None
    scope: str = "layer"
    source: str | None = None
    round_to: int = 1
    compensate: bool = True
    adapt_norms: bool = True
    calibration_images: int = 1000
    recover: int = 0
    recover_lr: float | None = None
    export: str | None = None
    measure_batch: int | None = None

    def __post_init__(self) -> None:
        """Check all that can be checked without the run."""
        given = ["--" + name.replace("_", "-") for name in _TARGETS if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                "say how much to remove, by one of --ratio, --target-flops, --target-params and "
                f"--max-loss; got {' and '.join(given) or 'none'}"
            )
        _one_of("--importance", self.importance, IMPORTANCES)
        if self.selection is not None:
            _one_of("--selection", self.selection, ("greedy", "one-shot"))
        if self.selection == "greedy" and self.importance != "saliency":
            raise UserError(
                f"--selection greedy is for --importance saliency, got {self.importance}"
            )
        _one_of("--scope", self.scope, ("layer", "global"))
        if self.source is not None:
            _one_of("--source", self.source, SOURCES)
        for name, least in (
            ("round_to", 1), ("calibration_images", 1), ("recover", 0), ("measure_batch", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                in_range("--" + name.replace("_", "-"), value, least)
        if self.recover_lr is not None and not 0 < self.recover_lr < float("inf"):
            raise UserError(f"--recover-lr must be a positive number, got {self.recover_lr}")
        if self.recover_lr is not None and not self.recover:
            raise UserError("--recover-lr is the step size of --recover EPOCHS, which is missing")
        _ = self.exports, self.target

    @property
    def exports(self) -> tuple[str, ...]:
        """The formats to export to.

        Raises:
            UserError: an unknown one, or one twice.
        """
        names = tuple(part.strip() for part in self.export.split(",")) if self.export else ()
        for name in names:
            _one_of("--export", name, tuple(EXPORTS))
        if len(set(names)) != len(names):
            raise UserError(f"--export names one format twice: {self.export}")
        return names

    @property
    def target(self) -> dict[str, Any]:
        """How much goes, as the argument of :class:`RLSPruner`."""
        if self.ratio:
            ratio = read_ratio(self.ratio)
            if self.scope == "global" and isinstance(ratio, dict):
                raise UserError(
                    f"--ratio must be one number with --scope global, got {self.ratio!r}"
                )
            return {"ratio": ratio}
        if self.max_loss:
            return {"max_loss": read_rise("--max-loss", self.max_loss)}
        name = "target_flops" if self.target_flops else "target_params"
        return {name: read_amount("--" + name.replace("_", "-"), getattr(self, name))}

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ScheduleSpec:
    """``CURVE:RATIO:ROUNDS[,warmup=EPOCHS][,tolerance=SHARE][,budget=EPOCHS]``, read.

    Attributes:
        curve: how the ratio grows.
        ratio: share of the channels gone after the last round.
        rounds: rounds of pruning.
        warmup: epochs before the first.
        tolerance: how far above the remembered validation loss counts as recovered.
        budget: epochs that a round may take to recover.
    """

    curve: str
    ratio: float
    rounds: int
    warmup: int = 1
    tolerance: float = 0.0
    budget: int = 5

    @classmethod
    def read(cls, text: str) -> ScheduleSpec:
        """Read the text of ``--prune-schedule``.

        Raises:
            UserError: it is not of that form, or a number is out of its range.
        """
        flag = "--prune-schedule"
        main, *extra = (part.strip() for part in text.split(","))
        pieces = main.split(":")
        if len(pieces) != 3:
            raise UserError(f"{flag} must be CURVE:RATIO:ROUNDS, such as cubic:0.7:4, got {text!r}")
        _one_of(flag, pieces[0], tuple(CURVES))
        ratio = read_ratio(pieces[1], flag)
        if isinstance(ratio, dict) or ratio == 0:
            raise UserError(f"{flag}: the ratio must lie between 0 and 1, got {pieces[1]!r}")
        values: dict[str, Any] = {"rounds": _integer(flag, "rounds", pieces[2], 1)}
        for part in extra:
            name, _, value = (piece.strip() for piece in part.partition("="))
            _one_of(flag, name, ("warmup", "tolerance", "budget"))
            if name in values:
                raise UserError(f"{flag} names {name} twice: {text}")
            if name == "tolerance":
                values[name] = read_rise(f"{flag}: tolerance", value)
            else:
                values[name] = _integer(flag, name, value, 1)
        return cls(pieces[0], ratio, **values)


def read_amount(flag: str, text: str) -> float:
    """A size, such as ``250000``, ``250k`` or ``1.5M``; or a share: ``0.5``, ``0.5x``, ``50%``.

    Returns:
        the share, in (0, 1), or the size, 1 or more.

    Raises:
        UserError: neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|x|[kMGT]?)", text.strip())
    if match:
        number, unit = float(match[1]), match[2]
        is_share = unit in ("%", "x") or (not unit and number < 1)
        value = number / 100 if unit == "%" else number * _POWERS.get(unit, 1)
        if (0 < value < 1) if is_share else 1 <= value < math.inf:
            return value if is_share else float(int(value))
    raise UserError(
        f"{flag} must be a number such as 250000 or 1.5M, or a share of the whole between 0 and 1 "
        f"such as 0.5x or 50%, got {text!r}"
    )


def read_rise(flag: str, text: str) -> float:
    """A relative rise: ``0.1`` or ``10%``.

    Raises:
        UserError: no such number, or a negative one.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    rise = float(match[1]) / (100 if match[2] else 1) if match else math.inf
    if rise == math.inf:
        raise UserError(f"{flag} must be a rise such as 0.1 or 10%, got {text!r}")
    return rise


def read_ratio(text: str, flag: str = "--ratio") -> float | dict[str, float]:
    """A ratio of channels in [0, 1), or such ratios by name or shell pattern of a coupling.

    Raises:
        UserError: neither.
    """
    if "=" not in text:
        return _share(flag, text)
    ratios: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in ratios:
            raise UserError(f"{flag} names {name} twice: {text}")
        ratios[name] = _share(flag, value)
    return ratios


def _share(flag: str, text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 1.0
    if not 0 <= value < 1:
        raise UserError(f"{flag} must lie in [0, 1), such as 0.7 or 70%, got {text!r}")
    return value


def _integer(flag: str, name: str, text: str, least: int) -> int:
    number = int(text) if re.fullmatch(r"\d{1,18}", text) else -1
    if number < least:
        raise UserError(f"{flag}: {name} must be a whole number >= {least}, got {text!r}")
    in_range(f"{flag}: {name}", number, least)
    return number


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")

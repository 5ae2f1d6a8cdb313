"""What a study of pre-training varies and what it keeps fixed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rlscuda.pruning.choice.ranking import IMPORTANCES
from rlscuda.pruning.options import check_number

LADDER = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FAIRNESS = ("epochs", "plateau", "accuracy")
RATES = {"rls": (0.02, 0.05, 0.1), "adam": (1e-3, 3e-3)}


@dataclass(frozen=True)
class Split:
    """Inputs and their labels.

    Attributes:
        x: Inputs [N, ...] as the network takes them.
        y: Labels [N], int64.
    """

    x: Tensor
    y: Tensor

    def __len__(self):
        return len(self.y)


@dataclass(frozen=True)
class Task:
    """A classification task: images to train on, to choose by, and to be tested on at the end.

    Attributes:
        train: Trains, and calibrates.
        val: Chooses step sizes and ends trainings.
        test: Read once a network, when it is final.
        classes: Labels lie in [0, classes).

    Raises:
        ValueError: A split is empty, has not one label an input, or a label out of range.
    """

    train: Split
    val: Split
    test: Split
    classes: int

    def __post_init__(self):
        for name in ("train", "val", "test"):
            split = getattr(self, name)
            if not len(split) or len(split.x) != len(split):
                raise ValueError(f"{name} must have one label an input, at least one, got "
                                 f"{len(split.x)} inputs, {len(split)} labels")  # fmt: skip
            low, high = int(split.y.min()), int(split.y.max())
            if low < 0 or high >= self.classes:
                raise ValueError(f"labels of {name} must lie in [0, {self.classes - 1}], got "
                                 f"[{low}, {high}]")  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of all inputs and labels."""
        splits = (self.train, self.val, self.test)
        return fingerprint(tensor for split in splits for tensor in (split.x, split.y))


@dataclass(frozen=True)
class Protocol:
    """The factors of a study, and its constants.

    Attributes:
        seeds: One pair of networks each.
        ratios: The ladder: shares of the channels (or weights) of each layer that are removed.
        rules: What decides who goes: an importance of `RLSPruner`, with `+` where the remaining
            weights make up for what went, as `saliency+` and `l1+`.
        granularity: ``channels`` or ``weights``; of weights there are `saliency`, `l1`, `random`.
        recovery: Epochs that a pruned network is trained on, one curve each; 0 for none.
        fairness: When a training on the target ends. ``epochs``: both arms after `epochs`, with
            cosine decay; ``plateau``: each when its validation loss has not improved for
            `patience` epochs, at a constant step size, and its best epoch is taken; ``accuracy``:
            the pre-trained arm as soon as it reaches the validation accuracy of the other one,
            which is that of ``epochs``.
        optimizer: ``rls`` or ``adam``, of all trainings; beside Adam a `SketchTracker` runs.
        rates: Step sizes to choose from, by validation accuracy of the first seed, for each arm;
            the last one trains the source. By default those of `RATES` for the optimizer.
        epochs: On the target.
        source_epochs: On the source.
        frozen_epochs: Of those on the target, how many the pre-trained arm first trains its new
            head alone.
        most_epochs: Bound of ``plateau``.
        patience: Of ``plateau``.
        batch_size: Of all trainings.
        calibration: Training images that calibrate and adapt batch norms, and each source of
            matrices is held to.
        tolerance: Of prunability, in accuracy: .01 is a point.

    Raises:
        ValueError: A factor is empty, names something twice or something that there is not, or a
            number is out of its range.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    ratios: tuple[float, ...] = LADDER
    rules: tuple[str, ...] = ("saliency+", "saliency", "l1", "l2", "random")
    granularity: str = "channels"
    recovery: tuple[int, ...] = (0,)
    fairness: tuple[str, ...] = ("epochs", "plateau")
    optimizer: str = "rls"
    rates: tuple[float, ...] = ()
    epochs: int = 10
    source_epochs: int = 5
    frozen_epochs: int = 1
    most_epochs: int = 30
    patience: int = 3
    batch_size: int = 64
    calibration: int = 500
    tolerance: float = 0.01

    def __post_init__(self):
        if self.optimizer not in RATES:
            raise ValueError(f"optimizer must be {' | '.join(RATES)}, got {self.optimizer!r}")
        object.__setattr__(self, "rates", self.rates or RATES[self.optimizer])
        for name in ("rules", "fairness", "seeds", "recovery", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be one or more, none twice, got {values}")
        for name, allowed in (("rules", rules_of(self.granularity)), ("fairness", FAIRNESS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise ValueError(f"{name} must be of {', '.join(allowed)}, got {value!r}")
        ascending = all(a < b for a, b in zip(self.ratios, self.ratios[1:]))
        if not self.ratios or self.ratios[0] != 0 or not ascending or not self.ratios[-1] < 1:
            raise ValueError(f"ratios must ascend from 0 and stay below 1, got {self.ratios}")
        for name, least in (
            ("epochs", 1), ("source_epochs", 1), ("frozen_epochs", 0), ("most_epochs", 1),
            ("patience", 1), ("batch_size", 1), ("calibration", 1),
        ):  # fmt: skip
            check_number(name, getattr(self, name), least, whole=True)
        for value in self.recovery:
            check_number("recovery", value, 0, whole=True)
        for value in self.seeds:
            check_number("seeds", value, 0, whole=True)
        check_number("tolerance", self.tolerance, 0)
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates must be positive, got {self.rates}")
        if self.frozen_epochs >= self.epochs:
            raise ValueError(
                f"frozen_epochs must be less than the {self.epochs} epochs, got "
                f"{self.frozen_epochs}"
            )

    def to_dict(self) -> dict[str, object]:
        """The protocol as plain data."""
        fields = dataclasses.asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields}


def rules_of(granularity: str) -> tuple[str, ...]:
    """The rules that there are for a granularity.

    Raises:
        ValueError: There is no such granularity.
    """
    if granularity not in ("channels", "weights"):
        raise ValueError(f"granularity must be channels | weights, got {granularity!r}")
    names = IMPORTANCES if granularity == "channels" else ("saliency", "l1", "random")
    return tuple(name + plus for name in names for plus in ("+", ""))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash of tensors: their shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()

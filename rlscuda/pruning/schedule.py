"""Recover, then prune: the loop of Yu et al. 2022, as a callback of any training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlscuda.pruning.options import check_number
from rlscuda.pruning.report import PruneReport


def _one_cycle(share: float) -> float:
    """The one-cycle curve of Hubens et al. 2021: a slow start, a fast middle, a slow end."""
    steep, middle = 14.0, 5.0
    return (1 + math.exp(-steep + middle)) / (1 + math.exp(-steep * share + middle))


# ratio in the end, share of the rounds done -> ratio gone
CURVES: dict[str, Callable[[float, float], float]] = {
    "one_shot": lambda ratio, share: ratio,
    "linear": lambda ratio, share: ratio * share,
    "iterative": lambda ratio, share: 1 - (1 - ratio) ** share,
    "cubic": lambda ratio, share: ratio * (1 - (1 - share) ** 3),
    "one_cycle": lambda ratio, share: ratio * _one_cycle(share),
}


def ratio_after(curve: str, ratio: float, done: int, rounds: int) -> float:
    r"""The share of the original units that is gone after `done` of `rounds` rounds.

    Args:
        curve: ``one_shot`` (all in the first round); ``linear``; ``iterative`` (in each round the
            same share of what is left); ``cubic`` (automated gradual pruning, Zhu and Gupta 2017:
            fast first, slow last); ``one_cycle`` (Hubens et al. 2021: slow, fast, slow).
        ratio: Share gone in the end, in [0, 1).
        done: Rounds done, in [0, rounds].
        rounds: Rounds in all, > 0.

    Returns:
        The share, 0 before the first round and `ratio` after the last.

    Raises:
        ValueError: An unknown curve or a number out of its range.

    Example:
        >>> [round(ratio_after("cubic", 0.8, k, 4), 3) for k in range(5)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    if curve not in CURVES:
        raise ValueError(f"curve must be {' | '.join(CURVES)}, got {curve!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    if not (rounds > 0 and 0 <= done <= rounds):
        raise ValueError(f"expected 0 <= done <= rounds and rounds > 0, got {done} of {rounds}")
    if done == 0:
        return 0.0
    return CURVES[curve](ratio, done / rounds)


class Restorable(Protocol):
    """A point of training that can be returned to, as `Snapshot`."""

    def restore(self) -> None:
        """Returns to it."""


class Pruner(Protocol):
    """What a schedule asks of a pruner, as `RLSPruner` does it."""

    def snapshot(self) -> Restorable:
        """The point of training now."""

    def step(self, ratio: float) -> PruneReport:
        """Prunes until `ratio` of the original units is gone."""


@dataclass
class Round:
    """One round of the loop.

    Attributes:
        ratio: Share of the original units that was to be gone after it.
        report: What the pruning changed.
        losses: Validation loss after each epoch since.
        outcome: `recovering`, `recovered` or `rolled back`.
    """

    ratio: float
    report: PruneReport
    losses: list[float] = field(default_factory=list)
    outcome: str = "recovering"

    def to_dict(self) -> dict[str, Any]:
        """The round as plain data."""
        return {**vars(self), "losses": list(self.losses), "report": self.report.to_dict()}


class PruneSchedule:
    r"""Prunes in rounds while training goes on: each waits until the validation loss is back.

    After `warmup` epochs the validation loss is remembered and the first round pruned; once the
    loss is back within `tolerance` of it, the next round follows. A round that is not back within
    `budget` epochs is rolled back, and pruning ends there. The papers' loop is
    ``curve="iterative", tolerance=0``.

    Args:
        pruner: What prunes; its own ratio or target plays no part.
        ratio: Share of the original units gone after the last round, in (0, 1).
        rounds: Rounds of pruning.
        curve: How the ratio grows from round to round, see `ratio_after`.
        warmup: Epochs before the first round.
        tolerance: How far above the remembered loss, relative to it, counts as recovered.
        budget: Epochs a round may take to recover; None for as many as it takes.
        on_change: Called after the network has been pruned or rolled back, with the current round;
            for what must follow it, such as an averaged copy of the weights.

    Attributes:
        rounds: The `Round` of each pruning so far.
        reference: The remembered validation loss, None before the first round.
        finished: Whether pruning has ended.

    Raises:
        ValueError: A number is out of its range, or the curve unknown.

    Example:
        >>> schedule = PruneSchedule(pruner, ratio=0.7, rounds=4)      # doctest: +SKIP
        >>> for epoch in range(50):                                    # doctest: +SKIP
        ...     train_one_epoch()
        ...     schedule.after_epoch(validation_loss())
        ...     if schedule.finished:
        ...         break
    """

    def __init__(
        self,
        pruner: Pruner,
        ratio: float,
        rounds: int = 4,
        curve: str = "cubic",
        *,
        warmup: int = 1,
        tolerance: float = 0.0,
        budget: int | None = 5,
        on_change: Callable[[Round], None] | None = None,
    ):
        check_number("ratio", ratio)
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {ratio}")
        check_number("rounds", rounds, 1, whole=True)
        ratio_after(curve, ratio, 0, rounds)  # checks the curve
        for name, value, least in (("warmup", warmup, 0), ("tolerance", tolerance, 0)):
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be >= 1 epoch or None, got {budget}")
        if "blocks" in getattr(pruner, "what", ()):
            raise ValueError(
                "a schedule's ratios are of channels alone, got a pruner of blocks too"
            )
        self.pruner, self.ratio, self.curve = pruner, ratio, curve
        self.total, self.warmup, self.tolerance, self.budget = rounds, warmup, tolerance, budget
        self.on_change = on_change
        self.rounds: list[Round] = []
        self.reference: float | None = None
        self.finished = False
        self._epochs = 0
        self._before: Restorable | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, as plain data; without the point that a roll back returns to."""
        return {
            "epochs": self._epochs,
            "reference": self.reference,
            "finished": self.finished,
            "rounds": [done.to_dict() for done in self.rounds],
        }

    def load_state_dict(self, state: dict[str, Any], before: Restorable | None) -> None:
        """Goes to where a loop was.

        Args:
            state: Of `state_dict`; model and optimizer must be those of that moment.
            before: The point to which a roll back returns, while a round is recovering.

        Raises:
            ValueError: A round is recovering, and there is no such point.
        """
        recovering = state["rounds"] and not state["finished"] and self.budget is not None
        if recovering and before is None:
            raise ValueError(
                "before must be the point to roll back to while a round is recovering, got None"
            )
        self._epochs, self.reference = state["epochs"], state["reference"]
        self.finished, self._before = state["finished"], before
        self.rounds = [
            Round(**{**entry, "report": PruneReport.from_dict(entry["report"])})
            for entry in state["rounds"]
        ]

    def after_epoch(self, loss: float) -> str:
        """Says what the validation loss of a finished epoch leads to, and does it.

        Args:
            loss: The validation loss now.

        Returns:
            ``warming up``, ``recovering``, ``pruned`` (a round has just begun), ``rolled back`` or
            ``finished``.

        Raises:
            ValueError: The loss that is to be remembered is not finite, or the pruner cannot prune.
        """
        if self.finished:
            return "finished"
        self._epochs += 1
        if not self.rounds:
            if self._epochs < self.warmup:
                return "warming up"
            if not math.isfinite(loss):
                raise ValueError(f"the validation loss before pruning must be finite, got {loss}")
            self.reference = loss
            return self._prune()
        now = self.rounds[-1]
        now.losses.append(loss)
        assert self.reference is not None
        if loss <= self.reference + self.tolerance * abs(self.reference):
            now.outcome = "recovered"
            if len(self.rounds) < self.total:
                return self._prune()
            return self._finish("finished")
        if self.budget is None or len(now.losses) < self.budget:
            return "recovering"
        assert self._before is not None
        self._before.restore()
        now.outcome = "rolled back"
        if self.on_change:
            self.on_change(now)
        return self._finish("rolled back")

    def _prune(self) -> str:
        self._before = None if self.budget is None else self.pruner.snapshot()
        ratio = ratio_after(self.curve, self.ratio, len(self.rounds) + 1, self.total)
        self.rounds.append(Round(ratio, self.pruner.step(ratio=ratio)))
        if self.on_change:
            self.on_change(self.rounds[-1])
        return "pruned"

    def _finish(self, outcome: str) -> str:
        self.finished, self._before = True, None
        return outcome

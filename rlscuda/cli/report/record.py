"""What a pruning was and did: the content of its report, and of `report.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.running.measure import Gains, compare, count_flops, count_parameters, measure

KINDS = ("whole", "pruned", "recovered", "recovering", "rolled back", "final")


@dataclass(frozen=True)
class Stage:
    """How good and how large the network was at one moment.

    Attributes:
        kind: One of `KINDS`; `recovering` is trained on, but the validation loss was not back.
        round: Rounds of pruning before it.
        parameters: Elements of all parameters.
        flops: Floating-point operations of the forward of one image.
        val_loss: Validation cross-entropy.
        val_accuracy: In [0, 1].
        test_accuracy: In [0, 1]; None where the test images were not shown to it.
    """

    kind: str
    round: int
    parameters: int
    flops: float
    val_loss: float
    val_accuracy: float
    test_accuracy: float | None = None

    @property
    def label(self) -> str:
        """The stage in words."""
        return self.kind if self.kind in ("whole", "final") else f"{self.kind}, round {self.round}"


@dataclass(frozen=True)
class Width:
    """Units of one coupling before the first and after the last round that stands."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Segment:
    """One round's part of a coupling's saliency spectrum.

    Attributes:
        start: Units that earlier rounds had removed.
        cost: Of each removal in order, made or not.
        removed: How many of them were made.
        last: Whether no later round follows, so that the removals not made are shown too.
    """

    start: int
    cost: list[float]
    removed: int
    last: bool


@dataclass(frozen=True)
class PruneRecord:
    """One pruning of one network, in one round or in several.

    Attributes:
        title: What network on what data.
        optimizer: Which of the run's optimizers trained it.
        stages: The moments at which it was evaluated, the whole network first.
        rounds: Of each round its ratio, outcome, losses and `PruneReport`, as plain data.
        gains: What the whole and the final network cost.
        epochs: The rows of the training that the rounds were part of; empty for a pruning after it.
        files: What each file beside the report is, by its name.
        compensate: Whether the remaining weights were changed to make up for what went.
        planned: Rounds that were asked for.
    """

    title: str
    optimizer: str
    stages: list[Stage]
    rounds: list[dict[str, Any]]
    gains: Gains
    epochs: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    compensate: bool = True
    planned: int = 1

    @property
    def standing(self) -> list[dict[str, Any]]:
        """The reports of the rounds that were not rolled back, as plain data."""
        return [r["report"] for r in self.rounds if r["outcome"] != "rolled back"]

    @property
    def last_report(self) -> dict[str, Any]:
        """The report of the last round that stands, else of the last one."""
        return (self.standing or [self.rounds[-1]["report"]])[-1]

    @property
    def widths(self) -> list[Width]:
        """Of every coupling, in the network's order."""
        found: dict[str, Width] = {}
        for report in self.standing or [self.rounds[-1]["report"]]:
            for change in report["couplings"]:
                name, after = change["name"], change["after"]
                after = after if self.standing else change["before"]
                before = found[name].before if name in found else change["before"]
                found[name] = Width(name, before, after)
        return list(found.values())

    @property
    def ratio(self) -> float:
        """Share of the units of all couplings that is gone."""
        before = sum(width.before for width in self.widths)
        return 1 - sum(width.after for width in self.widths) / before if before else 0.0

    def spectrum(self, name: str) -> list[Segment]:
        """The costs of one coupling's removals, by round."""
        changes = [
            change
            for report in self.standing
            for change in report["couplings"]
            if change["name"] == name and change["cost"]
        ]
        return [
            Segment(
                changes[0]["before"] - change["before"],
                change["cost"],
                len(change["removed"]),
                change is changes[-1],
            )
            for change in changes
        ]

    @property
    def spectra(self) -> list[str]:
        """The couplings that have a spectrum, in the network's order."""
        return [width.name for width in self.widths if self.spectrum(width.name)]

    def spent(self, name: str) -> float:
        """What the removals made in one coupling cost, by their own account."""
        return sum(sum(segment.cost[: segment.removed]) for segment in self.spectrum(name))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {**dataclasses.asdict(self), "ratio": self.ratio, "ratios": self.gains.ratios}


def size_of(model: nn.Module, image: Tensor) -> dict[str, int]:
    """The parameters of a network, and the FLOPs of its forward of one image [1, C, H, W]."""
    return {"parameters": count_parameters(model), "flops": count_flops(model, image)}


def gains_of(whole: nn.Module, final: nn.Module, image: Tensor, batch_size: int) -> Gains:
    """Both networks measured one after the other, so that the machine is in one state.

    They are measured as they will be used, without the hooks of an optimizer: where there are any,
    torch leaves its fused operators of transformer layers, which need less memory.

    Args:
        whole: Before.
        final: After.
        image: An example [1, C, H, W].
        batch_size: Images of the forwards.
    """
    before, after = (
        measure(isolated_copy(model), image, batch_size=batch_size) for model in (whole, final)
    )
    return compare(before, after)

"""What a pruning has changed, to read and to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlscuda.pruning.blocks.shortening import BlockChange
from rlscuda.pruning.running.measure import Gains, Measurement


@dataclass(frozen=True)
class CouplingChange:
    """What became of the channels of one coupling.

    Attributes:
        name: The coupling.
        members: Qualified names of the modules that share its channels.
        before: Units before.
        after: Units now.
        removed: The units that went, by their number before, in the order of removal.
        cost: The whole order's costs, removed or not: the saliency spectrum, in units of the
            variance of the outputs that the channels feed. Greedy costs are each given the removal
            of all before; other importances are in units of their own. Where scope ``global`` has
            measured them, all are in units of the variance of the model's output.
    """

    name: str
    members: list[str]
    before: int
    after: int
    removed: list[int]
    cost: list[float]


@dataclass(frozen=True)
class PruneReport:
    """The result of one `RLSPruner.step()`; prints as tables.

    Attributes:
        couplings: What changed, in the network's order.
        importance: The importance that chose.
        selection: `greedy` or `one-shot`.
        source: Where the matrices came from: `own`, `sketch`, `carried`, `calibration` or
            `none`.
        disagreement: By layer, how far the source is from a calibration, where one was given.
        uncompensated: Layers that lost inputs and could not be compensated, and why.
        refused: Couplings or modules that were not candidates, and why.
        kept_inputs: Raw inputs that lost features or channels, by their number among the tensors
            of the example inputs, with those that the model still takes.
        gains: Parameters, FLOPs, memory and latency before and after.
        blocks: Residual branches that went, in the order of their removal.
        outdated: Numbers beside the layers that still give the width from before, with the one of
            now: `num_features` of timm, `config.intermediate_size` of transformers. Set those that
            something reads, as before a new head is made or the config is saved.
    """

    couplings: list[CouplingChange]
    importance: str
    selection: str
    source: str
    disagreement: dict[str, float] | None
    uncompensated: dict[str, str]
    refused: dict[str, str]
    kept_inputs: dict[str, list[int]]
    gains: Gains
    blocks: list[BlockChange] = field(default_factory=list)
    outdated: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of all units that this pruning removed."""
        before = sum(c.before for c in self.couplings)
        return 1 - sum(c.after for c in self.couplings) / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "ratios": self.gains.ratios}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneReport:
        """The report of which `to_dict` gave the values."""
        gains = Gains(*(Measurement(**values["gains"][when]) for when in ("before", "after")))
        couplings = [CouplingChange(**change) for change in values["couplings"]]
        blocks = [BlockChange(**change) for change in values.get("blocks", [])]  # older have none
        later = {"blocks", "outdated"}
        own = {one.name: values[one.name] for one in fields(cls) if one.name not in later}
        own["outdated"] = values.get("outdated", {})
        return cls(**{**own, "gains": gains, "couplings": couplings, "blocks": blocks})

    def __str__(self):
        width = max([len("coupling"), *(len(c.name) for c in self.couplings)])
        lines = [f"{'coupling':<{width}}  {'before':>7}  {'after':>7}  {'cost':>9}"]
        for change in self.couplings:
            spent = sum(change.cost[: len(change.removed)])
            lines.append(
                f"{change.name:<{width}}  {change.before:>7}  {change.after:>7}  {spent:>9.3g}"
            )
        lines += [
            f"block {block.name}: {block.how}, cost {block.cost:.3g}" for block in self.blocks
        ]
        lines.append(f"chosen by {self.importance} ({self.selection}), matrices: {self.source}")
        for title, reasons in (
            ("not compensated", self.uncompensated), ("not a candidate", self.refused)
        ):  # fmt: skip
            lines += [f"{title}: {name}: {reason}" for name, reason in reasons.items()]
        if self.outdated:
            names = sorted({name.rpartition(".")[2] for name in self.outdated})
            lines.append(f"give a width from before: {', '.join(names)}, see outdated")
        if self.disagreement:
            worst = max(self.disagreement, key=self.disagreement.__getitem__)
            lines.append(f"largest disagreement with the calibration: {worst}, "
                         f"{self.disagreement[worst]:.3g}")  # fmt: skip
        return "\n".join([*lines, "", str(self.gains)])

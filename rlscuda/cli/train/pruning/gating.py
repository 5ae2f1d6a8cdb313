"""Gates on the branches of a network while it trains: their steps, their end, their checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

from rlscuda.cli.report.record import Stage
from rlscuda.cli.train.pruning.base import Pruning, Training, Validate, stage_of
from rlscuda.cli.train.pruning.specs import GateSpec
from rlscuda.files.documents import check
from rlscuda.pruning.files.manifest import Described, describe
from rlscuda.pruning.gates.layer_gates import LayerGates
from rlscuda.pruning.gates.report import GateReport, GateState
from rlscuda.pruning.gates.state import SavedGates


class SavedGating(TypedDict):
    """Of `Gating.state_dict`: gates that learn, or the network and the report when they are off."""

    gates: SavedGates | None
    network: Described | None
    report: GateReport | None
    stages: list[Stage]


class Gating(Pruning):
    """The gates of one training.

    Args:
        training: Of the RLS optimizer, at its start.
        spec: Their price, and for how long.

    Attributes:
        report: How the gates stand, or stood at their end.

    Raises:
        UserError: No branch of the network can have a gate.
    """

    flag = "--gates"

    def __init__(self, training: Training, spec: GateSpec):
        super().__init__(training)
        self.spec, self.learning = spec, spec.learning(training.config.epochs)
        try:
            self.gates = LayerGates(
                training.model, self.example, training.optimizer,
                total_steps=self.learning * training.steps_per_epoch,
                price=spec.price, by=spec.by, seed=training.config.seed,
            )  # fmt: skip
        except ValueError as error:
            raise self.refused(error) from None
        self.finished = False
        self.report = self.gates.report()

    @property
    def total(self) -> int:
        """One: what is off at the end goes."""
        return 1

    def size(self) -> dict[str, int]:
        """Parameters and FLOPs of an image of the network as the gates have decided it now."""
        if self.finished:
            return super().size()
        return {"parameters": self.report.parameters, "flops": self.report.flops}

    def after_backward(self, closure: Callable[[], Tensor], loss: Tensor) -> None:
        """Lets the gates learn, removes what has been off for long, and draws anew."""
        if not self.finished:
            self.gates.step(closure, loss)

    def after_epoch(self, row: dict[str, Any], validate: Validate) -> None:
        """Says how many branches are on; after the last epoch of the gates, takes out the others.

        Nothing more goes once the training loss is not finite any more.
        """
        if not self.finished:
            self.report = self.gates.report()
        row |= {**self.size(), "pruning": "" if self.finished else "gates"}
        if self.finished or self.training.epoch < self.learning or self.training.diverged:
            return
        try:
            self.report = self.gates.finish(self.batches())
        except ValueError as error:
            raise self.refused(error) from None
        self.finished, row["pruning"] = True, "finished"
        largest = max(row["parameters"] for row in self.training.history)
        whole = [row for row in self.training.history if row["parameters"] == largest][-1]
        self.stages = [stage_of("whole", 0, whole), self.changed(row, "pruned", 1, validate)]

    def rounds(self) -> list[dict[str, Any]]:
        """All that was done, as the one round of a record."""
        gone = [gate for gate in self.report.gates if gate.state != "on"]
        done = {
            "couplings": [],
            "importance": "gates",
            "selection": f"price {self.spec.price:g}, {_BY[self.spec.by]}",
            "source": "none",
            "disagreement": None,
            "uncompensated": {},
            "refused": dict(self.report.refused),
            "blocks": [{"name": gate.name, "how": "delete", "why": _why(gate)} for gate in gone],
            "gates": [dataclasses.asdict(gate) for gate in self.report.gates],
        }
        whole, pruned = self.stages
        losses = [row["val_loss"] for row in self.training.history[self.learning :]]
        ratio = 1 - pruned.parameters / whole.parameters
        return [{"ratio": ratio, "outcome": "gates", "losses": losses, "report": done}]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, and the record of those done."""
        return {
            "gates": None if self.finished else self.gates.state_dict(),
            "network": describe(self.training.model) if self.finished else None,
            "report": dataclasses.asdict(self.report) if self.finished else None,
            "stages": self.stages_saved(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the gates were; the training's network becomes that of the moment.

        Raises:
            ValueError: The state is not one of this network.
        """
        check(state, SavedGating, "the pruning")
        gates, network, report = (state[key] for key in ("gates", "network", "report"))
        finished = gates is None
        if (network is not None, report is not None) != (finished, finished):
            raise ValueError("the pruning must have gates, or a network and a report")
        stages = self.stages_of(state["stages"])
        expected = ["whole", "pruned"] if finished else []
        if [stage.kind for stage in stages] != expected:
            raise ValueError(f"the stages must be {expected}, got {[s.kind for s in stages]}")
        if finished:
            self.report = self._report_of(report)
            self.training.rebuild(network)
        else:
            self.gates.load_state_dict(gates)
        self.finished, self.stages = finished, stages

    def _report_of(self, saved: dict[str, Any]) -> GateReport:
        """The report of a checkpoint, which has passed `check`."""
        names = [gate.name for gate in self.report.gates]
        if [gate["name"] for gate in saved["gates"]] != names:
            raise ValueError(f"the report must be of gates on {names}")
        own = [field.name for field in dataclasses.fields(GateState)]
        states = [GateState(**{name: gate[name] for name in own}) for gate in saved["gates"]]
        return GateReport(states, saved["refused"], saved["parameters"], saved["flops"])


_BY = {"equal": "equal for all", "params": "by parameters", "flops": "by FLOPs"}


def _why(gate: GateState) -> str:
    return f"theta {gate.theta:.3g}, worth {gate.worth:.3g} at a price of {gate.price:.3g}"

"""What gates have come to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GateState:
    """A gate.

    Attributes:
        name: Of its branch.
        theta: Probability that it is open; 0 where the branch is gone.
        worth: What the branch lowered the loss by, a moving average; of one that is gone, the last.
        price: What it has to lower the loss by.
        state: `on` or `off`, as it will be where nothing is drawn any more, or `gone`.
    """

    name: str
    theta: float
    worth: float
    price: float
    state: str

    @property
    def undecided(self) -> bool:
        """Whether theta is further than .02 from 0 and from 1."""
        return 0.02 < self.theta < 0.98


@dataclass(frozen=True)
class GateReport:
    """All gates of a model; prints as a table.

    Attributes:
        gates: In the order of their branches.
        refused: Name of a branch without a gate -> why it cannot have one.
        parameters: Elements of the model's parameters.
        flops: Of a forward of the example inputs, where no branch is drawn.
    """

    gates: list[GateState]
    refused: dict[str, str]
    parameters: int
    flops: int

    def __str__(self):
        width = max([len("branch"), *(len(gate.name) for gate in self.gates)])
        lines = [f"{'branch':<{width}}  {'theta':>6}  {'worth':>9}  {'price':>9}  state"]
        lines += [
            f"{g.name:<{width}}  {g.theta:>6.3f}  {g.worth:>9.3g}  {g.price:>9.3g}  {g.state}"
            for g in self.gates
        ]
        lines += [f"no gate: {name}: {reason}" for name, reason in self.refused.items()]
        on = sum(gate.state == "on" for gate in self.gates)
        undecided = sum(gate.undecided for gate in self.gates)
        rest = f", {undecided} undecided" if undecided else ""
        lines.append(
            f"{on} of {len(self.gates)} branches on{rest}: "
            f"{self.parameters:,} parameters, {self.flops:,} FLOPs"
        )
        return "\n".join(lines)

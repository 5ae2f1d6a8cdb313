"""What became of channels and blocks, to read and to keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fate:
    """What became of a coupling, or of a block.

    Attributes:
        name: Of the coupling or block.
        kind: `channels` or `block`.
        before: Units at first, 1 of a block.
        after: Units now.
        least: Least scale, or penalty, among them now; NaN where it is not known.
        most: The largest.
        why: Why some went, or why none may.
    """

    name: str
    kind: str
    before: int
    after: int
    least: float
    most: float
    why: str


@dataclass(frozen=True)
class AdaptiveReport:
    """What an `AdaptivePruner` has done so far; prints as a table.

    Attributes:
        fates: Of couplings, then of blocks, those that are gone among them.
        penalty: `output` or `scale`.
        counted: In what sizes are counted: `params` or `flops`.
        before: Size at first.
        after: Size now.
        target: Size wanted.
        rho: The price now.
        history: Of each epoch: `epoch`, `size`, `rho`, `loss` (None where none was given),
            `channels` and `blocks` that went.
    """

    fates: list[Fate]
    penalty: str
    counted: str
    before: int
    after: int
    target: float
    rho: float
    history: list[dict[str, Any]]

    @property
    def reached(self) -> bool:
        """Whether the model is as small as was wanted."""
        return self.after <= self.target

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON."""
        return asdict(self)

    def __str__(self):
        width = max(len("coupling or block"), *(len(f.name) + 6 for f in self.fates), 0)
        what = {"output": "penalty", "scale": "scale"}[self.penalty]
        lines = [f"{'coupling or block':<{width}}  {'before':>6}  {'after':>5}  "
                 f"{f'{what} from':>12}  {'to':>8}  why"]  # fmt: skip
        for fate in self.fates:
            name = f"block {fate.name}" if fate.kind == "block" else fate.name
            lines.append(
                f"{name:<{width}}  {fate.before:>6}  {fate.after:>5}  "
                f"{fate.least:>12.3g}  {fate.most:>8.3g}  {fate.why}".rstrip()
            )
        share = self.after / self.before
        lines.append(f"{self.after} of {self.before} {self.counted} left ({share:.1%}), wanted "
                     f"{self.target:.0f}; price {self.rho:.3g}")  # fmt: skip
        return "\n".join(lines)

"""From a target to the cut that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlscuda.pruning.choice.compensation import compensate_layers, lost_columns, without_rule
from rlscuda.pruning.choice.consumers import Matrices
from rlscuda.pruning.choice.ladder import Counts, Ladder
from rlscuda.pruning.running.measure import count_flops, count_parameters
from rlscuda.pruning.structure.trace import Structure
from rlscuda.pruning.surgery.plan import Surgery, plan, pruned_copy


@dataclass(frozen=True)
class Cut:
    """What goes, and what it does to the rest.

    Attributes:
        removed: Units by coupling, in the order of their removal.
        lost: im2col columns that each layer loses.
        surgery: What remains of every tensor.
    """

    removed: dict[str, list[int]]
    lost: dict[str, Tensor]
    surgery: Surgery


class Search:
    """Cuts of one model, of any height.

    Args:
        model: The model.
        structure: Its couplings.
        example_inputs: What it can be called with.
        matrices: Inverse autocorrelation matrices by layer.
        compensate: Whether the remaining weights make up for what goes.
        settle: Called with a pruned copy and its surgery before it is evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        example_inputs: Any,
        matrices: Matrices,
        compensate: bool,
        settle: Callable[[nn.Module, Surgery], Any],
    ):
        self.model, self.structure, self.inputs = model, structure, example_inputs
        self.matrices, self.compensate, self.settle = matrices, compensate, settle

    def find(
        self,
        ladder: Ladder,
        kind: str,
        value: Any,
        evaluate: Callable[[nn.Module], float],
    ) -> Cut:
        """The cut that meets a target.

        Args:
            ladder: The order of removal.
            kind: `ratio`, `target_params`, `target_flops` or `max_loss`.
            value: Of the target; sizes below 1 are shares of the size now.
            evaluate: The validation loss of a model, for `max_loss`.

        Raises:
            ValueError: The target is out of reach.
        """
        if kind == "ratio":
            return self.cut(ladder, ladder.by_ratio(value))
        whole = self.cut(ladder, {})  # of which a copy is tried, as of all others
        if kind == "max_loss":
            loss = self._loss(evaluate, whole)
            if not math.isfinite(loss):
                raise ValueError(f"evaluate must give a finite loss of the whole model, got {loss}")
            limit = loss + value * abs(loss)
            return self.cut(
                ladder,
                ladder.highest(lambda c: self._loss(evaluate, self.cut(ladder, c)) <= limit),
            )
        size = self._size(kind, whole)
        limit = value if value >= 1 else value * size
        if size <= limit:
            return whole
        return self.cut(
            ladder, ladder.lowest(lambda c: self._size(kind, self.cut(ladder, c)) <= limit)
        )

    def cut(self, ladder: Ladder, counts: Counts) -> Cut:
        """The cut that removes so many units of each coupling."""
        removed = {
            name: ladder.candidates[name].order[:count].tolist()
            for name, count in counts.items()
            if count
        }
        lost = lost_columns(self.structure.couplings, dict(self.model.named_modules()), removed)
        return Cut(removed, lost, plan(self.structure, removed))

    def compensated(self, cut: Cut) -> tuple[dict[str, Tensor], dict[str, str]]:
        """New values of the weights and biases that a cut leaves; layers without any, and why."""
        if not self.compensate:
            return {}, {}
        values, reasons = compensate_layers(self.model, self.matrices, cut.lost)
        modules = dict(self.model.named_modules())
        return values, reasons | without_rule(self.structure.couplings, modules, cut.removed)

    def _loss(self, evaluate: Callable[[nn.Module], float], cut: Cut) -> float:
        pruned = pruned_copy(self.model, cut.surgery, self.compensated(cut)[0])
        if cut.removed:
            self.settle(pruned, cut.surgery)
        return evaluate(pruned)

    def _size(self, kind: str, cut: Cut) -> int:
        """Parameters or FLOPs of the model after a cut, whatever its values."""
        pruned = pruned_copy(self.model, cut.surgery, {})
        if kind == "target_params":
            return count_parameters(pruned)
        return count_flops(pruned, cut.surgery.slice_inputs(self.inputs))

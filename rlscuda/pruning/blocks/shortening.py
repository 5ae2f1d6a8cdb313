"""A model that loses one block after the other, as a copy, and how the model itself follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Change
from rlscuda.pruning.blocks.choosing import DAMPING, WAYS, Search, value_of
from rlscuda.pruning.blocks.finding import Block, find_blocks
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.blocks.transaction import replace_modules
from rlscuda.pruning.running.calls import ExampleInputs, isolated_copy


@dataclass(frozen=True)
class BlockChange:
    """What became of one block.

    Attributes:
        name: The block.
        how: `delete`, or the map in its place: `1x1`, `3x3` or `linear`.
        cost: Rise of the loss that its removal caused, given those before it.
        saved: What it saved, in the units of the price.
        explained: Share of the variance of its output that the map explains; 0 where it is deleted.
        parameters: Elements of its parameters before.
    """

    name: str
    how: str
    cost: float
    saved: float
    explained: float
    parameters: int


class Shortening:
    """A copy of a model without some of its blocks.

    Args:
        model: The model; it is only read.
        blocks: Those of it that may go.
        search: What may become of them.
        loss: Of a model.

    Attributes:
        model: The copy, in eval mode.
        value: Its loss.
        changes: What became of the blocks that are gone, in the order of their removal.

    Raises:
        TypeError: The loss is no number.
        ValueError: It is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Block],
        search: Search,
        loss: Callable[[nn.Module], float],
    ):
        self.model = isolated_copy(model).eval()
        self.changes: list[BlockChange] = []
        self._blocks, self._search, self._loss = list(blocks), search, loss
        self._stand_ins: list[dict[str, StandIn]] = []
        self._statistics: list[dict[str, Tensor]] = []
        self.value = value_of(loss, self.model)
        if not math.isfinite(self.value):
            raise ValueError(f"the loss of the whole model must be finite, got {self.value}")

    def advance(self) -> bool:
        """Takes the block that costs least for what it saves; whether there was one."""
        best = self._search.best(self.model, self._blocks, self._loss, self.value)
        if best is None:
            return False
        block = best.option.block
        self.model, self.value = best.model, self.value + best.cost
        self._blocks = [one for one in self._blocks if not one.touches(block)]
        self._stand_ins.append(best.option.stand_ins)
        self._statistics.append(best.statistics)
        how, explained = best.option.how, best.option.explained
        self.changes.append(
            BlockChange(block.name, how, best.cost, best.saved, explained, block.parameters)
        )
        return True

    def install(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        count: int,
        done: list[Change],
    ) -> None:
        """Takes the first blocks out of the model itself; all of it is done, or nothing.

        Args:
            model: The model.
            optimizers: All that hold its parameters.
            count: How many.
            done: Is given what takes it back, see `revert`.
        """
        chosen = {name: one for gone in self._stand_ins[:count] for name, one in gone.items()}
        own = {name: isolated_copy(stand_in) for name, stand_in in chosen.items()}
        statistics = self._statistics[count - 1] if count else {}
        replace_modules(model, optimizers, own, statistics, done)  # type: ignore[arg-type]


def shortening_of(
    model: nn.Module,
    inputs: ExampleInputs,
    loader: Iterable,
    loss: Callable[[nn.Module], float],
    price: str,
    adapt_norms: bool,
    fixed: Iterable[str],
) -> tuple[Shortening, dict[str, str]]:
    """The shortening of a model by any of its blocks, in any way; and those that cannot go, why.

    Args:
        model: The model.
        inputs: What it can be called with.
        loader: Batches as `feed` takes them.
        loss: Of a model.
        price: See `Search`.
        adapt_norms: See `Search`.
        fixed: Names of modules that stay, and with them the blocks that they are in.
    """
    blocks = find_blocks(model, inputs)
    refused, may_go = dict(blocks.refused), []
    for block in blocks.found:
        if any(f"{name}.".startswith(f"{part}.") for name in fixed for part in block.modules):
            refused[block.name] = "ignored"
        else:
            may_go.append(block)
    search = Search(inputs, loader, WAYS, price, adapt_norms, DAMPING)
    return Shortening(model, may_go, search, loss), refused

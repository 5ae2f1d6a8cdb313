"""What may become of a block, what that costs and saves, and the best of all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.blocks.fitting import fit
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.options import checked_loss
from rlscuda.pruning.running.batch_norms import check_finite, settle
from rlscuda.pruning.running.calls import isolated_copy, twice
from rlscuda.pruning.running.measure import count_flops, count_parameters, measure

WAYS = ("delete", "1x1", "3x3", "linear")  # what may become of a branch
PRICES = ("flops", "params", "latency")
REPEATS = 5  # forwards timed
DAMPING = 1e-6  # of autocorrelations, relative to the mean of their diagonals
_OF_KERNEL = {0: "linear", 1: "1x1", 3: "3x3"}


@dataclass(frozen=True, eq=False)
class Option:
    """One thing that may become of a block.

    Attributes:
        block: The block.
        how: One of `WAYS`.
        stand_ins: By the names of the modules that they replace.
        explained: Share of the variance of the branch's output that its map explains.
    """

    block: Block
    how: str
    stand_ins: dict[str, StandIn]
    explained: float


@dataclass(frozen=True, eq=False)
class Choice:
    """What becomes of a block.

    Attributes:
        option: What was chosen.
        model: A copy of the model with it, in eval mode.
        cost: Rise of the loss.
        saved: What is saved, in the units of the price.
        statistics: Those of the model's batch norms that followed, by buffer name.
    """

    option: Option
    model: nn.Module
    cost: float
    saved: float
    statistics: dict[str, Tensor]


class Search:
    """What may become of the blocks of a model, and the best of it.

    Args:
        inputs: What the model can be called with.
        loader: Batches as `feed` takes them.
        ways: Some of `WAYS`.
        price: One of `PRICES`.
        adapt_norms: Whether the statistics of batch norms follow.
        damping: See `damped_inverse`.
    """

    def __init__(
        self,
        inputs: Any,
        loader: Iterable,
        ways: Sequence[str],
        price: str,
        adapt_norms: bool,
        damping: float,
    ):
        self.inputs, self.loader, self.ways, self.price = inputs, loader, ways, price
        self.adapt_norms, self.damping = adapt_norms, damping

    def best(
        self,
        model: nn.Module,
        blocks: Iterable[Block],
        loss: Callable[[nn.Module], float],
        value: float,
    ) -> Choice | None:
        """The option of least cost for what it saves; None where none saves anything.

        Args:
            model: The model, with all of these blocks.
            blocks: Those that may go.
            loss: Of a model.
            value: The loss of this one.
        """
        best, least, size = None, math.inf, self.size(model)
        for block in blocks:
            for option in self.options(model, block):
                trial = with_stand_ins(model, option.stand_ins)
                saved = size - self.size(trial)
                if saved <= 0:
                    continue
                followed: dict[str, Tensor] = {}
                if self.adapt_norms:
                    followed = settle(model, trial, {}, twice(self.loader)).statistics
                    check_finite(followed)
                cost = value_of(loss, trial) - value
                if math.isfinite(cost) and cost / saved < least:
                    least = cost / saved
                    best = Choice(option, trial, cost, saved, followed)
        return best

    def options(self, model: nn.Module, block: Block) -> list[Option]:
        """All that may become of a block."""
        found = []
        if "delete" in self.ways:
            found.append(Option(block, "delete", block.stand_ins, 0.0))
        if set(self.ways) != {"delete"}:
            for kernel, fitted in fit(model, block, self.loader, self.damping).items():
                if (how := _OF_KERNEL[kernel]) in self.ways:
                    stand_ins = {**block.stand_ins, block.exit: fitted.stand_in}
                    found.append(Option(block, how, stand_ins, fitted.explained))
        return found

    def size(self, model: nn.Module) -> float:
        """Of a model, in the units of the price."""
        if self.price == "params":
            return count_parameters(model)
        if self.price == "flops":
            return count_flops(model, self.inputs)
        times = [measure(model, self.inputs, repeats=REPEATS).latency_seconds for _ in range(3)]
        return statistics.median(times)


def value_of(loss: Callable[[nn.Module], float], model: nn.Module) -> float:
    """The loss of a model as a number; it is that of a copy, which it may train.

    Raises:
        TypeError: It is none.
    """
    return checked_loss(loss(isolated_copy(model)))

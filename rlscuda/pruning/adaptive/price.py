r"""The price that every unit of size pays, and how it is set.

A unit of channels, or a block, whose removal saves :math:`\kappa` in units of the mean pays
:math:`\rho \kappa` for each unit of its scale, or of its penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlscuda.pruning.schedule import ratio_after

BOUNDS = (1e-6, 1e-1)  # of a price that is controlled


@dataclass
class Price:
    r"""A price rho that brings a model to a target size.

    Without a deadline it is controlled: after each epoch :math:`\rho \leftarrow \rho \exp(k (S -
    S^*) / S_0)` with the sizes now, wanted and at first, within 1e-6 and 1e-1. With one, there is a
    size for each epoch on the way, and the price is the least at which the units that are to go
    next would be gone by then, were there no loss.

    Attributes:
        rho: The price now.
        gain: k.
        target: Size wanted, as a share of the first.
        warmup: Epochs before anything is pruned.
        epochs: Epochs of pruning after that, or None.
        curve: How the share that is gone grows over them, see `ratio_after`.
        whole: First size.
    """

    rho: float
    gain: float
    target: float
    warmup: int
    epochs: int | None
    curve: str
    whole: float

    @property
    def limit(self) -> float:
        """The size wanted."""
        return self.target * self.whole

    def goal(self, epoch: int) -> float | None:
        """The size wanted after an epoch, counted from 1; None where there is no deadline."""
        if self.epochs is None:
            return None
        done = min(max(epoch - self.warmup, 0), self.epochs)
        if done == self.epochs:
            return self.limit
        return self.whole * (1 - ratio_after(self.curve, 1 - self.target, done, self.epochs))

    def control(self, size: float) -> None:
        """Sets the price after an epoch by the size that is left; 0 once that is the target."""
        if size <= self.limit:
            self.rho = 0.0
        elif self.epochs is None:
            raised = self.rho * math.exp(self.gain * (size - self.limit) / self.whole)
            self.rho = min(max(raised, BOUNDS[0]), BOUNDS[1])


def marginal(measures: Tensor, gains: Tensor, needed: float) -> float:
    """The least price at which what would go saves as much as is needed.

    Args:
        measures: What stands against the price, by candidate, float64 [m]: it goes where the price
            is not below.
        gains: What each saves [m].
        needed: In the units of the gains.
    """
    order = measures.argsort(stable=True)
    saved = gains[order].cumsum(0)
    enough = (saved >= needed).nonzero()
    if not len(measures) or needed <= 0:
        return 0.0
    place = int(enough[0]) if len(enough) else len(order) - 1
    return float(measures[order[place]].to(torch.float64))

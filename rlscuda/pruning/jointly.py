"""Channels and blocks together: how many blocks go before channels do the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from rlscuda.pruning.blocks.choosing import value_of
from rlscuda.pruning.blocks.shortening import Shortening
from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.running.measure import count_flops, count_parameters

SIZES: dict[str, Callable[..., int]] = {  # of a model and its inputs, by the target's name
    "target_params": lambda model, inputs: count_parameters(model),
    "target_flops": lambda model, inputs: count_flops(model, inputs),
}
_PATIENCE = 2  # blocks more that are tried after the best number


def best_mix(
    shorter: Shortening,
    reached: Callable[[nn.Module], bool],
    cut: Callable[[nn.Module], None],
    loss: Callable[[nn.Module], float],
) -> int:
    """The number of blocks with which the target costs the least loss.

    Blocks go in the order of their price, and for each number of them as many channels as the
    target still asks for are tried, all closed forms included. The search ends where two blocks
    more have only lost, so that what it gives is no worse by this loss than channels alone, nor
    than blocks alone where it has come so far.

    Args:
        shorter: The model, whole; it is advanced.
        reached: Whether a model is as small as the target.
        cut: Takes channels from a copy until it is.
        loss: Of a model.

    Raises:
        ValueError: The target is out of reach.
    """
    losses: list[float] = []  # with 0, 1, 2, ... blocks gone; infinite out of reach
    best = 0
    reason: ValueError | None = None
    while True:
        trial = isolated_copy(shorter.model)
        try:
            if not reached(trial):
                cut(trial)
        except ValueError as error:
            losses.append(math.inf)
            reason = error
        else:
            value = value_of(loss, trial)
            losses.append(value if math.isfinite(value) else math.inf)
        if losses[-1] < math.inf and losses[-1] == min(losses):
            best = len(losses) - 1
        tried = len(losses) - 1 - best
        over = min(losses) < math.inf and tried >= _PATIENCE
        if over or reached(shorter.model) or not shorter.advance():
            break
    if min(losses) == math.inf:
        raise ValueError("the target is out of reach, even without all blocks") from reason
    return best

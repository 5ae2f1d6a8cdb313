"""What a training step costs on average, where some cost more than others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rlscuda import RLSOptimizer


def in_turns(trainers: dict[str, Any]) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Lanes that make whole turns of steps, and how many steps each makes: a race's `work`.

    A turn of `RLSOptimizer` is an interval, from one update of `P` to the next; those of the others
    are one step. `RLSOptimizer` first makes the steps in which each has an update of `P`.

    Args:
        trainers: By name; calling one makes one step of its `optimizer`.
    """
    work = {}
    for name, train in trainers.items():
        work[name] = 1
        if isinstance(train.optimizer, RLSOptimizer):
            (group,) = train.optimizer.param_groups
            work[name] = group["interval"]
            for _ in range(math.ceil(1 / group["gain"]) if work[name] > 1 else 0):
                train()
    return {name: _repeated(train, work[name]) for name, train in trainers.items()}, work


def _repeated(train: Callable[[], object], steps: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(steps):
            train()

    return turn

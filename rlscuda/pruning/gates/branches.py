"""Which branches of a model have a gate, and what each has to be worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rlscuda.pruning.blocks.finding import Block, find_blocks
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.running.measure import count_flops, count_parameters

SIZES: dict[str, Callable[[nn.Module, Any], int]] = {  # of a model and its inputs
    "equal": lambda model, inputs: 1,
    "params": lambda model, inputs: count_parameters(model),
    "flops": count_flops,
}


def branches_of(
    model: nn.Module, inputs: Any, names: str | Iterable[str]
) -> tuple[list[Block], dict[str, str]]:
    """The branches that can have a gate, and those that cannot, why.

    None lies in another; of two such the larger one is chosen.

    Args:
        model: The model.
        inputs: What it can be called with.
        names: Shell patterns of the branches.

    Raises:
        ValueError: There is none.
    """
    blocks = find_blocks(model, inputs)
    patterns = [names] if isinstance(names, str) else list(names)
    named = [b for b in blocks.found if any(fnmatchcase(b.name, p) for p in patterns)]
    chosen: list[Block] = []
    for block in sorted(named, key=lambda block: -block.parameters):
        if not any(block.touches(other) for other in chosen):
            chosen.append(block)
    if not chosen:
        found = [block.name for block in blocks.found]
        raise ValueError(
            f"no branch of the model can have a gate: found {found}, refused {blocks.refused}"
        )
    return [block for block in named if block in chosen], dict(blocks.refused)


def prices_of(
    model: nn.Module, inputs: Any, blocks: list[Block], price: float, by: str
) -> list[float]:
    """What each branch must lower the loss by; the mean is `price`.

    Args:
        model: The model.
        inputs: What it can be called with.
        blocks: The branches.
        price: Their mean.
        by: One of `SIZES`; a branch's share of it is its share of the price.
    """
    if by == "equal":
        return [price] * len(blocks)
    size, whole = SIZES[by], isolated_copy(model).eval()
    without = [size(with_stand_ins(whole, block.stand_ins), inputs) for block in blocks]
    shares = [max(0, size(whole, inputs) - left) for left in without]
    return [price * len(blocks) * share / sum(shares) for share in shares]

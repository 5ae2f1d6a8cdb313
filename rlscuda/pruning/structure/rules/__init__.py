"""What operations make of labels.

An operation without a rule fixes all that it takes, by name, so that nothing is cut that is not
understood.
"""

from __future__ import annotations

from typing import Any

import torch

from rlscuda.pruning.structure.rules import joining, layers, sums
from rlscuda.pruning.structure.rules.moving import by_element, moved
from rlscuda.pruning.structure.rules.registry import RULES, Following, Rule, name_of, tensors_in

__all__ = ["joining", "layers", "rule_of", "sums"]


def rule_of(op: Any) -> Rule:
    """The rule of an operation, or by what torch says of it: on each element, or a view."""
    return RULES.get(name_of(op).removesuffix("_"), _default)


def _default(f: Following, op: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """What is on each element by itself, or a view; anything else is fixed."""
    if torch.Tag.pointwise in op.tags:
        return by_element(f, op, args, kwargs, output)
    if op.is_view:
        return moved(f, op, args, kwargs, output)
    f.fix_all(tensors_in((args, kwargs)), f"there is no rule for {f.where}")
    return []

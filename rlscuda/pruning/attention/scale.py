"""Attention that divides its logits by the root of its own width, when that width shrinks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.pruning.couplings import Family


def rescaled(
    model: nn.Module,
    families: Sequence[Family],
    removed: Mapping[str, Sequence[int]],
    attributes: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Values by name with queries that make up for the division by a smaller root.

    Args:
        model: The model.
        families: Of the dimensions of its heads.
        removed: Units that go, by coupling.
        attributes: Those of modules that change, as the width of a `nn.MultiheadAttention`.
        values: New values of parameters in their old shapes, which are left as they are.
    """
    found, modules = dict(values), dict(model.named_modules())
    for family in families:
        gone = set(removed.get(family.coupling, ()))
        left = sum(unit not in gone for unit in family.units.tolist())
        if not family.scaled or left == len(family.units):
            continue
        factor = math.sqrt(left / len(family.units))
        for name, heads in family.left.items():
            module = modules[name]
            for own, parameter in module.named_parameters("", False):
                full = f"{name}.{own}" if name else own
                value = found.get(full, parameter.detach()).clone()
                rows = value.mT if own == "weight" and is_transposed(module) else value
                for places in heads:
                    rows[places.to(value.device)] *= factor
                found[full] = value
    for prefix, changed in attributes.items():
        module = modules[prefix]
        if isinstance(module, nn.MultiheadAttention) and "head_dim" in changed:
            factor = math.sqrt(changed["head_dim"] / module.head_dim)
            for own in ("in_proj_weight", "in_proj_bias", "q_proj_weight"):
                if getattr(module, own) is not None:
                    full = f"{prefix}.{own}" if prefix else own
                    value = found.get(full, getattr(module, own).detach()).clone()
                    value[: module.embed_dim] *= factor
                    found[full] = value
    return found

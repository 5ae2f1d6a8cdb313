"""What the remaining weights become when columns of their layers' inputs go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlscuda.closed_form import formulas as algebra
from rlscuda.pruning.choice.consumers import Matrices, layer_weight
from rlscuda.pruning.structure.trace import Coupling, Member
from rlscuda.pruning.surgery.plan import Surgery


def lost_columns(
    couplings: Sequence[Coupling],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The im2col columns that each Linear and Conv2d loses, of each group; int64, ascending."""
    lost: dict[str, list[Tensor]] = {}
    for member, units in _losing(couplings, removed):
        module = modules.get(member.name)
        if member.kind == "in" and isinstance(module, (nn.Linear, nn.Conv2d)):
            lost.setdefault(member.name, []).append(member.columns(module)[units].flatten())
    return {name: torch.cat(parts).sort().values for name, parts in lost.items()}


def without_rule(
    couplings: Sequence[Coupling],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, str]:
    """Layers of other kinds that lose inputs too, and why nothing makes up for them."""
    reasons = {}
    for member, _ in _losing(couplings, removed):
        module = modules.get(member.name)
        mixes = member.kind == "in" or isinstance(module, nn.MultiheadAttention)
        if mixes and not isinstance(module, (nn.Linear, nn.Conv2d)):
            reasons[member.name] = f"there is no rule for {type(module).__name__}"
    return reasons


def _losing(
    couplings: Sequence[Coupling], removed: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Member, Tensor]]:
    """The members of all couplings that lose some units, and these, int64."""
    for coupling in couplings:
        units = torch.tensor(removed.get(coupling.name, ()), dtype=torch.int64)
        for member in coupling.members if len(units) else ():
            yield member, units


def kept_columns(modules: Mapping[str, nn.Module], surgery: Surgery) -> dict[str, Tensor]:
    """The im2col columns of all groups that each Linear and Conv2d keeps where it loses some.

    Args:
        modules: The modules by name, before the surgery.
        surgery: What remains.

    Returns:
        int64 by layer name, ascending, a depthwise layer's those of the groups that stay.
    """
    found = {}
    for name, module in modules.items():
        kept = surgery.tensors.get(f"{name}.weight")
        if kept is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        outputs, width = kept.of[:2]
        groups, area = getattr(module, "groups", 1), module.weight[0, 0].numel()
        stay = torch.unique(kept.places(0) // (outputs // groups))
        channels = (stay[:, None] * width + kept.places(1)).flatten()
        if len(channels) < groups * width:
            found[name] = (channels[:, None] * area + torch.arange(area)).flatten()
    return found


def compensate_layers(
    model: nn.Module, matrices: Matrices, lost: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and biases that make up best for the lost inputs, in their full shapes.

    Args:
        model: The model.
        matrices: Inverse autocorrelation matrices by layer.
        lost: Columns that each layer loses, see `lost_columns`.

    Returns:
        New values by parameter name, of the parameters' dtypes and devices; and the layers that
        could not be compensated, with the reason.
    """
    modules = dict(model.named_modules())
    holders: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    values: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, columns in lost.items():
        module = modules[name]
        if name not in matrices:
            reasons[name] = "its inverse autocorrelation matrix is not known"
            continue
        if any(p is not None and holders[id(p)] > 1 for p in module._parameters.values()):
            reasons[name] = "it shares its parameters with another layer"
            continue
        P = matrices[name]
        W = torch.stack([
            algebra.compensate(p, w, columns.to(P.device))
            for p, w in zip(P, layer_weight(module, P))
        ]).flatten(0, 1)  # fmt: skip
        inputs = module.weight[0].numel()
        values[f"{name}.weight"] = W[:, :inputs].reshape(module.weight.shape).to(module.weight)
        if W.shape[1] > inputs:
            values[f"{name}.bias"] = W[:, inputs].to(module.bias)
    return values, reasons

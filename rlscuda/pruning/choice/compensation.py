"""What layers lose with a cut, and the weights and biases that make up for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.closed_form.formulas import compensate
from rlscuda.optim.kinds.modules import is_consumer
from rlscuda.pruning.couplings import Coupling, Member
from rlscuda.pruning.matrices.calibration import Known
from rlscuda.pruning.matrices.layers import layer_values, layer_weight
from rlscuda.pruning.matrices.proven import NotProven


def lost_columns(
    couplings: Sequence[Coupling],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The im2col columns of each group that consumers lose; int64, ascending; see `is_consumer`."""
    lost: dict[str, list[Tensor]] = {}
    for member, units in _losing(couplings, removed):
        module: Any = modules.get(member.name)
        if member.kind == "in" and is_consumer(module):
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
        module: Any = modules.get(member.name)
        mixes = member.kind == "in" or isinstance(module, nn.MultiheadAttention)
        if mixes and not is_consumer(module):
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


def compensate_layers(
    model: nn.Module, matrices: Known, lost: Mapping[str, Tensor]
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
    holders = parameter_holders(model)
    values: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, columns in lost.items():
        module = modules[name]
        if name not in matrices:
            reasons[name] = "its inverse autocorrelation matrix is not known"
            continue
        if any(p is not None and holders[id(p)] > 1 for p in own_parameters(module).values()):
            reasons[name] = "it shares its parameters with another layer"
            continue
        P = matrices[name]
        W = torch.stack([
            compensate(p, w, columns.to(P.device))
            for p, w in zip(P, layer_weight(module, P))
        ])  # fmt: skip
        try:
            values |= {f"{name}.{own}": new for own, new in layer_values(module, W).items()}
        except NotProven as error:
            reasons[name] = str(error)
    return values, reasons


def parameter_holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in own_parameters(m).values())

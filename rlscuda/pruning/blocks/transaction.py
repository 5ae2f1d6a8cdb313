"""Stand-ins take the place of modules, and optimizers follow: all of it is done, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Change
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.surgery.transaction import commit


@torch.no_grad()
def replace_modules(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    stand_ins: Mapping[str, StandIn],
    buffers: Mapping[str, Tensor],
    done: list[Change],
) -> None:
    """Puts stand-ins into a model; completes, or leaves model and optimizers as they were.

    Parameters that the model has no more leave the groups and states of its optimizers; those of a
    map join the group of what it replaces, in its place, and start without a state.

    Args:
        model: The model.
        optimizers: All that hold its parameters.
        stand_ins: By the qualified name of the module that each replaces.
        buffers: New values by the names of buffers, of others than these modules'.
        done: Is given what takes the change back, see `revert`.

    Raises:
        KeyError: The model has no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    changes: list[Change] = []
    replaced: list[tuple[nn.Module, StandIn]] = []
    for name, stand_in in stand_ins.items():
        parent, _, own = name.rpartition(".")
        replaced.append((modules[name], stand_in.train(modules[name].training)))
        changes.append((modules[parent], own, stand_in))
    gone = _gone(model, [module for module, _ in replaced])
    heirs = {p: new for module, stand_in in replaced for p, new in _heirs(module, stand_in, gone)}
    changes += [
        (buffer, "data", buffers[name].clone())
        for name, buffer in model.named_buffers()
        if name in buffers
    ]
    for optimizer in optimizers:
        changes += _optimizer_changes(optimizer, gone, heirs)
    commit(changes, done)


def _gone(model: nn.Module, replaced: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters that nothing else in a model has."""
    inside = {module for one in replaced for module in one.modules()}
    left = {p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return {p for one in replaced for p in one.parameters()} - left


def _heirs(
    module: nn.Module, stand_in: StandIn, gone: set[nn.Parameter]
) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    """The first parameter that goes with a module, and those that come in its place."""
    new, old = list(stand_in.parameters()), [p for p in module.parameters() if p in gone]
    trained = any(parameter.requires_grad for parameter in old)
    for parameter in new:
        parameter.requires_grad_(trained)
    return [(old[0], new)] if old and new else []


def _optimizer_changes(
    optimizer: Optimizer,
    gone: set[nn.Parameter],
    heirs: Mapping[nn.Parameter, list[nn.Parameter]],
) -> list[Change]:
    changes: list[Change] = []
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for parameter in group["params"]:
            params += [parameter] if parameter not in gone else heirs.get(parameter, [])
        if len(params) != len(group["params"]) or gone.intersection(group["params"]):
            changes.append((group, "params", params))
    if not changes:
        return []
    state: dict[Any, Any] = copy.copy(optimizer.state)
    for parameter in gone & cast(dict[nn.Parameter, Any], optimizer.state).keys():
        del state[parameter]
    changes.append((optimizer, "state", state))
    if isinstance(optimizer, RLSOptimizer):
        changes += optimizer._without(gone)
    return changes

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
from rlscuda.pruning.surgery.transaction import check_alone, commit, revert


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
    map join the group of what it replaces, in the place of the first that was trained there, and
    start without a state.

    Args:
        model: The model.
        optimizers: All that hold its parameters.
        stand_ins: By the qualified name of the module that each replaces.
        buffers: New values by the names of buffers, of others than these modules'.
        done: Is given what takes the change back, see `revert`.

    Raises:
        KeyError: The model has no such module.
        ValueError: An optimizer keeps something for all of its parameters together, as LBFGS does.
    """
    modules, optimizers = dict(model.named_modules(remove_duplicate=False)), tuple(optimizers)
    changes: list[Change] = []
    for name, stand_in in stand_ins.items():
        parent, _, own = name.rpartition(".")
        changes.append((modules[parent], own, stand_in.train(modules[name].training)))
    gone = _gone(modules, stand_ins)
    held = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    heirs: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, stand_in in stand_ins.items():
        for ancestor in _ancestors(modules[name], stand_in, gone, held):
            heirs.setdefault(ancestor, []).extend(stand_in.parameters())
    changes += [
        (buffer, "data", buffers[name].clone())
        for name, buffer in model.named_buffers()
        if name in buffers
    ]
    following = []
    for optimizer in optimizers:
        if follows := _optimizer_changes(optimizer, gone, heirs):
            changes += follows
            following.append(optimizer)
    numbered: list[Change] = []
    try:
        commit(changes, done)
        commit([change for one in following for change in _numbers(one)], numbered)
    except BaseException:
        revert(done)
        raise
    done += numbered


def _numbers(optimizer: Optimizer) -> list[Change]:
    """The numbers of its layers that a new optimizer would give them, which seed their draws."""
    if not isinstance(optimizer, RLSOptimizer):
        return []
    registry = optimizer._registry
    registry.search()
    layers = [(match.layer, place) for place, match in enumerate(registry.matches)]
    return [(layer, "index", place) for layer, place in layers if layer is not None]


def _gone(modules: Mapping[str, nn.Module], replaced: Iterable[str]) -> set[nn.Parameter]:
    """The parameters that a model has under no other name than those of replaced modules."""
    inside = tuple(f"{name}." for name in replaced)
    left: set[nn.Parameter] = set()
    gone: set[nn.Parameter] = set()
    for name, module in modules.items():
        where = gone if f"{name}.".startswith(inside) else left
        where.update(module.parameters(recurse=False))
    return gone - left


def _ancestors(
    module: nn.Module, stand_in: StandIn, gone: set[nn.Parameter], held: set[nn.Parameter]
) -> list[nn.Parameter]:
    """The parameter of a module whose place, or the next, a stand-in's have; they train as it does.

    It is the first that an optimizer holds, of those that are trained and go if there are such.
    """
    old = list(module.parameters())
    stand_in.requires_grad_(any(parameter.requires_grad for parameter in old))
    ranked = sorted(
        (p for p in old if p in held), key=lambda p: (not p.requires_grad, p not in gone)
    )
    return ranked[:1]


def _optimizer_changes(
    optimizer: Optimizer,
    gone: set[nn.Parameter],
    heirs: Mapping[nn.Parameter, list[nn.Parameter]],
) -> list[Change]:
    check_alone(optimizer, gone | heirs.keys())
    changes: list[Change] = []
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for parameter in group["params"]:
            params += [] if parameter in gone else [parameter]
            params += heirs.get(parameter, [])
        if gone.union(heirs).intersection(group["params"]):
            # in place, for optimizers as LBFGS hold the list itself
            changes.append((group["params"], slice(None), params))
    if not changes:
        return []
    state: dict[Any, Any] = copy.copy(optimizer.state)
    for parameter in gone & cast(dict[nn.Parameter, Any], optimizer.state).keys():
        del state[parameter]
    changes.append((optimizer, "state", state))
    if isinstance(optimizer, RLSOptimizer):
        changes += optimizer._without(gone)
    return changes

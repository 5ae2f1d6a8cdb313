"""Units that nothing reads any more: what goes with them, and how they leave the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from rlscuda._torch import (
    BatchNorm,
    Convolution,
    InstanceNorm,
    is_masked,
    own_buffers,
    own_parameters,
    plain_or_masked,
    unwrapped,
)
from rlscuda.optim.kinds.modules import COVERED
from rlscuda.pruning.couplings import Coupling, Structure
from rlscuda.pruning.masks.layers import MaskLayer, undo_of
from rlscuda.pruning.options import checked_optimizers
from rlscuda.pruning.running.calls import ExampleInputs, isolated_copy
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import operate

# of what channels pass through, that which changes each of them by itself
_CHANNELWISE = (BatchNorm, InstanceNorm, nn.PReLU, Convolution)


def structure_of(model: nn.Module, example_inputs: ExampleInputs) -> Structure:
    """The couplings of a model, its masked layers included.

    Raises:
        ValueError: The model cannot be copied, run on the example inputs, or traced.
    """
    copy = isolated_copy(model)
    for module in copy.modules():
        _unmask(module)
    return trace(copy, example_inputs)


def unread(structure: Structure, keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The units of which no layer keeps a connection.

    Args:
        structure: The couplings of a model.
        keep: Name of a Linear or convolution -> what it keeps, bool [c, n] or more columns.
            Others keep everything.

    Returns:
        Units by name of their coupling. Where a norm over channels meets a unit, it is read.
    """
    modules = dict(structure.model.named_modules())
    found = {}
    for coupling in structure.couplings:
        read = _read(coupling, modules, keep)
        if not all(read):
            found[coupling.name] = [unit for unit, is_read in enumerate(read) if not is_read]
    return found


def _read(
    coupling: Coupling, modules: Mapping[str, nn.Module], keep: Mapping[str, Tensor]
) -> list[bool]:
    """Of each unit of a coupling, whether anything reads it."""
    everything = [True] * coupling.units
    if any(
        member.kind == "both" and not isinstance(modules.get(member.name), _CHANNELWISE)
        for member in coupling.members
    ):
        return everything
    readers = [member for member in coupling.members if member.kind == "in"]
    if not readers or any(member.name not in keep for member in readers):
        return everything
    read = torch.zeros(coupling.units, dtype=torch.bool, device="cpu")
    for member in readers:
        columns = member.columns(modules[member.name])
        read |= keep[member.name].any(0).cpu()[columns].any(1)
    return read.tolist()


def drop_unread(structure: Structure, keep: Mapping[str, Tensor]) -> None:
    """The backward pass: units that nothing reads lose all that makes them.

    Args:
        structure: The couplings of a model.
        keep: See `unread`; changed in place, the biases' column with its row.
    """
    last: dict[str, list[int]] | None = None
    while (now := unread(structure, keep)) != last:  # each time one layer further to the front
        for name, units in now.items():
            for member in structure.coupling(name).members:
                if member.kind in ("out", "both") and member.name in keep:
                    keep[member.name][member.indices[units].flatten()] = False
        last = now


def remove_unread(
    model: nn.Module,
    example_inputs: ExampleInputs,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
) -> dict[str, list[int]]:
    """Cuts units that nothing reads out of a masked model, which computes what it did before.

    After `prune_relief` these are the units that have lost all their connections. The masks of
    what remains stay, and optimizers follow. It completes, or leaves everything as it was.

    Args:
        model: The model, with the masks of `torch.nn.utils.prune` or with zeros for good.
        example_inputs: What it can be called with, as `RLSPruner` takes it.
        optimizers: All that train it.

    Returns:
        The units removed, by the name of their coupling; of each one unit stays.

    Raises:
        ValueError: The model cannot be traced, or an optimizer keeps what cannot follow.
        TypeError: An optimizer is no torch optimizer.

    Example:
        >>> from rlscuda.pruning import prune_relief
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... )
        >>> _ = prune_relief(model, [torch.randn(100, 4)], alpha=0.5)
        >>> removed = remove_unread(model, torch.randn(2, 4))
        >>> model[0].out_features == 8 - sum(map(len, removed.values()))
        True
    """
    model = unwrapped(model)
    followers = checked_optimizers(optimizers, model)
    structure = structure_of(model, example_inputs)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, COVERED) and plain_or_masked(module, "weight") is not None
    }
    keep = {name: module.weight.detach().flatten(1) != 0 for name, module in layers.items()}
    removed = {}
    for name, units in unread(structure, keep).items():
        whole = len(units) == structure.coupling(name).units
        if units[whole:]:
            removed[name] = units[whole:]
    if not removed:
        return {}
    surgery = plan(structure, removed)  # of the copy, whose names and shapes are the model's
    masks: dict[str, Tensor] = {}
    undo: list[Callable[[], None]] = []
    try:
        for name, module in layers.items():
            weight, bias = (plain_or_masked(module, own) for own in ("weight", "bias"))
            assert weight is not None
            undo.append(undo_of(MaskLayer(name, module, weight, bias, None), []))
            masks |= {f"{name}.{own}": mask for own, mask in _unmask(module).items()}
        operate(model, followers, surgery, {}, example_inputs, [])
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for name, mask in masks.items():
        kept = surgery.tensors.get(name)
        owner, _, own = name.rpartition(".")
        prune.custom_from_mask(layers[owner], own, mask if kept is None else kept.take(mask))
    return removed


def _unmask(module: nn.Module) -> dict[str, Tensor]:
    """Makes the masks of a module permanent, and gives them by the name of their parameter."""
    names = [name.removesuffix("_orig") for name in own_parameters(module)]
    masks = {}
    for name in names:
        if is_masked(module, name):
            mask: Any = own_buffers(module)[f"{name}_mask"]
            masks[name] = mask
            prune.remove(module, name)
    return masks

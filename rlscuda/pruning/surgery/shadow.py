"""What is left of a model's tensors when channels are removed.

Linear layers and convolutions are cut here. Of any other module a copy whose every element holds
its own place, the index shadow, is pruned by torch-pruning in its stead: what survives tells which
elements of each tensor are kept, whatever the kind of the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rlscuda.optim.kept import Kept
from rlscuda.pruning.running.copies import all_tensors, isolated_copy
from rlscuda.pruning.structure.units import require_torch_pruning

_PLAIN = (int, float, bool, str, tuple)


@dataclass(eq=False)
class Remains:
    """What is left of a model.

    Attributes:
        tensors: Name of a parameter or buffer -> what is kept of it; only those that are cut.
        attributes: Name of a module -> its plain attributes that change.
    """

    tensors: dict[str, Kept] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)


def remains(model: nn.Module, removed: Mapping[tuple[str, str], list[int]]) -> Remains:
    """What is left when channels are removed.

    Args:
        model: The model, which is only read.
        removed: Name of a module or parameter and side (`in`, `out` or `both`) -> channels.
    """
    sides: dict[str, dict[str, list[int]]] = {}
    for (name, side), channels in removed.items():
        sides.setdefault(name, {})[side] = channels
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    left = Remains()
    for name, channels_of in sides.items():
        if name not in modules:
            _cut_bare(left, name, parameters[name], channels_of["both"], modules)
            continue
        module = modules[name]
        if isinstance(module, (nn.Linear, _ConvNd)):
            _cut_weighted(left, name, module, channels_of)
        else:
            _cut_by_shadow(left, name, module, channels_of["both"])
    return left


def _cut_bare(
    left: Remains,
    name: str,
    parameter: Tensor,
    channels: list[int],
    modules: Mapping[str, nn.Module],
) -> None:
    """Cuts a parameter that is no module's of those that torch-pruning knows."""
    axis = parameter_axis(parameter)
    kept = Kept.along(tuple(parameter.shape), {axis: _without(parameter.shape[axis], channels)})
    left.tensors[name] = kept
    for owner, module in modules.items():
        if isinstance(module, nn.RMSNorm) and module.weight is parameter:
            left.attributes[owner] = {"normalized_shape": kept.shape}


def parameter_axis(parameter: Tensor) -> int:
    """The dimension in which torch-pruning cuts a bare parameter: the last of more than one."""
    return max(dim for dim, size in enumerate(parameter.shape) if size > 1)


def _without(size: int, channels: list[int]) -> Tensor:
    remain = torch.ones(size, dtype=torch.bool, device="cpu")
    remain[channels] = False
    return remain.nonzero().flatten()


def _cut_weighted(
    left: Remains, name: str, module: nn.Linear | _ConvNd, channels: Mapping[str, list[int]]
) -> None:
    """Cuts a linear layer or convolution; a depthwise one loses whole groups."""
    convolution = isinstance(module, _ConvNd)
    outputs = channels.get("out", channels.get("both", []))
    inputs = channels.get("in", channels.get("both", []))
    width_in, width_out = (
        (module.in_channels, module.out_channels)
        if isinstance(module, _ConvNd)
        else (module.in_features, module.out_features)
    )
    kind = "channels" if convolution else "features"
    attributes = {}
    weight: dict[int, Tensor] = {}
    axes = (1, 0) if getattr(module, "transposed", False) else (0, 1)
    if outputs:
        weight[axes[0]] = _without(width_out, outputs)
        attributes[f"out_{kind}"] = width_out - len(outputs)
        if module.bias is not None:
            left.tensors[_join(name, "bias")] = Kept.along((width_out,), {0: weight[axes[0]]})
    if inputs:
        attributes[f"in_{kind}"] = width_in - len(inputs)
        if "both" in channels:
            attributes["groups"] = width_out - len(outputs)
        else:  # the units hold the same places of every group
            groups = getattr(module, "groups", 1)
            size = width_in // groups
            weight[axes[1]] = _without(size, [i for i in inputs if i < size])
    left.tensors[_join(name, "weight")] = Kept.along(tuple(module.weight.shape), weight)
    left.attributes[name] = attributes


def _cut_by_shadow(left: Remains, name: str, module: nn.Module, channels: list[int]) -> None:
    """Cuts a module that passes its channels on, as torch-pruning does."""
    tp = require_torch_pruning()
    places = {tensor: _places(tensor) for tensor in all_tensors(module).values()}
    shadow = isolated_copy(module, places)
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm):
            _cut_layer_norm(shadow, channels)
        else:
            pruner = tp.DependencyGraph().get_pruner_of_module(module)
            pruner.prune_out_channels(shadow, sorted(channels))
            if isinstance(module, nn.modules.instancenorm._InstanceNorm):
                _cut_running_statistics(shadow, channels)
    for own, kept in survivors(shadow, all_tensors(module)).items():
        left.tensors[_join(name, own)] = kept
    after = dict(shadow.named_modules())
    for own, part in module.named_modules():
        for key, old in vars(part).items():
            new = vars(after[own]).get(key)
            if isinstance(old, _PLAIN) and new != old:
                left.attributes.setdefault(_join(name, own), {})[key] = new


def _join(first: str, second: str) -> str:
    return ".".join(part for part in (first, second) if part)


def _places(tensor: Tensor) -> Tensor:
    """The place of every element, on the CPU; float64 holds them exactly to 2^53."""
    places = torch.arange(tensor.numel(), dtype=torch.float64, device="cpu").view(tensor.shape)
    return nn.Parameter(places) if isinstance(tensor, nn.Parameter) else places


def number(model: nn.Module) -> None:
    """Makes a copy of a model its shadow, its parameters being the same objects."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _places(tensor).detach()


def survivors(shadow: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Kept]:
    """What is kept of each tensor that was cut.

    Args:
        shadow: The shadow after pruning.
        before: The tensors by name, as they were.
    """
    found = {}
    after = all_tensors(shadow)
    for name, tensor in before.items():
        places, of = after[name], tuple(tensor.shape)
        if tuple(places.shape) != of:
            found[name] = Kept.from_index(places.detach().to(torch.int64), of)
    return found


def _cut_layer_norm(norm: Any, channels: list[int]) -> None:
    """Cuts the last dimension; torch-pruning's own cut can leave the channels out of order."""
    *first, last = norm.normalized_shape
    for name in ("weight", "bias"):
        parameter = getattr(norm, name)
        if parameter is not None:
            kept = parameter.detach().index_select(-1, _without(last, channels))
            setattr(norm, name, nn.Parameter(kept))
    norm.normalized_shape = (*first, last - len(channels))


def _cut_running_statistics(norm: Any, channels: list[int]) -> None:
    """Cuts what torch-pruning leaves at its old size."""
    for name in ("running_mean", "running_var"):
        statistics = getattr(norm, name)
        if statistics is not None:
            setattr(norm, name, statistics.index_select(0, _without(len(statistics), channels)))

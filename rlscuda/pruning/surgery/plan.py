"""What is kept of a model's tensors when channels are removed; the model is only read.

Linear layers and convolutions are cut here. Of any other module a copy whose every element holds
its own place, the index shadow, is pruned by torch-pruning in its stead: what survives tells which
elements of each tensor are kept, whatever the kind of the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import Convolution, InstanceNorm
from rlscuda.optim.kept import Kept
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    all_tensors,
    isolated_copy,
    map_tensors,
    output_tensors,
)

_PLAIN = (int, float, bool, str, tuple)


@dataclass(frozen=True, eq=False)
class Surgery:
    """What is to change of a model.

    Attributes:
        tensors: Name of a parameter or buffer -> what is kept of it; only those that are cut.
        attributes: Name of a module -> its plain attributes that change, as `out_channels`.
        inputs: Number of an example input among their tensors -> channels (dimension 1) that the
            pruned model takes, int64.
        output_shapes: Shapes of the model's outputs, which stay.
    """

    tensors: dict[str, Kept]
    attributes: dict[str, dict[str, Any]]
    inputs: dict[str, Tensor]
    output_shapes: list[tuple[int, ...]]

    def set_attributes(self, model: nn.Module) -> None:
        """Gives the modules of a copy their new attributes."""
        for name, attributes in self.attributes.items():
            for key, value in attributes.items():
                setattr(model.get_submodule(name), key, value)

    def slice_inputs(self, example_inputs: ExampleInputs) -> Any:
        """Example inputs as the pruned model takes them."""
        numbers = iter(range(len(output_tensors(example_inputs))))

        def sliced(tensor: Tensor) -> Tensor:
            kept = self.inputs.get(str(next(numbers)))
            return tensor if kept is None else tensor.index_select(1, kept.to(tensor.device))

        return map_tensors(sliced, example_inputs)


def plan(structure: Structure, removed: Mapping[str, Iterable[int]]) -> Surgery:
    """What removing units of couplings changes; the model is only read.

    Args:
        structure: The model's couplings.
        removed: Name of a coupling -> the units to remove, of which one must stay.

    Raises:
        KeyError: There is no such coupling.
        ValueError: A unit is out of range or given twice, none would stay, two modules would cut
            the parameter that they share differently, or the model was changed since it was traced.
    """
    model = structure.model
    before = all_tensors(model)
    if {name: tuple(t.shape) for name, t in before.items()} != structure.shapes:
        raise ValueError("the model was changed since it was traced: trace it again")
    channels: dict[str, dict[str, list[int]]] = {}  # by name of a module or parameter, by side
    inputs: dict[str, Tensor] = {}
    for name, units in removed.items():
        coupling = structure.coupling(name)
        chosen = _checked(name, coupling.units, list(units))
        for member in coupling.members if chosen else ():
            gone = member.indices[chosen].flatten().tolist()
            if member.kind == "input":
                kept = _without(structure.input_widths[member.name], gone)
                earlier = inputs.get(member.name, kept)
                inputs[member.name] = kept[torch.isin(kept, earlier)]
            else:
                channels.setdefault(member.name, {}).setdefault(member.kind, []).extend(gone)
    surgery = Surgery({}, {}, inputs, structure.output_shapes)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, own in channels.items():
        module = modules.get(name)
        if module is None:
            _cut_bare(surgery, name, parameters[name], own["both"], modules)
        elif isinstance(module, (nn.Linear, Convolution)):
            _cut_weighted(surgery, name, module, own)
        else:
            _cut_by_shadow(surgery, name, module, own["both"])
    return replace(surgery, tensors=_tied(before, surgery.tensors))


def _checked(name: str, count: int, units: list[int]) -> list[int]:
    wrong = [
        u for u in units if isinstance(u, bool) or not isinstance(u, int) or not 0 <= u < count
    ]
    if wrong or len(set(units)) != len(units):
        raise ValueError(f"units of {name!r} must be different ints in [0, {count}), got {units}")
    if len(units) == count:
        raise ValueError(f"one of the {count} units of {name!r} must stay")
    return units


def _tied(before: Mapping[str, Tensor], tensors: Mapping[str, Kept]) -> dict[str, Kept]:
    """What is kept of every tensor that is cut, under all of its names.

    Raises:
        ValueError: Two modules share a tensor and would cut it differently.
    """
    names: dict[Tensor, list[str]] = {}
    for name, tensor in before.items():
        names.setdefault(tensor, []).append(name)
    found = {}
    for same in names.values():
        cut = [name for name in same if name in tensors]
        for name in same if cut else ():
            kept = tensors.get(name)
            # under the other names of a module that has several, nothing was planned
            if kept is not None and not kept.same(tensors[cut[0]]):
                raise ValueError(f"{cut[0]!r} and {name!r} are one tensor, and would be cut "
                                 "differently")  # fmt: skip
            found[name] = tensors[cut[0]]
    return found


def _cut_bare(
    surgery: Surgery,
    name: str,
    parameter: Tensor,
    channels: list[int],
    modules: Mapping[str, nn.Module],
) -> None:
    """Cuts a parameter that is no module's of those that torch-pruning knows."""
    # torch-pruning cuts the last dimension of more than one
    axis = max(dim for dim, size in enumerate(parameter.shape) if size > 1)
    kept = Kept.along(tuple(parameter.shape), {axis: _without(parameter.shape[axis], channels)})
    surgery.tensors[name] = kept
    for owner, module in modules.items():
        if isinstance(module, nn.RMSNorm) and module.weight is parameter:
            surgery.attributes[owner] = {"normalized_shape": kept.shape}


def _without(size: int, channels: list[int]) -> Tensor:
    remain = torch.ones(size, dtype=torch.bool, device="cpu")
    remain[channels] = False
    return remain.nonzero().flatten()


def _cut_weighted(
    surgery: Surgery, name: str, module: nn.Linear | Convolution, channels: Mapping[str, list[int]]
) -> None:
    """Cuts a linear layer or convolution; a depthwise one loses whole groups."""
    convolution = isinstance(module, Convolution)
    outputs = channels.get("out", channels.get("both", []))
    inputs = channels.get("in", channels.get("both", []))
    width_in, width_out = (
        (module.in_channels, module.out_channels)
        if isinstance(module, Convolution)
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
            surgery.tensors[_join(name, "bias")] = Kept.along((width_out,), {0: weight[axes[0]]})
    if inputs:
        attributes[f"in_{kind}"] = width_in - len(inputs)
        if "both" in channels:
            attributes["groups"] = width_out - len(outputs)
        else:  # the units hold the same places of every group
            groups = getattr(module, "groups", 1)
            size = width_in // groups
            weight[axes[1]] = _without(size, [i for i in inputs if i < size])
    surgery.tensors[_join(name, "weight")] = Kept.along(tuple(module.weight.shape), weight)
    surgery.attributes[name] = attributes


def _cut_by_shadow(surgery: Surgery, name: str, module: nn.Module, channels: list[int]) -> None:
    """Cuts a module that passes its channels on, as torch-pruning does."""
    import torch_pruning as tp

    places = {tensor: _places(tensor) for tensor in all_tensors(module).values()}
    shadow = isolated_copy(module, places)
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm):
            _cut_layer_norm(shadow, channels)
        else:
            pruner = tp.DependencyGraph().get_pruner_of_module(module)
            pruner.prune_out_channels(shadow, sorted(channels))
            if isinstance(module, InstanceNorm):
                _cut_running_statistics(shadow, channels)
    for own, kept in kept_tensors(shadow, all_tensors(module)).items():
        surgery.tensors[_join(name, own)] = kept
    after = dict(shadow.named_modules())
    for own, part in module.named_modules():
        for key, old in vars(part).items():
            new = vars(after[own]).get(key)
            if isinstance(old, _PLAIN) and new != old:
                surgery.attributes.setdefault(_join(name, own), {})[key] = new


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


def kept_tensors(shadow: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Kept]:
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

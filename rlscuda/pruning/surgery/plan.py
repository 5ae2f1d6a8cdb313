"""What is kept of a model's tensors when channels are removed; the model is only read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.optim.kept import Kept
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    all_tensors,
    map_tensors,
    output_tensors,
)
from rlscuda.pruning.surgery.attributes import attributes_of


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
    gone: dict[str, dict[int, list[int]]] = {}  # by name of a tensor, by dimension
    inputs: dict[str, Tensor] = {}
    chosen = {
        name: _checked(name, structure.coupling(name).units, list(units))
        for name, units in removed.items()
    }
    for name, units in chosen.items():
        coupling = structure.coupling(name)
        for (tensor, axis), places in coupling.places.items() if units else ():
            gone.setdefault(tensor, {}).setdefault(axis, []).extend(
                places[units].flatten().tolist()
            )
        for member in coupling.members if units else ():
            if member.kind == "input":
                lost = member.indices[units].flatten().tolist()
                kept = _without(structure.input_widths[member.name], lost)
                earlier = inputs.get(member.name, kept)
                inputs[member.name] = kept[torch.isin(kept, earlier)]
    tensors = {
        name: Kept.along(
            tuple(before[name].shape),
            {axis: _without(before[name].shape[axis], lost) for axis, lost in axes.items()},
        )
        for name, axes in gone.items()
    }
    surgery = Surgery(_tied(before, tensors), {}, inputs, structure.output_shapes)
    attributes = attributes_of(model, surgery.tensors, structure.widths, chosen)
    return replace(surgery, attributes=attributes)


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


def _without(size: int, channels: list[int]) -> Tensor:
    remain = torch.ones(size, dtype=torch.bool, device="cpu")
    remain[channels] = False
    return remain.nonzero().flatten()


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

"""Which channels of a model live and die together: its couplings, from torch-pruning's graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rlscuda.optim.discovery import selection
from rlscuda.pruning.running.copies import ExampleInputs, all_tensors
from rlscuda.pruning.structure.soundness import unsound
from rlscuda.pruning.structure.units import Side, Unit, units_of


@dataclass(frozen=True, eq=False)
class Member:
    """A module, bare parameter or raw input that meets a coupling.

    Attributes:
        name: Qualified name of the module or parameter; for a raw input its number among the
            tensors of the example inputs.
        kind: `in` or `out`, the side of a module on which the channels are; `both` where they pass
            through it (norm layers, depthwise convolutions, embeddings, bare parameters); `input`
            for a raw input of the model.
        indices: Channels of each unit [units, k], int64, on that side of the module.
    """

    name: str
    kind: str
    indices: Tensor

    def columns(self, module: nn.Module) -> Tensor:
        """The columns of the im2col matrix that the units take on the input side.

        Args:
            module: The `nn.Linear` or `nn.Conv2d` of that name.

        Returns:
            [units, columns] int64, ascending, in `F.unfold` order; for a grouped convolution within
            the matrix of each group.

        Raises:
            ValueError: The units are not on the input side of a Linear or Conv2d.
        """
        if self.kind != "in" or not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"columns are those of the input side of a Linear or Conv2d, got side "
                f"{self.kind!r} of {type(module).__name__} {self.name!r}"
            )
        if isinstance(module, nn.Linear):
            return self.indices
        area = module.kernel_size[0] * module.kernel_size[1]
        # the units hold the same positions of every group, and the first comes first
        first = self.indices[:, : self.indices.shape[1] // module.groups]
        return (first[:, :, None] * area + torch.arange(area, device="cpu")).flatten(1)


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels that can only be removed together, unit by unit.

    Attributes:
        name: That of the first module that produces them, or `input` for raw inputs.
        units: How many can be removed on their own, of which one must stay.
        members: All that meets them.
    """

    name: str
    units: int
    members: list[Member]

    def member(self, name: str, kind: str) -> Member:
        """The member of that name and side.

        Raises:
            KeyError: There is none.
        """
        for member in self.members:
            if (member.name, member.kind) == (name, kind):
                return member
        raise KeyError(f"coupling {self.name!r} has no member {name!r} on side {kind!r}")


@dataclass(frozen=True, eq=False)
class Structure:
    """The couplings of a model.

    Attributes:
        model: The model.
        couplings: Those that can be pruned, in the order of the modules that produce them.
        refused: Name of a coupling that cannot be pruned -> why.
        output_shapes: Shapes of the model's outputs for the example inputs.
        input_widths: Channels of each raw input, by its number, that pruning could follow.
        shapes: Shape of every parameter and buffer when the model was traced.
    """

    model: nn.Module
    couplings: list[Coupling]
    refused: dict[str, str]
    output_shapes: list[tuple[int, ...]]
    input_widths: dict[str, int]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    def coupling(self, name: str) -> Coupling:
        """The coupling of that name.

        Raises:
            KeyError: There is none; the message says why if it was refused.
        """
        for coupling in self.couplings:
            if coupling.name == name:
                return coupling
        reason = self.refused.get(name)
        raise KeyError(f"no coupling {name!r}" + (f": {reason}" if reason else ""))


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored: Iterable[str | nn.Module] = (),
    include_inputs: bool = False,
) -> Structure:
    """Finds the couplings of a model; the model itself is neither run nor changed.

    Args:
        model: The model.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.
        ignored: Modules, names or shell patterns of names; what they and all inside them produce
            keeps its channels.
        include_inputs: Whether the channels (dimension 1) of raw inputs may be removed too. The
            pruned model then takes inputs without them.

    Returns:
        The structure. What the model puts out is never part of a coupling.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: The model cannot be copied, run on the example inputs, or traced; `ignored`
            names what the model does not have.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prune the module inside DistributedDataParallel, and wrap it again")
    kept = {m for _, inside in selection(ignored, "ignored", model) for m in inside}
    kept_names = {name for name, module in model.named_modules() if module in kept}
    traced = units_of(model, example_inputs)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    couplings: list[Coupling] = []
    made = [unit for unit in traced.units if any(kind != "in" for _, kind in unit.channels)]
    refused = _unfollowed(traced.units) if include_inputs else {}
    for name, same in _named(_alike(made, order), order):
        coupling, reason = _coupling(name, same, order), same[0].reason
        produced = {m.name for m in coupling.members if m.kind in ("out", "both")}
        if produced & kept_names:
            continue
        touches_input = any(member.kind == "input" for member in coupling.members)
        if touches_input and not include_inputs:
            if not any(member.kind == "out" for member in coupling.members):
                continue
            reason = reason or "it is added to or joined with the model's input: include_inputs"
        if reason:
            refused[coupling.name] = reason
        else:
            couplings.append(coupling)
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}
    found = Structure(model, couplings, refused, traced.output_shapes, traced.input_widths, shapes)
    wrong = unsound(found, example_inputs)
    sound = [coupling for coupling in couplings if coupling.name not in wrong]
    return replace(found, couplings=sound, refused={**refused, **wrong})


def _unfollowed(units: list[Unit]) -> dict[str, str]:
    """The layers that take what nothing seems to make, and why that cannot be a coupling."""
    reason = "only float inputs of 2, 4 or 5 dimensions can be followed"
    return {
        f"input of {name!r}": reason
        for unit in units
        for name, _ in unit.channels
        if all(kind == "in" for _, kind in unit.channels)
    }


def _alike(units: list[Unit], order: dict[str, int]) -> list[list[Unit]]:
    """Units that have the same members, in the order of the modules that produce them."""
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        sides = sorted((side, len(found)) for side, found in unit.channels.items())
        alike.setdefault((tuple(sides), unit.reason), []).append(unit)
    for same in alike.values():
        same.sort(key=lambda unit: min(unit.channels[_leader(unit, order)]))
    return sorted(
        alike.values(),
        key=lambda same: (
            _place(_leader(same[0], order), order),
            min(same[0].channels[_leader(same[0], order)]),
        ),
    )


def _leader(unit: Unit, order: dict[str, int]) -> Side:
    """The side that names the coupling: the first to produce it, else the first to meet it."""
    sides = _in_order(unit, order)
    produced = [side for side in sides if side[1] == "out"]
    return (produced or sides)[0]  # a raw input is the first of all


def _in_order(unit: Unit, order: dict[str, int]) -> list[Side]:
    return sorted(unit.channels, key=lambda side: _place(side, order))


def _place(side: Side, order: dict[str, int]) -> tuple[int, Side]:
    """Sorts raw inputs first, then the model's modules in their order, then bare parameters."""
    return (-1 if side[1] == "input" else order.get(side[0], len(order)), side)


def _named(alike: list[list[Unit]], order: dict[str, int]) -> Iterator[tuple[str, list[Unit]]]:
    """Gives each list of units a name of its own."""
    seen: dict[str, int] = {}
    for same in alike:
        name, kind = _leader(same[0], order)
        name = f"input {name}" if kind == "input" else name
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", same


def _coupling(name: str, same: list[Unit], order: dict[str, int]) -> Coupling:
    sides = _in_order(same[0], order)
    members = [
        Member(*side, torch.tensor([unit.channels[side] for unit in same], device="cpu"))
        for side in sides
    ]
    return Coupling(name, len(same), members)

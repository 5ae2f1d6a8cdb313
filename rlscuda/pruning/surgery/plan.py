"""Removing channels from a model and everything that follows it, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Kept
from rlscuda.pruning.running.copies import (
    ExampleInputs,
    all_tensors,
    call,
    isolated_copy,
    map_tensors,
    output_tensors,
    rng_kept,
    train_but_norms,
)
from rlscuda.pruning.surgery.any_optimizer import optimizer_changes
from rlscuda.pruning.surgery.journal import Change, commit
from rlscuda.pruning.surgery.shadow import remains

if TYPE_CHECKING:
    from rlscuda.pruning.structure.trace import Structure


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
    sides: dict[tuple[str, str], list[int]] = {}
    inputs: dict[str, Tensor] = {}
    for name, units in removed.items():
        coupling = structure.coupling(name)
        chosen = _checked(name, coupling.units, list(units))
        for member in coupling.members if chosen else ():
            channels = member.indices[chosen].flatten().tolist()
            sides.setdefault((member.name, member.kind), []).extend(channels)
    for name, kind in [side for side in sides if side[1] == "input"]:
        gone = set(sides.pop((name, kind)))
        inputs[name] = torch.tensor(
            [channel for channel in range(structure.input_widths[name]) if channel not in gone],
            device="cpu",
        )
    left = remains(model, sides)
    tensors = _tied(before, left.tensors)
    return Surgery(tensors, left.attributes, inputs, structure.output_shapes)


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


@torch.no_grad()
def operate(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    surgery: Surgery,
    values: Mapping[str, Tensor],
    example_inputs: ExampleInputs,
) -> list[Change]:
    """Carries out a surgery on a model and its optimizers; completes, or leaves all as it was.

    Parameters that are cut become new `nn.Parameter` objects, with what was theirs: their ties,
    `requires_grad`, gradient, hooks and attributes, and the state that optimizers keep for them.
    Everything is computed, and the pruned model tried on the example inputs, before any reference
    is replaced.

    Args:
        model: The model.
        optimizers: Its optimizer, or all that hold its parameters.
        surgery: What to remove.
        values: Name of a parameter -> its new value in its old shape, as compensation has it.
        example_inputs: What the model could be called with so far.

    Returns:
        What takes the surgery back, see `journal.revert`.

    Raises:
        ValueError: The model is not that of the surgery, a value is of another shape or not
            finite, an optimizer keeps what cannot follow, or the pruned model fails on the example
            inputs.
    """
    model = getattr(model, "_orig_mod", model)
    before = all_tensors(model)
    _check(before, surgery, values)
    replaced, valued = _new_tensors(before, surgery, values)
    changes = [Change(tensor, "data", value) for tensor, value in valued.items()]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in before.items():
        if tensor in replaced:
            parent, _, own = name.rpartition(".")
            changes.append(Change(modules[parent], own, replaced[tensor][0]))
    for name, attributes in surgery.attributes.items():
        changes += [Change(modules[name], key, value) for key, value in attributes.items()]
    changes += _followers(optimizers, replaced)
    _try(model, surgery, _pruned_copy(model, surgery, replaced, valued), example_inputs)
    return commit(changes)


@torch.no_grad()
def pruned_copy(model: nn.Module, surgery: Surgery, values: Mapping[str, Tensor]) -> nn.Module:
    """What a surgery would make of a model, as a copy in eval mode; the model is only read.

    Args:
        model: The model.
        surgery: What to remove.
        values: Name of a parameter -> its new value in its old shape.

    Raises:
        ValueError: The model is not that of the surgery, or a value is of another shape or not
            finite.
    """
    model = getattr(model, "_orig_mod", model)
    before = all_tensors(model)
    _check(before, surgery, values)
    return _pruned_copy(model, surgery, *_new_tensors(before, surgery, values))


def _new_tensors(
    before: Mapping[str, Tensor], surgery: Surgery, values: Mapping[str, Tensor]
) -> tuple[dict[Tensor, tuple[Tensor, Kept]], dict[Tensor, Tensor]]:
    """What takes the place of each tensor that is cut, and the new values of those that are not."""
    replaced: dict[Tensor, tuple[Tensor, Kept]] = {}
    valued: dict[Tensor, Tensor] = {}
    for name, tensor in before.items():
        kept, value = surgery.tensors.get(name), values.get(name)
        if kept is not None and tensor not in replaced:
            replaced[tensor] = (_successor(tensor, kept, value), kept)
        elif kept is None and value is not None:
            valued[tensor] = _as(tensor, value)
    return replaced, valued


def _check(before: Mapping[str, Tensor], surgery: Surgery, values: Mapping[str, Tensor]) -> None:
    for name, kept in surgery.tensors.items():
        got = tuple(before[name].shape) if name in before else None
        if got != kept.of:
            raise ValueError(f"the surgery is of another model: {name!r} must be {list(kept.of)}, "
                             f"got {got if got is None else list(got)}")  # fmt: skip
    for name, value in values.items():
        if name not in before:
            raise ValueError(f"values has {name!r}, which the model does not have")
        if value.shape != before[name].shape:
            raise ValueError(f"the value of {name!r} must be of its old shape "
                             f"{list(before[name].shape)}, got {list(value.shape)}")  # fmt: skip
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the value of {name!r} is not finite")


def _as(tensor: Tensor, value: Tensor) -> Tensor:
    """A value in the dtype, device and memory format of the tensor whose it is to be."""
    return torch.empty_like(tensor, requires_grad=False).copy_(value)


def _successor(tensor: Tensor, kept: Kept, value: Tensor | None) -> Tensor:
    """What takes the place of a parameter or buffer."""
    source = tensor.detach() if value is None else _as(tensor, value)
    data = kept.take(source)
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    new.__dict__.update(tensor.__dict__)
    if tensor.grad is not None:
        new.grad = kept.take(tensor.grad)
    # the very dicts, so that the handles that remove a hook still do
    new._backward_hooks = tensor._backward_hooks
    new._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks
    return new


def _followers(
    optimizers: Optimizer | Iterable[Optimizer],
    replaced: Mapping[Tensor, tuple[Tensor, Kept]],
) -> list[Change]:
    """The changes of every optimizer."""
    parameters = cast(
        dict[nn.Parameter, tuple[nn.Parameter, Kept]],
        {old: pair for old, pair in replaced.items() if isinstance(old, nn.Parameter)},
    )
    every = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    return [change for one in every for change in optimizer_changes(one, parameters)]


def _pruned_copy(
    model: nn.Module,
    surgery: Surgery,
    replaced: Mapping[Tensor, tuple[Tensor, Kept]],
    valued: Mapping[Tensor, Tensor],
) -> nn.Module:
    tensors = {old: new for old, (new, _) in replaced.items()} | dict(valued)
    pruned = isolated_copy(model, {old: _like(old, new) for old, new in tensors.items()}).eval()
    surgery.set_attributes(pruned)
    return pruned


def _try(model: nn.Module, surgery: Surgery, pruned: nn.Module, example_inputs: Any) -> None:
    """Runs a copy of the pruned model, and once more in training mode.

    Raises:
        ValueError: It fails, in training mode where the whole model does not, or what it puts out
            has another shape.
    """
    inputs = surgery.slice_inputs(example_inputs)
    try:
        with rng_kept(model):
            output = call(pruned, inputs)
    except Exception as error:
        raise ValueError(
            f"the pruned model fails on the example inputs: {error}; is a number of channels "
            "written into its forward? What produces them can be named in ignored"
        ) from error
    shapes = [tuple(tensor.shape) for tensor in output_tensors(output)]
    if shapes != surgery.output_shapes:
        raise ValueError(f"the pruned model must put out {surgery.output_shapes} on the example "
                         f"inputs, got {shapes}")  # fmt: skip
    with rng_kept(model):
        _try_in_training(model, pruned, inputs, example_inputs)


def _try_in_training(model: nn.Module, pruned: nn.Module, inputs: Any, example_inputs: Any) -> None:
    try:
        call(train_but_norms(pruned), inputs)
    except Exception as error:
        try:
            call(train_but_norms(isolated_copy(model)), example_inputs)
        except Exception:
            return  # the whole model wants something else there
        raise ValueError(
            f"the pruned model fails in training mode on the example inputs: {error}; what "
            "produces the channels can be named in ignored"
        ) from error


def _like(old: Tensor, new: Tensor) -> Tensor:
    data = new.detach().clone()
    return nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data

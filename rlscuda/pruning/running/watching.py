"""What one forward shows of a model: what it never reaches, and sizes that follow from values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlscuda._torch import Operator, TorchDispatchMode, own_parameters, storage_key, tree_leaves
from rlscuda.pruning.running.calls import ExampleInputs, call, inference

_BY_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class _Operators(TorchDispatchMode):
    """Notes the storages that operators are given, and whether values decided about sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.by_values = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.storages.update(storage_key(t) for t in given if t.layout == torch.strided)
        self.by_values = self.by_values or _decides_sizes(func, given)
        return func(*args, **(kwargs or {}))


def _decides_sizes(operator: Operator, given: list[Tensor]) -> bool:
    """Whether what an operator gives has a size, or is a number, that follows from values."""
    if operator is torch.ops.aten.index.Tensor:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
    known = operator.namespace in ("aten", "prims", "prim")
    return not known or not _BY_VALUES.isdisjoint(operator.tags)


def _watched(model: nn.Module, example_inputs: ExampleInputs) -> _Operators:
    operators = _Operators()
    with inference(model), operators:
        call(model, example_inputs)
    return operators


def unreached(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """The modules with parameters of which a forward in eval mode uses none, and that it does not.

    A parameter counts as used where an operator takes it, or a view of it, whoever calls that.
    """
    used = _watched(model, example_inputs).storages
    found = {}
    for name, module in model.named_modules():
        own = [p for p in own_parameters(module).values() if p is not None and p.numel()]
        if own and all(storage_key(parameter) not in used for parameter in own):
            found[name] = "the example inputs never reach it in eval mode"
    return found


def sized_by_values(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Whether values decide about sizes in a forward in eval mode, as of boxes above a threshold.

    Operators that are not of torch may do anything, and count.
    """
    return _watched(model, example_inputs).by_values


def branched(error: Exception, missed: Iterable[str] = ()) -> ValueError:
    """What to raise where a pruned model fails on a batch, and not on the example inputs.

    Args:
        error: What it raised.
        missed: The modules that the example inputs do not reach.
    """
    names = ", ".join(map(repr, missed))
    never = f", as into {names}" if names else ""
    return ValueError(
        f"the pruned model fails on a batch of loader: {error}; the batch may take a branch that "
        f"the example inputs do not{never}: give example_inputs that reach all of the model"
    )

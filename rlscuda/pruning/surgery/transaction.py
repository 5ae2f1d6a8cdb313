"""The cut of a model and of all that follows it, in one transaction: all of it is done, or nothing.

Parameters that are cut become new `nn.Parameter` objects, with what was theirs: their ties,
`requires_grad`, gradient, hooks and attributes, and the state that optimizers keep for them.
Everything is computed, and the pruned model tried, before any reference is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda._torch import share_hooks
from rlscuda.optim.kept import Change, Kept, Replaced
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    all_tensors,
    isolated_copy,
    output_tensors,
)
from rlscuda.pruning.surgery.plan import Surgery
from rlscuda.pruning.surgery.trial import prove

_ABSENT = object()


@torch.no_grad()
def operate(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    surgery: Surgery,
    values: Mapping[str, Tensor],
    example_inputs: ExampleInputs,
    done: list[Change],
    batches: Iterable[tuple[Any, Any]] = (),
) -> None:
    """Carries out a surgery on a model and its optimizers; completes, or leaves all as it was.

    Args:
        model: The model.
        optimizers: All that hold its parameters.
        surgery: What to remove.
        values: Name of a parameter -> its new value in its old shape, as compensation has it.
        example_inputs: What the model could be called with so far.
        done: Is given what takes the surgery back, see `revert`.
        batches: What the pruned model has to run on, too: each as the whole model takes it and as
            the pruned one does.

    Raises:
        ValueError: The model is not that of the surgery, a value is of another shape or not
            finite, an optimizer keeps what cannot follow, or the pruned model fails on the example
            inputs or a batch.
    """
    before = all_tensors(model)
    replaced, valued = _new_tensors(before, surgery, values)
    changes: list[Change] = [(tensor, "data", value) for tensor, value in valued.items()]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in before.items():
        if tensor in replaced:
            parent, _, own = name.rpartition(".")
            changes.append((modules[parent], own, replaced[tensor][0]))
    for name, attributes in surgery.attributes.items():
        changes += [(modules[name], key, value) for key, value in attributes.items()]
    for optimizer in optimizers:
        changes += optimizer_changes(optimizer, replaced)
    prove(model, surgery, pruned_copy(model, surgery, values), example_inputs, batches)
    commit(changes, done)


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
    replaced, valued = _new_tensors(all_tensors(model), surgery, values)
    tensors = {old: new for old, (new, _) in replaced.items()} | valued
    held = {
        old: nn.Parameter(new.detach(), old.requires_grad) if isinstance(old, nn.Parameter) else new
        for old, new in tensors.items()
    }
    pruned = isolated_copy(model, held).eval()
    surgery.set_attributes(pruned)
    return pruned


def _new_tensors(
    before: Mapping[str, Tensor], surgery: Surgery, values: Mapping[str, Tensor]
) -> tuple[dict[Any, tuple[Any, Kept]], dict[Tensor, Tensor]]:
    """What takes the place of each tensor that is cut, and the new values of those that are not."""
    _check(before, surgery, values)
    replaced: dict[Any, tuple[Any, Kept]] = {}
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
    share_hooks(new, tensor)
    return new


def transfer_state(optimizer: Optimizer, replaced: Replaced) -> None:
    """Lets an optimizer go on with parameters that have taken the place of larger ones.

    Its groups hold the new parameters in the places of the old ones, and what it keeps for each
    (momentum, moments, averages) is cut as the parameter was. An `RLSOptimizer` cuts the rows and
    columns of its matrices with it, by a Schur downdate. Learning-rate schedulers and `GradScaler`
    go on as they are. It completes, or leaves the optimizer as it was.

    Args:
        optimizer: Any torch optimizer.
        replaced: Old parameter -> the new one and what was kept of the old.

    Raises:
        ValueError: The optimizer keeps something that cannot follow (as LBFGS does), or a new
            parameter is not of the shape of what was kept.

    Example:
        After torch-pruning itself has pruned a model:

        >>> import torch_pruning as tp
        >>> from rlscuda.pruning import PruningRecord
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        ... )
        >>> images = torch.randn(2, 3, 8, 8)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(images).square().mean().backward()
        >>> optimizer.step()
        >>> record = PruningRecord(model, images)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, images, tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ...     ignored_layers=[model[2]],
        ... )
        >>> pruner.step()
        >>> transfer_state(optimizer, record.replaced(pruner.pruning_history()))
        >>> optimizer.state[model[0].weight]["exp_avg"].shape
        torch.Size([4, 3, 3, 3])
    """
    commit(optimizer_changes(optimizer, replaced), [])


def optimizer_changes(optimizer: Optimizer, replaced: Replaced) -> list[Change]:
    """The changes by which an optimizer follows; nothing is changed yet.

    Args:
        optimizer: Any torch optimizer.
        replaced: Old parameter -> the new one and what was kept of the old.

    Raises:
        ValueError: The optimizer keeps something that cannot follow, or a new parameter is not of
            the shape of what was kept.
    """
    for old, (new, kept) in replaced.items():
        if (tuple(old.shape), tuple(new.shape)) != (kept.of, kept.shape):
            raise ValueError(f"what was kept is {list(kept.shape)} of {list(kept.of)}, the "
                             f"parameters are {list(new.shape)} and {list(old.shape)}")  # fmt: skip
    check_alone(optimizer, replaced)
    covered, changes = optimizer._cut(replaced) if isinstance(optimizer, RLSOptimizer) else ({}, [])
    state: dict[Any, Any] = copy.copy(optimizer.state)
    state.clear()
    for key, entries in cast(dict[nn.Parameter, dict], optimizer.state).items():
        if key in covered:
            state[replaced[key][0]] = covered[key]
        elif key in replaced:
            new, kept = replaced[key]
            state[new] = {n: _follow(n, entry, kept, optimizer) for n, entry in entries.items()}
        else:
            state[key] = entries
    changes += [
        (group["params"], place, replaced[parameter][0])
        for group in optimizer.param_groups
        for place, parameter in enumerate(group["params"])
        if parameter in replaced
    ]
    return [*changes, (optimizer, "state", state)]


def check_alone(optimizer: Optimizer, replaced: Container[nn.Parameter]) -> None:
    """Raises ValueError where the state of one parameter is of all those of a group that is cut."""
    for group in optimizer.param_groups:
        params = group["params"]
        if not any(parameter in replaced for parameter in params):
            continue
        total = sum(parameter.numel() for parameter in params)
        for parameter in params:
            entries = optimizer.state.get(parameter, {}) if parameter.numel() < total else {}
            for name, entry in entries.items():
                if any(t.shape == (total,) for t in output_tensors(entry)):
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {name!r} of shape [{total}] for all "
                        "parameters of a group together, which cannot follow them"
                    )


def _follow(name: str, entry: Any, kept: Kept, optimizer: Optimizer) -> Any:
    """An entry of a parameter's state after the parameter was cut."""
    if isinstance(entry, Tensor) and entry.dim() > 0:
        try:
            return kept.take(entry)
        except ValueError as error:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {name!r} of shape {list(entry.shape)} for a "
                f"parameter of shape {list(kept.of)}, which cannot follow it"
            ) from error
    if isinstance(entry, (list, tuple)) and any(isinstance(item, Tensor) for item in entry):
        return type(entry)(_follow(name, item, kept, optimizer) for item in entry)
    return entry


def _read(target: Any, key: Any) -> Any:
    if isinstance(target, dict):
        return target.get(key, _ABSENT)
    return target[key] if isinstance(target, list) else getattr(target, key, _ABSENT)


def _write(target: Any, key: Any, value: Any) -> None:
    """Sets a reference, or removes it where `value` is that of an absent one."""
    items = isinstance(target, (dict, list))
    if value is _ABSENT:
        if items:
            target.pop(key, None)
        elif hasattr(target, key):
            delattr(target, key)
    elif items:
        target[key] = value
    else:
        setattr(target, key, value)


def commit(changes: Iterable[Change], done: list[Change]) -> None:
    """Makes every change, in order; where one fails, takes back those before it and raises.

    Args:
        changes: The changes.
        done: Is given what takes them back, for `revert`, each before it is made.
    """
    try:
        for target, key, value in changes:
            done.append((target, key, _read(target, key)))  # noted first: it may fail half-way
            _write(target, key, value)
    except BaseException:
        revert(done)
        raise


def revert(done: list[Change]) -> None:
    """Takes back committed changes, the last one first; what is cut short can be done again."""
    for change in reversed(done):
        _write(*change)
    done.clear()

"""What an optimizer keeps for a parameter follows it when the parameter loses channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim import surgery as rls_state
from rlscuda.optim.kept import Kept
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.running.copies import (
    ExampleInputs,
    call,
    isolated_copy,
    output_tensors,
    rng_kept,
)
from rlscuda.pruning.structure.units import require_torch_pruning
from rlscuda.pruning.surgery.journal import Change, commit
from rlscuda.pruning.surgery.shadow import number, survivors

Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Kept]]


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
    commit(optimizer_changes(optimizer, replaced))


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
    _check_alone(optimizer, replaced)
    layers = rls_state.cuts(optimizer, replaced) if isinstance(optimizer, RLSOptimizer) else {}
    state: dict[Any, Any] = copy.copy(optimizer.state)
    state.clear()
    for key, entries in cast(dict[nn.Parameter, dict], optimizer.state).items():
        if key in layers:
            cut = layers[key]
            state[cut.weight] = cut.entries(entries)
        elif key in replaced:
            new, kept = replaced[key]
            state[new] = {n: _follow(n, entry, kept, optimizer) for n, entry in entries.items()}
        else:
            state[key] = entries
    changes = [
        Change(group["params"], place, replaced[parameter][0])
        for group in optimizer.param_groups
        for place, parameter in enumerate(group["params"])
        if parameter in replaced
    ]
    if isinstance(optimizer, RLSOptimizer):
        changes += rls_state.changes(optimizer, replaced, layers)
    return [*changes, Change(optimizer, "state", state)]


def _check_alone(optimizer: Optimizer, replaced: Replaced) -> None:
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


class PruningRecord:
    """Finds what torch-pruning has kept of every parameter; to be made before it prunes.

    Args:
        model: The model that is to be pruned.
        example_inputs: What it can be called with.

    Raises:
        ImportError: torch-pruning is not installed.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs):
        self._model = model
        self._before = dict(model.named_parameters(remove_duplicate=False))
        self._shadow = isolated_copy(model)
        self._inputs = example_inputs

    def replaced(self, history: Sequence[Any]) -> dict[nn.Parameter, tuple[nn.Parameter, Kept]]:
        """Old parameter -> the new one and what was kept of the old, for `transfer_state`.

        Args:
            history: The `pruning_history()` of torch-pruning's pruner or graph, as far as it was
                made since this record.

        Raises:
            ValueError: The model is not what the history leads to.
        """
        tp = require_torch_pruning()
        shadow = copy.deepcopy(self._shadow)
        for parameter in shadow.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with rng_kept(shadow), torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                shadow, self._inputs, forward_fn=call, verbose=False
            )
        number(shadow)
        with torch.no_grad():
            graph.load_pruning_history(list(history))
        after = dict(self._model.named_parameters(remove_duplicate=False))
        found: dict[nn.Parameter, tuple[nn.Parameter, Kept]] = {}
        for name, kept in survivors(shadow, self._before).items():
            if name not in after or tuple(after[name].shape) != kept.shape:
                got = list(after[name].shape) if name in after else "none"
                raise ValueError(
                    f"{name!r} must be {list(kept.shape)} by the history, got {got}: a record "
                    "stands for what is pruned after it is made"
                )
            found[self._before[name]] = (after[name], kept)
        return found

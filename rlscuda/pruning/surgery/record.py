"""What torch-pruning itself has kept of a model, so that an optimizer can follow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlscuda.optim.kept import Kept
from rlscuda.pruning.running.calls import ExampleInputs, call, isolated_copy, rng_kept
from rlscuda.pruning.surgery.plan import kept_tensors, number


class PruningRecord:
    """Finds what torch-pruning has kept of every parameter; to be made before it prunes.

    Args:
        model: The model that is to be pruned.
        example_inputs: What it can be called with.

    Raises:
        ValueError: The model cannot be copied.
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
            ImportError: torch-pruning is not installed.
            ValueError: The model is not what the history leads to.
        """
        import torch_pruning as tp

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
        for name, kept in kept_tensors(shadow, self._before).items():
            if name not in after or tuple(after[name].shape) != kept.shape:
                got = list(after[name].shape) if name in after else "none"
                raise ValueError(
                    f"{name!r} must be {list(kept.shape)} by the history, got {got}: a record "
                    "stands for what is pruned after it is made"
                )
            found[self._before[name]] = (after[name], kept)
        return found

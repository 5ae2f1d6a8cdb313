"""A point of training to which model and optimizer can return, across prunings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Change
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.running.calls import all_tensors
from rlscuda.pruning.surgery.transaction import revert


class Snapshot:
    """The values of a model and its optimizers now.

    The options of parameter groups are not part of it: schedulers go on counting.

    Args:
        model: The model.
        optimizers: Its optimizers.
        tracker: The tracker of its matrices, or None.
        back: Called by `restore` once the shapes are back, with the names of the parameters and
            buffers that came or went by that; `expected` of all snapshots is to follow.
        order: Its place among the snapshots of one pruner.

    Attributes:
        changes: What each pruning since has to take back.
        void: Whether an earlier snapshot was restored since.
        expected: Names of the parameters and buffers that the model has now, by what it lost.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        tracker: SketchTracker | None,
        back: Callable[[set[str]], None],
        order: int,
    ):
        self._model, self._tracker, self._back = model, tracker, back
        self.changes: list[list[Change]] = []
        self.void, self.order = False, order
        self._values = {name: t.detach().clone() for name, t in all_tensors(model).items()}
        self.expected = set(self._values)
        self._tracked = tracker.state_dict() if tracker is not None else None
        self._states = [(one, copy.deepcopy(one.state_dict())) for one in optimizers]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives model and optimizers back their shapes and values; may be called again.

        Snapshots that were taken since are void then.

        Raises:
            ValueError: It is void itself, or the model has got or lost parameters or buffers other
                than by pruning, as by a mask; nothing is changed.
        """
        if self.void:
            raise ValueError("this snapshot is void: one taken before it was restored since")
        names = all_tensors(self._model).keys()
        changed = sorted(names ^ self.expected)
        if changed:
            raise ValueError(
                "the model must have the parameters and buffers that it had, with masks on or off "
                f"as then, got a change of {changed}"
            )
        self._check_groups()
        while self.changes:
            revert(self.changes[-1])
            self.changes.pop()
        self._back(set(names ^ all_tensors(self._model).keys()))
        for name, tensor in all_tensors(self._model).items():
            tensor.copy_(self._values[name])
        if self._tracker is not None and self._tracked is not None:
            self._tracker.load_state_dict(self._tracked)
        for optimizer, state in self._states:
            now = optimizer.state_dict()["param_groups"]
            # a copy, since optimizers go on with the very tensors that they are given
            optimizer.load_state_dict({**copy.deepcopy(state), "param_groups": now})
            optimizer.zero_grad()

    def _check_groups(self) -> None:
        """Raises ValueError where a group that came later holds parameters that are to go."""
        going = {
            parameter
            for done in self.changes
            for target, key, before in done
            if isinstance(target, nn.Module) and isinstance(before, (nn.Module, nn.Parameter))
            for parameter in _parameters(getattr(target, key))
        }
        for optimizer, state in self._states:
            for group in optimizer.param_groups[len(state["param_groups"]) :]:
                if not going.isdisjoint(group["params"]):
                    raise ValueError("a parameter group that came since the snapshot holds pruned "
                                     "parameters, which go: take it out first")  # fmt: skip


def _parameters(held: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [held] if isinstance(held, nn.Parameter) else list(held.parameters())

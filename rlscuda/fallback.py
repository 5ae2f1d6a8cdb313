"""The rule for every parameter that RLS does not cover: a torch optimizer over the same state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

IN_P = {"in_P": True}  # the state of a bias whose moments are its weight's: none may have no state
ENTRIES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


class Fallback:
    """Runs a torch optimizer whose state lives in the state of the RLS optimizer.

    Args:
        rule: `adamw`, `sgd` (momentum .9), or a callable from parameter groups to an optimizer.

    Raises:
        ValueError: An unknown name.
        TypeError: Neither a name nor a callable.
    """

    def __init__(self, rule: str | Callable[[list[dict]], Optimizer]):
        if isinstance(rule, str):
            if rule not in ENTRIES:
                raise ValueError(
                    f"fallback must be {' | '.join(ENTRIES)} or a callable, got {rule!r}"
                )
        elif not callable(rule):
            raise TypeError(f"fallback must be a name or a callable, got {type(rule).__name__}")
        self.rule = rule
        self.reset()

    @property
    def entries(self) -> set[str] | None:
        """What the rule keeps in the state of a parameter; None where that is unknown."""
        return ENTRIES[self.rule] if isinstance(self.rule, str) else None

    def reset(self) -> None:
        """Forgets the inner optimizer, since the groups have changed."""
        self._inner: Optimizer | None = None
        self._fusable = False
        self._covered: set[nn.Parameter] | None = None

    def __getstate__(self):
        return {"rule": self.rule}

    def __setstate__(self, state):
        self.rule = state["rule"]
        self.reset()

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        if self.rule == "sgd":
            return SGD(groups, lr=1e-3, momentum=0.9)
        if isinstance(self.rule, str):
            tensors = [p for group in groups for p in group["params"]]
            self._fusable = all(
                p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors
            )
            return AdamW(groups, lr=1e-3, fused=self._fusable or None)
        inner = self.rule(groups)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"fallback must return a torch optimizer, got {type(inner).__name__}")
        if [len(g["params"]) for g in inner.param_groups] != [len(g["params"]) for g in groups]:
            raise ValueError("fallback must return an optimizer over the groups that it is given")
        return inner

    @staticmethod
    def _rate(group: dict[str, Any]) -> float | torch.Tensor:
        """The rate of the inner optimizer; one on a GPU stays there."""
        lr = group["lr"]
        on_gpu = isinstance(lr, torch.Tensor) and lr.is_cuda
        return (lr if on_gpu else float(lr)) * group["fallback_ratio"]

    @staticmethod
    def _decay(group: dict[str, Any]) -> float:
        return group["weight_decay"] if group["fallback_decays"] else 0.0

    def prepare(self, groups: list[dict[str, Any]], covered: set[nn.Parameter], state: Any) -> None:
        """Makes the inner optimizer for every parameter of `groups` outside `covered`.

        Raises:
            TypeError: The callable did not make an optimizer.
            ValueError: It made one over other groups.
        """
        if covered == self._covered:
            return
        inner_groups: list[dict[str, Any]] = [
            {
                "params": [p for p in group["params"] if p not in covered],
                "lr": self._rate(group),
                "weight_decay": self._decay(group),
            }
            for group in groups
        ]
        for parameter in (p for group in inner_groups for p in group["params"]):
            if state.get(parameter) == IN_P:  # its weight has been frozen
                del state[parameter]
        trains = any(group["params"] for group in inner_groups)
        self._inner = self._make(inner_groups) if trains else None
        self._covered = covered

    @torch.no_grad()
    def restart(self, state: Any) -> None:
        """Lets the moments of its parameters start anew; what an unknown rule keeps is dropped."""
        own = [p for p, entries in state.items() if "P" not in entries and entries != IN_P]
        for parameter in own:
            if self.entries is None:
                del state[parameter]
                continue
            for value in state[parameter].values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]], state: Any) -> None:
        """One step of the inner optimizer, each group at its rate."""
        if self._inner is None:
            return
        self._inner.state = state
        for inner, group in zip(self._inner.param_groups, groups):
            inner["lr"], inner["weight_decay"] = self._rate(group), self._decay(group)
            if self._fusable:
                inner["fused"] = _flat(inner["params"]) or None
                # a fused step keeps its counters on the device anyhow: it need only be told
                on_gpu = any(p.is_cuda for p in inner["params"])
                inner["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
        self._inner.step()


def _flat(parameters: list[nn.Parameter]) -> bool:
    """Whether all of them and their gradients are contiguous: a fused step ignores strides."""
    for p in parameters:
        grad = p.grad
        if grad is not None and not (p.is_contiguous() and grad.is_contiguous()):
            return False
    return True

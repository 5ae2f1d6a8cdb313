"""The rule for every parameter that RLS does not cover: a torch optimizer over the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

RULES = ("adamw", "sgd")


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
            if rule not in RULES:
                raise ValueError(
                    f"fallback must be {' | '.join(RULES)} or a callable, got {rule!r}"
                )
        elif not callable(rule):
            raise TypeError(f"fallback must be a name or a callable, got {type(rule).__name__}")
        self.rule = rule
        self.reset()

    def reset(self) -> None:
        """Forgets the inner optimizer, since the groups have changed."""
        self._inner: Optimizer | None = None

    def __getstate__(self):
        return {"rule": self.rule}

    def __setstate__(self, state):
        self.rule = state["rule"]
        self.reset()

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        if callable(self.rule):
            return self.rule(groups)
        if self.rule == "sgd":
            return SGD(groups, lr=1e-3, momentum=0.9)
        tensors = [p for group in groups for p in group["params"]]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)
        return AdamW(groups, lr=1e-3, fused=fused or None)

    @torch.no_grad()
    def step(self, groups: Iterable[dict], covered: set[nn.Parameter], state: Any) -> None:
        """One step for every parameter of `groups` outside `covered`, at its group's rate."""
        groups = list(groups)
        rates = [float(group["lr"]) * group["fallback_ratio"] for group in groups]
        if self._inner is None:
            inner_groups = [
                {
                    "params": [p for p in group["params"] if p not in covered],
                    "lr": rate,
                    "weight_decay": group["fallback_weight_decay"],
                }
                for group, rate in zip(groups, rates)
            ]
            if not any(group["params"] for group in inner_groups):
                return
            self._inner = self._make(inner_groups)
        self._inner.state = state
        for group, rate in zip(self._inner.param_groups, rates):
            group["lr"] = rate
        self._inner.step()

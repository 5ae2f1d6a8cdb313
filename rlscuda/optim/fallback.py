"""The rule for every parameter that RLS does not cover: a torch optimizer over the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from rlscuda._torch import version_of
from rlscuda.optim.advice import warn_cut_short

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

    FRESH: ClassVar = {"_inner": None, "_fusable": False, "_trained": None}
    _inner: Optimizer | None
    _fusable: bool
    _trained: list[list[int]] | None  # ids of the parameters of each group

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

    def starts(self, entries: Mapping[str, Any]) -> bool:
        """Whether the state of a parameter has nothing of the rule yet, but perhaps of others."""
        return not entries or (self.entries is not None and self.entries.isdisjoint(entries))

    def reset(self) -> None:
        """Forgets the inner optimizer."""
        self.__dict__.update(self.FRESH)

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

    def prepare(self, groups: list[dict[str, Any]], covered: set[int], state: Any) -> None:
        """Makes the inner optimizer for every parameter of `groups` whose id is not in `covered`.

        Raises:
            TypeError: The callable did not make an optimizer.
            ValueError: It made one over other groups.
        """
        parameters = [[p for p in group["params"] if id(p) not in covered] for group in groups]
        trained = [list(map(id, members)) for members in parameters]
        if trained == self._trained:
            return
        inner_groups = [
            {"params": members, "lr": rate(group), "weight_decay": _decay(group)}
            for members, group in zip(parameters, groups)
        ]
        for parameter in (p for members in parameters for p in members):
            if parameter in state:  # its weight may have been frozen
                state[parameter].pop("in_P", None)
                if not state[parameter]:
                    del state[parameter]
        self._inner = self._make(inner_groups) if any(parameters) else None
        self._trained = trained

    @torch.no_grad()
    def restart(self, state: Any) -> None:
        """Lets the moments of its parameters start anew; what an unknown rule keeps is dropped."""
        own = [p for p, entries in state.items() if "P" not in entries and "in_P" not in entries]
        for parameter in own:
            if self.entries is None:
                del state[parameter]
                continue
            for name in self.entries & state[parameter].keys():
                if isinstance(state[parameter][name], torch.Tensor):
                    state[parameter][name].zero_()

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]], state: Any) -> None:
        """One step of the inner optimizer, each group at its rate.

        Raises:
            RuntimeError: A gradient is sparse and the rule takes none; nothing has changed.
        """
        if self._inner is not None:
            self._step(self._inner, groups, state)
        for group in groups:
            group["peak_lr"] = _peak(group)

    def _step(self, optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
        members = [p for inner in optimizer.param_groups for p in inner["params"]]
        if self.entries and any(p.grad is not None and p.grad.is_sparse for p in members):
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support sparse gradients: pass a fallback "
                "that does, such as torch.optim.SparseAdam"
            )
        optimizer.state = state
        for inner, group in zip(optimizer.param_groups, groups):
            inner["lr"], inner["weight_decay"] = rate(group), _decay(group)
            if self._fusable:
                inner["fused"] = _flat(inner["params"]) or None
                # a fused step keeps its counters on the device anyhow: it need only be told
                on_gpu = any(p.is_cuda for p in inner["params"])
                inner["capturable"] = on_gpu and torch.cuda.is_current_stream_capturing()
        versions = [version_of(p) for p in members]
        try:
            with self._foreign_entries_apart(members, state):
                optimizer.step()
        except BaseException as error:
            if versions != [version_of(p) for p in members]:
                warn_cut_short(error)
            raise

    @contextmanager
    def _foreign_entries_apart(self, parameters: list[nn.Parameter], state: Any) -> Iterator[None]:
        """Takes what others keep in a state away: a rule starts only where there is nothing."""
        held = {p: state[p] for p in parameters if p.grad is not None and p in state}
        foreign = {p: state.pop(p) for p, entries in held.items() if self.starts(entries)}
        try:
            yield
        finally:
            for p, entries in foreign.items():
                state[p].update(entries)


def set_rates(group: dict[str, Any], options: Mapping[str, Any], covered: bool, peak: Any) -> None:
    """Notes in a new group what its `lr` is the rate of, and how the fallback rule follows it.

    Args:
        group: The group, with every option.
        options: What the user has set of them.
        covered: Whether the group has a covered layer, for which its weight decay is then.
        peak: The `lr` of the layers at which the rule has its own rate; None where the group's `lr`
            is the rule's.
    """
    group["fallback_decays"] = not covered
    if not covered:
        group["weight_decay"] = options["weight_decay"] or 0.0
    if peak is not None:
        group["peak_lr"] = float(peak)
        return
    if options["lr"] is None:
        group["lr"] = group["fallback_lr"]
    group.update(fallback_lr=None, peak_lr=float(group["lr"]))


def restart_rates(groups: list[dict[str, Any]]) -> None:
    """Sets every `lr` to what a schedule started from."""
    for group in groups:
        lr, first = group["lr"], group.get("initial_lr", group["lr"])
        if not isinstance(lr, torch.Tensor):
            group["lr"] = first
        elif isinstance(first, torch.Tensor):  # in place, as a captured step reads it
            lr.copy_(first)
        else:
            lr.fill_(first)  # which unlike copy_ waits for no GPU


def rate(group: dict[str, Any]) -> float | torch.Tensor:
    """The learning rate of the fallback rule in a group; one on a GPU stays there.

    It follows the shape of `lr`, its value over the highest so far, and so never exceeds
    `fallback_lr`, whatever sets `lr`. Where there is none, `lr` is the rule's own.
    """
    lr = group["lr"]
    if not (isinstance(lr, torch.Tensor) and lr.is_cuda):
        lr = float(lr)
    if group["fallback_lr"] is None:
        return lr
    return lr * (group["fallback_lr"] / (_peak(group) or 1.0))


def _peak(group: dict[str, Any]) -> float:
    """The highest `lr` of a group so far, or to come where a scheduler says so."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.is_cuda:  # which would have to be waited for
        return group["peak_lr"]
    return max(group["peak_lr"], float(lr), float(group.get("max_lr") or 0.0))


def _decay(group: dict[str, Any]) -> float:
    return group["weight_decay"] if group["fallback_decays"] else 0.0


def _flat(parameters: list[nn.Parameter]) -> bool:
    """Whether all of them and their gradients are contiguous: a fused step ignores strides."""
    for p in parameters:
        grad = p.grad
        if grad is not None and not (p.is_contiguous() and grad.is_contiguous()):
            return False
    return True

"""The optimizers that are compared, each with the schedule and the split that its users give it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

import rlscuda
from benchmarks.learning.tasks import Task

BETAS, DECAY = (0.9, 0.99), 0.05
ADAM_RATES, OUR_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.1, 0.3)


class FlatMuon(Muon):
    """`torch.optim.Muon`, which takes matrices alone, on weights flattened to [c, n]."""

    def __init__(self, weights: Iterable[Tensor], **options: Any):
        self._weights = list(weights)
        super().__init__(
            [nn.Parameter(w.detach().flatten(1).clone()) for w in self._weights], **options
        )

    def step(self) -> None:
        """Moves the weights, through copies: those of channels_last do not flatten in place."""
        flats = self.param_groups[0]["params"]
        with torch.no_grad():
            for weight, flat in zip(self._weights, flats, strict=True):
                flat.copy_(weight.flatten(1))
                flat.grad = weight.grad.flatten(1)
        super().step()
        with torch.no_grad():
            for weight, flat in zip(self._weights, flats, strict=True):
                weight.copy_(flat.view(weight.shape))


def _sgd(model: nn.Module, task: Task, lr: float, **settings: Any) -> list[Optimizer]:
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    return [SGD(model.parameters(), lr, **options | settings)]


def _adamw(model: nn.Module, task: Task, lr: float, **settings: Any) -> list[Optimizer]:
    options = {"betas": BETAS, "weight_decay": DECAY, "fused": True}
    return [AdamW(model.parameters(), lr, **options | settings)]


def _muon(model: nn.Module, task: Task, lr: float, **settings: Any) -> list[Optimizer]:
    """Muon moves the hidden layers' weights, AdamW the rest."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        depthwise = p.dim() == 4 and p.shape[1] == 1 and p.shape[0] > 1
        (rest if p.dim() < 2 or name in task.ends or depthwise else hidden).append(p)
    options = {"weight_decay": DECAY} | settings
    others = AdamW(rest, lr, betas=BETAS, fused=True, **options)
    return [FlatMuon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw", **options), others]


def _soap(model: nn.Module, task: Task, lr: float, **settings: Any) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr, **{"weight_decay": DECAY} | settings)]


def _kron(model: nn.Module, task: Task, lr: float, **settings: Any) -> list[Optimizer]:
    from pytorch_optimizer import Kron

    if not torch.backends.opt_einsum.is_available():
        raise ImportError("PSGD needs opt_einsum: its products of four are far too slow without")
    return [Kron(model.parameters(), lr, **{"weight_decay": DECAY} | settings)]


class Unconditioned(rlscuda.RLSOptimizer):
    """The same step with every `P` left at the identity: no input is observed, nor missed."""

    def _observe(self, *seen: Any) -> None:
        pass

    def _warn(self, *texts: Any) -> None:
        pass


def _rls(
    model: nn.Module,
    task: Task,
    lr: float | None = None,
    conditioned: bool = True,
    **settings: Any,
) -> list[Optimizer]:
    make = rlscuda.RLSOptimizer if conditioned else Unconditioned
    return [make(model, lr, **settings)]


@dataclass(frozen=True)
class Row:
    """A row of the tables: how its optimizer is made, and what it is tuned over.

    Rates are tried with the usual decay, then `decays` at the best rate.
    An ablation is a row of ours with `settings` of its own.
    """

    title: str
    make: Callable[..., list[Optimizer]]
    rates: tuple[float, ...] = ADAM_RATES
    decays: tuple[float, ...] = (4 * DECAY,)
    warmup: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether it is not our own."""
        return self.make is not _rls

    @property
    def is_default(self) -> bool:
        """Whether it is our own, with nothing set but the rate: it has the default's pace."""
        return not (self.is_peer or self.settings)


ROWS = {
    "rls": Row("RLS default", _rls, (), (), warmup=False),
    "rls_tuned": Row("RLS tuned", _rls, OUR_RATES, (), warmup=False),
    "identity": Row("RLS, P = I", _rls, OUR_RATES, (), False, {"conditioned": False}),
    "sgd": Row("SGD + Nesterov", _sgd, (0.01, 0.03, 0.1, 0.3), (2e-3,)),
    "adamw": Row("AdamW", _adamw),
    "muon": Row("Muon", _muon),
    "soap": Row("SOAP", _soap),
    "kron": Row("PSGD Kron", _kron),
}


class Scheduled:
    """The optimizers of one network under a cosine to 0, after a linear warm-up for some."""

    def __init__(
        self, row: str, model: nn.Module, task: Task, steps: int, seed: int, **settings: Any
    ):
        self.steps = steps
        self.warmup = min(100, steps // 10) if ROWS[row].warmup else 0
        if not ROWS[row].is_peer:
            settings["seed"] = seed
        self.optimizers = ROWS[row].make(model, task, **settings)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peaks = [(group, group["lr"]) for group in groups]
        self.model, self.step_number = model, 0

    def step(self) -> None:
        """One step of each, at the rate of its place in the schedule."""
        factor = self._factor(self.step_number)
        for group, peak in self.peaks:
            group["lr"] = factor * peak
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number += 1

    def resume(self, step: int) -> None:
        """Go on from a step, after the optimizers have loaded their states, which hold rates too.

        Loading replaces the groups, so the peaks are tied to the new ones.
        """
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        peaks = [peak for _, peak in self.peaks]
        self.peaks, self.step_number = list(zip(groups, peaks, strict=True)), step

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

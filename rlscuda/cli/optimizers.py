"""The optimizers ``rlscuda train`` compares, their default settings, and the schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlscuda.cli.config import RunConfig


@dataclass(frozen=True)
class Settings:
    """Step size and decoupled (Adam, RLS) or L2 (SGD) weight decay of one optimizer."""

    lr: float
    weight_decay: float


SGD_DEFAULTS = Settings(lr=0.05, weight_decay=5e-4)
ADAM_DEFAULTS = Settings(lr=1e-3, weight_decay=0.0)
RLS_DEFAULTS = {
    "adaptive": Settings(lr=0.1, weight_decay=0.05),
    "paper": Settings(lr=0.3, weight_decay=0.0),
    "natural": Settings(lr=0.3, weight_decay=0.0),
}


def settings_of(config: RunConfig, name: str) -> Settings:
    """The settings that ``name`` trains with: its defaults and what the command line changes."""
    defaults = {"sgd": SGD_DEFAULTS, "adam": ADAM_DEFAULTS, "rls": RLS_DEFAULTS[config.form]}[name]
    return Settings(
        lr=config.overrides("lr").get(name, defaults.lr),
        weight_decay=config.overrides("weight_decay").get(name, defaults.weight_decay),
    )


def build_optimizer(config: RunConfig, name: str, model: nn.Module) -> Optimizer:
    """Build ``rls`` (RLSOptimizer), ``sgd`` (momentum 0.9) or ``adam`` for ``model``.

    Adam with decoupled weight decay is AdamW; with none, AdamW is Adam.
    """
    settings = settings_of(config, name)
    if name == "rls":
        from rlscuda import RLSOptimizer

        return RLSOptimizer(
            model, lr=settings.lr, weight_decay=settings.weight_decay, form=config.form
        )
    if name == "sgd":
        return SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=0.9,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def build_scheduler(config: RunConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Step-wise schedule: ``cosine`` falls to zero at the last step, ``constant`` stays at 1."""
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / total_steps)))

"""The optimizers that `rlscuda train` compares: names, default settings, and the schedules."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlscuda import RLSOptimizer
from rlscuda.cli.train.options import RunConfig

LABELS = {"rls": "RLS", "sgd": "SGD + momentum", "adam": "Adam"}
SGD_DEFAULTS = {"lr": 0.05, "weight_decay": 5e-4}
ADAM_DEFAULTS = {"lr": 2e-3, "weight_decay": 0.0}


def build_optimizer(config: RunConfig, name: str, model: nn.Module) -> Optimizer:
    """Builds `rls` (RLSOptimizer), `sgd` (momentum 0.9) or `adam` for a model.

    What the command line does not set is the default above, or that of the RLS form. Adam with
    decoupled weight decay is AdamW; with none, AdamW is Adam. PyTorch's 1e-3 for Adam is too small
    for a few epochs of a small network: LeNet-5 on 3,600 digits ended two points lower with it.
    """
    given: dict[str, Any] = {
        option: values[name]
        for option in ("lr", "weight_decay")
        if name in (values := config.overrides(option))
    }
    if name == "rls":
        return RLSOptimizer(model, form=config.form, seed=config.seed, **given)
    if name == "sgd":
        return SGD(model.parameters(), momentum=0.9, fused=True, **{**SGD_DEFAULTS, **given})
    return AdamW(model.parameters(), fused=True, **{**ADAM_DEFAULTS, **given})


def build_scheduler(config: RunConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Step-wise schedule: `cosine` falls to zero at the last step, `constant` stays at 1."""
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / total_steps)))

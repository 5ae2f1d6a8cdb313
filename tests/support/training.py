"""Small models and plain training steps on random data."""

from __future__ import annotations

import torch
from torch import nn

from rlscuda import RLSOptimizer


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """4-6-3 with an in-place ReLU."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    return model.to(dtype)


def cnn(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Convolution, grouped convolution and linear layer, with a batch norm for the fallback."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 3),
    ).to(dtype)


def make(params, summary="mean", rank=3, form="natural", interval=1, **options) -> RLSOptimizer:
    """An optimizer that moves both weights and `P` visibly in a few steps."""
    return RLSOptimizer(params, form=form, summary=summary, rank=rank, gain=0.5, lr=0.1,
                        interval=interval, fallback="sgd", **options)  # fmt: skip


def batch(model: nn.Module, size: int = 8, seed: int = 1) -> torch.Tensor:
    """A random input of `mlp` or `cnn`, of the dtype of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 2, 6, 6) if isinstance(model[0], nn.Conv2d) else (size, 4)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def train(model, optimizer, steps: int = 3, seed: int = 1, size: int = 8) -> list[float]:
    """Plain training steps on random data, the same for the same arguments; the losses."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(model, size, seed + step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

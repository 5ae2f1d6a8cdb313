"""Seeds, tolerances and small models for every test."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from rlscuda import RLSOptimizer

TOLERANCE = {  # dtype: (relative, absolute), against a float64 specification
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


if device := os.environ.get("RLSCUDA_TEST_DEVICE"):  # benchmarks/gpu_check.sh runs tests on CUDA
    torch.set_default_device(device)
torch.set_num_threads(1)  # small shapes; what threads change is tested where it is said so


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Compares in float64, within `scale` times the tolerance of the actual dtype."""
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol * scale, atol=atol * scale
    )


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Compares two results of one dtype, within `tolerance` of the largest expected element."""
    assert actual.shape == expected.shape
    if actual.numel():
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= tolerance * scale


def random_spd(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Symmetric positive definite matrices [*shape, n, n], symmetric to the bit."""
    A = torch.randn(*shape, shape[-1], dtype=torch.float64)
    P = A @ A.mT / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=torch.float64)
    return ((P + P.mT) / 2).to(dtype)


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


def make(params, summary="mean", rank=3, form="natural", **options) -> RLSOptimizer:
    """An optimizer that moves both weights and `P` visibly in a few steps."""
    return RLSOptimizer(params, form=form, summary=summary, rank=rank, gain=0.5, lr=0.1,
                        fallback="sgd", **options)  # fmt: skip


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


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of every parameter and every tensor or count of the optimizer's state."""
    values = {f"param.{i}": p.detach().clone() for i, p in enumerate(model.parameters())}
    for i, p in enumerate(model.parameters()):
        for name, value in optimizer.state.get(p, {}).items():
            values[f"state.{i}.{name}"] = torch.as_tensor(value).detach().clone()
    return values


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """The names of what is not the same to the bit (NaN equals NaN)."""
    both = first.keys() | second.keys()
    return {
        k for k in both
        if k not in first or k not in second
        or first[k].dtype != second[k].dtype
        or not torch.equal(first[k].nan_to_num(7.5), second[k].nan_to_num(7.5))
    }  # fmt: skip

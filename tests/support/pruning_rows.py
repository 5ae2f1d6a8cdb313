"""Rows of correlated inputs that the tests of masks share."""

import torch


def inputs(n: int, rows: int = 300, seed: int = 0) -> torch.Tensor:
    """Correlated rows [rows, n] in float64 with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix + 0.5


def inverse(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(X.T @ X / len(X))


def with_ones(X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def error(X: torch.Tensor, change: torch.Tensor) -> float:
    return float((X @ change.T).square().sum() / len(X))


def all_columns(n: int) -> torch.Tensor:
    return torch.arange(n)[None]

"""Input rows, layers and their units, which the closed forms of pruning are tested on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Data:
    """Input rows X [N, n], a weight W [c, n], and the units' columns [m, b]."""

    X: Tensor
    W: Tensor
    blocks: Tensor

    @property
    def P(self) -> Tensor:
        return inverse(self.X)

    def refit(self, removed: Tensor) -> tuple[Tensor, float]:
        """The least-squares weight [c, n] without columns, and its mean squared output error."""
        kept = others(self.X.shape[1], removed)
        Y = self.X @ self.W.T
        solution = torch.linalg.lstsq(self.X[:, kept], Y, driver="gelsd").solution
        W = torch.zeros_like(self.W)
        W[:, kept] = solution.T
        return W, error(self.X, W - self.W)


def inputs(n: int, rows: int = 300, seed: int = 0) -> Tensor:
    """Correlated rows [rows, n] in float64 with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix + 0.5


def with_ones(X: Tensor) -> Tensor:
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def inverse(X: Tensor) -> Tensor:
    """P of input rows."""
    return torch.linalg.inv(X.T @ X / len(X))


def error(X: Tensor, change: Tensor) -> float:
    """Mean squared output error of a change [c, n] of the weight."""
    return float((X @ change.T).square().sum() / len(X))


def all_columns(n: int) -> Tensor:
    return torch.arange(n)[None]


def others(n: int, columns: Tensor) -> Tensor:
    return torch.tensor(sorted(set(range(n)) - set(columns.tolist())), dtype=torch.int64)


def layer_data(units: int, b: int, c: int, bias: bool, faint: int = 0) -> Data:
    """Correlated inputs; the columns of the first `faint` units nearly dead."""
    n = units * b + bias
    X = torch.randn(4 * n + 10, n).double() @ (torch.eye(n) + 0.5 * torch.randn(n, n)).double()
    columns = torch.randperm(units * b).view(units, b)  # a unit's columns need not be neighbours
    X[:, columns[:faint].flatten()] *= 1e-4
    if bias:
        X[:, -1] = 1
    return Data(X, torch.randn(c, n).double(), columns)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


SHAPES = {
    "usual": (6, 4, 5, True),
    "no_bias": (6, 4, 5, False),
    "one_column": (9, 1, 3, True),
    "one_output": (5, 3, 1, True),
    "one_unit": (1, 4, 3, True),
    "one_unit_one_column": (1, 1, 1, True),
    "more_outputs_than_columns": (3, 2, 20, True),
    "nearly_dead": (6, 3, 4, True, 2),
}

"""The specification of the streaming filter: plain NumPy in float64, one sample at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-2  # of a coordinate's running power
ROUNDING = 16  # times epsilon n / (1 - lambda): the least ridge of a dtype
WAIT = 16  # samples between two raises


@dataclass
class RidgeTurn:
    """Which coordinates of R get their ridge after a sample: csrc/rls_ridge.h.

    Args:
        n: Inputs.
        debt: Coordinates that are due.
        waited: Samples since the last raise.
        next: The coordinate whose turn it is.
        leverage: Running mean of 1 - λ / h.
    """

    n: int
    debt: float = 0.0
    waited: int = 0
    next: int = 0
    leverage: float = 0.0

    def after(self, forgetting: float, h: float) -> list[int]:
        """The coordinates to be raised after a sample."""
        self.leverage += (1 - forgetting) * (1 - forgetting / h - self.leverage)
        self.debt -= self.n * math.log2(forgetting)
        self.waited += 1
        if self.debt >= self.n:
            due, self.debt = self.n, 0.0
        elif self.waited < WAIT or self.debt < 1:
            return []
        else:
            due = int(self.debt)
            self.debt -= due
        self.waited = 0
        coordinates = [(self.next + k) % self.n for k in range(due)]
        self.next = (self.next + due) % self.n
        return coordinates


def raises(
    powers: NDArray[Any], forgetting: float, leverage: float, epsilon: float, ridge: float | None
) -> NDArray[Any]:
    """What each coordinate of R is raised by in its turn.

    Args:
        powers: Running mean of κ x² of each input [n].
        forgetting: λ.
        leverage: Running mean of 1 - λ / h.
        epsilon: Of the filter's dtype.
        ridge: ρ; None for relative to the powers.
    """
    n = len(powers)
    if ridge is None:
        memory = 1 / (1 - forgetting)
        relative = max(RIDGE, ROUNDING * epsilon * n * memory, (2 * leverage - 1) * memory)
        rho = relative * np.maximum(powers, np.sqrt(epsilon) * powers.mean())
    else:
        rho = np.full(n, ridge)
    return rho * max(1.0, 1 / forgetting - 1)


def rls_filter(
    P: NDArray[Any],
    W: NDArray[Any],
    X: NDArray[Any],
    Y: NDArray[Any],
    forgetting: float = 1.0,
    gain: float = 1.0,
    ridge: float | None = None,
    weights: NDArray[Any] | None = None,
    epsilon: float = float(np.finfo(np.float64).eps),
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Filters a series; the arguments are left as they are.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weights [n_out, n].
        X: Inputs [T, n].
        Y: Targets [T, n_out].
        forgetting: λ.
        gain: κ.
        ridge: ρ; None for a hundredth of the running mean of κ x² of each input.
        weights: What each sample counts [T].
        epsilon: Of the dtype of the filter that is specified.

    Returns:
        The a-priori predictions [T, n_out], the new P and W.
    """
    P, W, X, Y = (np.array(values, np.float64) for values in (P, W, X, Y))
    predictions = np.empty_like(Y)
    turn, squares, learnt = RidgeTurn(len(P)), np.zeros(len(P)), 0
    for t, (x, y) in enumerate(zip(X, Y, strict=True)):
        predictions[t] = W @ x
        kappa = gain * (1.0 if weights is None else weights[t])
        if kappa == 0:
            continue
        squares += kappa * x * x
        learnt += 1
        if ridge is None and not squares.any():
            continue  # nothing has been seen that could be forgotten
        u = P @ x
        h = forgetting + kappa * (x @ u)
        W += kappa / h * np.outer(y - predictions[t], u)
        P = (P - kappa / h * np.outer(u, u)) / forgetting
        if forgetting == 1 or ridge == 0:
            continue
        for j in turn.after(forgetting, h):
            rho = raises(squares / learnt, forgetting, turn.leverage, epsilon, ridge)[j]
            P -= rho / (1 + rho * P[j, j]) * np.outer(P[j], P[j])
    return predictions, P, W

"""The specification of a bank of filters: plain NumPy in float64, one filter after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlscuda.reference.filter import RidgeTurn, raises


@dataclass
class Stabilised:
    """One filter with stabilised forgetting.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weights [n_out, n].
        forgetting: λ.
        gain: κ.
        ridge: What the information of a coordinate gains each time that forgetting has halved it;
            None: a hundredth of the running mean of x_j².
        initial_scale: δ of P₀ = δ I.
        epsilon: Of the dtype whose rounding bounds the ridge from below.

    Attributes:
        squares: Sums of κx² [n] over the samples that entered.
        turn: Whose turn it is to gain a ridge.
        updates, resets: Samples that entered; those that would have broken P.
    """

    P: NDArray[Any]
    W: NDArray[Any]
    forgetting: float = 1.0
    gain: float = 1.0
    ridge: float | None = None
    initial_scale: float = 1.0
    epsilon: float = float(np.finfo(np.float64).eps)
    squares: NDArray[Any] = field(init=False)
    turn: RidgeTurn = field(init=False)
    updates: int = 0
    resets: int = 0

    def __post_init__(self) -> None:
        self.P, self.W = np.array(self.P, np.float64), np.array(self.W, np.float64)
        self.squares, self.turn = np.zeros(len(self.P)), RidgeTurn(len(self.P))

    def update(self, x: NDArray[Any], y: NDArray[Any], weight: float = 1.0) -> NDArray[Any]:
        """Learns a sample x [n], y [n_out]; returns W x before."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        prediction = self.W @ x
        kappa = self.gain * weight
        if kappa == 0:
            return prediction
        squares = self.squares + kappa * x**2
        if self.ridge is None and not squares.any():
            self.updates += 1
            return prediction
        u, e = self.P @ x, y - prediction
        h = self.forgetting + kappa * (x @ u)
        if not (0 < h < np.inf and np.isfinite(e).all()):
            self._start_anew()
            return prediction
        self.squares, self.updates = squares, self.updates + 1
        self.W = self.W + kappa / h * np.outer(e, u)
        self.P = (self.P - kappa / h * np.outer(u, u)) / self.forgetting
        if self.forgetting < 1 and self.ridge != 0:
            self._raise(h)
        return prediction

    def _start_anew(self) -> None:
        self.P = self.initial_scale * np.eye(len(self.P))
        self.resets += 1

    def _raise(self, h: float) -> None:
        for j in self.turn.after(self.forgetting, h):
            powers = self.squares / self.updates
            options = (self.forgetting, self.turn.leverage, self.epsilon, self.ridge)
            rho = raises(powers, *options)[j]
            divisor = 1 + rho * self.P[j, j]
            if not 0 < divisor < np.inf:
                return self._start_anew()
            self.P = self.P - rho / divisor * np.outer(self.P[:, j], self.P[:, j])
        return None


def rls_filter_bank(
    filters: list[Stabilised],
    x: NDArray[Any],
    y: NDArray[Any],
    weights: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
    index: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """One sample for each filter, or for those of an index; the filters change.

    Args:
        filters: b filters.
        x: Inputs [k, n], or [n] for one that all share; k is b without an index.
        y: Targets [k, n_out].
        weights: [k]; None means 1.
        mask: [k]: false where a filter stays as it is; None means true.
        index: [k]: the filter of each row; None means all, in their order.

    Returns:
        The a-priori predictions [k, n_out].
    """
    rows = len(y)
    x = np.broadcast_to(x, (rows, np.shape(x)[-1]))
    weights = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    weights = weights if mask is None else np.where(mask, weights, 0.0)
    chosen = filters if index is None else [filters[i] for i in index]
    return np.stack([f.update(*row) for f, *row in zip(chosen, x, y, weights, strict=True)])

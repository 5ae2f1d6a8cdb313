"""The specification of the streaming filter: plain NumPy in float64, one sample at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rls_filter(
    P: NDArray[Any],
    W: NDArray[Any],
    X: NDArray[Any],
    Y: NDArray[Any],
    forgetting: float = 1.0,
    gain: float = 1.0,
    shrinkage: float | None = None,
    initial_scale: float = 1.0,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]:
    """Filters a series; the arguments are left as they are.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weights [n_out, n].
        X: Inputs [T, n].
        Y: Targets [T, n_out].
        forgetting: λ.
        gain: κ.
        shrinkage: μ; None means min(1, 2 (1 − λ)).
        initial_scale: δ.

    Returns:
        The a-priori predictions [T, n_out], the new P and W, and the number of resets.
    """
    P, W, X, Y = (np.array(values, np.float64) for values in (P, W, X, Y))
    mu = min(1.0, 2 * (1 - forgetting)) if shrinkage is None else shrinkage
    P0 = initial_scale * np.eye(len(P))
    predictions = np.empty_like(Y)
    resets = 0
    for t, (x, y) in enumerate(zip(X, Y, strict=True)):
        u = P @ x
        h = forgetting + gain * (x @ u)
        predictions[t] = W @ x
        e = y - predictions[t]
        if not (0 < h < np.inf and np.isfinite(e).all()):
            P, resets = P0.copy(), resets + 1
            continue
        W += gain / h * np.outer(e, u)
        P = (1 - mu) / forgetting * (P - gain / h * np.outer(u, u)) + mu * P0
    return predictions, P, W, resets

"""How far the targets of a filter scatter about its predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlscuda.streaming.filter import RLSFilter


class Residuals(NamedTuple):
    r"""The least value of what a filter minimises, followed from sample to sample.

    With e the error before a sample of weight w and ε the error after it, the cost
    J = Σ λ^(t−i) κ wᵢ εᵢ² + λ^t Σⱼ Wⱼ²/δⱼ at its minimum obeys J' = λ J + κ w e ε, exactly; so
    does the sum over a few samples with e before the first and ε after the last of them, if no
    ridge came in between.

    Attributes:
        cost: J [n_out].
        prior: λ^t, what forgetting has left of the penalty.
    """

    cost: NDArray[Any]
    prior: float = 1.0

    def after(
        self,
        errors: tuple[NDArray[Any], NDArray[Any]],
        weights: NDArray[Any],
        forgetting: float,
        gain: float,
    ) -> Residuals:
        """Follows a series.

        Args:
            errors: e and ε, each [T, n_out].
            weights: w [T]; a weight of 0 is not counted as a sample of the filter.
            forgetting: λ.
            gain: κ.
        """
        before, after = errors
        count = len(weights)
        factors = gain * weights * forgetting ** np.arange(count - 1, -1, -1)
        cost = forgetting**count * self.cost + factors @ (before.astype(np.float64) * after)
        return Residuals(cost, self.prior * forgetting ** int(np.count_nonzero(weights)))

    def variance(
        self, filter_: RLSFilter, mass: float, samples: float, constants: int
    ) -> NDArray[Any]:
        r"""The variance [n_out] of a sample of weight 1 about the model: σ² = (S/N) / (1 − p/M).

        S is the cost less the penalty, that is Σ λ^(t−i) κ wᵢ rᵢ² of the residuals r, N the mass,
        M the effective number of samples and p how many parameters these determine: the constants
        and γ = n − λ^t Σⱼ Pⱼⱼ/δⱼ coefficients, where the penalty determines the others (MacKay,
        Bayesian interpolation, 1992). With λ = 1 and no penalty it is Σ wᵢ rᵢ² / (Σ wᵢ − p) of
        ordinary least squares. Infinite where there are no more samples than parameters.
        """
        scale = np.asarray(filter_.initial_scale, np.float64)
        penalty = self.prior * np.sum(filter_.W.astype(np.float64) ** 2 / scale, axis=1)
        undetermined = self.prior * np.sum(np.diagonal(filter_.P) / scale)
        determined = filter_.n - min(float(undetermined), filter_.n)
        share = 1 - (constants + determined) / samples
        if share <= np.finfo(np.float64).eps * filter_.n:
            return np.full(filter_.n_out, np.inf)
        return np.maximum(self.cost - penalty, 0) / (mass * share)

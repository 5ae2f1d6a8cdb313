"""The rows of a regression with a free intercept, as a filter without one takes them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_GROWTH = 100.0  # log of the largest λ^-k within one call of `after`: far from float64's 709


class Means(NamedTuple):
    r"""Exponentially weighted means of a series of rows z, and the rows relative to them.

    A row of weight w turns the effective weight N and the mean m into::

        N' = λ N + w,   d = z − m,   m' = m + (w/N') d

    and the scatter about the mean, C = Σ λ^(t−i) wᵢ (zᵢ − m)(zᵢ − m)ᵀ, obeys exactly::

        C' = λ C + w (λ N/N') d dᵀ

    So least squares with an intercept that no penalty touches is least squares without one on the
    rows d, at the weights w λN/N'. The first row has weight 0: it sets the means alone.

    Attributes:
        mass: N.
        squares: Σ λ^(2(t−i)) gain² wᵢ, so that mass² / squares counts the samples in the memory,
            one of weight 2 as two.
        mean: m [width] in float64.
        rest: What rounding left of m: a mean of 10⁹ costs rows of size 1 no digits.
    """

    mass: float
    squares: float
    mean: NDArray[Any]
    rest: NDArray[Any]

    @classmethod
    def none(cls, width: int) -> Means:
        """Before the first row."""
        return cls(0.0, 0.0, np.zeros(width), np.zeros(width))

    @property
    def samples(self) -> float:
        """How many samples of weight 1 are as good as those remembered; w counts as w of them."""
        return self.mass * (self.mass / self.squares)

    def relative(self, Z: NDArray[Any]) -> NDArray[Any]:
        """Rows [T, width] less the means."""
        return (Z - self.mean) - self.rest

    def after(
        self, Z: NDArray[Any], weights: NDArray[Any], forgetting: float, gain: float
    ) -> tuple[Means, NDArray[Any], NDArray[Any]]:
        """Learns a few rows, at most `longest(forgetting)`.

        Args:
            Z: Rows [T, width], float64, T ≥ 1.
            weights: Their weights w [T], float64, > 0.
            forgetting: λ.
            gain: A factor of all weights.

        Returns:
            The new means, the rows d [T, width], each relative to the means before it, and the
            weights [T] of these for a filter of the same gain.
        """
        if len(Z) == 1:
            return self._after_one(Z, weights, forgetting, gain)
        origin, rest = (self.mean, self.rest) if self.mass else (Z[0], np.zeros_like(Z[0]))
        powers = forgetting ** np.arange(len(Z))
        scaled = gain * weights / powers
        away = Z - origin
        old = forgetting * self.mass
        masses = powers * (old + np.cumsum(scaled))
        sums = old * rest + np.cumsum(scaled[:, None] * away, axis=0)
        offsets = sums * (powers / masses)[:, None]  # of the means after each row
        before = np.concatenate([[self.mass], masses[:-1]])
        squares = (forgetting * powers[-1]) ** 2 * self.squares
        squares += gain * powers[-1] * np.sum(scaled * (powers[-1] / powers))
        after = self._moved(masses[-1], squares, origin, offsets[-1])
        away[0] -= rest
        away[1:] -= offsets[:-1]
        return after, away, weights * (forgetting * before / masses)

    def _after_one(
        self, Z: NDArray[Any], weights: NDArray[Any], forgetting: float, gain: float
    ) -> tuple[Means, NDArray[Any], NDArray[Any]]:
        """`after` one row, in few operations: streams come row by row."""
        weight = gain * float(weights[0])
        old, squares = forgetting * self.mass, forgetting**2 * self.squares + gain * weight
        if not old:
            after = Means(weight, squares, Z[0].copy(), np.zeros_like(Z[0]))
            return after, np.zeros_like(Z), np.zeros(1)
        mass = old + weight
        away = self.relative(Z)
        after = self._moved(mass, squares, self.mean, self.rest + away[0] * (weight / mass))
        return after, away, weights * (old / mass)

    @staticmethod
    def _moved(mass: float, squares: float, origin: NDArray[Any], offset: NDArray[Any]) -> Means:
        """Means at origin + offset, with what rounding leaves of the sum."""
        mean = origin + offset
        return Means(float(mass), float(squares), mean, offset - (mean - origin))


def longest(forgetting: float) -> int:
    """The most rows of one call of `Means.after`, for which λ^-k stays small."""
    return 1 + int(_GROWTH / max(-math.log(forgetting), 1e-6))

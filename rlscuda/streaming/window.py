"""The samples of a sliding window, which leave it one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlscuda.streaming.core import Core

_MOST = 1e-2  # times 1 / root epsilon: the energy of one that leaves, over that of what stays


@dataclass
class Series:
    """Samples in the order in which a kernel takes them.

    Attributes:
        X: Inputs [S, n].
        Y: Targets [S, n_out].
        gains: Gain of each [S]: negative for one that leaves, 0 for one that is only predicted.
        forgettings: Forgetting factor of each [S].
        places: [T]: where the T new samples are.
    """

    X: NDArray[Any]
    Y: NDArray[Any]
    gains: NDArray[np.float64]
    forgettings: NDArray[np.float64]
    places: NDArray[np.intp]


def _energies(X: NDArray[Any]) -> NDArray[np.float64]:
    wide = X.astype(np.result_type(X.dtype, np.float64))
    return np.einsum("tn,tn->t", wide, wide.conj()).real


class Window:
    """The last `length` samples, with what each still weighs.

    They are learnt anew where one that left outweighed all that stay.

    Args:
        length: Samples that stay.
        n: Inputs.
        n_out: Outputs.
        dtype: Of the samples.
    """

    def __init__(self, length: int, n: int, n_out: int, dtype: np.dtype[Any]) -> None:
        self.length = length
        self.X = np.zeros((0, n), dtype)
        self.Y = np.zeros((0, n_out), dtype)
        self.gains = np.zeros(0)

    def learn(
        self,
        core: Core,
        X: NDArray[Any],
        Y: NDArray[Any],
        gains: NDArray[np.float64],
        path: NDArray[Any] | None,
        initial_scale: Any,
    ) -> tuple[NDArray[Any], list[int]]:
        """Learns samples [T, n] while those that are too old leave.

        Args:
            core: What learns.
            X: Inputs.
            Y: Targets [T, n_out].
            gains: Gain of each.
            path: None, or what takes the weights after each sample [T, n_out, n].
            initial_scale: See `Core.run`.

        Returns:
            The predictions [T, n_out], and the samples left out.
        """
        gains, left_out = gains.copy(), list[int]()  # those left out do not leave either
        predictions = np.empty_like(Y)
        forgetting = core.kernel.forgetting
        step = 1 if path is not None else self.length  # so that none comes and goes in one call
        for first in range(0, len(X), step):
            part = slice(first, first + step)
            series = self.interleaved(X[part], Y[part], gains[part], forgetting)
            options = (series.gains, series.forgettings, None, initial_scale)
            results, failed = core.run(series.X, series.Y, *options)
            predictions[part] = results[series.places]
            for place in np.flatnonzero(np.isin(series.places, failed)):
                left_out.append(first + int(place))
                gains[first + place] = 0
            self.keep(X[part], Y[part], gains[part], forgetting)
            if self._outweighed(series):
                core.learn_anew(self.X, self.Y, self.gains, initial_scale)
            if path is not None:
                path[first] = core.W
        return predictions, left_out

    def _outweighed(self, series: Series) -> bool:
        """Whether one that left was so large that, beside it, rounding has lost what stays."""
        left = series.gains < 0
        largest = np.max(-series.gains[left] * _energies(series.X[left]), initial=0.0)
        return largest > _MOST / np.finfo(self.X.dtype).eps ** 0.5 * (
            self.gains @ _energies(self.X)
        )

    def interleaved(
        self, X: NDArray[Any], Y: NDArray[Any], gains: NDArray[np.float64], forgetting: float
    ) -> Series:
        """New samples [T, n], each followed by the one that leaves for it, if any does."""
        old, new = len(self.X), len(X)
        order = np.arange(new)
        leaving = order + old - self.length  # of the samples old and new, in their order
        leaves = leaving >= 0
        places = order + np.concatenate([[0], np.cumsum(leaves)[:-1]]) if new else order
        everything = np.concatenate([self.gains, gains])
        size = new + int(leaves.sum())
        sources = np.empty(size, np.intp)
        sources[places] = old + order
        sources[places[leaves] + 1] = leaving[leaves]
        series = Series(
            np.concatenate([self.X, X])[sources], np.concatenate([self.Y, Y])[sources],
            np.empty(size), np.ones(size), places,
        )  # fmt: skip
        series.gains[places] = gains
        series.forgettings[places] = forgetting
        # a sample forgets what was before it, unless its own gain is 0 and it changes nothing
        steps = np.concatenate([np.zeros(old), np.cumsum(gains != 0)])
        age = steps[old + order] - steps[np.maximum(leaving, 0)]
        gone = everything[np.maximum(leaving, 0)] * forgetting**age
        series.gains[places[leaves] + 1] = -gone[leaves]
        return series

    def keep(
        self, X: NDArray[Any], Y: NDArray[Any], gains: NDArray[np.float64], forgetting: float
    ) -> None:
        """Takes the new samples in; those that leave are dropped."""
        steps = np.cumsum(gains != 0)
        later = forgetting ** (steps[-1:] - steps)
        before = self.gains * forgetting ** (steps[-1] if len(steps) else 0)
        self.X = np.concatenate([self.X, X])[-self.length :]
        self.Y = np.concatenate([self.Y, Y])[-self.length :]
        self.gains = np.concatenate([before, gains * later])[-self.length :]

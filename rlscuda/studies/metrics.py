r"""What a curve of accuracies along a ladder of ratios says, and the difference of two arms.

Of accuracies :math:`a(r)` at ratios r that begin with 0: the drop :math:`D(r) = a(0) - a(r)`; the
prunability :math:`\rho(\tau)`, the largest ratio up to which no drop exceeds :math:`\tau`; and the
area :math:`AUC`, the mean over the ladder of :math:`a(r) / a(0)`, which needs no tolerance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_ROUNDING = 1e-12  # accuracies are counts over a number of images


def prunability(ratios: Sequence[float], accuracies: Sequence[float], tolerance: float) -> float:
    """The largest ratio up to which the accuracy falls by no more than a tolerance.

    Args:
        ratios: Ascending, the first 0.
        accuracies: At each ratio, in any one unit.
        tolerance: In the same unit, >= 0.

    Returns:
        One of the ratios.

    Raises:
        ValueError: The ratios are not so, lengths differ, or the tolerance is negative.

    Example:
        >>> prunability([0, 0.5, 0.9], [0.80, 0.795, 0.60], tolerance=0.01)
        0.5
    """
    _check(ratios, accuracies)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    reached = 0.0
    for ratio, accuracy in zip(ratios, accuracies):
        if accuracies[0] - accuracy > tolerance + _ROUNDING:
            break
        reached = float(ratio)
    return reached


def auc(ratios: Sequence[float], accuracies: Sequence[float]) -> float:
    """The mean over the ladder of the share of the accuracy that is kept; 1 of a constant curve.

    Args:
        ratios: Ascending, the first 0.
        accuracies: At each ratio, in any one unit; the first is positive.

    Raises:
        ValueError: See `prunability`; or the first accuracy is not positive.

    Example:
        >>> auc([0, 0.5, 0.9], [0.8, 0.8, 0.4])
        0.8333333333333334
    """
    _check(ratios, accuracies)
    if not accuracies[0] > 0:
        raise ValueError(f"the accuracy at ratio 0 must be positive, got {accuracies[0]}")
    return statistics.fmean(accuracy / accuracies[0] for accuracy in accuracies)


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference of pairs, and its standard error.

    Args:
        first: A number of each pair.
        second: The other one of each pair, in the same order.

    Returns:
        The mean of first - second, and the standard error of that, None for a single pair.

    Raises:
        ValueError: There is no pair, or not as many of both.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected pairs, got {len(first)} and {len(second)} values")
    differences = [a - b for a, b in zip(first, second)]
    if len(differences) == 1:
        return differences[0], None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error


def _check(ratios: Sequence[float], accuracies: Sequence[float]) -> None:
    ascending = all(a < b for a, b in zip(ratios, ratios[1:]))
    if not ratios or ratios[0] != 0 or not ascending:
        raise ValueError(f"ratios must ascend from 0, got {list(ratios)}")
    if len(ratios) != len(accuracies):
        raise ValueError(f"expected an accuracy a ratio, got {len(accuracies)} of {len(ratios)}")

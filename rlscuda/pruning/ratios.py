"""How much of a network is gone after each of several rounds of pruning."""

from __future__ import annotations

import math
from collections.abc import Callable


def _one_cycle(share: float) -> float:
    """The one-cycle curve of Hubens et al. 2021: a slow start, a fast middle, a slow end."""
    steep, middle = 14.0, 5.0
    return (1 + math.exp(-steep + middle)) / (1 + math.exp(-steep * share + middle))


# ratio in the end, share of the rounds done -> ratio gone
CURVES: dict[str, Callable[[float, float], float]] = {
    "one_shot": lambda ratio, share: ratio,
    "linear": lambda ratio, share: ratio * share,
    "iterative": lambda ratio, share: 1 - (1 - ratio) ** share,
    "cubic": lambda ratio, share: ratio * (1 - (1 - share) ** 3),
    "one_cycle": lambda ratio, share: ratio * _one_cycle(share),
}


def ratio_after(curve: str, ratio: float, done: int, rounds: int) -> float:
    r"""The share of the original units that is gone after `done` of `rounds` rounds.

    Args:
        curve: ``one_shot`` (all in the first round); ``linear``; ``iterative`` (in each round the
            same share of what is left); ``cubic`` (automated gradual pruning, Zhu and Gupta 2017:
            fast first, slow last); ``one_cycle`` (Hubens et al. 2021: slow, fast, slow).
        ratio: Share gone in the end, in [0, 1).
        done: Rounds done, in [0, rounds].
        rounds: Rounds in all, > 0.

    Returns:
        The share, 0 before the first round and `ratio` after the last.

    Raises:
        ValueError: An unknown curve or a number out of its range.

    Example:
        >>> [round(ratio_after("cubic", 0.8, k, 4), 3) for k in range(5)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    if curve not in CURVES:
        raise ValueError(f"curve must be {' | '.join(CURVES)}, got {curve!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    if not (rounds > 0 and 0 <= done <= rounds):
        raise ValueError(f"expected 0 <= done <= rounds and rounds > 0, got {done} of {rounds}")
    if done == 0:
        return 0.0
    return CURVES[curve](ratio, done / rounds)

"""The specification of stabilised forgetting: explicit information matrices R = P^-1 in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGE = 1e-2  # of a coordinate's running power
ROUNDING = 16  # epsilon n / (1 - lambda) times this is the least of it
WAIT = 16  # updates between two raises of a held matrix


def turns_of_cycle(forgetting: float) -> int:
    """K: the most updates that forget no more than half, or one."""
    return max(1, int(-1 / math.log2(forgetting)))


def coordinates_due(turn: int, n: int, forgetting: float) -> range:
    """The coordinates that are raised after update number `turn`: each once in K."""
    turns = turns_of_cycle(forgetting)
    place = turn % turns
    return range(place * n // turns, (place + 1) * n // turns)


def information_update(
    R: Tensor,
    S: Tensor,
    forgetting: float = 1.0,
    gain: float = 1.0,
    ridge: float | Tensor = 0.0,
    turn: int = 0,
) -> Tensor:
    """One update of R = P^-1 with a ridge that does not depend on the input.

    Args:
        R: [n, n].
        S: [r, n].
        forgetting: λ in (0, 1].
        gain: κ > 0.
        ridge: ρ, or one for each coordinate [n].
        turn: Number of the update.

    Returns:
        The new R [n, n]. Where nothing but the ridge excites coordinate j, R_jj is ρ before its
        turn and ρ λ^−K after it.
    """
    n = len(R)
    R = forgetting * R + gain / len(S) * S.T @ S
    if forgetting < 1:
        weight = forgetting ** -turns_of_cycle(forgetting) - 1
        rho = torch.as_tensor(ridge, dtype=R.dtype).expand(n)
        for j in coordinates_due(turn, n, forgetting):
            R[j, j] += weight * rho[j]
    return R


def relative_ridge(power: Tensor, forgetting: float, epsilon: float) -> Tensor:
    """The rho [n] of coordinates of this running power [n].

    Args:
        power: Mean of gain times the square of each coordinate.
        forgetting: lambda < 1.
        epsilon: Of the dtype of P.
    """
    share = max(RIDGE, ROUNDING * epsilon * len(power) / (1 - forgetting))
    return share * power.clamp(min=epsilon**0.5 * float(power.mean()))


@dataclass
class HeldRidge:
    """The series of R of a `HeldMatrix`, whose ridge follows the power of the input.

    Args:
        R: [n, n], float64; it changes.
        epsilon: Of the dtype of P.
        ridge: ρ; None for that of the running power.
        samples: Updates so far.
        debt: Coordinates that are due.
        waited: Updates since the last raise.
        next: The coordinate whose turn it is.
    """

    R: Tensor
    epsilon: float
    ridge: float | None = None
    power: Tensor = field(init=False)  # sums of gain x_j^2
    samples: int = 0
    debt: float = 0.0
    waited: int = 0
    next: int = 0

    def __post_init__(self):
        self.power = torch.zeros(len(self.R), dtype=torch.float64)

    def update(self, S: Tensor, forgetting: float, gain: float = 1.0) -> None:
        """One update.

        Args:
            S: Rows [r, n].
            forgetting: λ in (0, 1).
            gain: κ > 0.
        """
        n, power = len(self.R), self.power + gain * S.square().mean(0)
        due = self._due(n, forgetting)
        if self.ridge is None and not power.any():
            return  # nothing is known that could be forgotten
        self.power, self.samples = power, self.samples + 1
        self.R = forgetting * self.R + gain / len(S) * S.T @ S
        if self.ridge is None:
            rho = relative_ridge(self.power / self.samples, forgetting, self.epsilon)
        else:
            rho = torch.full((n,), self.ridge, dtype=torch.float64)
        for j in due:
            self.R[j, j] += max(1, 1 / forgetting - 1) * rho[j]

    def _due(self, n: int, forgetting: float) -> list[int]:
        """The coordinates that are raised after this update, which counts if it is refused, too."""
        self.debt -= n * math.log2(forgetting)
        self.waited += 1
        if self.debt < n and (self.waited < WAIT or self.debt < 1):
            return []
        first, due = self.next, min(n, int(self.debt))
        self.debt = 0.0 if due == n else self.debt - due
        self.waited, self.next = 0, (first + due) % n
        return [j % n for j in range(first, first + due)]

"""The ridge of a `HeldMatrix`: how large it is, whose turn it is, and its state.

The rule is that of `csrc/rls_ridge.h`. Whose turn it is follows from lambda alone, so the host
knows it; how large the ridge is follows from the inputs, so only the device does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlscuda.functional.ridges import (
    WAIT,
    as_tensor,
    captured,
    raise_where_,
    share_of_power,
    stabilise_,
)


class Ridge:
    """The ridge of one matrix, or of each of a batch.

    Args:
        P: [n, n] or [b, n, n].
        ridge: rho; None for that of the running power.

    Attributes:
        tensors: `turn` float64 [3], on the CPU: coordinates due, updates since the last raise, the
            next coordinate. `captured` int64 []: turns that the device has counted. `power` float64
            [n + 1] or [b, n + 1], where the ridge is of that: over all updates that were not
            refused, the sums of kappa x_j^2, and how many they were.
    """

    def __init__(self, P: Tensor, ridge: float | None):
        self._rho, self._n = ridge, P.shape[-1]
        self.tensors = {
            "turn": torch.zeros(3, dtype=torch.float64, device="cpu"),
            "captured": torch.zeros((), dtype=torch.int64, device=P.device),
        }
        if ridge is None:
            shape = (*P.shape[:-2], self._n + 1)
            self.tensors["power"] = torch.zeros(shape, dtype=torch.float64, device=P.device)

    def notice(self, s: Tensor, gain: float, found_inf: Tensor | None) -> Tensor | None:
        """Takes in the rows of an update; returns whether it is to be refused.

        Until some input was not 0 there is nothing to forget, nor a measure of the ridge.
        """
        if self._rho is not None:
            return found_inf
        power, s = self.tensors["power"], s.detach().double()
        squares = s.square()
        if s.dim() > power.dim():
            squares = squares.mean(-2)
        self._seen = torch.add(power[..., :-1], squares, alpha=gain)
        nothing = self._seen.amax() <= 0
        return nothing if found_inf is None else nothing | found_inf.view(())

    def due(self, h: Tensor, forgetting: float) -> int:
        """Counts an update that left `h`; how many coordinates are to be raised after it."""
        if self._rho is None:
            power = self.tensors["power"]
            seen = torch.cat((self._seen, power[..., -1:] + 1), -1)
            power.copy_(torch.where((h == h).unsqueeze(-1), seen, power))
            del self._seen
        if captured(h):
            self.tensors["captured"] += 1
            return self._n
        debt, waited, first = self.tensors["turn"].tolist()
        debt, waited = debt - self._n * math.log2(forgetting), waited + 1
        due = 0
        if debt >= self._n:
            due, debt = self._n, 0.0
        elif waited >= WAIT and debt >= 1:
            due = math.floor(debt)
            debt -= due
        self._first = int(first)
        self.tensors["turn"].numpy()[:] = debt, 0 if due else waited, (first + due) % self._n
        return due

    def raise_(
        self, P: Tensor, h: Tensor, forgetting: float, due: int, initial_scale: float = 1.0,
        health: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Raises that many coordinates where `h` is not NaN; returns it, NaN where P was reset.

        A captured graph does not come back to the host: there the device has turns of its own, for
        the fewest coordinates after each update.
        """
        rho = as_tensor(P, self._rho) if self._rho is not None else self._relative(P, forgetting)
        if captured(h):
            turn = self.tensors["captured"]
            return stabilise_(P, h, forgetting, rho, turn, initial_scale, health)
        weight = max(1.0, 1 / forgetting - 1) * rho
        return raise_where_(P, h, weight, self._first, due, due, initial_scale, health)

    def _relative(self, P: Tensor, forgetting: float) -> Tensor:
        """The ridge of each coordinate; where one matrix has seen nothing, of what others have."""
        sums, samples = self.tensors["power"].split([self._n, 1], -1)
        power = sums / samples.clamp(min=1)
        mean = power.mean(-1, keepdim=True)
        least = torch.where(mean > 0, mean, mean.mean()) * torch.finfo(P.dtype).eps ** 0.5
        return share_of_power(forgetting, self._n, P.dtype) * torch.maximum(power, least)

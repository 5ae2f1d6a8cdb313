"""Ridges: what keeps forgetting from losing all that is known of a coordinate.

Forgetting alone takes lambda^t of the information R = P^-1 about whatever the input no longer
excites, until P overflows. So coordinates are given a ridge in turn, R_jj <- R_jj + ridge: a row
sqrt(ridge) e_j without a target. A cycle, in which each has its turn once, is of as many updates K
as forget at most half; a raise of rho (lambda^-K - 1) then keeps what is known of a dead coordinate
between rho and lambda^-K rho, at most 2 rho (or rho / lambda, where one update forgets more).
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from rlscuda import _C

_rls_update = torch.ops.rlscuda.rls_update_.default
WAIT = 16  # updates between two raises, where the host can count them, to share a pass over P
ROWS = 64  # of one update: more follow in others
RIDGE = 1e-2  # of a coordinate's running power
_ROUNDING = 16  # epsilon n / (1 - lambda) times this is the least of it
_MOST_TURNS = 1 << 31  # so that a turn times n is an int64
RESETS = _C.health_slots.index("resets")


def turns_of(forgetting: float, wait: int = 1) -> int:
    """The raises of a cycle, one in `wait` updates: of K, which forget at most half, or are one."""
    updates = -1 / math.log2(forgetting) if forgetting < 1 else math.inf
    return max(1, int(min(updates, _MOST_TURNS)) // wait)


def ridge_weight(forgetting: float, wait: int = 1) -> float:
    """What a raise adds, of the rho that is kept at least: lambda^-K - 1."""
    return forgetting ** -(wait * turns_of(forgetting, wait)) - 1


def captured(x: Tensor) -> bool:
    """Whether a CUDA graph takes in what is done, which the host will not count again."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def share_of_power(forgetting: float, n: int, dtype: torch.dtype) -> float:
    """What part of the running power of the input a ridge is that follows it.

    None is so small that the condition of R is beyond the dtype.
    """
    return max(RIDGE, _ROUNDING * torch.finfo(dtype).eps * n / (1 - forgetting))


def ridge_rows(P: Tensor, ridge: Tensor, first: int | Tensor, count: int | Tensor, most: int):
    """The rows sqrt(ridge_j) e_j [most, n], [b, most, n] for batched `P`, the last ones zeros.

    Args:
        P: [n, n] or [b, n, n].
        ridge: Expands to the diagonals of `P`.
        first: The first coordinate, the others follow it, and 0 the last.
        count: Rows that are not zeros.
        most: Rows.
    """
    n, place = P.shape[-1], torch.arange(most, device=P.device)
    chosen = torch.arange(n, device=P.device) == ((place + first) % n)[:, None]
    if isinstance(count, Tensor) or count < most:
        chosen &= (place < count)[:, None]
    return torch.where(chosen, ridge.sqrt().to(P.dtype).expand(P.shape[:-1]).unsqueeze(-2), 0)


def turn_of(
    turn: int | Tensor, n: int, forgetting: float, wait: int = 1
) -> tuple[int | Tensor, int | Tensor, int]:
    """The first coordinate whose turn it is, how many they are, and how many they can be."""
    turns = turns_of(forgetting, wait)
    place = turn % turns
    first = place * n // turns
    return first, (place + 1) * n // turns - first, -(-n // turns)


def raise_(P: Tensor, rows: Tensor, initial_scale: float, found_inf: Tensor | None) -> Tensor:
    """P <- (P^-1 + rows^T rows)^-1; returns the mean of 1 + row P row^T, NaN where refused."""
    parts = rows.split(ROWS, dim=-2)
    h = torch.zeros(P.shape[:-2], dtype=P.dtype, device=P.device)
    for part in parts:
        r = part.shape[-2]
        rule = (1.0, float(r), 1.0, 0.0, initial_scale, None, None, found_inf)
        h += _rls_update(P, part.contiguous(), *rule)[1] * (r / rows.shape[-2])
    torch.autograd.graph.increment_version([P])
    return h


def raise_where_(
    P: Tensor,
    h: Tensor,
    ridge: Tensor,
    first: int | Tensor,
    count: int | Tensor,
    most: int,
    initial_scale: float,
    health: Tensor | None,
) -> Tensor:
    """Raises coordinates where `h` is not NaN; see `ridge_rows`.

    Returns:
        `h`, NaN where that has reset `P`, too, which `health` counts.
    """
    ridge = torch.where(h.isnan().unsqueeze(-1), 0, ridge)
    raised = raise_(P, ridge_rows(P, ridge, first, count, most), initial_scale, None).isnan()
    if health is not None:
        health[RESETS] += raised.sum()
    return torch.where(raised, math.nan, h)


def stabilise_(
    P: Tensor,
    h: Tensor,
    forgetting: float,
    ridge: float | Tensor,
    turn: int | Tensor,
    initial_scale: float = 1.0,
    health: Tensor | None = None,
) -> Tensor:
    """The raises that are due after an update that left `h`; see `raise_where_`."""
    first, count, most = turn_of(turn, P.shape[-1], forgetting)
    most = count if isinstance(count, int) else most
    if forgetting >= 1 or not most:
        return h
    weight = as_tensor(P, ridge) * ridge_weight(forgetting)
    return raise_where_(P, h, weight, first, count, most, initial_scale, health)


def as_tensor(P: Tensor, ridge: float | Tensor) -> Tensor:
    """A ridge as a tensor on the device of `P`, without a wait for it."""
    return ridge if isinstance(ridge, Tensor) else P.new_full((), ridge, dtype=torch.float64)


def check_ridge(P: Tensor, ridge: float | Tensor) -> None:
    """Raises ValueError or TypeError for what is no ridge of `P`."""
    if isinstance(ridge, Tensor):
        diagonal = P.shape[:-1]
        fits = ridge.dim() <= len(diagonal) and all(
            size in (1, wanted) for size, wanted in zip(ridge.shape[::-1], diagonal[::-1])
        )
        if not fits or ridge.device != P.device or not ridge.is_floating_point():
            raise ValueError(
                f"ridge must expand to {list(diagonal)}, floating point on {P.device}, got "
                f"{list(ridge.shape)}, {ridge.dtype} on {ridge.device}"
            )
    elif isinstance(ridge, bool) or not isinstance(ridge, Real):
        raise TypeError(f"ridge must be a number or a torch.Tensor, got {type(ridge).__name__}")
    elif not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be >= 0 and finite, got {ridge!r}")


def check_count(name: str, value: int | Tensor) -> None:
    """Raises ValueError or TypeError for what is neither an int >= 0 nor an int64 tensor []."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim():
            raise ValueError(f"{name} must be an int or int64 [], got {value.dtype} "
                             f"{list(value.shape)}")  # fmt: skip
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a torch.Tensor, got {type(value).__name__}")
    elif value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")

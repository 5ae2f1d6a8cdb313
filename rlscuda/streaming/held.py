"""A matrix P whose updates are held back, and when that pays."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rlscuda.functional import rls_flush_, rls_update_, rls_update_held_
from rlscuda.functional.calls import check_tensor
from rlscuda.functional.ridges import check_ridge
from rlscuda.streaming.ridge import Ridge
from rlscuda.streaming.states import copy_in

_MOST_ROWS = 64  # that the operator holds
_ENOUGH = 16  # updates that share a write of P
_LEAST_BYTES = 1 << 20  # of P on the CPU: below, P stays in the near caches
_LEAST_COLUMNS = 768  # of P on CUDA: below, launches rule


def updates_to_hold(n: int, itemsize: int, rank: int = 1, cuda: bool = False) -> int:
    """How many updates of a matrix [n, n] by `rank` rows share one write of it; 0 for none.

    The writes of P fall with that number while the thin products with what is held grow.
    """
    pays = n >= _LEAST_COLUMNS if cuda else n * n * itemsize > _LEAST_BYTES
    hold = min(_ENOUGH, _MOST_ROWS // rank)
    return hold if pays and hold >= 2 else 0


class HeldMatrix:
    r"""An inverse autocorrelation matrix for many updates between two readings.

    Updates are those of `functional.rls_update_`, but as a rule only read the matrix: K of them
    wait as thin factors and are applied together. To rounding the result is the same (1e-12
    relative in float64), and the traffic of an update by one row falls from 12 n² bytes (float32)
    to little more than 4 n². Nothing waits for the device, so updates can be captured in a CUDA
    graph.

    Reading `P` applies what is held. A tensor taken from `P` before is the same memory, and shows
    later updates only once `P` is read, or `flush` called, again. Copies, pickles and `state_dict`
    carry what is held, and go on to the same bits.

    Forgetting is stabilised: each time that it has halved what was known, every coordinate j has
    once been given a ridge, :math:`R_{jj} \leftarrow R_{jj} + \rho_j` for :math:`R = P^{-1}`, so
    that what the input no longer excites is bounded. Coordinates take turns, at least 16 updates
    apart, and a captured graph has turns of its own, after each update. See `ridge`.

    Args:
        P: [n, n] or [b, n, n], float32 or float64, contiguous, symmetric positive definite. It is
            taken over, not copied.
        rank: Rows of one update.
        hold: K, at least 2 with K * rank <= 64; 0 applies each update at once; None chooses by size
            (16 where it pays).
        ridge: :math:`\rho`, a number >= 0, what updates with forgetting < 1 leave at least of the
            information on each coordinate; 0 for plain forgetting. None for a hundredth of the
            running mean of :math:`\kappa x_j^2` over all of these updates, at least root epsilon
            of its mean over the coordinates and 16 epsilon n / (1 - forgetting) of itself: then
            the units of the input do not matter, and until one is not 0 updates are refused.

    Attributes:
        hold: K.
        rank: Rows of one update.
        ridge: As given.

    Raises:
        ValueError: `rank`, `hold` or `ridge` is out of its range, or `P` of another shape.
        TypeError: `P` is no tensor, or `ridge` no number.

    Example:
        >>> import torch
        >>> from rlscuda import HeldMatrix
        >>> matrix = HeldMatrix(torch.eye(2), hold=4, ridge=0)
        >>> u, h = matrix.update(torch.tensor([1.0, 2.0]), forgetting=0.5)
        >>> float(h)
        5.5
        >>> matrix.P
        tensor([[ 1.6364, -0.7273],
                [-0.7273,  0.5455]])
    """

    def __init__(
        self, P: Tensor, rank: int = 1, hold: int | None = None, ridge: float | None = None
    ) -> None:
        check_tensor("P", P)
        if P.dim() not in (2, 3) or P.shape[-1] != P.shape[-2]:
            raise ValueError(f"P must be [n, n] or [b, n, n], got {list(P.shape)}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if hold is None:
            hold = updates_to_hold(P.shape[-1], P.element_size(), rank, P.is_cuda)
        if hold and not (hold >= 2 and hold * rank <= _MOST_ROWS):
            raise ValueError(
                f"hold must be 0, or at least 2 with hold * rank <= {_MOST_ROWS}, "
                f"got {hold} for rank {rank}"
            )
        if ridge is not None:
            check_ridge(P, ridge)
        self.rank, self.hold, self.ridge = rank, hold, ridge
        self._P = P
        self._ridge = Ridge(P, ridge) if ridge != 0 else None
        self._held = P.new_zeros(*P.shape[:-2], hold, rank, P.shape[-1])
        self._state = torch.zeros(*P.shape[:-2], 3, dtype=torch.float64, device=P.device)
        self._state[..., 0] = 1

    @property
    def P(self) -> Tensor:
        """The matrix with every update applied, the live tensor and not a copy."""
        self.flush()
        return self._P

    def update(
        self, s: Tensor, forgetting: float = 1.0, gain: float = 1.0, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One update by the rows `s` [n], [rank, n] or [b, rank, n].

        Args:
            s: Rows, of the dtype of `P`.
            forgetting: See `functional.rls_update_`, as what it returns and raises.
            gain: See there.
            **options: Decay, diffusion, initial_scale, power, health, found_inf; see there.

        Returns:
            `u`, the rows P s before the update, and `h`.

        Raises:
            ValueError: `s` does not have `rank` rows, or what `functional.rls_update_` refuses.
        """
        check_tensor("s", s)
        rows = 1 if s.dim() < 2 else s.shape[-2]
        if rows != self.rank:
            raise ValueError(f"s must have {self.rank} rows, got {list(s.shape)}")
        if s.shape[-1:] != self._P.shape[-1:] or s.dtype != self._P.dtype:
            n = self._P.shape[-1]
            raise ValueError(
                f"s must have n={n} columns of {self._P.dtype}, got {list(s.shape)} of {s.dtype}"
            )
        ridge = self._ridge if forgetting < 1 else None
        if ridge is not None:
            options["found_inf"] = ridge.notice(s, gain, options.get("found_inf"))
        if self.hold:
            own = (self._P, self._held, self._state)
            u, h = rls_update_held_(*own, s, forgetting, gain, **options)
        else:
            u, h = rls_update_(self._P, s, forgetting, gain, **options)
        due = 0 if ridge is None else ridge.due(h, forgetting)
        if ridge is not None and due:
            h = ridge.raise_(self.P, h, forgetting, due, **options)
        return u, h

    def __copy__(self) -> HeldMatrix:
        return copy.deepcopy(self)

    def flush(self) -> None:
        """Applies what is held."""
        if self.hold:
            rls_flush_(self._P, self._held, self._state)

    def state_dict(self) -> dict[str, Tensor]:
        """P as it lies in memory, what is held, and all scalars: the tensors themselves."""
        own = {"P": self._P, "held": self._held, "state": self._state}
        return own if self._ridge is None else own | self._ridge.tensors

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Copies in what `state_dict` gave for a matrix of the same size, rank, hold and ridge.

        Raises:
            ValueError: A tensor is missing, or of another shape or dtype.
        """
        copy_in(self.state_dict(), state_dict)

    def __repr__(self) -> str:
        shape = list(self._P.shape)
        return f"HeldMatrix({shape}, {self._P.dtype}, rank={self.rank}, hold={self.hold})"

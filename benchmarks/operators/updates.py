"""The updates of P that the benchmarks of both devices time: at once, and held back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import shapes
from rlscuda import HeldMatrix, functional

GAIN = 0.01
UPDATES = 16  # that share a write of P


def ours(P: Tensor, s: Tensor) -> None:
    """One update, at once."""
    functional.rls_update_(P, s, gain=GAIN)


def held_updates(case: shapes.UpdateCase, device: str = "cpu") -> Callable[[], None]:
    """What makes UPDATES updates that are held back, checked against as many that are not."""
    P, s = case.tensors(device=device)
    plain, matrix = P.clone(), HeldMatrix(P, hold=UPDATES)
    for _ in range(UPDATES + 2):
        matrix.update(s, gain=GAIN)
        ours(plain, s)
    torch.testing.assert_close(matrix.P, plain, rtol=1e-4, atol=1e-5)

    def run() -> None:
        for _ in range(UPDATES):
            matrix.update(s, gain=GAIN)

    return run

"""Valid arguments of every registered operator, for the tests that must leave none out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlscuda import _C
from support.compare import random_spd

SLOTS = len(_C.health_slots)
RULE = (0.99, 0.5, 1.0, 0.0)  # forgetting, gain, decay, diffusion


def registered() -> list[str]:
    """The names of all operators of the library."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.split("::")[1] for name in names if name.startswith("rlscuda::"))


def health() -> torch.Tensor:
    """Counters of a layer after a step."""
    counters = torch.zeros(SLOTS, dtype=torch.float64)
    counters[_C.health_slots.index("steps")] = 1
    return counters


def _update(n: int = 6, rank: int = 2, batch: tuple[int, ...] = ()) -> list[Any]:
    return [random_spd(*batch, n, dtype=torch.float32), torch.randn(*batch, rank, n)]


def _rls_update() -> list[Any]:
    options = [torch.ones(1), health(), torch.tensor(False)]
    return [*_update(), *RULE, 1.0, *options]


def _rls_update_held() -> list[Any]:
    P, s = _update(batch=(3,))
    state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(3, 1)
    return [P, torch.zeros(3, 4, 2, 6), state, s, *RULE, 1.0, torch.ones(3), health(), None]


def _rls_flush() -> list[Any]:
    state = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    return [random_spd(6, dtype=torch.float32), 0.01 * torch.randn(4, 2, 6), state]


def _rls_filter_bank() -> list[Any]:
    P, W = random_spd(4, 5, dtype=torch.float32), torch.randn(4, 2, 5)
    rule = torch.tensor([0.9, 0.5, -1.0, 1.0], dtype=torch.float64).repeat(4, 1)
    state, squares = (torch.zeros(4, size, dtype=torch.float64) for size in (7, 5))
    options = [torch.ones(3), torch.tensor([True, False, True]), torch.tensor([2, 0, 3])]
    return [P, W, state, squares, rule, torch.randn(3, 5), torch.randn(3, 2), *options]


def _foreach_rls_update() -> list[Any]:
    (P, s), (Q, t) = _update(), _update(5, 1, (2,))
    none = s[:0]
    X = torch.randn(3, 5)
    return [
        [P, Q], [s, t], [torch.ones(1), torch.ones(2)], [health(), health()], torch.tensor(False),
        [s @ P, none], [torch.cat([X, torch.ones(3, 1)], 1) @ P, none], [X, none], *RULE, 0.1, 1.0,
        True,
    ]  # fmt: skip


def _weight_step() -> list[Any]:
    return [
        torch.randn(4, 3), torch.randn(4), torch.randn(4, 4), torch.randn(2, 4), torch.randn(4),
        1 + torch.rand(2), torch.randn(4, 4), 0.1, 0.9, 0.01, True,
    ]  # fmt: skip


def _adaptive_weight_step() -> list[Any]:
    return [
        torch.randn(4, 2, 3, 3), torch.randn(4), torch.randn(4, 19), torch.randn(4, 18),
        torch.randn(19), torch.randn(4), torch.ones(1), torch.zeros(4, 19), torch.zeros(4),
        0.1, 0.9, 0.99, 0.01, 1e-8, 1,
    ]  # fmt: skip


def _foreach_weight_step() -> list[Any]:
    none = torch.empty(0)
    return [
        [torch.randn(4, 3), torch.randn(4, 2, 3, 3)], [torch.randn(4), none],
        [torch.randn(4, 4), torch.randn(4, 18)], [torch.randn(4, 3), torch.randn(4, 18)],
        [torch.randn(4), none], [torch.randn(4), none], torch.ones(3), [1, 2],
        [torch.zeros(4, 4), torch.zeros(4, 18)], [torch.zeros(4), torch.zeros(4)],
        [health(), health()], torch.tensor(0.5), None, 0.1, 0.9, 0.99, 0.01, 1e-8, 0.1, 1.0, False,
    ]  # fmt: skip


def _foreach_complete_products() -> list[Any]:
    none = torch.empty(0)
    return [
        [torch.randn(4, 4), torch.randn(4, 18)], [torch.randn(4, 3), torch.randn(4, 2, 3, 3)],
        [torch.randn(4), none], [torch.randn(4), none], [torch.randn(4), none], [1, 2],
    ]  # fmt: skip


def _foreach_nesterov() -> list[Any]:
    return [
        [torch.randn(4, 3), torch.randn(4, 3)], [torch.randn(4), torch.randn(4)],
        [torch.randn(4, 4), torch.randn(4, 4)], torch.ones(5), [3, 0], [2, 2], [3, 3], 0.9,
    ]  # fmt: skip


def _foreach_spectral_root() -> list[Any]:
    tall = torch.randn(2, 3, 2)  # two blocks of a matrix that has two columns
    return [
        [random_spd(4, 5, dtype=torch.float32), tall.mT @ tall], [torch.ones(4), torch.ones(1)],
        [torch.ones(4), torch.ones(1)], [torch.ones(1), torch.ones(3), torch.ones(1)],
        [5, 3], [5, 6], [7, 2], [3.0, -4.0, 2.0, 2.0, -1.5, 0.5], 1e-8,
    ]  # fmt: skip


def _foreach_spectral_direction() -> list[Any]:
    none, like = torch.empty(0), {"dtype": torch.float32}  # of 1, 3 and 1 matrices
    return [
        torch.randn(1 * 35 + 3 * 35 + 2 * 6), torch.randn(1 * 35 + 3 * 35 + 2 * 6),
        [random_spd(7, **like), random_spd(3, 7, **like), none], torch.ones(5), torch.ones(5),
        [torch.ones(1), torch.ones(3), torch.ones(1)], [1, 3, 2], [5, 5, 3], [5, 5, 6], [7, 7, 2],
        [3.0, -4.0, 2.0, 2.0, -1.5, 0.5], 1e-8,
    ]  # fmt: skip


def _patches(*draw: int) -> Callable[[], list[Any]]:
    geometry = [[3, 3], [2, 1], [1, 1, 0, 2], [1, 2], 2, 1, True]
    return lambda: [torch.randn(3, 4, 8, 9), *geometry, *draw]


def _factors_agree() -> list[Any]:
    x, delta = torch.randn(5, 3), torch.randn(5, 4)
    return [delta.T @ x, x, delta, delta.sum(0)]


VALID: dict[str, Callable[[], list[Any]]] = {
    "adaptive_weight_step_": _adaptive_weight_step,
    "factors_agree": _factors_agree,
    "foreach_complete_products_": _foreach_complete_products,
    "foreach_nesterov_": _foreach_nesterov,
    "foreach_rls_update_": _foreach_rls_update,
    "foreach_spectral_direction_": _foreach_spectral_direction,
    "foreach_spectral_root_": _foreach_spectral_root,
    "foreach_weight_step_": _foreach_weight_step,
    "nonfinite": lambda: [[torch.randn(3), torch.randn(4, 2).t()[:, ::2], torch.zeros(2).half()]],
    "patch_mean": _patches(),
    "patch_sample": _patches(2, 7, 3),
    "patch_sketch": _patches(2, 7, 3),
    "rls_filter_bank_": _rls_filter_bank,
    "rls_flush_": _rls_flush,
    "rls_update_": _rls_update,
    "rls_update_held_": _rls_update_held,
    "weight_step_": _weight_step,
}

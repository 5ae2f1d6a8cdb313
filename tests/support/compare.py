"""Comparing tensors within the tolerance of their dtype, and everything to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TOLERANCE = {  # dtype: (relative, absolute), against a float64 specification
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Compares in float64, within `scale` times the tolerance of the actual (real) dtype."""
    rtol, atol = TOLERANCE[actual.dtype.to_real()]
    torch.testing.assert_close(wide(actual), wide(expected), rtol=rtol * scale, atol=atol * scale)


def wide(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64, or in complex128."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Compares two results of one dtype, within `tolerance` of the largest expected element."""
    assert actual.shape == expected.shape
    if actual.numel():
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= tolerance * scale


def random_spd(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Symmetric (Hermitian) positive definite matrices [*shape, n, n], so to the bit."""
    A = torch.randn(*shape, shape[-1], dtype=wide(torch.empty(0, dtype=dtype)).dtype)
    P = A @ A.mH / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=torch.float64)
    return ((P + P.mH) / 2).to(dtype)


def assert_same_by_any_threads(
    make: Callable[[], Any], run: Callable[[Any], Iterable[torch.Tensor]]
) -> None:
    """That what `run` makes of what `make` makes is the same to the bit by 1, 2, 3 and 5 threads.

    `make` has one seed and always the threads of before: torch's own products depend on them. What
    one of another seed leaves is in the memory that a kernel keeps, so that a part which nobody
    writes shows.
    """
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 5):
        torch.manual_seed(1)
        list(run(make()))
        torch.manual_seed(0)
        given = make()
        torch.set_num_threads(threads)
        try:
            results.append(list(run(given)))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of every parameter and every tensor or count of the optimizer's state."""
    values = {f"param.{i}": p.detach().clone() for i, p in enumerate(model.parameters())}
    for i, p in enumerate(model.parameters()):
        for name, value in optimizer.state.get(p, {}).items():
            values[f"state.{i}.{name}"] = torch.as_tensor(value).detach().clone()
    return values


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """The names of what is not the same to the bit (NaN equals NaN)."""
    both = first.keys() | second.keys()
    return {
        k for k in both
        if k not in first or k not in second
        or first[k].dtype != second[k].dtype
        or not torch.equal(first[k].nan_to_num(7.5), second[k].nan_to_num(7.5))
    }  # fmt: skip

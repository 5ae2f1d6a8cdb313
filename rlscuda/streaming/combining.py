"""Filters made of others: what two know together, and one of more inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def information(one: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """R = P⁻¹ [n, n] and W R [n_out, n], in float64 at least."""
    wide = np.result_type(one.dtype, np.float64)
    R = np.linalg.inv(one.P.astype(wide))
    R = (R + R.conj().T) / 2
    return R, one.W.astype(wide) @ R


def merged(one: Any, other: Any, base: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """P [n, n] and W [n_out, n] of both, less what the other started from: information adds.

    Raises:
        ValueError: The sizes differ, or the base knows more than the other.
    """
    for name, third in (("other", other), ("base", base)):
        if third is not None and (third.n, third.n_out) != (one.n, one.n_out):
            raise ValueError(
                f"{name} must have n {one.n} and n_out {one.n_out}, got {third.n} and {third.n_out}"
            )
    start: tuple[NDArray[Any], NDArray[Any]]
    own, theirs = information(one), information(other)
    if base is None:  # a fresh filter: R = I / δ, W = 0
        scales = np.broadcast_to(other.initial_scale, other.n)
        start = np.diag(1 / scales), np.zeros_like(own[1])
        learnt = other.updates
    else:
        start, learnt = information(base), other.updates - base.updates
    if learnt < 0:
        raise ValueError(f"base must be older than other, got {-learnt} updates more")
    left = other.forgetting**learnt
    R = own[0] + theirs[0] - left * start[0]
    if np.linalg.eigvalsh(R)[0] <= 0:
        raise ValueError("base must know less than other, but what remains is not positive")
    P = np.linalg.inv(R)
    P = (P + P.conj().T) / 2
    return P, (own[1] + theirs[1] - left * start[1]) @ P


def grown(one: Any, count: int, initial_scale: ArrayLike) -> Any:
    """A filter of `count` inputs more, of which nothing is known yet.

    Raises:
        ValueError: The count is below 1, or the samples of a window would lack the new inputs.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if one.window is not None:
        raise ValueError("a filter with a window cannot grow: its samples lack the new inputs")
    scales = np.broadcast_to(np.asarray(initial_scale, np.float64), count)
    all_scales = np.concatenate([np.broadcast_to(one.initial_scale, one.n), scales])
    larger = type(one)(
        one.n + count, one.n_out, one.forgetting, one.gain, all_scales, one.ridge, one.form,
        one.dtype, one.missing,
    )  # fmt: skip
    larger._core.take(one._core, scales)
    larger.updates = one.updates
    return larger

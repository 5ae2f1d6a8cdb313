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
    for name, third in (("self", one), ("other", other), ("base", base)):
        if third is None and name == "base":
            continue
        if type(third) is not type(one):
            raise TypeError(f"{name} must be a {type(one).__name__}, got {type(third).__name__}")
        if (third.n, third.n_out) != (one.n, one.n_out):
            raise ValueError(
                f"{name} must have n {one.n} and n_out {one.n_out}, got {third.n} and {third.n_out}"
            )
        if third.window is not None:
            raise ValueError("filters with a window cannot be merged: samples could not leave")
    if base is None and other._start is None:
        raise ValueError("base is needed: P or W of other was assigned")
    if base is not None and base.updates > other.updates:
        more = base.updates - other.updates
        raise ValueError(f"base must be older than other, got {more} updates more")
    own, theirs = information(one), information(other)
    if base is None:
        R0 = np.diag(1 / np.broadcast_to(np.asarray(other._start[0]), other.n))
        start, left = (R0, other._start[1] @ R0), other._decayed()
    else:
        start, left = information(base), other._decayed() / base._decayed()
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
    scales = np.asarray(initial_scale, np.float64)
    if scales.shape not in ((), (count,)):
        raise ValueError(f"initial_scale must be a number or [{count}], got {list(scales.shape)}")
    scales = np.broadcast_to(scales, count)
    all_scales = np.concatenate([np.broadcast_to(one.initial_scale, one.n), scales])
    larger = type(one)(
        one.n + count, one.n_out, one.forgetting, one.gain, all_scales, one.ridge, one.form,
        one.dtype, one.missing,
    )  # fmt: skip
    larger._core.take(one._core, scales)
    larger.updates = larger._since = one.updates
    larger._decay = one._decayed()
    if one._start is not None:
        larger._start = all_scales, np.pad(one._start[1], ((0, 0), (0, count)))
    else:
        larger._start = None
    return larger

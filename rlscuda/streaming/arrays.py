"""What the streaming filters make of the arrays that come in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ALIGNMENT = 64  # bytes of a cache line: a row that starts on one is read at full speed


def aligned(values: NDArray[Any]) -> NDArray[Any]:
    """A dense copy that starts on a cache line."""
    memory = np.empty(values.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def padded(n: int, itemsize: int) -> int:
    """Columns for rows of n numbers that keep them apart in the cache: an odd number of lines."""
    line = _ALIGNMENT // itemsize
    return (-(-n // line) | 1) * line


def read_only(values: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written."""
    view = values.view()
    view.flags.writeable = False
    return view


def as_array(name: str, values: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An aligned array of `dtype`, the values' own memory where that is possible.

    What is masked in a masked array is NaN in the result.

    Raises:
        TypeError: The values are no numbers, or complex where `dtype` is real.
    """
    if isinstance(values, np.ma.MaskedArray):
        wide = np.result_type(values.dtype, np.float32)
        values = np.ma.filled(values.astype(wide), np.nan)
    array = values if isinstance(values, np.ndarray) else np.asarray(values)
    if array.dtype != dtype:
        known = "biuf" if dtype.kind == "f" else "biufc"
        if array.dtype.kind not in known:
            raise TypeError(f"{name} must be {dtype} or convertible to it, got {array.dtype}")
        return array.astype(dtype)
    return array if array.flags.aligned else array.copy()


def check_finite(name: str, array: NDArray[Any]) -> None:
    """Refuses what is not finite.

    Raises:
        ValueError: There is a NaN or an infinity.
    """
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or inf")


def as_gains(
    weights: ArrayLike, samples: int, gain: float, dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    """The gain of every sample [T], where each counts by its weight.

    Raises:
        ValueError: A weight is negative or not finite, or there are too few or too many.
    """
    array = as_array("weights", weights, np.dtype(np.float64))
    if array.shape != (samples,):
        raise ValueError(f"weights must be [{samples}], got {list(array.shape)}")
    gains = gain * array
    if not ((array >= 0) & (gains <= np.finfo(dtype).max)).all():
        raise ValueError("weights must be >= 0 and finite")
    return gains

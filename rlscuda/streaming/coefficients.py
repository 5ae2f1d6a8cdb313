"""What of a streaming filter may be assigned between two calls, and is checked when it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Coefficients:
    """The coefficients of an `RLSFilter`, which are those of its kernel."""

    __slots__ = (
        "_decay",
        "_initial_scale",
        "_kernel",
        "_missing",
        "_since",
        "dtype",
        "n",
        "updates",
    )

    _kernel: Any
    _decay: float
    _since: int
    dtype: np.dtype[Any]
    n: int
    updates: int

    def _decayed(self) -> float:
        """What forgetting has left of the start: the product of λ over the samples learnt."""
        return self._decay * self._kernel.forgetting ** (self.updates - self._since)

    @property
    def forgetting(self) -> float:
        """λ in (0, 1]."""
        return self._kernel.forgetting

    @forgetting.setter
    def forgetting(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"forgetting must be in (0, 1], got {value}")
        self._decay = self._decayed()
        self._kernel.forgetting, self._since = float(value), self.updates

    @property
    def gain(self) -> float:
        """κ > 0."""
        return self._kernel.gain

    @gain.setter
    def gain(self, value: float) -> None:
        if not np.finfo(self.dtype).tiny <= value <= np.finfo(self.dtype).max:
            raise ValueError(f"gain must be > 0 and finite, got {value}")
        self._kernel.gain = float(value)

    @property
    def ridge(self) -> float | None:
        """ρ, or None where it is relative to the input."""
        return None if self._kernel.ridge < 0 else self._kernel.ridge

    @ridge.setter
    def ridge(self, value: float | None) -> None:
        if value is not None and not 0 <= value <= np.finfo(self.dtype).max:
            raise ValueError(f"ridge must be >= 0 and finite, or None, got {value}")
        self._kernel.ridge = -1.0 if value is None else float(value)

    @property
    def initial_scale(self) -> float | NDArray[np.float64]:
        """δ, a number or [n]; it counts from the next reset on."""
        scale = self._initial_scale
        return scale.copy() if isinstance(scale, np.ndarray) else scale

    @initial_scale.setter
    def initial_scale(self, value: float | ArrayLike) -> None:
        scales = np.array(value, np.float64)
        if scales.shape not in ((), (self.n,)):
            raise ValueError(f"initial_scale must be a number or [{self.n}], got {scales.shape}")
        finfo = np.finfo(self.dtype)
        if not ((scales >= finfo.tiny) & (scales <= finfo.max)).all():
            raise ValueError(f"initial_scale must be > 0 and finite, got {scales}")
        self._initial_scale: float | NDArray[np.float64] = scales if scales.ndim else float(scales)

    @property
    def missing(self) -> str:
        """What a sample with a missing number does: "raise" or "skip"."""
        return self._missing

    @missing.setter
    def missing(self, value: str) -> None:
        if value not in ("raise", "skip"):
            raise ValueError(f"missing must be 'raise' or 'skip', got {value!r}")
        self._missing = value

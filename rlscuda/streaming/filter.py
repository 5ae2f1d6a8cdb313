"""Streaming recursive least squares on NumPy arrays."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from rlscuda import _C
from rlscuda.functional.calls import as_user_error
from rlscuda.streaming.held import updates_to_hold

_ALIGNMENT = 64  # bytes of a cache line: a row that starts on one is read at full speed


def _aligned(values: NDArray[Any]) -> NDArray[Any]:
    """A dense copy that starts on a cache line."""
    memory = np.empty(values.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view


class RLSFilter:
    r"""Recursive-least-squares filter: y ≈ W x, one sample at a time or a series at once.

    A sample (x, y) updates the weights ``W`` and the inverse autocorrelation matrix ``P`` by::

        u = P x,   h = λ + κ x·u,   e = y − W x
        W ← W + (κ/h) e uᵀ
        P ← (1 − μ) (P − (κ/h) u uᵀ) / λ + μ P₀,     P₀ = δ I

    With μ = 0 this is exponentially weighted least squares: W minimises
    Σ κ λ^(t−i) ‖yᵢ − W xᵢ‖² + λ^t ‖W − W₀‖² / δ. With λ < 1, directions that the input never
    excites would grow as λ^(−t); the shrinkage μ towards P₀ bounds them. A sample for which h or e
    is not finite, or h not positive, is skipped: ``P`` starts anew from P₀, ``resets`` counts it.

    Args:
        n: Inputs of the filter.
        n_out: Outputs of the filter.
        forgetting: λ, the forgetting factor, in (0, 1].
        gain: κ, the weight of a new sample, > 0.
        initial_scale: δ, the scale of P₀ = δ I, > 0; large means little regularisation.
        shrinkage: μ in [0, 1]; None means min(1, 2 (1 − λ)), which is 0 where λ = 1.
        dtype: float32 or float64, of the state and of every array that goes in or out.

    Attributes:
        updates: Samples that entered P and W.
        resets: Samples that were skipped because they would have broken P.

    λ, κ, δ and μ are plain attributes and may be changed between two calls. A filter can be pickled
    and deep-copied, and then goes on to the same bits. Calls release the GIL while they compute:
    different filters run in parallel threads, one filter must not.

    Example:
        >>> import numpy as np
        >>> from rlscuda import RLSFilter
        >>> X = np.random.default_rng(0).standard_normal((500, 3))
        >>> Y = X @ [1.0, -2.0, 0.5]
        >>> f = RLSFilter(3, forgetting=0.999, initial_scale=100.0)
        >>> errors = Y - f.run(X, Y)
        >>> bool(np.abs(errors[-100:]).max() < 1e-3)
        True

    Raises:
        TypeError: An argument or array is of another type than documented.
        ValueError: An argument is out of its range, or an array has the wrong shape, a NaN or an
            infinity in it. The filter is then as it was before the call.
    """

    def __init__(
        self,
        n: int,
        n_out: int = 1,
        forgetting: float = 1.0,
        gain: float = 1.0,
        initial_scale: float = 1.0,
        shrinkage: float | None = None,
        dtype: DTypeLike = np.float64,
    ) -> None:
        self.n = operator.index(n)
        self.n_out = operator.index(n_out)
        self.dtype = np.dtype(dtype)
        self.forgetting = forgetting
        self.gain = gain
        self.initial_scale = initial_scale
        self.shrinkage = shrinkage
        if self.n < 1 or self.n_out < 1:
            raise ValueError(f"n and n_out must be at least 1, got {n} and {n_out}")
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self._coefficients()
        self.reset()

    def reset(self) -> None:
        """Starts anew: W = 0, P = P₀, counters 0."""
        self._coefficients()
        self._P = _aligned(self.initial_scale * np.eye(self.n, dtype=self.dtype))
        self._W = _aligned(np.zeros((self.n_out, self.n), self.dtype))
        hold = updates_to_hold(self.n, self.dtype.itemsize)
        self._held = _aligned(np.zeros((hold, self.n), self.dtype))
        self._held_state = np.array([1.0, 0.0, 0.0])
        self.updates = 0
        self.resets = 0

    @property
    def P(self) -> NDArray[Any]:
        """The inverse autocorrelation matrix [n, n]: the state itself, not a copy, read-only.

        Where P is large, the samples of `update` and of short series wait to be entered together;
        reading P enters them. An array from an earlier reading shows them only from then on.
        """
        _C.rls_filter_flush(self._P, self._held, self._held_state)
        return _read_only(self._P)

    @property
    def W(self) -> NDArray[Any]:
        """The weights [n_out, n]: the live state, not a copy, read-only; assigning copies in."""
        return _read_only(self._W)

    @W.setter
    def W(self, values: ArrayLike) -> None:
        array = self._array("W", values)
        if array.shape != self._W.shape:
            raise ValueError(f"W must be [{self.n_out}, {self.n}], got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError("W must be finite, got NaN or inf")
        self._W[...] = array

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """The outputs W x, without learning.

        Args:
            x: One input [n], or [T, n].

        Returns:
            [n_out], or [T, n_out].
        """
        array = self._array("x", x)
        if array.ndim not in (1, 2) or array.shape[-1] != self.n:
            raise ValueError(f"x must be [{self.n}] or [T, {self.n}], got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise ValueError("x must be finite, got NaN or inf")
        return array @ self._W.T

    def update(self, x: ArrayLike, y: ArrayLike) -> NDArray[Any]:
        """Learns one sample.

        Args:
            x: The input [n].
            y: The target [n_out], or a number where n_out = 1.

        Returns:
            The a-priori prediction W x, made before the update, in the shape of `y`; the a-priori
            error is `y` minus it.
        """
        inputs, target = self._array("x", x), self._array("y", y)
        if inputs.shape != (self.n,):
            raise ValueError(f"x must be [{self.n}], got {list(inputs.shape)}")
        if target.shape != (self.n_out,) and (target.ndim or self.n_out > 1):
            raise ValueError(f"y must be [{self.n_out}], got {list(target.shape)}")
        predictions = self._learn(inputs[None], target.reshape(1, self.n_out))
        return predictions.reshape(target.shape)[()]

    def run(self, X: ArrayLike, Y: ArrayLike) -> NDArray[Any]:
        """Learns a series, in order, without returning to Python in between.

        Equal, to rounding, to one `update` a sample: the samples pass in blocks that share one
        read and write of P. Arrays of any strides are read where they lie, so a tapped delay line
        can be `numpy.lib.stride_tricks.sliding_window_view(signal, n)`; only an array that is not
        aligned to its dtype is copied.

        Args:
            X: The inputs [T, n].
            Y: The targets [T, n_out], or [T] where n_out = 1.

        Returns:
            The a-priori predictions, each made before its sample was learnt, in the shape of `Y`.
            An empty series gives an empty result.
        """
        inputs, targets = self._array("X", X), self._array("Y", Y)
        if inputs.ndim != 2 or inputs.shape[1] != self.n:
            raise ValueError(f"X must be [T, {self.n}], got {list(inputs.shape)}")
        columns = targets[:, None] if targets.ndim == 1 else targets
        if columns.shape != (len(inputs), self.n_out):
            raise ValueError(
                f"Y must be [{len(inputs)}, {self.n_out}] for X {list(inputs.shape)}, "
                f"got {list(targets.shape)}"
            )
        return self._learn(inputs, columns).reshape(targets.shape)

    def _learn(self, X: NDArray[Any], Y: NDArray[Any]) -> NDArray[Any]:
        try:
            predictions, resets = _C.rls_filter_run(
                self._P, self._W, X, Y, *self._coefficients(), self._held, self._held_state
            )
        except RuntimeError as error:
            raise as_user_error(error) from None
        self.updates += len(X) - resets
        self.resets += resets
        return predictions

    def _coefficients(self) -> tuple[float, float, float, float, float]:
        """The checked forgetting, gain, decay, diffusion and initial scale of the kernel."""
        if not 0 < self.forgetting <= 1:
            raise ValueError(f"forgetting must be in (0, 1], got {self.forgetting}")
        largest = float(np.finfo(self.dtype).max)
        for name in ("gain", "initial_scale"):
            if not 0 < getattr(self, name) <= largest:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        shrinkage = self.shrinkage
        if shrinkage is None:
            shrinkage = min(1.0, 2 * (1 - self.forgetting))
        elif not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1] or None, got {shrinkage}")
        decay, diffusion = 1 - shrinkage, shrinkage * self.initial_scale
        return self.forgetting, self.gain, decay, diffusion, self.initial_scale

    def _array(self, name: str, values: ArrayLike) -> NDArray[Any]:
        """An array of the filter's dtype; numbers and lists are converted, arrays never."""
        if not isinstance(values, np.ndarray):
            values = np.asarray(values, self.dtype)
        if values.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype}, got {values.dtype}")
        return values if values.flags.aligned else values.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._P, self._W, self._held = (_aligned(a) for a in (self._P, self._W, self._held))

    def __repr__(self) -> str:
        return (
            f"RLSFilter(n={self.n}, n_out={self.n_out}, forgetting={self.forgetting}, "
            f"gain={self.gain}, initial_scale={self.initial_scale}, "
            f"shrinkage={self.shrinkage}, dtype={self.dtype})"
        )

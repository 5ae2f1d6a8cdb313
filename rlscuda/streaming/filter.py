"""Streaming recursive least squares on NumPy arrays."""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from rlscuda.streaming.arrays import as_array, as_gains, check_finite, read_only
from rlscuda.streaming.coefficients import Coefficients
from rlscuda.streaming.combining import grown, merged
from rlscuda.streaming.core import FORMS, Core
from rlscuda.streaming.window import Window


class RLSFilter(Coefficients):
    r"""Recursive-least-squares filter: y ≈ W x, one sample at a time or a series at once.

    A sample (x, y) of weight w updates the weights ``W`` and the inverse autocorrelation matrix
    ``P`` by, with κ = w · gain::

        u = P x,   h = λ + κ x·u,   e = y − W x
        W ← W + (κ/h) e uᵀ,   P ← (P − (κ/h) u uᵀ) / λ

    This is exponentially weighted least squares: W minimises
    Σ κ λ^(t−i) ‖yᵢ − W xᵢ‖² + λ^t ‖W − W₀‖² / δ.

    **Stabilised forgetting.** With λ < 1, what is known of directions that the input never excites
    would be lost as λ^t, until P overflows. Each time that forgetting has halved it, every
    coordinate j in turn gets a ridge: R_jj ← R_jj + ρ_j, where R is the inverse of P. So R is
    nowhere below diag(ρ), while W is not pulled anywhere. By default ρ_j is a hundredth of the mean
    of κ ‖x_j‖² over all samples, so that units do not matter, and more only where the memory
    1 / (1 − λ) is too short to determine W. The noise floor is the textbook's.

    **Complex signals.** With a complex dtype u = P x, h = λ + κ xᴴu, e = y − W x and::

        W ← W + (κ/h) e uᴴ,   P ← (P − (κ/h) u uᴴ) / λ

    P, Hermitian, is the inverse of the forgetting sum of κ x xᴴ. Nothing is conjugated in W x: a
    row of W is MATLAB's row w of y = w u, and the wᴴ of textbooks that write y = wᴴu.

    **Samples that cannot be learnt.** Where rounding has made h negative, P is repaired: what is
    below its precision is raised to it. A P that has overflowed starts anew from P₀, and a sample
    that is itself too large is left out. ``resets`` counts each, and the first one warns.

    Args:
        n: Inputs of the filter.
        n_out: Outputs of the filter.
        forgetting: λ, the forgetting factor, in (0, 1].
        gain: κ, the weight of a new sample, > 0.
        initial_scale: δ, of P₀ = δ I, > 0, or a δ for each input [n]; large means little
            regularisation.
        ridge: ρ: None for relative to the input, a number >= 0 for all coordinates alike, 0 for
            none, which is the textbook's filter.
        form: "covariance", or "square-root", which keeps a root of P: at up to three times the cost
            P stays positive definite however badly the inputs are conditioned.
        dtype: float32, float64, complex64 or complex128, of the state and of the results; the last
            two for form="covariance".
        missing: What a NaN, an infinity or a masked element in a sample does: "raise" refuses the
            series, "skip" learns nothing from that sample, and its prediction is NaN if it is in x.
        window: Samples that stay: an older one is taken out again, exactly; None for all.

    Attributes:
        updates: Samples that entered P and W.

    All but `n`, `n_out`, `form`, `dtype` and `window` may be assigned between two calls. A filter
    can be pickled and copied, and then goes on to the same bits. Calls release the GIL while they
    compute: different filters run in parallel threads, one filter must not. A sample costs O(n²).

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

    __slots__ = ("_core", "_start", "_window", "form", "n_out", "window")

    def __init__(
        self,
        n: int,
        n_out: int = 1,
        forgetting: float = 1.0,
        gain: float = 1.0,
        initial_scale: float | ArrayLike = 1.0,
        ridge: float | None = None,
        form: str = "covariance",
        dtype: DTypeLike = np.float64,
        missing: str = "raise",
        window: int | None = None,
    ) -> None:
        self.n = operator.index(n)
        self.n_out = operator.index(n_out)
        self.dtype = np.dtype(dtype).newbyteorder("=")
        if self.n < 1 or self.n_out < 1:
            raise ValueError(f"n and n_out must be at least 1, got {n} and {n_out}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if self.dtype.name not in FORMS[form]:
            raise TypeError(f"dtype must be one of {', '.join(FORMS[form])}, got {self.dtype}")
        self.form, self.missing = form, missing
        self.window = None if window is None else operator.index(window)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None, got {window}")
        self._core = Core(self.n, self.n_out, self.dtype, form)
        self._kernel = self._core.kernel
        self.updates, self._since, self._decay = 0, 0, 1.0
        self.forgetting, self.gain, self.ridge = forgetting, gain, ridge
        self.initial_scale = initial_scale
        self.reset()

    # -- state -----------------------------------------------------------------------------------

    def reset(self, keep_weights: bool = False) -> None:
        """Starts anew: P = P₀, counters 0, and W = 0 unless it is kept."""
        core = self._core
        core.restart(self._initial_scale)
        if not keep_weights:
            core.W[...] = 0
        core.squares[...] = core.scalars[2:] = 0
        core.resets = self.updates = self._since = 0
        self._decay = 1.0
        self._start: tuple[Any, Any] | None = (self._initial_scale, core.W.copy())
        self._empty_window()

    def _empty_window(self) -> None:
        shape = (self.n, self.n_out, self.dtype)
        self._window = None if self.window is None else Window(self.window, *shape)

    @property
    def resets(self) -> int:
        """Times that P was repaired or started anew, or a sample was left out as too large."""
        return self._core.resets

    @property
    def P(self) -> NDArray[Any]:
        """The inverse autocorrelation matrix [n, n], the state itself and not a copy; read-only.

        Samples wait to be entered in it together; reading enters them. An array from an earlier
        reading shows them only from then on. A positive definite matrix, symmetric or Hermitian,
        may be assigned, and is copied in; no sample of before then leaves a window any more.
        """
        return self._core.matrix()

    @P.setter
    def P(self, values: ArrayLike) -> None:
        array = as_array("P", values, self.dtype)
        if array.shape != (self.n, self.n):
            raise ValueError(f"P must be [{self.n}, {self.n}], got {list(array.shape)}")
        check_finite("P", array)
        most = 1e3 * np.finfo(self.dtype).eps * np.abs(array).max()
        if np.abs(array - array.conj().T).max() > most or np.linalg.eigvalsh(array)[0] <= 0:
            kind = "Hermitian" if self.dtype.kind == "c" else "symmetric"
            raise ValueError(f"P must be {kind} and positive definite")
        self._core.enter(array)
        self._start = None
        self._empty_window()

    @property
    def W(self) -> NDArray[Any]:
        """The weights [n_out, n], the live state and not a copy; read-only, assigning copies in."""
        return read_only(self._core.W)

    @W.setter
    def W(self, values: ArrayLike) -> None:
        array = as_array("W", values, self.dtype)
        if array.shape != self._core.W.shape:
            raise ValueError(f"W must be [{self.n_out}, {self.n}], got {list(array.shape)}")
        check_finite("W", array)
        self._core.W[...] = array
        fresh = self._start is not None and self.updates == 0
        self._start = (self._initial_scale, array.copy()) if fresh else None

    def merge(self, other: RLSFilter, base: RLSFilter | None = None) -> None:
        """Adds what another filter has learnt: as if its samples had been learnt here.

        Exact at forgetting 1; with less the samples of both count by their own age. The running
        power is merged, too; filters with a window are refused.

        Args:
            other: A filter of the same n and n_out; it stays as it is.
            base: A copy of the filter that both are copies of; None where both started anew.

        Raises:
            TypeError: One of them is no filter.
            ValueError: The sizes differ, the base knows more than `other`, or it is needed since P
                or W of `other` was assigned.
        """
        P, W = merged(self, other, base)
        self.P, self.W = P, W
        self._core.add_power(other._core, 1)
        self.updates += other.updates
        if base is not None:
            self._core.add_power(base._core, -1)
            self.updates -= base.updates

    def grow(self, count: int, initial_scale: float | ArrayLike = 1.0) -> None:
        """Appends inputs, of which nothing is known yet.

        Args:
            count: New inputs, at least 1; they follow the old ones in x.
            initial_scale: δ of each, a number or [count].
        """
        self.__setstate__(grown(self, operator.index(count), initial_scale).__getstate__())

    # -- prediction ------------------------------------------------------------------------------

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """The outputs W x, without learning.

        Args:
            x: One input [n], or [T, n].

        Returns:
            [n_out], or [T, n_out].
        """
        return self._inputs(x) @ self._core.W.T

    def variance(self, x: ArrayLike) -> Any:
        """xᵀ P x, or xᴴ P x: the variance of a prediction, in units of the noise's over the gain.

        Its root is the width of the confidence bound of LinUCB. P is not brought up to date for it.

        Args:
            x: One input [n], or [T, n].

        Returns:
            A number, or float64 [T].
        """
        array = self._inputs(x)
        result = self._kernel.variance(np.atleast_2d(array))
        return result if array.ndim == 2 else float(result[0])

    def _inputs(self, x: ArrayLike) -> NDArray[Any]:
        array = as_array("x", x, self.dtype)
        if array.ndim not in (1, 2) or array.shape[-1] != self.n:
            raise ValueError(f"x must be [{self.n}] or [T, {self.n}], got {list(array.shape)}")
        check_finite("x", array)
        return array

    # -- learning --------------------------------------------------------------------------------

    def update(self, x: ArrayLike, y: ArrayLike, weight: float = 1.0) -> Any:
        """Learns one sample.

        Args:
            x: The input [n].
            y: The target [n_out], or a number where n_out = 1.
            weight: What the sample counts, >= 0; at 0 it is predicted alone.

        Returns:
            The a-priori prediction W x, made before the update, in the shape of `y`; the a-priori
            error is `y` minus it.
        """
        if weight == 1 and self._window is None:
            prediction = self._kernel.update(x, y)
            if prediction is not None:
                self.updates += 1
                return prediction if prediction.ndim else prediction[()]
        inputs, target = as_array("x", x, self.dtype), as_array("y", y, self.dtype)
        if inputs.shape != (self.n,):
            raise ValueError(f"x must be [{self.n}], got {list(inputs.shape)}")
        if target.shape != (self.n_out,) and (target.ndim or self.n_out > 1):
            raise ValueError(f"y must be [{self.n_out}], got {list(target.shape)}")
        predictions, _ = self._learn(inputs[None], target.reshape(1, -1), [weight], False)
        return predictions.reshape(target.shape)[()]

    def run(
        self,
        X: ArrayLike,
        Y: ArrayLike,
        weights: ArrayLike | None = None,
        history: bool = False,
    ) -> Any:
        """Learns a series, in order, without returning to Python in between.

        Equal, to rounding, to one `update` a sample: the samples pass in blocks that share one
        read and write of P. Arrays of any strides are read where they lie, so a tapped delay line
        can be `numpy.lib.stride_tricks.sliding_window_view(signal, n)`; only an array that is not
        aligned, or of another dtype, is copied.

        Args:
            X: The inputs [T, n].
            Y: The targets [T, n_out], or [T] where n_out = 1.
            weights: What each sample counts [T], >= 0; None for 1.
            history: Whether to return the weights after each sample too, which is slower.

        Returns:
            The a-priori predictions, each made before its sample was learnt, in the shape of `Y`;
            with `history` a pair of them and the weights [T, n_out, n]. An empty series gives an
            empty result.
        """
        inputs, targets = as_array("X", X, self.dtype), as_array("Y", Y, self.dtype)
        if inputs.ndim != 2 or inputs.shape[1] != self.n:
            raise ValueError(f"X must be [T, {self.n}], got {list(inputs.shape)}")
        columns = targets[:, None] if targets.ndim == 1 else targets
        if columns.shape != (len(inputs), self.n_out):
            raise ValueError(
                f"Y must be [{len(inputs)}, {self.n_out}] for X {list(inputs.shape)}, "
                f"got {list(targets.shape)}"
            )
        predictions, path = self._learn(inputs, columns, weights, history)
        predictions = predictions.reshape(targets.shape)
        return (predictions, path) if history else predictions

    def _learn(
        self, X: NDArray[Any], Y: NDArray[Any], weights: ArrayLike | None, history: bool
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Learns checked arrays; returns the predictions, and the weights after each sample."""
        gains = None if weights is None else as_gains(weights, len(X), self.gain, self.dtype)
        unknown = np.zeros(0, bool)
        if self.missing == "skip":
            gone = ~np.isfinite(X).all(1)
            idle = gone | ~np.isfinite(Y).all(1)
            if idle.any():
                gains = np.where(idle, 0.0, self.gain if gains is None else gains)
                X, Y = np.where(gone[:, None], 0, X), np.where(idle[:, None], 0, Y)
                unknown = gone
        path = np.empty((len(X), *self._core.W.shape), self.dtype) if history else None
        initial = self._initial_scale
        if self._window is None:
            predictions, left_out = self._core.run(X, Y, gains, None, path, initial)
        else:
            if gains is None:
                gains = np.full(len(X), self.gain)
            check_finite("X", X)
            check_finite("Y", Y)
            predictions, left_out = self._window.learn(self._core, X, Y, gains, path, initial)
        learnt = len(X) if gains is None else int(np.count_nonzero(gains))
        self.updates += learnt - len(left_out)
        if unknown.any():
            predictions[unknown] = np.nan
        return predictions, path

    def __copy__(self) -> RLSFilter:
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        names = {*Coefficients.__slots__, *self.__slots__} - {"_kernel"}
        return {name: getattr(self, name) for name in sorted(names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._kernel = self._core.kernel

    def __repr__(self) -> str:
        return (
            f"RLSFilter(n={self.n}, n_out={self.n_out}, forgetting={self.forgetting}, "
            f"gain={self.gain}, initial_scale={self.initial_scale}, ridge={self.ridge}, "
            f"form={self.form!r}, dtype={self.dtype}, missing={self.missing!r}, "
            f"window={self.window})"
        )

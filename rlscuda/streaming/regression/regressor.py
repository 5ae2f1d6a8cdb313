"""Linear regression by recursive least squares, as scikit-learn users expect it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from rlscuda.streaming.filter import RLSFilter
from rlscuda.streaming.regression.centring import Means, longest
from rlscuda.streaming.regression.estimator import (
    BaseEstimator,
    NotFittedError,
    RegressorMixin,
    validate_data,
)
from rlscuda.streaming.regression.residuals import Residuals

_LEAST, _MOST = 16, 256  # rows that are centred together
_NUMBERS = 2**15  # of the weights after each of them, which stay in the cache


def _numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    """A float array, float32 or float64."""
    if hasattr(values, "toarray"):
        raise TypeError(f"sparse data is not supported: {name} must be a dense array")
    if np.ma.is_masked(values):
        raise ValueError(f"{name} must have no masked entry: leave these rows out or fill them")
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} is {array.dtype}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _check_range(name: str, array: NDArray[Any], dtype: Any) -> None:
    """No number may be missing, or so large that a difference overflows in `dtype`."""
    limit = np.float64(np.finfo(dtype).max) / 4
    sizes = np.abs(array)
    if not sizes.max(initial=0) <= limit:
        where = tuple(np.argwhere(~(sizes <= limit))[0])
        raise ValueError(
            f"{name} must be finite and within ±{limit:.0e}, got {array[where]} at "
            f"{list(map(int, where))} (NaN, inf or too large)"
        )


def _learnt(
    filter_: RLSFilter, inputs: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Passes samples to the filter; returns the errors of each before and after, for `Residuals`.

    Without forgetting, before and after all of them gives the same sum, in less time.
    """
    if filter_.forgetting == 1 and len(inputs) > 1:
        before = targets - filter_.predict(inputs)
        filter_.run(inputs, targets, weights=weights)
        return before, targets - filter_.predict(inputs)
    predictions, path = filter_.run(inputs, targets, weights=weights, history=True)
    return targets - predictions, targets - np.einsum("tij,tj->ti", path, inputs)


class RLSRegressor(RegressorMixin, BaseEstimator):
    r"""Ridge regression, online, on an `RLSFilter`; a scikit-learn estimator where there is one.

    One pass over the samples in their order. With the defaults, `fit` gives the coefficients and
    the intercept of `sklearn.linear_model.Ridge(alpha=1 / (gain * initial_scale))`: the penalty is
    on the coefficients alone. `partial_fit` goes on where the last call ended; any cut of a series
    into calls gives the same to rounding. With forgetting < 1 it follows a drifting target::

        minimise  Σ λ^(t−i) κ wᵢ ‖yᵢ − W xᵢ − b‖² + λ^(t−1) ‖W‖² / δ

    The intercept is free because the filter sees x and y relative to their running means, which is
    the same problem exactly (see `centring.Means`); means of 10⁹ cost no digits. The first sample
    only sets the means, hence λ^(t−1); without an intercept it is λ^t.

    Args:
        forgetting: λ, the forgetting factor, in (0, 1].
        gain: κ, a weight of every sample, > 0.
        initial_scale: δ, the scale of P₀ = δ I, > 0, or one for each column [n_features]; large
            means little regularisation.
        ridge: The stabilised forgetting of `RLSFilter`; None is its default, 0 none.
        fit_intercept: Whether there is an intercept b; else b = 0 and x, y are taken as they are.
        form: Of the filter: "square-root" stays exact where columns differ by 10⁵ in size and the
            penalty is small; "covariance" is faster.
        dtype: Of the filter, float64 or float32. The means are float64 always.

    `forgetting`, `gain` and `ridge` may be changed between two calls of `partial_fit`, by
    `set_params` or as attributes: they count from the next call on. The others count from the next
    `fit` on.

    Attributes:
        coef_: Coefficients W [n_features], or [n_targets, n_features] where y is two-dimensional.
        intercept_: Intercept b, a number or [n_targets].
        P_: Inverse autocorrelation matrix [n_features, n_features] of the (centred) inputs, whose
            covariance form is the filter's memory itself; read-only.
        filter_: The `RLSFilter`.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X was a data frame.

    Example:
        >>> import numpy as np
        >>> from rlscuda import RLSRegressor
        >>> X = np.arange(12.0).reshape(6, 2) % 5
        >>> model = RLSRegressor(initial_scale=1e6).fit(X, X @ [2.0, -1.0] + 1000.0)
        >>> np.round(model.coef_, 3).tolist(), round(float(model.intercept_), 3)
        ([2.0, -1.0], 1000.0)
    """

    def __init__(
        self,
        forgetting: float = 1.0,
        gain: float = 1.0,
        initial_scale: float | ArrayLike = 1.0,
        ridge: float | None = None,
        fit_intercept: bool = True,
        form: str = "square-root",
        dtype: DTypeLike = np.float64,
    ) -> None:
        self.forgetting = forgetting
        self.gain = gain
        self.initial_scale = initial_scale
        self.ridge = ridge
        self.fit_intercept = fit_intercept
        self.form = form
        self.dtype = dtype

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RLSRegressor:
        """Learns from scratch.

        Args:
            X: Inputs [T, n_features].
            y: Targets [T] or [T, n_targets].
            sample_weight: Weights [T] ≥ 0, or a number; with λ = 1, a weight of 2 is the row
                twice. A row of weight 0 is left out: it is not forgotten at either.

        Raises:
            ValueError: An argument is out of its range, or has another shape, a NaN or an infinity
                in it. The model is then as it was before the call.
        """
        before = dict(self.__dict__)
        try:
            inputs = self._inputs(X, fresh=True)
            targets, weights = self._samples(inputs, y, sample_weight, np.dtype(self.dtype))
            if not weights.any():
                raise ValueError("sample_weight must not be zero throughout: there is no sample")
            self._flat = targets.ndim == 1
            outputs = 1 if self._flat else targets.shape[1]
            self.filter_ = RLSFilter(
                inputs.shape[1],
                outputs,
                forgetting=self.forgetting,
                gain=self.gain,
                initial_scale=self.initial_scale,
                ridge=self.ridge,
                form=self.form,
                dtype=self.dtype,
            )
            self._means = Means.none(inputs.shape[1] + outputs)
            self._residuals = Residuals(np.zeros(outputs))
            self._intercept = bool(self.fit_intercept)
            self._learn(inputs, targets, weights)
        except BaseException:
            self.__dict__ = before
            raise
        return self

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RLSRegressor:
        """Goes on learning with further samples; the first call is `fit`.

        Args:
            X: Inputs [T, n_features].
            y: Targets [T] or [T, n_targets], as in the first call.
            sample_weight: Weights [T] ≥ 0, or a number.

        Raises:
            ValueError: As `fit`.
        """
        if not hasattr(self, "filter_"):
            return self.fit(X, y, sample_weight)
        inputs = self._inputs(X)
        targets, weights = self._samples(inputs, y, sample_weight, self.filter_.dtype)
        columns = targets[:, None] if targets.ndim == 1 else targets
        if columns.shape[1] != self.filter_.n_out:
            raise ValueError(
                f"y must be [{len(inputs)}, {self.filter_.n_out}] as in fit, "
                f"got {list(targets.shape)}"
            )
        self._follow()
        self._learn(inputs, targets, weights)
        return self

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        r"""The predictions, and how far a new target is expected to be off.

        The standard deviation is that of a target of weight 1 about its prediction, where weights
        count samples: one of weight 2 is as two, so that inverses of variances are none::

            σ √(1 + κ (x − m)ᵀ P (x − m) + κ/N)

        with m the mean and N the weight of the samples, forgetting counted, and σ² the variance of
        the residuals (see `residuals.Residuals.variance`); without an intercept m and 1/N are 0.
        With λ = 1 and a large δ it is that of ordinary least squares. With λ < 1 it is as if the
        target drifted as fast as λ is the best for; where nothing drifts, the part that P brings is
        up to twice too large.

        Args:
            X: Inputs [T, n_features].
            return_std: Whether the standard deviations are returned too.

        Returns:
            [T] or [T, n_targets], shaped as the y that was learnt; with `return_std` two of them.
            A standard deviation is inf where no more samples are remembered than parameters fitted.

        Raises:
            NotFittedError: Nothing has been learnt yet.
            ValueError: X is not as described.
        """
        if not hasattr(self, "filter_"):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet: call fit or partial_fit first"
            )
        filter_, inputs = self.filter_, self._inputs(X)
        if self._intercept:
            inputs = self._input_means().relative(inputs)
        inputs = inputs.astype(filter_.dtype, copy=False)
        predictions = filter_.predict(inputs)
        if self._intercept:
            predictions = (predictions + self._target_mean()).astype(filter_.dtype, copy=False)
        shaped = predictions[:, 0] if self._flat else predictions
        if not return_std:
            return shaped
        means, constants = self._means, int(self._intercept)
        variance = self._residuals.variance(filter_, means.mass, means.samples, constants)
        factor = 1 + filter_.gain * (filter_.variance(inputs) + constants / means.mass)
        deviations = np.sqrt(factor[:, None] * variance).astype(filter_.dtype, copy=False)
        return shaped, deviations[:, 0] if self._flat else deviations

    @property
    def coef_(self) -> NDArray[Any]:
        """The coefficients, a view of the filter's live weights."""
        return self.filter_.W[0] if self._flat else self.filter_.W

    @property
    def intercept_(self) -> Any:
        """The intercept in float64, 0 where none is fitted."""
        filter_ = self.filter_
        if not self._intercept:
            return 0.0
        offset = self._input_means().relative(np.zeros(filter_.n))
        intercept = self._target_mean() + filter_.W.astype(np.float64) @ offset
        return intercept[0] if self._flat else intercept

    @property
    def P_(self) -> NDArray[Any]:
        """The filter's inverse autocorrelation matrix."""
        return self.filter_.P

    def _input_means(self) -> Means:
        means, n = self._means, self.filter_.n
        return Means(means.mass, means.squares, means.mean[:n], means.rest[:n])

    def _target_mean(self) -> NDArray[Any]:
        return (self._means.mean + self._means.rest)[self.filter_.n :]

    def _follow(self) -> None:
        """Hands the filter what may be changed while it learns; it refuses what it cannot take."""
        filter_ = self.filter_
        before = filter_.forgetting, filter_.gain, filter_.ridge
        try:
            filter_.forgetting, filter_.gain = self.forgetting, self.gain
            filter_.ridge = self.ridge
        except (TypeError, ValueError):
            filter_.forgetting, filter_.gain, filter_.ridge = before
            raise

    def _learn(self, X: NDArray[Any], y: NDArray[Any], weights: NDArray[Any]) -> None:
        """Passes checked samples to the filter, block by block."""
        if not weights.all():
            X, y, weights = X[weights > 0], y[weights > 0], weights[weights > 0]
        Y = y[:, None] if y.ndim == 1 else y
        filter_, n = self.filter_, self.filter_.n
        forgetting, gain, dtype = filter_.forgetting, filter_.gain, filter_.dtype
        length = min(_MOST, max(_LEAST, _NUMBERS // filter_.W.size), longest(forgetting))
        for start in range(0, len(X), length):
            rows = slice(start, start + length)
            samples = np.concatenate([X[rows], Y[rows]], axis=1, dtype=np.float64)
            means, relative, counts = self._means.after(samples, weights[rows], forgetting, gain)
            if not self._intercept:
                relative, counts = samples, weights[rows]
            inputs, targets = relative[:, :n].astype(dtype), relative[:, n:].astype(dtype)
            errors = _learnt(filter_, inputs, targets, counts)
            self._residuals = self._residuals.after(errors, counts, forgetting, gain)
            self._means = means

    def _inputs(self, X: ArrayLike, fresh: bool = False) -> NDArray[Any]:
        """X, checked; `fresh` notes its columns, else they are checked too."""
        dtype = np.dtype(self.dtype) if fresh else self.filter_.dtype
        if dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        inputs = _numbers("X", X)
        if inputs.ndim != 2:
            raise ValueError(
                f"Expected 2D array X [T, n_features], got {list(inputs.shape)}. Reshape your data"
            )
        if inputs.size == 0 and fresh:
            raise ValueError(
                f"Found array with {inputs.shape[0]} sample(s) and {inputs.shape[1]} feature(s) "
                f"(shape={inputs.shape}) while a minimum of 1 is required."
            )
        unnamed = type(X) is np.ndarray and not hasattr(self, "feature_names_in_")
        if fresh or not unnamed or inputs.shape[1] != self.n_features_in_:
            validate_data(self, X, reset=fresh, skip_check_array=True)
        _check_range("X", inputs, dtype)
        return inputs

    def _samples(
        self,
        inputs: NDArray[Any],
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        dtype: np.dtype[Any],
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The targets and the weights [T] of as many inputs, checked."""
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        count = len(inputs)
        targets = _numbers("y", y)
        _check_range("y", targets, dtype)
        if targets.ndim not in (1, 2) or len(targets) != count:
            raise ValueError(
                f"y must be [{count}] or [{count}, n_targets], got {list(targets.shape)}"
            )
        if sample_weight is None:
            return targets, np.ones(count)
        weights = _numbers("sample_weight", sample_weight).astype(np.float64)
        _check_range("sample_weight", weights, dtype)
        if weights.ndim == 0:
            weights = np.full(count, float(weights))
        if weights.shape != (count,):
            raise ValueError(f"sample_weight must be [{count}], got {list(weights.shape)}")
        if (weights < 0).any():
            raise ValueError(f"sample_weight must be >= 0, got {weights.min()}")
        if len(weights) and not self.gain * weights.max() <= np.finfo(dtype).max:
            raise ValueError(
                f"gain times sample_weight must be finite in {dtype}, got {self.gain} times "
                f"{weights.max()}"
            )
        return targets, weights

    def __copy__(self) -> RLSRegressor:
        return copy.deepcopy(self)  # else two models would learn into one filter

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

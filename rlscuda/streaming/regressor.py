"""Linear regression by recursive least squares, as scikit-learn users expect it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlscuda.streaming.filter import RLSFilter


def _not_fitted(estimator: Any) -> Exception:
    """scikit-learn's own exception where scikit-learn is there, else its base class."""
    message = f"this {type(estimator).__name__} is not fitted yet: call fit or partial_fit first"
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return ValueError(message)
    return NotFittedError(message)


def _numbers(name: str, values: ArrayLike, dtype: Any = None) -> NDArray[Any]:
    """A float array of `dtype`, by default the values' own where it is float32, else float64."""
    if hasattr(values, "toarray"):
        raise TypeError(f"sparse data is not supported: {name} must be a dense array")
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} is {array.dtype}")
    if dtype is None:
        dtype = np.float32 if array.dtype == np.float32 else np.float64
    return array.astype(dtype, copy=False)


class RLSRegressor:
    r"""Online linear regression on top of `RLSFilter`; works with scikit-learn, without needing it.

    One pass over the samples in their order. With the defaults, `fit` is ridge regression with
    penalty 1 / (gain · initial_scale) on the coefficients and on the intercept, exactly; with
    forgetting < 1 it follows a drifting target. `partial_fit` goes on where the last call ended.

    Args:
        forgetting: λ, the forgetting factor, in (0, 1].
        gain: κ, the weight of a new sample, > 0.
        initial_scale: δ, the scale of P₀ = δ I, > 0; large means little regularisation.
        shrinkage: μ in [0, 1] towards P₀; None means min(1, 2 (1 − λ)).
        fit_intercept: Whether a constant input is learnt along, at the cost of one copy of X.

    Attributes:
        coef_: Coefficients [n_features], or [n_targets, n_features] where y is two-dimensional.
        intercept_: Intercept, a number or [n_targets].
        P_: Inverse autocorrelation matrix [n, n], n = n_features (+ 1), read-only, not a copy.
        filter_: The `RLSFilter`, float32 where the first X was float32, else float64.
        n_features_in_: Columns of X.

    Example:
        >>> import numpy as np
        >>> from rlscuda import RLSRegressor
        >>> X = np.arange(12.0).reshape(6, 2) % 5
        >>> model = RLSRegressor(initial_scale=1e6).fit(X, X @ [2.0, -1.0] + 3.0)
        >>> np.round(model.coef_, 3).tolist(), round(float(model.intercept_), 3)
        ([2.0, -1.0], 3.0)
    """

    _estimator_type = "regressor"

    def __init__(
        self,
        forgetting: float = 1.0,
        gain: float = 1.0,
        initial_scale: float = 1.0,
        shrinkage: float | None = None,
        fit_intercept: bool = True,
    ) -> None:
        self.forgetting = forgetting
        self.gain = gain
        self.initial_scale = initial_scale
        self.shrinkage = shrinkage
        self.fit_intercept = fit_intercept

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name; `deep` is there for scikit-learn."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> RLSRegressor:
        """Sets constructor arguments by name; they count from the next `fit` on.

        Raises:
            ValueError: A name is not an argument of the constructor.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r}: expected one of {sorted(known)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X: ArrayLike, y: ArrayLike) -> RLSRegressor:
        """Learns X [T, n_features] and y [T] or [T, n_targets] from scratch."""
        return self._learn(X, y, None)

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> RLSRegressor:
        """Goes on learning with further samples; the first call is `fit`."""
        return self._learn(X, y, getattr(self, "filter_", None))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The predictions [T] or [T, n_targets], shaped as the y that was learnt."""
        if not hasattr(self, "filter_"):
            raise _not_fitted(self)
        predictions = self.filter_.predict(self._inputs(X, self.filter_))
        return predictions[:, 0] if self._flat else predictions

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """The coefficient of determination R², averaged over the targets."""
        targets = _numbers("y", y, np.float64)
        residual = np.sum((targets - self.predict(X)) ** 2, axis=0)
        total = np.sum((targets - targets.mean(axis=0)) ** 2, axis=0)
        return float(np.mean(1 - residual / total))

    @property
    def coef_(self) -> NDArray[Any]:
        """The coefficients: a view of the filter's live weights."""
        weights = self.filter_.W[:, : self.n_features_in_]
        return weights[0] if self._flat else weights

    @property
    def intercept_(self) -> Any:
        """The intercept, 0 where none is fitted."""
        if self.filter_.n == self.n_features_in_:
            return 0.0
        return self.filter_.W[0, -1] if self._flat else self.filter_.W[:, -1]

    @property
    def P_(self) -> NDArray[Any]:
        """The live inverse autocorrelation matrix."""
        return self.filter_.P

    def _learn(self, X: ArrayLike, y: ArrayLike, filter_: RLSFilter | None) -> RLSRegressor:
        """Learns into `filter_`, or into a new one; this object changes only on success."""
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        inputs = self._inputs(X, filter_)
        targets = _numbers("y", y, inputs.dtype)
        if targets.ndim not in (1, 2) or len(targets) != len(inputs):
            raise ValueError(
                f"y must be [{len(inputs)}] or [{len(inputs)}, n_targets], "
                f"got {list(targets.shape)}"
            )
        flat = targets.ndim == 1
        if filter_ is not None:
            filter_.run(inputs, targets)
            return self
        filter_ = RLSFilter(
            inputs.shape[1],
            1 if flat else targets.shape[1],
            self.forgetting,
            self.gain,
            self.initial_scale,
            self.shrinkage,
            inputs.dtype,
        )
        filter_.run(inputs, targets)
        self.filter_ = filter_
        self.n_features_in_ = inputs.shape[1] - bool(self.fit_intercept)
        self._flat = flat
        return self

    def _inputs(self, X: ArrayLike, filter_: RLSFilter | None) -> NDArray[Any]:
        """X as the filter takes it: checked, of its dtype, with the column of ones it has."""
        inputs = _numbers("X", X, filter_ and filter_.dtype)
        if inputs.ndim != 2:
            raise ValueError(
                f"Expected 2D array X [T, n_features], got {list(inputs.shape)}. Reshape your data"
            )
        if inputs.size == 0 and filter_ is None:
            raise ValueError(
                f"Found array with {inputs.shape[0]} sample(s) and {inputs.shape[1]} feature(s) "
                f"(shape={inputs.shape}) while a minimum of 1 is required."
            )
        if filter_ is not None and inputs.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {inputs.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        constant = self.fit_intercept if filter_ is None else filter_.n > self.n_features_in_
        if constant:
            return np.hstack([inputs, np.ones((len(inputs), 1), inputs.dtype)])
        return inputs

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True),
            input_tags=InputTags(),
            regressor_tags=RegressorTags(),
        )

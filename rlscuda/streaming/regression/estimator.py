"""What an estimator has from scikit-learn, or as much of it as it needs where there is none."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data
except ImportError:  # not installed, or older than 1.6

    class NotFittedError(ValueError, AttributeError):  # type: ignore[no-redef]
        """A method was called that needs a fitted estimator."""

    class BaseEstimator:  # type: ignore[no-redef]
        """Parameters by name."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """The constructor's arguments by name; `deep` is there for scikit-learn."""
            return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

        def set_params(self, **params: Any) -> Any:
            """Sets constructor arguments by name.

            Raises:
                ValueError: A name is not an argument of the constructor; none is set then.
            """
            known = sorted(self.get_params())
            for name in params:
                if name not in known:
                    raise ValueError(f"Invalid parameter {name!r}: expected one of {known}")
            for name, value in params.items():
                setattr(self, name, value)
            return self

        def __repr__(self) -> str:
            arguments = (f"{name}={value!r}" for name, value in self.get_params().items())
            return f"{type(self).__name__}({', '.join(arguments)})"

    class RegressorMixin:  # type: ignore[no-redef]
        """The score of a regressor."""

        _estimator_type = "regressor"

        def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
            """The coefficient of determination R², averaged over the targets."""
            targets = np.asarray(y, np.float64)
            mean = np.average(targets, axis=0, weights=sample_weight)
            residuals = (targets - self.predict(X)) ** 2  # type: ignore[attr-defined]
            residual = np.average(residuals, axis=0, weights=sample_weight)
            total = np.average((targets - mean) ** 2, axis=0, weights=sample_weight)
            return float(np.mean(1 - residual / total))

    def validate_data(estimator: Any, X: Any, *, reset: bool, skip_check_array: bool) -> None:
        """Keeps or checks the number of columns; of their names it knows nothing."""
        columns = np.shape(X)[1]
        if reset:
            estimator.n_features_in_ = columns
        elif columns != estimator.n_features_in_:
            raise ValueError(
                f"X has {columns} features, but {type(estimator).__name__} is expecting "
                f"{estimator.n_features_in_} features as input"
            )


__all__ = ["BaseEstimator", "NotFittedError", "RegressorMixin", "validate_data"]

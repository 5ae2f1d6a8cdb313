"""Recursive-least-squares training for PyTorch."""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from rlscuda import _C  # noqa: F401
from rlscuda.filter import RLSFilter
from rlscuda.regressor import RLSRegressor

__all__ = ["RLSFilter", "RLSRegressor"]

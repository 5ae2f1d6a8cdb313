"""The states of what lives in tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_in(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Copies into the tensors of a state those of the same names, all of them or none.

    Raises:
        ValueError: A tensor is missing, or of another shape or dtype.
    """
    for name, tensor in own.items():
        value = given.get(name)
        if value is None or value.shape != tensor.shape or value.dtype != tensor.dtype:
            came = "none" if value is None else f"{list(value.shape)}, {value.dtype}"
            raise ValueError(f"{name} must be {list(tensor.shape)}, {tensor.dtype}, got {came}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])

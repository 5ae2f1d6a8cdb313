"""How redundant the inputs of each layer are, by channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.closed_form.redundancy import redundancy
from rlscuda.optim.kinds.modules import is_consumer
from rlscuda.pruning.matrices.layers import layer_of


def redundancies(model: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The share of each input channel's power that the rest of a layer's input explains linearly.

    It says how well pruning can be made up for before anything is pruned: at 1 the layer loses
    nothing with the channel. An input of a Linear is a channel of its own.

    Args:
        model: The model.
        matrices: Inverse autocorrelation matrices [groups, n, n] by layer name, up to a factor.

    Returns:
        float64 [channels] in [0, 1) by layer name; within a grouped convolution the rest is that of
        the channel's group.

    Raises:
        ValueError: A layer is not in the model, or has other inputs than its matrix.
        TypeError: A matrix is no floating-point tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> A = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
        >>> redundancies(model, {"0": torch.linalg.inv(A)[None]})
        {'0': tensor([0.3600, 0.3600], dtype=torch.float64)}
    """
    modules = dict(model.named_modules())
    found = {}
    for name, P in matrices.items():
        module: Any = modules.get(name)
        layer = layer_of(module) if is_consumer(module) else None
        columns = layer.columns if layer else 0
        if not columns or P.dim() != 3 or P.shape[1] not in (columns, columns + 1):
            raise ValueError(
                f"{name!r} must be a layer with the inputs of its matrix {list(P.shape)}, got "
                f"{columns} columns"
            )
        area = math.prod(getattr(module, "kernel_size", ()))
        channels = torch.arange(columns, device=P.device).view(-1, area)
        found[name] = torch.cat([redundancy(part, channels) for part in P])
    return found

"""The classes of modules whose forward the RLS rule knows, and those that pruning knows."""

from __future__ import annotations

import sys

from torch import nn

from rlscuda.optim.kinds.recurrent import RECURRENT

COVERED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SPREADING = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class whose forward the RLS rule knows and `module` is derived from, if there is one."""
    kinds = (*COVERED, nn.MultiheadAttention, *RECURRENT, *_transposed())
    return next((kind for kind in kinds if isinstance(module, kind)), None)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of a module is [n, c]."""
    return isinstance(module, _transposed())


def is_consumer(module: nn.Module) -> bool:
    """Whether a module multiplies rows of its input by its weight, as a matrix can describe them.

    A Linear or convolution, also a transposed one, or the Conv1D of transformers.
    """
    return isinstance(module, (*COVERED, *SPREADING, *_transposed()))


def has_inputs_first(module: nn.Module) -> bool:
    """Whether the first dimension of a consumer's weight is that of its inputs."""
    return isinstance(module, (*SPREADING, *_transposed()))


def _transposed() -> tuple[type[nn.Module], ...]:
    """The Conv1D of transformers, a Linear whose weight is [n, c], where that is loaded."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if kind is None else (kind,)

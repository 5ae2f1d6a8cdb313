"""Operators that the optimizer alone calls, and those of patches for the rows of a Linear layer.

The optimizer calls `foreach_weight_step_` for many layers; here it is for one, with names for its
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlscuda.functional import patch_mean, patch_sample, patch_sketch
from rlscuda.functional.calls import call

_ops = torch.ops.rlscuda


def weight_step_(
    weight: Tensor,
    product: Tensor,
    lr: float,
    *,
    bias: Tensor | None = None,
    bias_row: Tensor | None = None,
    grad_bias: Tensor | None = None,
    h: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    divide_by_h: bool = False,
) -> None:
    """`reference.weight_step` in place: product [c, n (+ 1)] is D, and is overwritten."""
    with torch.no_grad():
        call(
            _ops.weight_step_.default, weight, bias, product, bias_row, grad_bias, h,
            momentum_buffer, lr, momentum, weight_decay, divide_by_h,
        )  # fmt: skip


def adaptive_weight_step_(
    weight: Tensor,
    product: Tensor,
    grad: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    lr: float,
    step: int,
    *,
    bias: Tensor | None = None,
    bias_row: Tensor | None = None,
    grad_bias: Tensor | None = None,
    h: Tensor | None = None,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> None:
    """`reference.adaptive_weight_step` in place: product is D, and is overwritten."""
    with torch.no_grad():
        call(
            _ops.adaptive_weight_step_.default, weight, bias, product, grad, bias_row, grad_bias, h,
            first_moment, second_moment, lr, beta1, beta2, weight_decay, eps, step,
        )  # fmt: skip


def factors_agree(grad: Tensor, x: Tensor, delta: Tensor, grad_bias: Tensor | None = None) -> bool:
    """Whether delta^T [x, 1] is the whole gradient [c, n], probed with one fixed vector."""
    with torch.no_grad():
        return call(_ops.factors_agree.default, grad, x, delta, grad_bias)


def nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether any element of any of the tensors is infinite or NaN: one bool []."""
    return call(_ops.nonfinite.default, [t.detach() for t in tensors])


def _pixels(x: Tensor) -> Tensor:
    """Rows [..., n] as images of one pixel [N, n, 1, 1]."""
    return x.reshape(-1, x.shape[-1], 1, 1)


def row_mean(x: Tensor, *, ones: bool = False) -> Tensor:
    """The mean row of x [..., n]: [n (+ 1)]."""
    return patch_mean(_pixels(x), 1, ones=ones).squeeze(0)


def row_sketch(x: Tensor, rank: int, seed: int, *, offset: int = 0, ones: bool = False) -> Tensor:
    """Random-sign sums of the rows of x [..., n]: [rank, n (+ 1)]."""
    options = {"rank": rank, "seed": seed, "offset": offset, "ones": ones}
    return patch_sketch(_pixels(x), 1, **options).squeeze(0)


def row_sample(
    x: Tensor, rank: int, seed: int, *, offset: int = 0, ones: bool = False
) -> tuple[Tensor, Tensor]:
    """`rank` random rows of x [..., n], [rank, n (+ 1)], and their keys."""
    options = {"rank": rank, "seed": seed, "offset": offset, "ones": ones}
    rows, keys = patch_sample(_pixels(x), 1, **options)
    return rows.squeeze(0), keys

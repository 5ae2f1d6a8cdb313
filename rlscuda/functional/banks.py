"""Updates of a bank of filters, each with weights of its own, as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda.functional.calls import call, check_tensor, fake

_rls_filter_bank = torch.ops.rlscuda.rls_filter_bank_.default


def rls_filter_bank_(
    P: Tensor,
    W: Tensor,
    state: Tensor,
    squares: Tensor,
    rule: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    r"""One sample for each of b recursive-least-squares filters, or for k of them, in place.

    With :math:`\kappa` the filter's gain times the weight of its sample,

    .. math:: u = P x, \quad h = \lambda + \kappa\, x \cdot u, \quad e = y - W x, \quad
              W \leftarrow W + \tfrac{\kappa}{h} e u^T, \quad
              P \leftarrow \tfrac{1}{\lambda} \left(P - \tfrac{\kappa}{h} u u^T\right)

    and then, where :math:`\lambda < 1`, the raises of stabilised forgetting: each time that
    forgetting has halved what was known, the inverse of P has gained a ridge at each coordinate
    once. A sample for which h, 1 + ridge P_jj or an error is not finite, or h not positive, is
    skipped and its P set back to ``initial_scale * I``. `RLSFilterBank` owns the tensors and is the
    easier way.

    Args:
        P: [b, n, n], float32 or float64, contiguous, symmetric positive definite.
        W: Weights [b, n_out, n] of the dtype of `P`.
        state: float64 [b, 7], 0 at first: the turn of the ridge (coordinates due, samples waited,
            next coordinate, leverage), and the samples that entered, that reset P, and that were
            refused.
        squares: float64 [b, n], 0 at first: the sums of :math:`x_j^2`.
        rule: float64 [b, 4]: forgetting in (0, 1], gain > 0, ridge and initial_scale > 0. A ridge
            below 0 follows the input, at a hundredth of the mean of :math:`x_j^2`; 0 is none, and
            any other number is added as it is.
        x: Inputs [b, n], or [n] for one that all filters share; [k, n] with `index`.
        y: Targets [b, n_out], or [k, n_out].
        weights: [b] or [k], >= 0, of the dtype of `P`; at 0 a filter stays as it is.
        mask: bool [b] or [k]: false where a filter is to stay as it is.
        index: int64 [k]: the filter of each row, none of them twice.

    Returns:
        The predictions W x before the update, of the shape of `y`.

    Raises:
        ValueError: A shape, dtype, device or value is not as above. Values are looked at on the CPU
            alone; on CUDA, where nothing waits for the device, rows of such values are refused and
            counted, and a row whose filter is none, or was named by an earlier row, gives NaN.
        TypeError: An argument is not of its type.
    """
    check_tensor("x", x)
    check_tensor("y", y)
    result = call(
        _rls_filter_bank, P, W, state, squares, rule, x.detach(), y.detach(), weights, mask, index
    )
    torch.autograd.graph.increment_version([P, W, state, squares])
    return result


@fake("rls_filter_bank_")
def _(P, W, state, squares, rule, x, y, weights, mask, index):
    return P.new_empty(y.shape)

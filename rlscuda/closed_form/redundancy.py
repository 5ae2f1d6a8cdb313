r"""How much of a layer's input the rest of it explains, from the inverse autocorrelation alone.

With P the inverse of the autocorrelation A, :math:`1 / P_{jj}` is the power of input j that is
left when all others (and the bias, a column of ones) are known, so

.. math:: R_j^2 = 1 - \frac{1}{A_{jj} P_{jj}}, \qquad
          R_g^2 = 1 - \frac{\operatorname{tr}(P_{gg}^{-1})}{\operatorname{tr}(A_{gg})}

for one input and for the block g of a channel. Neither a common factor of P nor, for one input,
any rescaling of the inputs changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda.closed_form.formulas import check_blocks, check_matrix, factor, invert_, solve_lower


def redundancy(P: Tensor, blocks: Tensor) -> Tensor:
    """The share of each block's power that the remaining inputs explain linearly.

    Args:
        P: Inverse autocorrelation matrix [n, n]; what damped it counts as power of each input that
            nothing explains.
        blocks: Columns of each block, int64 [u, b].

    Returns:
        float64 [u] in [0, 1).

    Raises:
        TypeError, ValueError: See `rlscuda.closed_form.formulas`.

    Example:
        >>> A = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
        >>> redundancy(torch.linalg.inv(A), torch.tensor([[0], [1]]))
        tensor([0.3600, 0.3600], dtype=torch.float64)
    """
    P = check_matrix("P", P)
    blocks = check_blocks(blocks, len(P))
    try:
        power = invert_(P.clone()).diagonal()[blocks].sum(1)
    except torch.linalg.LinAlgError:
        raise ValueError("P must be positive definite, which it is not") from None
    inside = factor(P[blocks[:, :, None], blocks[:, None, :]])
    identity = torch.eye(blocks.shape[1], dtype=P.dtype, device=P.device).expand_as(inside)
    left = solve_lower(inside, identity).square().sum((1, 2))  # tr(P_gg^-1)
    return (1 - left / power).clamp(min=0)

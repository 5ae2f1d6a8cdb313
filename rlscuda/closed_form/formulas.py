r"""The closed forms of pruning: saliency, compensation, downdate from an inverse autocorrelation.

Of a layer Y = X W^T with inverse autocorrelation :math:`P = (X^T X / N)^{-1}` [n, n] and weight
W [c, n], g are the columns to remove and k the rest (Hassibi & Stork 1993, Optimal Brain Surgeon;
Leung et al. 2001 for recursive least squares):

.. math::
    s_g = tr(W_g P_{gg}^{-1} W_g^T), \quad W \leftarrow W - W_g P_{gg}^{-1} P_{g,:}, \quad
    P \leftarrow P_{kk} - P_{kg} P_{gg}^{-1} P_{gk}

the increase of the layer's mean squared output error, the least-squares weight of what remains, and
its inverse autocorrelation. Everything is computed in float64, whatever the dtype given. A nearly
singular :math:`P_{gg}` (columns of enormous power) gets a jitter from 1e-12 to 1e-4 of its
diagonal, the least that makes it factor, so nothing turns into NaN; an indefinite one is refused.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from rlscuda.closed_form.blocks import (
    check_blocks,
    check_matrix,
    check_removed,
    check_weight,
    factor,
    invert_,
    solve_lower,
    symmetrise_,
)
from rlscuda.closed_form.greedy import Consumer, Path, greedy_path

__all__ = [
    "Consumer",
    "Path",
    "adaptive_to_inverse",
    "block_saliency",
    "compensate",
    "damped_inverse",
    "diagonal_saliency",
    "downdate",
    "greedy_path",
    "output_energy",
    "shrunk_to_inverse",
]


def block_saliency(P: Tensor, W: Tensor, blocks: Tensor) -> Tensor:
    r"""What removing each block alone costs, the rest compensated: tr(W_g P_gg^-1 W_g^T).

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weight [c, n].
        blocks: Columns of each block, int64 [m, b].

    Returns:
        float64 [m]: increase of the mean over rows of the squared error of the layer's output.

    Raises:
        TypeError: A matrix is no floating-point tensor, or `blocks` is not int64.
        ValueError: Shapes do not fit, columns are out of range or in two places, values are not
            finite, or a block of P is indefinite.

    Example:
        >>> P, W = torch.diag(torch.tensor([0.25, 4.0])), torch.tensor([[3.0, 4.0]])
        >>> block_saliency(P, W, torch.tensor([[0], [1]]))
        tensor([36.,  4.], dtype=torch.float64)
    """
    P = check_matrix("P", P)
    W, blocks = check_weight(W, len(P)), check_blocks(blocks, len(P))
    factors = factor(P[blocks[:, :, None], blocks[:, None, :]])
    return solve_lower(factors, W.mT[blocks]).square().sum((1, 2))


def diagonal_saliency(P: Tensor, W: Tensor, blocks: Tensor) -> Tensor:
    """The saliency as if P were diagonal within a block: the sum over g of |W_:j|^2 / P_jj.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weight [c, n].
        blocks: Columns of each block, int64 [m, b].

    Returns:
        float64 [m]; equal to `block_saliency` for b = 1.

    Raises:
        TypeError: A matrix is no floating-point tensor, or `blocks` is not int64.
        ValueError: As `block_saliency`; the diagonal of P must be positive.
    """
    P = check_matrix("P", P)
    W, blocks = check_weight(W, len(P)), check_blocks(blocks, len(P))
    diagonal = P.diagonal()
    if not (diagonal[blocks] > 0).all():
        raise ValueError(
            f"P must have a positive diagonal, got {float(diagonal[blocks].min()):g} as its least"
        )
    return (W.square().sum(0) / diagonal)[blocks].sum(1)


def compensate(P: Tensor, W: Tensor, removed: Tensor) -> Tensor:
    r"""The weight after removing columns: W - W_g P_gg^-1 P_g,: with zeros where they were.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weight [c, n].
        removed: Columns g, int64 [k].

    Returns:
        float64 [c, n]: the least-squares weight of the remaining columns, exactly 0 in `removed`.

    Raises:
        TypeError: A matrix is no floating-point tensor, or `removed` is not int64.
        ValueError: Shapes do not fit, columns are out of range or in two places, values are not
            finite, or P is indefinite.
    """
    P = check_matrix("P", P)
    W, removed = check_weight(W, len(P)), check_removed(removed, len(P))
    if not len(removed):
        return W.clone()
    share = torch.cholesky_solve(W[:, removed].mT, _factor_of(P, removed))  # P_gg^-1 W_g^T
    result = torch.addmm(W, share.mT, P[removed], alpha=-1)
    result[:, removed] = 0
    return result


def downdate(P: Tensor, removed: Tensor) -> Tensor:
    r"""The inverse autocorrelation of the remaining columns: P_kk - P_kg P_gg^-1 P_gk.

    A slice P_kk is not it: that belongs to a layer that still sees the removed columns.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        removed: Columns g, int64 [k], k < n.

    Returns:
        float64 [n - k, n - k], symmetric to the bit.

    Raises:
        TypeError: P is no floating-point tensor, or `removed` is not int64.
        ValueError: P is not square, not finite or indefinite, or `removed` is out of range, in two
            places or everything.
    """
    P = check_matrix("P", P)
    kept = _kept(len(P), check_removed(removed, len(P)))
    result = P.index_select(0, kept).index_select(1, kept)
    if len(removed):
        rows = P.index_select(0, removed).index_select(1, kept)
        half = solve_lower(_factor_of(P, removed), rows)
        result.addmm_(half.mT, half, alpha=-1)
    return symmetrise_(result)


def output_energy(P: Tensor, W: Tensor, columns: Tensor) -> float:
    """What removing all `columns` at once costs, the rest (a bias) compensated.

    It is the part of the layer's mean squared output that they carry, so saliencies divided by it
    compare between layers.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        W: Weight [c, n].
        columns: All columns that could be removed, int64 [k].

    Returns:
        tr(W_x P_xx^-1 W_x^T).

    Raises:
        TypeError: A matrix is no floating-point tensor, or `columns` is not int64.
        ValueError: As `compensate`.
    """
    P = check_matrix("P", P)
    W, columns = check_weight(W, len(P)), check_removed(columns, len(P))
    if not len(columns):
        return 0.0
    return float(solve_lower(_factor_of(P, columns), W[:, columns].mT).square().sum())


def damped_inverse(A: Tensor, damping: float) -> Tensor:
    """(A + damping * mean(diag A) * I)^-1, with more damping where A is indefinite beyond it.

    Where the damped matrix cannot be factored (A estimated with rounding errors larger than the
    damping), the damping is multiplied by 10, from 1e-12 at least, until it can be. For A = 0, of
    inputs that never fire, the mean counts as 1.

    Args:
        A: Autocorrelation matrix [n, n].
        damping: Relative to the mean of the diagonal, >= 0.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.

    Raises:
        TypeError: A is no floating-point tensor.
        ValueError: A is not square, not finite, or the mean of its diagonal is not positive;
            `damping` is negative; or a damping of 1 would not suffice.
    """
    A = check_matrix("A", A)
    mean = float(A.diagonal().mean()) if A.any() else 1.0
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be >= 0 and finite, got {damping}")
    if not mean > 0:
        raise ValueError(f"A must have a positive mean diagonal, got {mean:g}")
    amount = damping
    while True:
        damped = A.clone()
        damped.diagonal().add_(amount * mean)
        with suppress(torch.linalg.LinAlgError):
            return symmetrise_(invert_(damped))
        if amount >= 1:
            raise ValueError("A must be positive semidefinite, got an indefinite matrix")
        amount = max(10 * amount, 1e-12)


def adaptive_to_inverse(P: Tensor, drift: float, damping: float) -> Tensor:
    r"""The inverse autocorrelation from the adaptive form's P, whose fixed point is dP + PAP = I.

    So :math:`A = P^{-1} (I - \delta P) P^{-1}`. Directions that never fire have eigenvalues of P at
    the cap :math:`1/\delta`, where A is zero; the damping lowers the drift to
    :math:`d = \delta - damping / \delta`, which adds :math:`(damping / \delta) P^{-1}` to A: no
    less than damping, reached where nothing fires, and next to nothing where A is large. With
    x / (1 - x) in partial fractions one inversion is enough:

    .. math:: (A + \tfrac{damping}{\delta} P^{-1})^{-1} = P (I - d P)^{-1} P
              = d^{-2} \left((I - d P)^{-1} - I - d P\right)

    The optimizer divides inputs by the root of their mean power, so this is the matrix of the
    divided inputs, whose mean power is 1: the true one times that power. A common factor changes
    neither the order of saliencies within a layer, nor compensation, nor a downdate.

    Args:
        P: The adaptive form's matrix [n, n].
        drift: Its drift :math:`\delta` > 0.
        damping: In (0, drift^2), of the mean power of the divided inputs; multiplied by 10 as long
            as eigenvalues of P above the cap, by rounding or a large start, ask for more.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.

    Raises:
        TypeError: P is no floating-point tensor.
        ValueError: P is not square, not finite, not positive or far above the cap, or `drift` or
            `damping` is out of range.
    """
    check_matrix("P", P)
    if not 0 < drift < math.inf:
        raise ValueError(f"drift must be > 0 and finite, got {drift}")
    if not 0 < damping < drift * drift:
        raise ValueError(f"damping must be in (0, drift^2 = {drift * drift:g}), got {damping}")
    if not (P.diagonal() > 0).all():
        raise ValueError(f"P must have a positive diagonal, got {float(P.diagonal().min()):g}")
    while damping < drift * drift:
        d = drift - damping / drift
        result = P.detach().to(torch.float64, copy=True).mul_(-d)
        result.diagonal().add_(1)
        with suppress(torch.linalg.LinAlgError):
            invert_(result).sub_(P.detach(), alpha=d).diagonal().sub_(1)
            return symmetrise_(result.div_(d * d))
        damping *= 10
    raise ValueError(f"P must have eigenvalues up to 1 / drift = {1 / drift:g}, got larger ones")


def shrunk_to_inverse(
    P: Tensor,
    forgetting: float,
    gain: float,
    shrinkage: float,
    initial_scale: float,
    damping: float,
) -> Tensor:
    r"""The inverse autocorrelation from the P of a form with shrinkage towards :math:`P_0 = pI`.

    Its fixed point :math:`P = (1 - \mu) (\lambda P^{-1} + \kappa A)^{-1} + \mu P_0` is near the
    root of :math:`A^{-1}`, no multiple of it; solved for A, which is then damped and inverted:

    .. math:: \kappa A = (1 - \mu) (P - \mu P_0)^{-1} - \lambda P^{-1}

    Args:
        P: The matrix [n, n].
        forgetting: :math:`\lambda` in (0, 1].
        gain: :math:`\kappa` > 0.
        shrinkage: :math:`\mu` in (0, 1).
        initial_scale: p.
        damping: See `damped_inverse`.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.

    Raises:
        TypeError: P is no floating-point tensor.
        ValueError: P is not square or finite, or no positive A fits it.
    """
    P = check_matrix("P", P)
    shifted = P.clone()
    shifted.diagonal().sub_(shrinkage * initial_scale)
    A = torch.linalg.inv(shifted).mul_(1 - shrinkage).sub_(torch.linalg.inv(P), alpha=forgetting)
    return damped_inverse(symmetrise_(A.div_(gain)), damping)


def _factor_of(P: Tensor, columns: Tensor) -> Tensor:
    return factor(P[columns[:, None], columns])


def _kept(n: int, removed: Tensor) -> Tensor:
    """The columns not in `removed`, ascending."""
    mask = torch.ones(n, dtype=torch.bool, device=removed.device)
    mask[removed] = False
    if not mask.any():
        raise ValueError(f"removed must leave at least one of the {n} columns, got all of them")
    return mask.nonzero().squeeze(1)

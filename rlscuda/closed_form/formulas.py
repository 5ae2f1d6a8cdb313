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
diagonal, the least that makes it factor, so nothing turns into NaN.

All raise TypeError for a matrix that is no floating-point tensor, or columns that are not int64;
and ValueError for shapes that do not fit, columns out of range or in two places, values that are
not finite, a matrix that is indefinite, and a negative damping.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

# Relative to the block's diagonal. Below the first, a pivot is rounding noise; beyond the last,
# the matrix is no inverse autocorrelation matrix.
_JITTERS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
_LEAF = 768  # below it LAPACK inverts as fast as products do
_PIVOT = 1e-14  # least squared pivot, times the size of the block, that is taken as it is


@singledispatch
def block_saliency(P: Any, W: Tensor, blocks: Tensor) -> Tensor:
    r"""What removing each block alone costs, the rest compensated: tr(W_g P_gg^-1 W_g^T).

    Args:
        P: Inverse autocorrelation matrix [n, n], or the `FewRows` of it.
        W: Weight [c, n].
        blocks: Columns of each block, int64 [m, b].

    Returns:
        float64 [m]: increase of the mean over rows of the squared error of the layer's output.

    Example:
        >>> P, W = torch.diag(torch.tensor([0.25, 4.0])), torch.tensor([[3.0, 4.0]])
        >>> block_saliency(P, W, torch.tensor([[0], [1]]))
        tensor([36.,  4.], dtype=torch.float64)
    """
    P = check_matrix("P", P)
    W, blocks = check_weight(W, len(P)), check_blocks(blocks, len(P))
    factors = factor(P[blocks[:, :, None], blocks[:, None, :]])
    return solve_lower(factors, W.mT[blocks]).square().sum((1, 2))


@singledispatch
def compensate(P: Any, W: Tensor, removed: Tensor) -> Tensor:
    r"""The weight after removing columns: W - W_g P_gg^-1 P_g,: with zeros where they were.

    Args:
        P: Inverse autocorrelation matrix [n, n], or the `FewRows` of it.
        W: Weight [c, n].
        removed: Columns g, int64 [k].

    Returns:
        float64 [c, n]: the least-squares weight of the remaining columns, exactly 0 in `removed`.
    """
    P = check_matrix("P", P)
    W, removed = check_weight(W, len(P)), check_removed(removed, len(P))
    if not len(removed):
        return W.clone()
    share = torch.cholesky_solve(W[:, removed].mT, _factor_of(P, removed))  # P_gg^-1 W_g^T
    result = torch.addmm(W, share.mT, P[removed], alpha=-1)
    result[:, removed] = 0
    return result


def block_costs(D: Tensor, G: Tensor, scale: Tensor) -> Tensor:
    """What removing each block costs: tr(D^-1 G) of its P_gg and W_g^T W_g.

    Args:
        D: P_gg [m, b, b].
        G: W_g^T W_g [m, b, b].
        scale: [m, b], see `factor`.

    Returns:
        float64 [m].
    """
    identity = torch.eye(D.shape[1], dtype=torch.float64, device=D.device)
    inverse = solve_lower(factor(D, scale), identity.expand_as(D))
    return ((inverse @ G) * inverse).sum((1, 2)).clamp(min=0)


def downdate(P: Tensor, removed: Tensor) -> Tensor:
    r"""The inverse autocorrelation of the remaining columns: P_kk - P_kg P_gg^-1 P_gk.

    A slice P_kk is not it: that belongs to a layer that still sees the removed columns.

    Args:
        P: Inverse autocorrelation matrix [n, n].
        removed: Columns g, int64 [k], k < n.

    Returns:
        float64 [n - k, n - k], symmetric to the bit.
    """
    P = check_matrix("P", P)
    kept = _kept(len(P), check_removed(removed, len(P)))
    result = P.index_select(0, kept).index_select(1, kept)
    if len(removed):
        rows = P.index_select(0, removed).index_select(1, kept)
        half = solve_lower(_factor_of(P, removed), rows)
        result.addmm_(half.mT, half, alpha=-1)
    return symmetrise_(result)


@singledispatch
def output_energy(P: Any, W: Tensor, columns: Tensor) -> float:
    """What removing all `columns` at once costs, the rest (a bias) compensated.

    It is the part of the layer's mean squared output that they carry, so saliencies divided by it
    compare between layers.

    Args:
        P: Inverse autocorrelation matrix [n, n], or the `FewRows` of it.
        W: Weight [c, n].
        columns: All columns that could be removed, int64 [k].

    Returns:
        tr(W_x P_xx^-1 W_x^T).
    """
    P = check_matrix("P", P)
    W, columns = check_weight(W, len(P)), check_removed(columns, len(P))
    if not len(columns):
        return 0.0
    return float(solve_lower(_factor_of(P, columns), W[:, columns].mT).square().sum())


def damped_inverse(A: Tensor, damping: float) -> Tensor:
    """(A + damping * mean(diag A) * I)^-1, with more damping where A is indefinite beyond it.

    Where the damped matrix cannot be factored (A estimated with rounding errors larger than the
    damping), the damping is multiplied by 10, from 1e-12 at least, until it can be or exceeds 1.
    For A = 0, of inputs that never fire, the mean counts as 1.

    Args:
        A: Autocorrelation matrix [n, n].
        damping: Relative to the mean of the diagonal, >= 0.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.
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


def factor(blocks: Tensor, scale: Tensor | None = None) -> Tensor:
    """Cholesky factors of positive definite blocks, jittered where they are nearly singular.

    A block whose factorisation fails, or has a pivot of rounding noise, is replaced by
    ``block + jitter * diag(scale)`` with the least jitter of 1e-12, 1e-10, ..., 1e-4 that factors.
    What is computed from it is then finite and exact for that slightly larger block.

    Args:
        blocks: [..., b, b], float64, symmetric.
        scale: [..., b] > 0, against which a pivot is small; the block's diagonal by default. A
            block that was downdated has the rounding errors of what it was before.

    Returns:
        Lower triangular [..., b, b].

    Raises:
        ValueError: A block is indefinite beyond rounding.
    """
    shape = blocks.shape
    flat = blocks.reshape(-1, *shape[-2:])
    diagonal = flat.diagonal(dim1=-2, dim2=-1)
    scale = diagonal if scale is None else scale.reshape(diagonal.shape)
    factors, sound = _attempt(flat, scale)
    todo = (~sound).nonzero().squeeze(1)
    for jitter in _JITTERS:
        if not todo.numel():
            break
        again, sound = _attempt(flat[todo] + torch.diag_embed(jitter * scale[todo]), scale[todo])
        factors[todo[sound]] = again[sound]
        todo = todo[~sound]
    if todo.numel():
        raise ValueError(
            "P must be positive definite, got an indefinite block with a diagonal from "
            f"{float(diagonal[todo].min()):g} to {float(diagonal[todo].max()):g}"
        )
    return factors.reshape(shape)


def _attempt(blocks: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which of them have pivots above the rounding of `scale`."""
    factors, info = torch.linalg.cholesky_ex(blocks)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    return factors, (info == 0) & (pivots > _PIVOT * scale.shape[-1] * scale).all(-1)


def solve_lower(factors: Tensor, right: Tensor) -> Tensor:
    """C^-1 right, for lower triangular C."""
    return torch.linalg.solve_triangular(factors, right, upper=False)


def _factor_of(P: Tensor, columns: Tensor) -> Tensor:
    return factor(P[columns[:, None], columns])


def _kept(n: int, removed: Tensor) -> Tensor:
    """The columns not in `removed`, ascending."""
    mask = torch.ones(n, dtype=torch.bool, device=removed.device)
    mask[removed] = False
    if not mask.any():
        raise ValueError(f"removed must leave at least one of the {n} columns, got all of them")
    return mask.nonzero().squeeze(1)


def invert_(A: Tensor) -> Tensor:
    """Replaces a symmetric positive definite A [n, n] by its inverse, mostly in matrix products.

    Raises:
        torch.linalg.LinAlgError: A is not positive definite; its values are lost.
    """
    n = len(A)
    if n <= _LEAF:
        return A.copy_(torch.cholesky_inverse(torch.linalg.cholesky(A)))
    k = n // 2
    X = invert_(A[:k, :k]) @ A[:k, k:]
    S = invert_(A[k:, k:].addmm_(A[:k, k:].mT, X, alpha=-1))  # of the Schur complement
    Y = X @ S
    A[:k, :k].addmm_(Y, X.mT)
    A[:k, k:] = Y.neg_()
    A[k:, :k] = Y.mT
    return A


def symmetrise_(A: Tensor) -> Tensor:
    """Makes A [n, n] symmetric to the bit, by the mean of both halves, without a second matrix."""
    n, step = A.shape[0], 256
    for i in range(0, n, step):
        mean = (A[i : i + step, i:] + A[i:, i : i + step].mT) / 2
        A[i : i + step, i:] = mean
        A[i:, i : i + step] = mean.mT
    return A


def check_matrix(name: str, A: Any) -> Tensor:
    """A as float64 [n, n], n >= 1, finite."""
    _check_floating(name, A)
    if A.dim() != 2 or A.shape[0] != A.shape[1] or not A.shape[0]:
        raise ValueError(f"{name} must be [n, n] with n >= 1, got {list(A.shape)}")
    # the sum first, which needs no memory; that of finite elements may still overflow
    if not torch.isfinite(A.sum()) and not torch.isfinite(A).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite elements")
    return A.detach().double()


def check_weight(W: Tensor, n: int) -> Tensor:
    """W as float64 [c, n], finite."""
    _check_floating("W", W)
    if W.dim() != 2 or W.shape[1] != n:
        raise ValueError(f"W must be [c, n] with n={n}, the size of P, got {list(W.shape)}")
    if not torch.isfinite(W).all():
        raise ValueError("W must be finite, got NaN or infinite elements")
    return W.detach().double()


def check_blocks(blocks: Tensor, n: int) -> Tensor:
    """Blocks [m, b] of distinct columns below n."""
    _check_columns("blocks", blocks, n)
    if blocks.dim() != 2 or not blocks.numel():
        raise ValueError(f"blocks must be [m, b] with m, b >= 1, got {list(blocks.shape)}")
    return blocks


def check_removed(removed: Tensor, n: int) -> Tensor:
    """Distinct columns [k] below n."""
    _check_columns("removed", removed, n)
    if removed.dim() != 1:
        raise ValueError(f"removed must be [k], got {list(removed.shape)}")
    return removed


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _check_columns(name: str, value: Tensor, n: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor of columns, got {got}")
    if not value.numel():
        return
    least, most = int(value.min()), int(value.max())
    if least < 0 or most >= n:
        raise ValueError(f"{name} must be columns from 0 to {n - 1}, got {least} to {most}")
    if value.unique().numel() != value.numel():
        raise ValueError(f"{name} must be distinct columns, got one in two places")

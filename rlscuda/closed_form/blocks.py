"""Checks of a layer's matrices, and Cholesky factors of their blocks that never turn into NaN."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the block's diagonal. Below the first, a pivot is rounding noise; beyond the last,
# the matrix is no inverse autocorrelation matrix.
_JITTERS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
_LEAF = 768  # below it LAPACK inverts as fast as products do
_PIVOT = 1e-14  # least squared pivot, times the size of the block, that is taken as it is


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


def check_matrix(name: str, A: Tensor) -> Tensor:
    """A as float64 [n, n], n >= 1, finite.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It is not square, is empty, or holds a NaN or an infinity.
    """
    _check_floating(name, A)
    if A.dim() != 2 or A.shape[0] != A.shape[1] or not A.shape[0]:
        raise ValueError(f"{name} must be [n, n] with n >= 1, got {list(A.shape)}")
    # the sum first, which needs no memory; that of finite elements may still overflow
    if not torch.isfinite(A.sum()) and not torch.isfinite(A).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite elements")
    return A.detach().double()


def check_weight(W: Tensor, n: int) -> Tensor:
    """W as float64 [c, n], finite.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It has another shape, or holds a NaN or an infinity.
    """
    _check_floating("W", W)
    if W.dim() != 2 or W.shape[1] != n:
        raise ValueError(f"W must be [c, n] with n={n}, the size of P, got {list(W.shape)}")
    if not torch.isfinite(W).all():
        raise ValueError("W must be finite, got NaN or infinite elements")
    return W.detach().double()


def check_blocks(blocks: Tensor, n: int) -> Tensor:
    """Blocks [m, b] of distinct columns below n.

    Raises:
        TypeError: They are no int64 tensor.
        ValueError: They have another shape, or a column is out of range or in two places.
    """
    _check_columns("blocks", blocks, n)
    if blocks.dim() != 2 or not blocks.numel():
        raise ValueError(f"blocks must be [m, b] with m, b >= 1, got {list(blocks.shape)}")
    return blocks


def check_removed(removed: Tensor, n: int) -> Tensor:
    """Distinct columns [k] below n.

    Raises:
        TypeError: They are no int64 tensor.
        ValueError: They have another shape, or a column is out of range or in two places.
    """
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

r"""The spectral direction: the gradient's momentum, made orthogonal in the metric of `P`.

N [c, n] is the momentum of the gradient, looked ahead as Nesterov does. With P = R R^T and the
singular values N R = U S V^T, the direction is

    (N P N^T)^(-1/2) N P = U V^T R^T,

the steepest way down where a bound holds for the spectral norm of what the step does to P's
whitened input: all of the momentum's directions move the output alike. Nothing is decomposed: a
polynomial of the smaller one of N P N^T [c, c] and N^T N P [n, n] stands for the inverse root.
`rlscuda.reference.spectral_direction` is the definition.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlscuda.optim.layers import Layer

# a + b x + c x^2 of each iteration: x p(x^2) one after another map singular values of [.03, 1] to
# 1 +- .037, each the best such polynomial on what the last one leaves; smaller ones grow likewise
# by a factor of 44 at most.
COEFFICIENTS = (
    (7.362528, -20.743398, 15.160553),
    (2.917538, -2.182405, 0.475529),
    (2.046310, -1.429475, 0.393352),
)


def shape_of(layer: Layer) -> tuple[int, int, int]:
    """Matrices, and the rows and columns of each, that a layer's direction is made of."""
    return layer.groups, layer.weight.shape[0] // layer.groups, layer.fan_in


def write_directions(
    moves: Sequence[Any], bias_gradients: Sequence[Tensor], h: Tensor, group: dict[str, Any]
) -> None:
    """Turns the product of every move into its direction, and takes the gradient into the moments.

    Args:
        moves: Layers of one group, dtype and device; their products lie ordered by `shape_of`.
        bias_gradients: The gradient of each bias in `P`, an empty tensor where there is none.
        h: Of each matrix in turn, not finite where nothing may move.
        group: The parameter group.
    """
    usable = h.isfinite().split([move.layer.groups for move in moves])
    rows = sorted(zip(moves, bias_gradients, usable), key=lambda row: shape_of(row[0].layer))
    for shape, batch in itertools.groupby(rows, key=lambda row: shape_of(row[0].layer)):
        _write_batch(*map(list, zip(*batch)), shape, group)


def _write_batch(
    moves: list[Any],
    bias_gradients: list[Tensor],
    usable: list[Tensor],
    shape: tuple[int, int, int],
    group: dict[str, Any],
) -> None:
    """Likewise for layers of one shape, whose matrices are one batch [b, c, n]."""
    groups, c, n = shape
    finite = torch.cat(usable)
    N = _momentum(moves, bias_gradients, finite, shape, group["momentum"])
    D = moves[0].product.as_strided(N.shape, N.stride())  # the products, one after another
    length = torch.linalg.vector_norm(N, dim=(1, 2), keepdim=True) / math.sqrt(c * n)
    N.div_(length.clamp(min=torch.finfo(N.dtype).tiny))  # so that no square leaves its range
    for move, part, product in zip(moves, N.split(groups), D.split(groups)):
        torch.bmm(part, move.state["P"].view(groups, n, n), out=product)
    gram = torch.bmm(D, N.mT) if c <= n else torch.bmm(N.mT, D)
    size = (gram * gram.mT).sum((1, 2), keepdim=True).sqrt()  # of the eigenvalues, >= the largest
    size.clamp_(min=torch.finfo(N.dtype).tiny)
    root = _inverse_root(gram.div_(size)).div_(size.sqrt())
    power = torch.cat([move.state["power"] for move in moves]).view(-1, 1, 1)
    scale = math.sqrt(c / min(c, n)) * length / (length + group["eps"] * power.sqrt())
    torch.mul(D, scale, out=N)
    torch.bmm(*((root, N) if c <= n else (N, root)), out=D)


def _momentum(
    moves: list[Any],
    bias_gradients: list[Tensor],
    finite: Tensor,
    shape: tuple[int, int, int],
    momentum: float,
) -> Tensor:
    """Averages the gradients in, and returns what the average will be if the next is the same.

    Returns:
        [b, c, n], with the biases as the last column.
    """
    groups, c, n = shape
    N = moves[0].grad.new_empty(len(finite), c, n)
    for move, gradient, part in zip(moves, bias_gradients, N.view(len(moves), -1, n)):
        part[:, : move.layer.columns] = move.grad
        if move.layer.bias:
            part[:, -1] = gradient
    N.masked_fill_(~finite.view(-1, 1, 1), 0)  # which the average does not take in
    shares = (finite.to(N.dtype) * (1 - momentum)).view(-1, groups, 1, 1)
    for move, share, part in zip(moves, shares, N.view(len(moves), groups, c, n)):
        average = move.state["momentum_buffer"].view(groups, c, n).lerp_(part, share)
        part.lerp_(average, momentum)
    return N


def _inverse_root(x: Tensor) -> Tensor:
    """About x^(-1/2) of each matrix [b, m, m] whose Frobenius norm is 1."""
    root = None
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(x, x, x, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        root = factor if root is None else torch.bmm(factor, root)
        if i + 1 < len(COEFFICIENTS):
            x = torch.bmm(factor, torch.bmm(factor, x))
    assert root is not None
    return root

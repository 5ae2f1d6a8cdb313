r"""The spectral direction: the gradient's momentum, made orthogonal in the metric of `P`.

N [c, n] is the momentum of the gradient, looked ahead as Nesterov does. With P = R R^T and the
singular values N R = U S V^T, the direction is

    (N P N^T)^(-1/2) N P = U V^T R^T,

the steepest way down where a bound holds for the spectral norm of what the step does to an input
that P whitens: all directions of the momentum move the output alike. It is taken of some rows at a
time, at most `ROWS`: that costs little beside N P and learns as well. Nothing is decomposed: a
polynomial of the smaller one of N P N^T and N^T N P stands for the inverse root.
`rlscuda.reference.spectral_weight_step` is the definition.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from rlscuda.optim.moves import Move

_nesterov = torch.ops.rlscuda.foreach_nesterov_.default

ROWS = 64
# a + b x + c x^2 of each iteration: x p(x^2) one after another map singular values of [.03, 1] to
# 1 +- .037, each the best such polynomial on what the last one leaves; smaller ones grow likewise
# by a factor of 44 at most.
COEFFICIENTS = (
    (7.362528, -20.743398, 15.160553),
    (2.917538, -2.182405, 0.475529),
    (2.046310, -1.429475, 0.393352),
)


def write_directions(
    moves: list[Move], bias_gradients: list[Tensor], h: Tensor, group: dict[str, Any]
) -> None:
    """Makes every move's product its direction, and takes its gradient into the momentum.

    Layers of one shape are one batch.

    Args:
        moves: Layers of one group, dtype and device.
        bias_gradients: The gradient of each bias in `P`, an empty tensor where there is none.
        h: Of each matrix in turn, not finite where nothing may move.
        group: The parameter group.
    """
    groups = [move.layer.groups for move in moves]
    places = itertools.accumulate(groups, initial=0)  # of each layer's first h
    rows = sorted(zip(moves, bias_gradients, places), key=_shape)
    with torch.autocast(h.device.type, enabled=False):
        for shape, batch in itertools.groupby(rows, key=_shape):
            _write_batch(shape, group, h, *map(list, zip(*batch)))


def block_rows(rows: int) -> int:
    """Rows of each block but the last: as few blocks as can be, as equal as can be."""
    return -(-rows // -(-rows // ROWS))


def _shape(row: tuple[Move, Tensor, int]) -> tuple[int, int, int, bool]:
    """Matrices, rows and columns of each, and whether the last is a bias', of a move's direction.

    Of a weight whose rows lie on several processes, it is the same on all of them.
    """
    layer = row[0].layer
    return layer.groups, layer.outputs // layer.groups, layer.fan_in, layer.bias


def _write_batch(
    shape: tuple[int, int, int, bool],
    group: dict[str, Any],
    h: Tensor,
    moves: list[Move],
    bias_gradients: list[Tensor],
    places: list[int],
) -> None:
    groups, c, n, _ = shape
    m, shard, here = block_rows(c), moves[0].shard, moves[0].outputs // groups
    rows = m * -(-c // ROWS) if shard is None else max(1, here)  # a norm of no rows is none
    averages = [move.state["momentum_buffer"] for move in moves]
    gradients = [move.grad for move in moves]
    N, peaks = _nesterov(
        gradients, bias_gradients, averages, h, places, groups, rows, group["momentum"]
    )
    tiny, first = torch.finfo(N.dtype).tiny, 0
    peak = peaks.amax(1)[:, None, None]
    if shard is not None:
        peak = shard.largest(peak)
    N.div_(peak.clamp(min=tiny))  # so that no square leaves its range
    length = torch.linalg.vector_norm(N, dim=(1, 2), keepdim=True)
    if shard is not None:
        length = shard.sum(length.square()).sqrt()
        N, first = shard.blocks(N, m)
    length.mul_(peak / math.sqrt(c * n))
    D = torch.empty_like(N)
    for move, part, product in zip(moves, N.view(len(moves), -1, n), D.view(len(moves), -1, n)):
        move.layer.multiply(part, move.state["P"], out=product)
    N, scaled = N.view(-1, m, n), D.view(-1, m, n)
    gram = torch.bmm(scaled, N.mT) if m <= n else torch.bmm(N.mT, scaled)
    size = (gram * gram.mT).sum((1, 2), keepdim=True).clamp(min=tiny).sqrt()  # >= any eigenvalue
    root = _inverse_root(gram.div_(size)).div_(size.sqrt())
    power = torch.cat([move.state["power"] for move in moves]).view(-1, 1, 1)
    floor = (group["eps"] * power.sqrt()).clamp(min=tiny)
    D.mul_(math.sqrt(m / min(m, n)) * length / (length + floor))
    torch.bmm(*((root, scaled) if m <= n else (scaled, root)), out=N)
    for move, direction in zip(moves, N.view(len(moves), groups, -1, n)):
        move.product = direction[:, first : first + here].reshape(-1, n)


def _inverse_root(x: Tensor) -> Tensor:
    """About x^(-1/2) of each matrix [b, m, m] whose eigenvalues are in [0, 1]."""
    root = None
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(x, x, x, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        root = factor if root is None else torch.bmm(factor, root)
        if i + 1 < len(COEFFICIENTS):
            x = torch.bmm(factor, torch.bmm(factor, x))
    assert root is not None
    return root

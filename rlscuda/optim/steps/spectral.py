r"""The spectral direction: the gradient's momentum, made orthogonal in the metric of `P`.

N [c, n] is the momentum of the gradient, looked ahead as Nesterov does. With P = R R^T and the
singular values N R = U S V^T, the direction is

    (N P N^T)^(-1/2) N P = U V^T R^T,

the steepest way down where a bound holds for the spectral norm of what the step does to an input
that P whitens: all directions of the momentum move the output alike. It is taken of some rows at a
time, at most `ROWS`: that costs little beside N P and learns as well. Nothing is decomposed: a
polynomial of the smaller one of N P N^T and N^T N P, its gram, stands for the inverse root.
`rlscuda.reference.spectral_weight_step` is the definition.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlscuda.optim.moves import Move

_nesterov = torch.ops.rlscuda.foreach_nesterov_.default
_take_roots = torch.ops.rlscuda.foreach_spectral_root_.default

ROWS = 64
# a + b x + c x^2 of each iteration: x p(x^2) one after another map singular values of [.03, 1] to
# 1 +- .037, each the best such polynomial on what the last one leaves; smaller ones grow likewise
# by a factor of 44 at most.
COEFFICIENTS = (
    (7.362528, -20.743398, 15.160553),
    (2.917538, -2.182405, 0.475529),
    (2.046310, -1.429475, 0.393352),
)
_NUMBERS = list(itertools.chain(*COEFFICIENTS))


def write_directions(
    moves: list[Move], bias_gradients: list[Tensor], h: Tensor, group: dict[str, Any]
) -> None:
    """Makes every move's product its direction, and takes its gradient into the momentum.

    Layers of one shape are one batch; the roots of all shapes are taken by one call.

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
        batches = [
            _multiplied(shape, group["momentum"], h, *map(list, zip(*batch)))
            for shape, batch in itertools.groupby(rows, key=_shape)
        ]
        _scale_roots(batches, group["eps"])
        for batch in batches:
            batch.write()


def block_rows(rows: int) -> int:
    """Rows of each block but the last: as few blocks as can be, as equal as can be."""
    return -(-rows // -(-rows // ROWS))


def _shape(row: tuple[Move, Tensor, int]) -> tuple[int, int, int, bool]:
    """Matrices, rows and columns of each, and whether the last is a bias', of a move's direction.

    Of a weight whose rows lie on several processes, it is the same on all of them.
    """
    layer = row[0].layer
    return layer.groups, layer.outputs // layer.groups, layer.fan_in, layer.bias


@dataclass(eq=False)
class _Batch:
    """Layers of one shape on the way to their directions.

    Attributes:
        moves: The layers.
        N: Their momentum over its peak [b, rows, n], of whole blocks.
        D: The products N P.
        gram: Of each block, the smaller one of N P N^T and N^T N P; then its scaled root.
        peak: The largest |element| of each matrix of the momentum.
        length: The Euclidean norm of each, over its peak.
        rows: Of a matrix, on all processes.
        block: Rows of a block.
        first: The place in N of the first row of this process.
    """

    moves: list[Move]
    N: Tensor
    D: Tensor
    gram: Tensor
    peak: Tensor
    length: Tensor
    rows: int
    block: int
    first: int

    def write(self) -> None:
        """Makes the product of every layer its direction, of the roots in `gram`."""
        n, layers = self.N.shape[2], len(self.moves)
        here = self.moves[0].outputs // self.moves[0].layer.groups
        D = self.D.view(-1, self.block, n)
        pair = (self.gram, D) if self.block <= n else (D, self.gram)
        torch.bmm(*pair, out=self.N.view(-1, self.block, n))
        all_rows = self.N.view(layers, self.moves[0].layer.groups, -1, n)
        mine = all_rows[:, :, self.first : self.first + here].reshape(layers, -1, n)
        for move, direction in zip(self.moves, mine.unbind()):
            move.product = direction


def _multiplied(
    shape: tuple[int, int, int, bool],
    momentum: float,
    h: Tensor,
    moves: list[Move],
    bias_gradients: list[Tensor],
    places: list[int],
) -> _Batch:
    """Takes the gradients of layers of one shape in, and multiplies what that gives by `P`."""
    groups, c, n, _ = shape
    m, shard, here = block_rows(c), moves[0].shard, moves[0].outputs // groups
    rows = m * -(-c // ROWS) if shard is None else max(1, here)  # a norm of no rows is none
    averages = [move.state["momentum_buffer"] for move in moves]
    gradients = [move.grad for move in moves]
    N, peak, length = _nesterov(
        gradients, bias_gradients, averages, h, places, groups, rows, momentum
    )
    first = 0
    if shard is not None:
        tiny = torch.finfo(N.dtype).tiny
        own, peak = peak, shard.largest(peak.clone())
        share = own.clamp(min=tiny) / peak.clamp(min=tiny)
        length = shard.sum((length * share).square()).sqrt()
        N, first = shard.blocks(N.mul_(share[:, None, None]), m)
    D = torch.empty_like(N)
    for move, part, product in zip(moves, N.view(len(moves), -1, n), D.view(len(moves), -1, n)):
        move.layer.multiply(part, move.state["P"], out=product)
    blocks, products = N.view(-1, m, n), D.view(-1, m, n)
    gram = torch.bmm(products, blocks.mT) if m <= n else torch.bmm(blocks.mT, products)
    return _Batch(moves, N, D, gram, peak, length, c, m, first)


def _scale_roots(batches: list[_Batch], eps: float) -> None:
    """Makes every gram its inverse root, scaled to the length of the direction."""
    _take_roots(
        [batch.gram for batch in batches],
        [batch.peak for batch in batches],
        [batch.length for batch in batches],
        [move.state["power"] for batch in batches for move in batch.moves],
        [batch.block for batch in batches],
        [batch.rows for batch in batches],
        [batch.N.shape[2] for batch in batches],
        _NUMBERS,
        eps,
    )

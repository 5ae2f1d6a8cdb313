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
from typing import Any

import torch
from torch import Tensor

from rlscuda.functional.gemm import WORTH
from rlscuda.optim.moves import Move

_nesterov = torch.ops.rlscuda.foreach_nesterov_.default
_take_roots = torch.ops.rlscuda.foreach_spectral_root_.default
_take_directions = torch.ops.rlscuda.foreach_spectral_direction_.default

ROWS = 64
ONE_CALL = {"cpu"}  # where directions are one operator; others have libraries for its products
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

    Layers of one shape are one batch; momenta and roots of all shapes are made by one call each, on
    a CPU all that is small and all that follows the products, too.

    Args:
        moves: Layers of one group, dtype and device.
        bias_gradients: The gradient of each bias in `P`, an empty tensor where there is none.
        h: Of each matrix in turn, not finite where nothing may move.
        group: The parameter group.
    """
    places = itertools.accumulate((move.layer.groups for move in moves), initial=0)
    rows = sorted(zip(moves, bias_gradients, places), key=_shape)
    with torch.autocast(h.device.type, enabled=False):
        batches = _looked_ahead(rows, h, group["momentum"])
        at_once = h.device.type in ONE_CALL
        for batch in batches:
            batch.multiply(leave=WORTH if at_once else 0)
        if at_once:
            _take_directions(
                [batch.blocks(batch.N) for batch in batches],
                [batch.blocks(batch.D) for batch in batches],
                [P for batch in batches for P in batch.left], *_numbers(batches, group["eps"]),
            )  # fmt: skip
        else:
            grams = [batch.square() for batch in batches]
            _take_roots(grams, *_numbers(batches, group["eps"]))
            for batch, root in zip(batches, grams):
                batch.apply(root)
        for batch in batches:
            batch.deal()


def block_rows(rows: int) -> int:
    """Rows of each block but the last: as few blocks as can be, as equal as can be."""
    return -(-rows // -(-rows // ROWS))


def _shape(row: tuple[Move, Tensor, int]) -> tuple[int, int, int, bool]:
    """Matrices, rows and columns of each, and whether the last is a bias', of a move's direction.

    Of a weight whose rows lie on several processes, it is the same on all of them.
    """
    layer = row[0].layer
    return layer.groups, layer.outputs // layer.groups, layer.fan_in, layer.bias


class _Batch:
    """Layers of one shape on the way to their directions.

    Attributes:
        moves: The layers.
        groups: Matrices of each.
        rows: Of a matrix, on all processes.
        columns: n.
        block: Rows of a block.
        padded: Rows of a matrix of `N`, those of whole blocks where it is not sharded.
        N: Their momentum over its peak [b, rows, n]; then the directions.
        peak: The largest |element| of each matrix of the momentum.
        length: The Euclidean norm of each, over its peak.
        D: The products N P.
        left: Of each layer the P of a product that is left to be made, an empty tensor where it is.
        first: The place in N of the first row of this process.
    """

    N: Tensor
    peak: Tensor
    length: Tensor
    D: Tensor
    left: list[Tensor]
    first: int = 0

    def __init__(self, moves: list[Move]):
        layer = moves[0].layer
        self.moves, self.groups, self.columns = moves, layer.groups, layer.fan_in
        self.rows, self.here = layer.outputs // self.groups, moves[0].outputs // self.groups
        self.block = block_rows(self.rows)
        whole = self.block * -(-self.rows // ROWS)
        self.padded = whole if moves[0].shard is None else max(1, self.here)  # no norm of no rows

    @property
    def matrices(self) -> int:
        """Those of all layers."""
        return len(self.moves) * self.groups

    def take(self, N: Tensor, peak: Tensor, length: Tensor) -> None:
        """Takes what `_nesterov` has made of the layers, one after another."""
        N, shard = N.view(-1, self.padded, self.columns), self.moves[0].shard
        if shard is not None:
            tiny = torch.finfo(N.dtype).tiny
            own, peak = peak, shard.largest(peak.clone())
            share = own.clamp(min=tiny) / peak.clamp(min=tiny)
            length = shard.sum((length * share).square()).sqrt()
            N, self.first = shard.blocks(N.mul_(share[:, None, None]), self.block)
        self.N, self.peak, self.length = N, peak, length

    def multiply(self, leave: int) -> None:
        """Multiplies the momentum by `P`.

        Args:
            leave: Multiplications below which the product of a layer is left to be made.
        """
        layers, n = len(self.moves), self.columns
        self.D, none = torch.empty_like(self.N), self.N.new_empty(0)
        small = self.N.numel() // layers * n < leave and self.moves[0].layer.blocks == 1
        self.left = [move.state["P"] if small else none for move in self.moves]
        if not small:
            parts = zip(self.moves, self.N.view(layers, -1, n), self.D.view(layers, -1, n))
            for move, part, product in parts:
                move.layer.multiply(part, move.state["P"], out=product)

    def blocks(self, rows: Tensor) -> Tensor:
        """`N` or `D` as blocks [b, block, n]."""
        return rows.view(-1, self.block, self.columns)

    def square(self) -> Tensor:
        """The grams of all blocks."""
        N, D = self.blocks(self.N), self.blocks(self.D)
        return torch.bmm(*((D, N.mT) if self.block <= self.columns else (N.mT, D)))

    def apply(self, root: Tensor) -> None:
        """Makes `N` the directions."""
        N, D = self.blocks(self.N), self.blocks(self.D)
        torch.bmm(*((root, D) if self.block <= self.columns else (D, root)), out=N)

    def deal(self) -> None:
        """Makes the product of every layer its direction."""
        layers, n = len(self.moves), self.columns
        all_rows = self.N.view(layers, self.groups, -1, n)
        mine = all_rows[:, :, self.first : self.first + self.here].reshape(layers, -1, n)
        for move, direction in zip(self.moves, mine.unbind()):
            move.product = direction


def _looked_ahead(rows: list[tuple[Move, Tensor, int]], h: Tensor, momentum: float) -> list[_Batch]:
    """Takes all gradients into their momenta, and looks ahead.

    Args:
        rows: Of each layer the move, the gradient of its bias and the place of its first h, those
            of one shape side by side.
        h: See `write_directions`.
        momentum: The share that a momentum keeps.
    """
    moves, bias_gradients, places = map(list, zip(*rows))
    batches = [
        _Batch([move for move, *_ in batch]) for _, batch in itertools.groupby(rows, key=_shape)
    ]
    flat, peak, length = _nesterov(
        [move.grad for move in moves],
        bias_gradients,
        [move.state["momentum_buffer"] for move in moves],
        h,
        places,
        [batch.groups for batch in batches for _ in batch.moves],
        [batch.padded for batch in batches for _ in batch.moves],
        momentum,
    )
    counts = [batch.matrices for batch in batches]
    sizes = [batch.matrices * batch.padded * batch.columns for batch in batches]
    parts = zip(flat.split(sizes), peak.split(counts), length.split(counts))
    for batch, part in zip(batches, parts):
        batch.take(*part)
    return batches


def _numbers(batches: list[_Batch], eps: float) -> tuple:
    """What both operators need of all shapes."""
    return (
        [batch.peak for batch in batches],
        [batch.length for batch in batches],
        [move.state["power"] for batch in batches for move in batch.moves],
        [batch.block for batch in batches],
        [batch.rows for batch in batches],
        [batch.columns for batch in batches],
        _NUMBERS,
        eps,
    )

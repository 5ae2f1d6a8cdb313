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

from rlscuda._torch import unflattened
from rlscuda.optim.moves import Move, Workspace, buffer

_nesterov = torch.ops.rlscuda.foreach_nesterov_.default
_take_roots = torch.ops.rlscuda.foreach_spectral_root_.default
_take_directions = torch.ops.rlscuda.foreach_spectral_direction_.default

ROWS = 64
ONE_CALL = {"cpu"}  # where directions are one operator; others have libraries for its products
KEPT = 1 << 20  # elements of products that the workspace keeps, at most
SMALL = 5_000_000  # multiplications of a product with P below which it is a part of that call
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
    moves: list[Move],
    bias_gradients: list[Tensor],
    h: Tensor,
    group: dict[str, Any],
    workspace: Workspace,
) -> None:
    """Makes every move's product its direction, and takes its gradient into the momentum.

    Args:
        moves: Layers of one group, dtype and device.
        bias_gradients: The gradient of each bias in `P`, an empty tensor where there is none.
        h: Of each matrix in turn, not finite where nothing may move.
        group: The parameter group.
        workspace: Memory kept from step to step.
    """
    places = itertools.accumulate((move.layer.groups for move in moves), initial=0)
    rows = list(zip(moves, bias_gradients, places))
    if h.device.type in ONE_CALL and moves[0].shard is None:
        _write_at_once(rows, h, group, workspace)
        return
    with torch.autocast(h.device.type, enabled=False):
        _write_by_shapes(sorted(rows, key=_shape), h, group)


def _write_at_once(
    rows: list[tuple[Move, Tensor, int]], h: Tensor, group: dict[str, Any], workspace: Workspace
) -> None:
    """By one operator for all that follows the products with `P`, small ones among that."""
    moves = [move for move, *_ in rows]
    layers = [move.layer for move in moves]
    groups, columns = [layer.groups for layer in layers], [layer.fan_in for layer in layers]
    heights = [layer.outputs // k for layer, k in zip(layers, groups)]
    block = [block_rows(height) for height in heights]
    parts = [-(-height // ROWS) for height in heights]
    padded = [m * count for m, count in zip(block, parts)]
    N, peak, length = _look_ahead(rows, h, groups, padded, group["momentum"])
    kept = N.numel() <= KEPT  # what is given back in every step may be taken anew page by page
    D = buffer(workspace, "product", N, N.numel()) if kept else torch.empty_like(N)
    none = N.new_empty(0)
    sizes = [k * high * n for k, high, n in zip(groups, padded, columns)]
    matrices, start = [], 0
    for move, size, n in zip(moves, sizes, columns):
        left = size * n < SMALL and move.layer.blocks == 1
        matrices.append(move.state["P"] if left else none)
        if not left:
            part, product = (x[start : start + size].view(-1, n) for x in (N, D))
            move.layer.multiply(part, move.state["P"], out=product)
        start += size
    _take_directions(
        N, D, matrices, peak, length, [move.state["power"] for move in moves],
        [k * count for k, count in zip(groups, parts)], block, heights, columns, _NUMBERS,
        group["eps"],
    )  # fmt: skip
    if padded == heights:
        directions = unflattened(N, [move.state["momentum_buffer"] for move in moves])
    else:
        directions = [
            part.view(k, high, n)[:, :height].reshape(-1, n)
            for part, k, high, height, n in zip(N.split(sizes), groups, padded, heights, columns)
        ]
    for move, direction in zip(moves, directions):
        move.product = direction


def _write_by_shapes(
    rows: list[tuple[Move, Tensor, int]], h: Tensor, group: dict[str, Any]
) -> None:
    """By the products of a library, of all layers of one shape at once, and one call for roots."""
    batches = _batches(rows, h, group["momentum"])
    for batch in batches:
        batch.multiply()
    _take_roots(
        [batch.gram for batch in batches],
        [batch.peak for batch in batches],
        [batch.length for batch in batches],
        [move.state["power"] for batch in batches for move in batch.moves],
        [batch.block for batch in batches],
        [batch.rows for batch in batches],
        [batch.columns for batch in batches],
        _NUMBERS,
        group["eps"],
    )
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
        gram: Of each block, the smaller one of N P N^T and N^T N P; then its scaled root.
        first: The place in N of the first row of this process.
    """

    N: Tensor
    peak: Tensor
    length: Tensor
    D: Tensor
    gram: Tensor
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

    def multiply(self) -> None:
        """Multiplies the momentum by `P`."""
        layers, m, n = len(self.moves), self.block, self.columns
        self.D = torch.empty_like(self.N)
        parts = zip(self.moves, self.N.view(layers, -1, n), self.D.view(layers, -1, n))
        for move, part, product in parts:
            move.layer.multiply(part, move.state["P"], out=product)
        blocks, products = self.N.view(-1, m, n), self.D.view(-1, m, n)
        pair = (products, blocks.mT) if m <= n else (blocks.mT, products)
        self.gram = torch.bmm(*pair)

    def write(self) -> None:
        """Makes the product of every layer its direction, of the roots in `gram`."""
        layers, m, n = len(self.moves), self.block, self.columns
        D = self.D.view(-1, m, n)
        torch.bmm(*((self.gram, D) if m <= n else (D, self.gram)), out=self.N.view(-1, m, n))
        all_rows = self.N.view(layers, self.groups, -1, n)
        mine = all_rows[:, :, self.first : self.first + self.here].reshape(layers, -1, n)
        for move, direction in zip(self.moves, mine.unbind()):
            move.product = direction


def _batches(rows: list[tuple[Move, Tensor, int]], h: Tensor, momentum: float) -> list[_Batch]:
    """Takes all gradients into their momenta, looked ahead: a batch for each shape.

    Args:
        rows: Of each layer the move, the gradient of its bias and the place of its first h, those
            of one shape side by side.
        h: See `write_directions`.
        momentum: The share that a momentum keeps.
    """
    batches = [
        _Batch([move for move, *_ in batch]) for _, batch in itertools.groupby(rows, key=_shape)
    ]
    groups = [batch.groups for batch in batches for _ in batch.moves]
    padded = [batch.padded for batch in batches for _ in batch.moves]
    flat, peak, length = _look_ahead(rows, h, groups, padded, momentum)
    counts = [batch.matrices for batch in batches]
    sizes = [batch.matrices * batch.padded * batch.columns for batch in batches]
    parts = zip(flat.split(sizes), peak.split(counts), length.split(counts))
    for batch, part in zip(batches, parts):
        batch.take(*part)
    return batches


def _look_ahead(
    rows: list[tuple[Move, Tensor, int]],
    h: Tensor,
    groups: list[int],
    padded: list[int],
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The momenta looked ahead, one after another, the peak and the length of each matrix.

    Args:
        rows: See `_batches`.
        h: See `write_directions`.
        groups: Matrices of each layer.
        padded: Rows of a matrix, those of whole blocks.
        momentum: The share that a momentum keeps.
    """
    moves, bias_gradients, places = map(list, zip(*rows))
    buffers = [move.state["momentum_buffer"] for move in moves]
    grads = [move.grad for move in moves]
    return _nesterov(grads, bias_gradients, buffers, h, places, groups, padded, momentum)

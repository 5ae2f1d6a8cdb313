"""Weights whose rows lie on several processes: of FSDP2, HSDP, column-wise tensor parallel.

`P` is the same on all of them, and a row moves where it lies. What a step asks of all rows of a
layer is little: norms, and for the spectral form the blocks of rows that a border cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlscuda._torch import dtensor, flattened, is_dtensor


@dataclass(frozen=True)
class Rows:
    """The rows of a weight that this process has: as even parts as can be, the last ones smaller.

    Attributes:
        mesh: The ranks of the whole mesh, in turn.
        group: The processes that have the other rows; None where each has all.
        rank: Of this process in it.
        size: Processes in it.
        total: Rows of all of them.
    """

    mesh: tuple[int, ...]
    group: Any
    rank: int
    size: int
    total: int

    @property
    def most(self) -> int:
        """Rows of the first process."""
        return -(-self.total // self.size)

    @property
    def start(self) -> int:
        """The first row of this process."""
        return self._span(self.rank)[0]

    @property
    def stop(self) -> int:
        """The last row of this process, + 1."""
        return self._span(self.rank)[1]

    def _span(self, rank: int) -> tuple[int, int]:
        start = min(rank * self.most, self.total)
        return start, min(start + self.most, self.total)

    def _whole(self, rank: int, m: int) -> tuple[int, int]:
        """The span of the blocks of `m` rows, the last filled up, that hold a process' rows."""
        start, stop = self._span(rank)
        return start // m * m, -(-stop // m) * m if stop > start else start // m * m

    def sum(self, x: Tensor) -> Tensor:
        """Makes every element the sum over the processes."""
        return self._all(dist.ReduceOp.SUM, x)

    def largest(self, x: Tensor) -> Tensor:
        """Makes every element the largest of all processes."""
        return self._all(dist.ReduceOp.MAX, x)

    def _all(self, operation: Any, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x, operation, self.group)
        return x

    def blocks(self, part: Tensor, m: int) -> tuple[Tensor, int]:
        """Whole blocks of `m` rows, the last filled up by zeros, that hold all rows of a part.

        Args:
            part: The rows of this process [b, rows, n], and whatever after them.
            m: Rows of a block.

        Returns:
            [b, k m, n], and the place in it of the first row of this process.
        """
        first, last = self._whole(self.rank, m)
        rows = part.new_zeros(len(part), last - first, part.shape[2])
        rows[:, self.start - first : self.stop - first] = part[:, : self.stop - self.start]
        if self.most % m and self.size > 1:  # borders cut blocks: on all processes, or on none
            self._fill_up(rows, m)
        return rows, self.start - first

    def _fill_up(self, rows: Tensor, m: int) -> None:
        """Takes the rows of this process' blocks that others have, and gives them theirs."""
        first, last = self._whole(self.rank, m)
        others = [rank for rank in range(self.size) if rank != self.rank]
        gives, takes = [(0, 0)] * self.size, [(0, 0)] * self.size
        for rank in others:
            gives[rank] = _common((self.start, self.stop), self._whole(rank, m))
            takes[rank] = _common(self._span(rank), (first, last))
        given = [rows[:, a - first : b - first].flatten() for a, b in gives]
        size = len(rows) * rows.shape[2]
        counts = [(b - a) * size for a, b in takes]
        taken = rows.new_empty(sum(counts))
        sizes = [piece.numel() for piece in given]
        dist.all_to_all_single(taken, torch.cat(given), counts, sizes, self.group)
        for (a, b), piece in zip(takes, taken.split(counts)):
            rows[:, a - first : b - first] = piece.view(len(rows), b - a, rows.shape[2])


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """What two spans have in common; an empty one within the first, where that is nothing."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else (one[0], one[0])


def rows_of(weight: Any) -> Rows | None:
    """The rows of a weight that this process has; None for a plain tensor."""
    if not is_dtensor(weight):
        return None
    mesh, ranks = weight.device_mesh, tuple(weight.device_mesh.mesh.flatten().tolist())
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            place = (mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))
            return Rows(ranks, *place, weight.shape[0])
    return Rows(ranks, None, 0, 1, weight.shape[0])


def group_of_mesh(weight: Any) -> Any:
    """The process group of all of a distributed weight's mesh."""
    mesh = weight.device_mesh
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return flattened(mesh)


def local(tensor: Any) -> Any:
    """What this process has of a tensor, which shares its memory."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor


def like_rows(weight: Any, zeros: Tensor) -> Tensor:
    """A distributed tensor whose rows lie where those of a weight do.

    Args:
        weight: The weight.
        zeros: Its rows on this process.
    """
    if not is_dtensor(weight):
        return zeros
    shape = torch.Size((weight.shape[0], *zeros.shape[1:]))
    return dtensor().from_local(
        zeros, weight.device_mesh, weight.placements, run_check=False, shape=shape,
        stride=zeros.stride(),
    )  # fmt: skip


def refusal_of_shards(weight: Any, groups: int, transposed: bool) -> str | None:
    """Why the rows of a distributed weight cannot be moved where they lie; None where they can."""
    if not is_dtensor(weight):
        return None
    shards = [p for p in weight.placements if not p.is_replicate()]
    if not shards:
        return None
    if len(shards) > 1:
        return "its weight is sharded over two dimensions of its mesh"
    if not shards[0].is_shard(0) or type(shards[0]).__name__ != "Shard" or transposed:
        return f"its weight is sharded as {shards[0]!r}: only whole rows, Shard(0), can be moved"
    if groups > 1:
        return "its weight is sharded and has groups"
    return None

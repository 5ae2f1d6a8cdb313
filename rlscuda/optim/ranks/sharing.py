"""Matrices that each are on one process: its owner moves the layer, the others get its weight.

The largest are given out first, each to the process that has least so far. A layer keeps its owner.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlscuda._torch import is_dtensor, tree_map


class Sharing:
    """Who owns the matrix of which layer."""

    def __init__(self) -> None:
        self.enter(None, 0, 1)

    def enter(self, group: Any, rank: int, size: int) -> None:
        """Begins anew among the processes of a group."""
        self._group, self._rank = group, rank
        self._owner: dict[nn.Parameter, int] = {}
        self._bytes = [0] * size

    def assign(self, sizes: dict[nn.Parameter, int]) -> None:
        """Gives every layer that has none an owner.

        Args:
            sizes: Covered weight -> bytes of its matrix, in the same order on every process.

        Raises:
            ValueError: A weight is distributed already.
        """
        new = [weight for weight in sizes if weight not in self._owner]
        if any(map(is_dtensor, new)):
            raise ValueError("shard_matrices is for replicated weights, as those of "
                             "DistributedDataParallel: these are distributed")  # fmt: skip
        for weight in sorted(new, key=sizes.__getitem__, reverse=True):
            owner = self._bytes.index(min(self._bytes))
            self._owner[weight] = owner
            self._bytes[owner] += sizes[weight]

    def is_here(self, weight: nn.Parameter) -> bool:
        """Whether this process owns the matrix of a weight."""
        return self.owner(weight) == self._rank

    def check_here(self, weight: nn.Parameter, name: str) -> None:
        """Refuses to make up the matrix of a layer that another process has.

        Raises:
            RuntimeError: It has.
        """
        if not self.is_here(weight):
            raise RuntimeError(
                f"the matrix of {name!r} is on rank {self.owner(weight)}, as shard_matrices asks: "
                "state_dict() gathers all of them"
            )

    def owner(self, weight: nn.Parameter) -> int:
        """The rank that owns the matrix of a weight."""
        return self._owner.get(weight, self._rank)

    def spread(self, parameters: dict[nn.Parameter, list[nn.Parameter]]) -> None:
        """Gives every process the parameters that an owner has moved.

        Args:
            parameters: Covered weight -> what one step of its layer moves.
        """
        if len(self._bytes) == 1:
            return
        kinds = {(p.device, p.dtype) for own in parameters.values() for p in own}
        for device, dtype in sorted(kinds, key=str):
            by_owner: list[list[Tensor]] = [[] for _ in self._bytes]
            for weight, own in parameters.items():
                by_owner[self.owner(weight)] += [
                    p.detach() for p in own if (p.device, p.dtype) == (device, dtype)
                ]
            for rank, some in enumerate(by_owner):
                if some:
                    self._broadcast(rank, some)

    def _broadcast(self, rank: int, parameters: list[Tensor]) -> None:
        """Gives every process the values that some parameters have on one, in one piece."""
        flat = torch.cat([p.flatten() for p in parameters])
        dist.broadcast(flat, dist.get_global_rank(self._group, rank), self._group)
        if rank != self._rank:
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.copy_(piece.view(p.shape))

    def gathered(self, state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The entries of all layers, by number of the parameter; those of others on the CPU."""
        if len(self._bytes) == 1:
            return state
        own = {k: on_cpu(entries) for k, entries in state.items() if "P" in entries}
        parts: list[Any] = [None] * len(self._bytes)
        dist.all_gather_object(parts, own, self._group)
        others = {k: entries for part in parts for k, entries in part.items()}
        return {**state, **{k: state[k] if k in own else others[k] for k in sorted(others)}}


def on_cpu(tree: Any) -> Any:
    """Dictionaries and lists with all their tensors on the CPU."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)

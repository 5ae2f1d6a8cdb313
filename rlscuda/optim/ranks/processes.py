"""The processes that train one model together, and how an optimizer finds them."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlscuda._torch import active_ddp, is_dtensor, joins
from rlscuda.optim.ranks.shards import group_of_mesh
from rlscuda.optim.ranks.sharing import Sharing

LEFT_ALONE = (
    "this is one of {size} processes, and nothing says which of them train this model together: "
    "no covered layer was called by a DistributedDataParallel module. Pass process_group= the "
    "group that averages the gradients, or process_group=None if each process trains a model of "
    "its own"
)
NOT_IN_STEP = "the processes are not at the same step: load a checkpoint on every rank"
NEVER = 2**63 - 1  # a number that is no least one


class Processes:
    """The data-parallel group of an optimizer.

    Args:
        given: `"auto"`, for that of the DistributedDataParallel module that calls the layers; a
            process group; or None, for this process alone.
        shares: Whether each matrix is on one of them only.

    Attributes:
        group: The group, None while this process is alone.
        rank: Of this process in it.
        size: Processes in it.
        sharing: Who owns which matrix; None where all have all.

    Raises:
        TypeError: It is none of these.
    """

    def __init__(self, given: Any, shares: bool = False):
        is_group = dist.is_available() and isinstance(given, dist.ProcessGroup)
        if given is not None and given != "auto" and not is_group:
            kind = type(given).__name__
            raise TypeError(f"process_group must be 'auto', None or a process group, got {kind}")
        self._given = given
        self.sharing = Sharing() if shares else None
        self._ddp: weakref.ref | None = None  # the last module that called a layer
        self._agreed: set[bytes] = set()
        self._begun = False
        self.group: Any = None
        self.rank, self.size = 0, 1
        if is_group:
            self._enter(given)

    def _enter(self, group: Any) -> None:
        if group is self.group:
            return
        self._agreed, self._begun = set(), False
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.sharing is not None:
            self.sharing.enter(group, self.rank, self.size)

    def notice(self, weight: Tensor, x: Any) -> None:
        """Looks, in a forward, who has called a layer.

        Args:
            weight: The layer's. Where it is distributed but its input is not, all of its mesh have
                minibatches of their own.
            x: The input.
        """
        if self._given != "auto":
            return
        ddp = active_ddp()
        if ddp is not None and (self._ddp is None or self._ddp() is not ddp):
            self._ddp = weakref.ref(ddp)
            self._enter(ddp.process_group)
        elif self.group is None and is_dtensor(weight) and not is_dtensor(x):
            self._enter(group_of_mesh(weight))

    def of_join(self) -> Any:
        """The group for `torch.distributed.algorithms.Join`: all processes, unless one is known."""
        if self.group is None and self._given == "auto":
            self._enter(dist.group.WORLD)
        return self.group

    def apart(self) -> str | None:
        """What to warn of where there are other processes, but no group that this one is in."""
        if self._given != "auto" or self.group is not None or not dist.is_available():
            return None
        size = dist.get_world_size() if dist.is_initialized() else 1
        return LEFT_ALONE.format(size=size) if size > 1 else None

    def check_join(self, joined: bool) -> None:
        """Refuses a step inside of the module's own `join()`, in which the others would hang.

        Args:
            joined: Whether the optimizer is in the context, too.

        Raises:
            RuntimeError: It is not.
        """
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and joins(ddp) and not joined:
            raise RuntimeError(
                "step() exchanges what the processes saw of the inputs, which join() of the model "
                "alone does not know of: use torch.distributed.algorithms.Join([model, optimizer])"
            )

    def begin(self, steps: int | None, device: torch.device) -> None:
        """Checks, in the first step together, that all have made as many before.

        Which steps they exchange something in depends on that.

        Args:
            steps: Those of all layers; None for a process that makes none of its own.
            device: On which the group works.

        Raises:
            RuntimeError: They have not.
        """
        if self._begun:
            return
        own = [NEVER, NEVER] if steps is None else [steps, -steps]
        both = torch.tensor(own, device=device)
        self.least(both)
        if steps is not None and both.tolist() != own:
            raise RuntimeError(NOT_IN_STEP)
        self._begun = True

    def agree(self, layout: str, device: torch.device) -> None:
        """Checks, once for each, that all processes are about to exchange the same.

        Args:
            layout: Describes it.
            device: Of the tensors.

        Raises:
            RuntimeError: They are not.
        """
        digest = hashlib.sha256(layout.encode()).digest()[:7]
        if digest in self._agreed:
            return
        number = int.from_bytes(digest, "big")
        both = torch.tensor([number, -number], device=device)
        self.least(both)
        if both.tolist() != [number, -number]:
            raise RuntimeError(
                f"the processes do not train the same layers alike; rank {self.rank} of "
                f"{self.size} has: {layout}. Make the model, the groups and the optimizer, and "
                "load a checkpoint, in the same way on every rank; a ZeroRedundancyOptimizer "
                "cannot hold this one"
            )
        self._agreed.add(digest)

    def least(self, x: Tensor) -> None:
        """Makes every element the least of all processes."""
        dist.all_reduce(x, dist.ReduceOp.MIN, self.group)

    def total(self, x: Tensor) -> None:
        """Makes every element the sum over all processes."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)

    def last(self, here: bool, device: torch.device) -> int:
        """The last rank of the group for which `here` is true.

        Args:
            here: Whether it is for this one.
            device: On which the group works.
        """
        rank = torch.tensor([-self.rank if here else 1], device=device)
        self.least(rank)
        return -int(rank)

    def __deepcopy__(self, memo: dict) -> Processes:
        return Processes(self._given, self.sharing is not None)

    def __reduce__(self) -> Any:  # a group means nothing in another process
        return Processes, (None if self._given is None else "auto", self.sharing is not None)

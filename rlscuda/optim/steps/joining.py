"""What `torch.distributed.algorithms.Join` asks of an optimizer that takes part.

    with Join([model, optimizer]):
        ...  # as many minibatches as this process has

A process that has no more takes part in the exchange of the others' steps with nothing of its own,
and in the end has the state of the last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rlscuda.optim.ranks.sharing import on_cpu
from rlscuda.optim.steps.reduction import staged


class Joining:
    """The part of `RLSOptimizer` that `Join` calls; it takes the place of torch's `Joinable`."""

    _join_config: Any = None  # set by Join

    @property
    def _joined(self: Any) -> bool:
        """Whether this is in such a context, in which all processes exchange in every step."""
        return self._join_config is not None and self._join_config.enable

    def notify_join(self: Any) -> None:
        """Tells the context, if there is one, that this process goes on.

        Raises:
            RuntimeError: The model is in such a context without the optimizer.
        """
        self._processes.check_join(self._joined)
        if self._joined:
            from torch.distributed.algorithms.join import Join

            Join.notify_join_context(self)

    def join_hook(self: Any, **kwargs: Any) -> Any:
        """Stands in for this process when it has no more minibatches; see `Joinable`.

        Raises:
            ValueError: The matrices are sharded.
        """
        if self._processes.sharing is not None:
            raise ValueError(
                "an optimizer with shard_matrices cannot take part in Join: a process that has no "
                "more minibatches has no gradient to move the layers that it owns"
            )
        return _Shadow(self)

    @property
    def join_device(self: Any) -> torch.device:
        """The device of the first parameter; see `Joinable`."""
        return self.param_groups[0]["params"][0].device

    @property
    def join_process_group(self: Any) -> Any:
        """The group of the processes that train the model together; see `Joinable`."""
        return self._processes.of_join()


class _Shadow:
    """What torch calls a `JoinHook`."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """Takes part in the exchange of one step of the others."""
        own = self._optimizer
        own._follow_groups()
        own._registry.clear()
        each = dict.fromkeys(own._registry.covered.values(), 1)
        staged(each, {}, own._processes, joined=True)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Takes the state of a process that has made all steps."""
        own, processes = self._optimizer, self._optimizer._processes
        last = processes.last(is_last_joiner, own.join_device)
        state = [on_cpu(own.state_dict()) if last == processes.rank else None]
        source = dist.get_global_rank(processes.group, last)
        dist.broadcast_object_list(state, source, processes.group, own.join_device)
        if last != processes.rank:
            own.load_state_dict(state[0])

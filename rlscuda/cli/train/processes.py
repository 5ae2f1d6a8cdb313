"""One training by all the processes that `torchrun` has started: each takes a share of a minibatch.

The first one alone prints and writes; the others follow it step by step. The result is that of one
process, up to rounding, and so what would be another is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import flag_of
from rlscuda.cli.train.options import RunConfig


@contextmanager
def together() -> Iterator[None]:
    """Lets the processes find one another, in the block; a process alone has nothing to find.

    Raises:
        UserError: Another process has ended, and has said why.
    """
    if _started() == 0:
        yield
        return
    dist.init_process_group()
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError(f"process {dist.get_rank()} ends, as another one has") from None
    dist.destroy_process_group()


def check_alone(command: str) -> None:
    """Checks that a command that is for one process has not been started on several.

    Raises:
        UserError: It has.
    """
    if _started() > 1:
        raise UserError(f"rlscuda {command} needs one process, torchrun has started {_started()}")


def _started() -> int:
    """How many processes torchrun has started; 0 where this is none of them."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if launched else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def told(value: Any = None) -> Any:
    """What the first process tells the others; they wait for it."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def own(device: torch.device) -> torch.device:
    """The device of this process: of several on one machine, each has a GPU of its own."""
    if size() == 1 or device.type != "cuda":
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def check_config(config: RunConfig) -> None:
    """Checks that several processes can do what one would.

    Raises:
        UserError: They cannot.
    """
    if size() == 1:
        return
    for name in config.prunings:
        raise UserError(f"{flag_of(name)} needs one process, torchrun has started {size()}")
    if config.batch_size % size():
        raise UserError(
            f"--batch-size must be a multiple of the {size()} processes, got {config.batch_size}"
        )


def check_network(model: nn.Module, name: str) -> None:
    """Checks that a network makes of the shares of a minibatch what it makes of the whole.

    Args:
        model: The network.
        name: What the user calls it.

    Raises:
        UserError: It has a layer that does not.
    """
    if size() == 1:
        return
    for path, module in model.named_modules():
        random = isinstance(module, _DropoutNd) and module.p > 0
        if random or isinstance(module, _BatchNorm):
            raise UserError(
                f"--model {name} needs one process: its {type(module).__name__} {path} would not "
                f"make of the shares of {size()} processes what it makes of the whole minibatch"
            )


def averaged(model: nn.Module) -> nn.Module:
    """The network as several processes call it: its gradients are the means over all of them."""
    return DistributedDataParallel(model)


def share(rows: Tensor) -> Tensor:
    """The part of a minibatch's rows [N] that is this process' own, [N / size]."""
    return rows.chunk(size())[rank()]


def mean(value: Tensor) -> Tensor:
    """The mean over all processes, on each of them."""
    if size() > 1:
        dist.all_reduce(value)
        value /= size()
    return value

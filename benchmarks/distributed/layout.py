"""One step of one of many processes, by the optimizer's own code, on the meta device.

Nothing here knows a formula: the tensors have their shapes and no memory, the process group has its
size and no processes, and what the code does is counted.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.distributed.counting import Call, Counter, Work, collectives, held
from benchmarks.distributed.networks import Network
from rlscuda import RLSOptimizer
from rlscuda.optim.layers import Layer, matrix_bytes
from rlscuda.optim.ranks.processes import Processes
from rlscuda.optim.ranks.shards import Rows
from rlscuda.optim.ranks.sharing import Sharing
from rlscuda.optim.staging import Stage
from rlscuda.optim.steps import stepping
from rlscuda.optim.steps.spectral import block_rows

SCHEMES = ("ddp", "shard_matrices", "fsdp2")


@dataclass(frozen=True)
class Seen:
    """What forward and backward of one minibatch leave.

    Attributes:
        network: Of which network.
        options: Of its optimizer.
        layers: Its covered layers.
        stages: What is staged of the input of each, by name.
        flops: Of forward and backward.
    """

    network: Network
    options: dict[str, Any]
    layers: list[Layer]
    stages: dict[str, Stage]
    flops: int


def seen(network: Network, **options: Any) -> Seen:
    """Runs forward and backward.

    Args:
        network: The network.
        options: Of `RLSOptimizer`.
    """
    model = network.meta()
    optimizer = RLSOptimizer(model, process_group=None, **options)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(network.input, device="meta")).sum().backward()
    registry = optimizer._registry
    stages = {layer.name: registry.stages[w] for w, layer in registry.layers.items()}
    return Seen(network, options, list(registry.layers.values()), stages, counter.get_total_flops())


@dataclass(frozen=True)
class Step:
    """What one process has and does.

    Attributes:
        weights: Bytes of its parameters; its gradients have as many.
        matrices: Bytes of `P`.
        state: Bytes of its whole state, `P` included.
        calls: The collectives of the step, in turn.
        work: Of the step.
    """

    weights: int
    matrices: int
    state: int
    calls: list[Call]
    work: Work

    @property
    def held(self) -> int:
        """Bytes of weights, gradients and state."""
        return 2 * self.weights + self.state

    @property
    def exchanged(self) -> int:
        """The most bytes of momentum or of weights that one call takes or gives."""
        return max((max(c.bytes, c.sent) for c in self.calls if c.kind != "all_reduce"), default=0)


@contextmanager
def one_of(size: int, rank: int) -> Iterator[None]:
    """Makes this the process `rank` of `size`, the others of which there are not."""
    dist.init_process_group("fake", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def on_meta(device: str) -> Iterator[None]:
    """Lets a step run on the meta device, in such parts as on another."""
    chunks = {"meta": stepping._CHUNK_BYTES[device]}
    with (
        mock.patch.dict(stepping._CHUNK_BYTES, chunks),
        mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),  # not of meta
        mock.patch.object(Processes, "begin"),  # once, and by reading what has no values
        mock.patch.object(Processes, "agree"),  # likewise
    ):
        yield


def ready_optimizer(given: Seen, scheme: str) -> tuple[nn.Module, RLSOptimizer]:
    """A model and its optimizer before a step, in a process group that there is already."""
    model = given.network.meta()
    if scheme == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    options = {"shard_matrices": scheme == "shard_matrices", **given.options}
    optimizer = RLSOptimizer(model, process_group=dist.group.WORLD, **options)
    for weight, layer in optimizer._registry.layers.items():
        optimizer._registry.covered[weight].stage = copy.copy(given.stages[layer.name])
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model, optimizer


def step_of(given: Seen, scheme: str, size: int, rank: int, device: str = "cpu") -> Step:
    """What a process has and does in one step.

    Args:
        given: What it has seen.
        scheme: One of `SCHEMES`: replicated under DDP, with owners under DDP, or by rows.
        size: Of how many.
        rank: Which of them.
        device: For which the step is to be divided into parts.
    """
    with one_of(size, rank), on_meta(device), collectives(really=False) as calls:
        model, optimizer = ready_optimizer(given, scheme)
        with Counter().counting() as counter:
            optimizer.step()
        states = [dict(state) for state in optimizer.state.values()]
        matrices = [state["P"] for state in states if "P" in state]
        sizes = (held(list(model.parameters())), held(matrices), held(states))
    return Step(*sizes, list(calls), counter.work)


def whole_blocks(rows: Rows) -> range:
    """The rows of all blocks, see `spectral.block_rows`, of which a process has some."""
    if rows.start == rows.stop:
        return range(0)
    m = block_rows(rows.total)
    return range(rows.start // m * m, min(-(-rows.stop // m) * m, rows.total))


def owner_of_most(given: Seen, size: int) -> tuple[int, int]:
    """With `shard_matrices`, the process that has most of `P`, and that which multiplies most."""
    sharing = Sharing()
    sharing.enter(None, 0, size)
    sizes = {x.weight: matrix_bytes(x, given.options.get("dtype")) for x in given.layers}
    sharing.assign(sizes)
    held, work = [0] * size, [0] * size
    for layer in given.layers:
        rank = sharing.owner(layer.weight)
        held[rank] += sizes[layer.weight]
        work[rank] += layer.outputs * layer.fan_in * layer.block_size
    return held.index(max(held)), work.index(max(work))


def busiest(given: Seen, size: int) -> tuple[int, int]:
    """By rows, the process that multiplies most by `P`, and that which exchanges most rows."""
    shapes = collections.Counter((x.outputs, x.fan_in, x.block_size) for x in given.layers)
    work, traffic = [0] * size, [0] * size
    for (c, n, columns), layers in shapes.items():
        parts = [Rows((), None, rank, size, c) for rank in range(size)]
        wanted = collections.Counter(row for part in parts for row in whole_blocks(part))
        for rank, part in enumerate(parts):
            work[rank] += len(whole_blocks(part)) * n * columns * layers
            takes = len(whole_blocks(part)) - (part.stop - part.start)
            gives = sum(wanted[row] - 1 for row in range(part.start, part.stop))
            traffic[rank] += max(takes, gives) * n * layers
    return work.index(max(work)), traffic.index(max(traffic))

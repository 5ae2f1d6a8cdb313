"""What each rank of a launch does at the corners of training under DDP; see `launch`."""

import copy
import gc
import weakref

import pytest
import torch
from distributed.cases.shards import sharded, train, whole
from distributed.training import backward, counted_reductions, minibatch, mlp, number_of, state_of
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer


class Mates(nn.Module):
    """Two layers that are shown the same input, where both are used."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, both):
        return self.q(x).tanh() * (self.k(x) if both else 1)


def mates(rank, size, kind):
    """The second rank uses the second layer in every other step."""
    torch.manual_seed(3)
    model = Mates().double()
    optimizer, ddp = RLSOptimizer(model, summary=kind), DDP(model, find_unused_parameters=True)
    for step in range(6):
        x, y = minibatch(mlp, number_of(step, 0, rank), 5 + rank)
        (ddp(x, rank == 0 or step % 2 == 0) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)


class Checkpointed(nn.Module):
    """Its layers run without gradients, and again amid the backward pass."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=True)


def checkpointed(rank, size):
    model = Checkpointed()
    optimizer, ddp = RLSOptimizer(model), DDP(model)
    for step in range(4):
        backward(ddp, mlp, [number_of(step, 0, rank)], [5])
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model.net, optimizer)


class TwoTypes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4).double()

    def forward(self, x):
        return self.second(self.first(x.float()).double())


def two_types(rank, size):
    """How many exchanges each of four steps has, of float32 layers and of float64 ones."""
    model = TwoTypes()
    optimizer, ddp = RLSOptimizer(model), DDP(model)
    counts = []
    for step in range(4):
        backward(ddp, mlp, [number_of(step, 0, rank)], [5])
        with counted_reductions() as calls:
            optimizer.step()
        counts.append(len(calls))
        optimizer.zero_grad()
    return counts, state_of(model, optimizer)


def let_go(rank, size):
    """Whether an optimizer lets go of a DDP module that is not called any more."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    ddp = DDP(model)
    backward(ddp, mlp, [1 + rank], [5])
    optimizer.step()
    left = weakref.ref(ddp)
    del ddp
    gc.collect()
    return left() is None and optimizer.health()["0"].updates == 1


def columns(rank, size):
    """A network whose layers all are column-wise parallel."""
    mesh = init_device_mesh("cpu", (size,))
    gathered = ColwiseParallel(output_layouts=Replicate())
    model = parallelize_module(mlp(), mesh, {"0": gathered, "2": gathered})
    optimizer = RLSOptimizer(model)
    backward(model, mlp, [1], [5])
    optimizer.step()
    return True


def one_row(rank, size):
    """A gradient that is not finite in a row that one process has; what moves, on any."""
    model = sharded(mlp, (size,))
    optimizer = RLSOptimizer(model)
    train(model, optimizer, mlp, rank, 2)
    before = whole(state_of(model, optimizer))
    backward(model, mlp, [number_of(2, 0, rank)], [5])
    if rank == 0:
        model[0].weight.grad.to_local()[0, 0] = torch.inf
    optimizer.step()
    after = whole(state_of(model, optimizer))
    return [k for k in before if k[0] in "WP" and not torch.equal(before[k], after[k])]


def shards_join(rank, size):
    model = mlp()
    with pytest.raises(ValueError, match="shard_matrices cannot take part in Join"):
        Join([DDP(model), RLSOptimizer(model, shard_matrices=True)])
    return True


def of_another(rank, size):
    """Asks for every matrix; the names of those that are elsewhere, and the whole state."""
    model, whole = mlp(), mlp()
    optimizer, other = RLSOptimizer(model, shard_matrices=True), RLSOptimizer(whole)
    for network, own in ((model, optimizer), (whole, other)):
        backward(DDP(network), mlp, [1 + rank], [5])
        own.step()
    elsewhere = []
    for name in ("0", "2"):
        try:
            optimizer.inverse_autocorrelation(name)
        except RuntimeError as error:
            assert f"the matrix of {name!r} is on rank {1 - rank}" in str(error)
            elsewhere.append(name)
    state, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
    same = [torch.equal(state[i]["P"], expected[i]["P"]) for i in (0, 2)]
    return elsewhere, all(same)


def shards_refused(rank, size):
    """A first step that is refused: what is left of it."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model, shard_matrices=True), DDP(model)
    before = copy.deepcopy(model.state_dict())
    backward(ddp, mlp, [1 + rank], [5])
    optimizer.param_groups[0]["max_fan_in"] = 4
    with pytest.raises(ValueError, match="max_fan_in of a group cannot change"):
        optimizer.step()
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    return moved, [dict(entries) for entries in optimizer.state.values() if entries]

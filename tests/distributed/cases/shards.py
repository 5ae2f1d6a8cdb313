"""What each rank of a launch does where weights are sharded; see `launch`."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.training import OUTPUTS, SHAPES, backward, minibatch, mlp, number_of, state_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

from rlscuda import RLSOptimizer


def wide():
    """Of layers whose blocks of rows the borders of shards cut, or not."""
    torch.manual_seed(5)
    layers = (nn.Linear(8, 130), nn.Tanh(), nn.Linear(130, 128), nn.Tanh(), nn.Linear(128, 4))
    return nn.Sequential(*layers).double()


def conv():
    """Of layers with fewer rows than ranks."""
    torch.manual_seed(2)
    layers = (nn.Conv2d(4, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, 6, 3, stride=2))
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3)).double()


SHAPES.update({wide: (8,), conv: (4, 6, 6)})
OUTPUTS.update({wide: 4, conv: 3})


def whole(state):
    """Distributed tensors as plain ones."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def sharded(make, shape):
    names = ("replicate", "shard")[-len(shape) :]
    mesh, model = init_device_mesh("cpu", shape, mesh_dim_names=names), make()
    for module in model:
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, make, rank, steps, start=0, rows=5):
    for step in range(start, start + steps):
        backward(model, make, [number_of(step, 0, rank)], [rows])
        optimizer.step()
        optimizer.zero_grad()


def fsdp(rank, size, make, shape, options):
    """Ten steps, and what the optimizer says of the layers."""
    model = sharded(make, shape)
    optimizer = RLSOptimizer(model.parameters(), **options)
    statuses = [row.status for row in optimizer.coverage() if "Norm" not in row.kind]
    train(model, optimizer, make, rank, 10)
    return whole(state_of(model, optimizer)), statuses, optimizer.health()


def fsdp_accumulates(rank, size):
    """Three minibatches a step, of which two are not synchronised."""
    model = sharded(mlp, (size,))
    optimizer = RLSOptimizer(model)
    for step in range(4):
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            backward(model, mlp, [number_of(step, micro, rank)], [5])
        optimizer.step()
        optimizer.zero_grad()
    return whole(state_of(model, optimizer))


def fsdp_refuses(rank, size):
    """A minibatch that is not finite, on one rank only."""
    model = sharded(mlp, (size,))
    optimizer = RLSOptimizer(model)
    train(model, optimizer, mlp, rank, 2)
    before = whole(state_of(model, optimizer))
    x, y = minibatch(mlp, 1 + rank, 5)
    x[0, 0] = float("nan") if rank == 0 else 1.0
    (model(x) - y).square().mean().backward()
    optimizer.step()
    after = whole(state_of(model, optimizer))
    moved = max(float((before[k] - after[k]).abs().max()) for k in before if k[0] in "WP")
    return moved, [h.refused for h in optimizer.health().values()]


def made_first(rank, size):
    """An optimizer made before the model is sharded, whose parameters are then switched."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    old = list(model.parameters())
    mesh = init_device_mesh("cpu", (size,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    new = dict(zip(old, model.parameters()))
    for group in optimizer.param_groups:  # as accelerate does
        group["params"] = [new[p] for p in group["params"]]
    before = [p.full_tensor().clone() for p in model.parameters()]
    train(model, optimizer, mlp, rank, 10)
    moved = [float((p.full_tensor() - b).abs().max()) for p, b in zip(model.parameters(), before)]
    return moved, [row.status for row in optimizer.coverage()], optimizer.health()


def tensor_parallel(rank, size, options):
    """A column-wise layer followed by one that gathers; all ranks have the same minibatches."""
    mesh = init_device_mesh("cpu", (size,))
    gathered = ColwiseParallel(output_layouts=Replicate())
    model = parallelize_module(wide(), mesh, {"0": gathered, "2": gathered})
    optimizer = RLSOptimizer(model, **options)
    statuses = [row.status for row in optimizer.coverage()]
    train(model, optimizer, wide, 0, 10)
    return whole(state_of(model, optimizer)), statuses


def row_wise(rank, size):
    """A row-wise layer after a column-wise one."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(mlp(), init_device_mesh("cpu", (size,)), plan)
    optimizer = RLSOptimizer(model)
    train(model, optimizer, mlp, 0, 3)
    return [(row.status, row.why) for row in optimizer.coverage()]


def flat(rank, size, original):
    """The older FullyShardedDataParallel, whose parameters are parts of flat ones."""
    model = FullyShardedDataParallel(mlp(), use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = RLSOptimizer(model)
    train(model, optimizer, mlp, rank, 3)
    return [(row.status, row.why) for row in optimizer.coverage()]


def saved(rank, size, folder, kind):
    """Training that is saved after five steps; the state after ten."""
    model = sharded(mlp, (size,)) if kind == "fsdp" else mlp()
    optimizer = RLSOptimizer(model)
    called = DDP(model) if kind == "ddp" else model
    train(called, optimizer, mlp, rank, 5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(called, optimizer, mlp, rank, 5, start=5)
    return whole(state_of(model, optimizer))


def loaded(rank, size, folder, kind, members, shares):
    """The same from the checkpoint, on some of the ranks, each with as many shares of the data."""
    group = dist.new_group(members)
    if rank not in members:
        return None
    torch.manual_seed(7)
    model = mlp()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
    optimizer = RLSOptimizer(model, process_group=None if len(members) == 1 else "auto")
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=folder, process_group=group, no_dist=len(members) == 1)
    set_state_dict(
        model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
    )
    called = DDP(model, process_group=group) if kind == "ddp" and len(members) > 1 else model
    for step in range(5, 10):
        x, y = (
            torch.cat(part)
            for part in zip(
                *(minibatch(mlp, number_of(step, 0, rank * shares + s), 5) for s in range(shares))
            )
        )
        (called(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(state_of(model, optimizer))

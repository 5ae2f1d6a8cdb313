"""What each rank of a launch does under DistributedDataParallel; see `launch`."""

import copy
import math
from types import MappingProxyType

import torch
import torch.distributed as dist
from distributed.training import (
    cnn,
    counted_reductions,
    ddp_process,
    minibatch,
    mlp,
    number_of,
    state_of,
)
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from rlscuda import RLSOptimizer
from rlscuda.optim.ranks.processes import Processes
from rlscuda.optim.staging import Stage
from rlscuda.optim.steps.reduction import Part, reduce_summaries
from rlscuda.pruning import RLSPruner


def exact(rank, size, make, steps, options):
    return ddp_process(make, rank, steps, **options)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.odd, self.even = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, odd):
        return (self.odd if odd else self.even)(self.first(x).tanh())


def unused(rank, size):
    """Of two layers each rank uses one."""
    torch.manual_seed(3)
    model = Branches().double()
    optimizer, ddp = RLSOptimizer(model), DDP(model, find_unused_parameters=True)
    for step in range(10):
        x, y = minibatch(mlp, number_of(step, 0, rank), 5)
        (ddp(x, rank % 2) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = {k: (h.updates, h.missing) for k, h in optimizer.health().items()}
    return state_of(model, optimizer), counts


def uneven(rank, size, options):
    """Minibatches of eight on the first rank, of five on the others."""
    return ddp_process(mlp, rank, 6, rows=5 if rank else 8, **options)


def unbiased(rank, size, kind, draws):
    """The mean of S^T S / r over many seeds, of ranks whose draws overlap, and X^T X / R."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = RLSOptimizer(model, summary=kind, rank=2, process_group=dist.group.WORLD)
    (layer,) = optimizer._registry.layers.values()
    processes, group = Processes(dist.group.WORLD), optimizer.param_groups[0]
    rows = [torch.arange(1.0, 1 + 3 * n).view(n, 3).cos() for n in (7, 2)]  # both draw by 2 and 3
    x = torch.cat(rows)
    mean = torch.zeros(3, 3, dtype=torch.float64)
    own = [dict(group, seed=seed) for seed in range(draws)]
    for options in own:
        stage = Stage()
        output = model(rows[rank].requires_grad_())
        place = (rank, size)
        stage.observe(layer, options, 0, optimizer._registry.inputs, place, rows[rank], [output], 1)
        output.sum().backward()
        optimizer.zero_grad()
        (summary,) = reduce_summaries([Part(layer, options, stage, 0)], processes)
        s = summary.rows[0].double()
        mean += s.T @ s / len(s) / draws
    return mean, x.double().T @ x.double() / len(x)


def joined(rank, size, alone, options=MappingProxyType({})):
    """Twelve minibatches on the first rank, seven on the others, in one context or DDP's own."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model, **options), DDP(model)
    with ddp.join() if alone else Join([ddp, optimizer]):
        for step in range(7 if rank else 12):
            x, y = minibatch(mlp, number_of(step, 0, rank), 5)
            (ddp(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return state_of(model, optimizer)


def refused_together(rank, size, bad):
    """A minibatch that is not finite, on one rank only."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model), DDP(model)
    for step in range(3):
        before = copy.deepcopy(model.state_dict())
        x, y = minibatch(mlp, number_of(step, 0, rank), 5)
        if step == 2 and rank == 0:
            x[0, 0] = bad
        (ddp(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = max((before[k] - v).abs().max() for k, v in model.state_dict().items())
    refused = [h.refused for h in optimizer.health().values()]
    return float(moved), refused, state_of(model, optimizer)


def elastic(rank, size, folder, options):
    """Seven steps on two ranks, seven on four, six on one, by a plain file."""
    model, start = mlp(), 0
    optimizer = RLSOptimizer(model, **options)
    for steps, members in ((7, [0, 1]), (7, [0, 1, 2, 3]), (6, [0])):
        group = dist.new_group(members)
        if start:
            saved = torch.load(f"{folder}/saved", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer = RLSOptimizer(model, **options)
            optimizer.load_state_dict(saved["optimizer"])
        if rank in members:
            ddp = DDP(model, process_group=group)
            for step in range(start, start + steps):
                shares = [minibatch(mlp, number_of(step, 0, part), 8) for part in range(4)]
                x, y = (torch.cat(part).chunk(len(members))[rank] for part in zip(*shares))
                (ddp(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        start += steps
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, f"{folder}/saved")
        dist.barrier()
    return state_of(model, optimizer) if rank == 0 else None


def counted(rank, size, kind):
    """The calls of all_reduce of the third step, and their bytes."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model, summary=kind, rank=4), DDP(model)
    for step in range(3):
        x, y = minibatch(mlp, number_of(step, 0, rank), 5)
        (ddp(x) - y).square().mean().backward()
        with counted_reductions() as calls:
            optimizer.step()
        optimizer.zero_grad()
    return calls


def at_rest(rank, size, options):
    """How often each of ten steps calls all_reduce."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model, **options), DDP(model)
    counts = []
    for step in range(10):
        x, y = minibatch(mlp, number_of(step, 0, rank), 5)
        (ddp(x) - y).square().mean().backward()
        with counted_reductions() as calls:
            optimizer.step()
        counts.append(len(calls))
        optimizer.zero_grad()
    return counts


def apart(rank, size, options):
    """No DDP: each process on its own, with or without saying so."""
    model = mlp()
    optimizer = RLSOptimizer(model, **options)
    for _ in range(2):
        model(minibatch(mlp, 1 + rank, 5)[0]).square().mean().backward()
        optimizer.step()
    return True


def another_seed(rank, size):
    """The optimizers of the ranks are not made alike."""
    model = mlp()
    return after_refusal(model, RLSOptimizer(model, seed=rank))


def another_step(rank, size, begun=0):
    """A checkpoint that only one rank has loaded: in the midst of a run, or `begun` steps old."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    own = RLSOptimizer(model, process_group=None) if begun else optimizer
    ddp = model if begun else DDP(model)
    ddp(minibatch(mlp, 1, 5)[0]).square().mean().backward()
    own.step()
    if rank == 0:
        state = copy.deepcopy(own.state_dict())
        for entries in state["state"].values():
            if "P" in entries:
                entries["step"] = begun or 5
        optimizer.load_state_dict(state)
    return after_refusal(model, optimizer)


def zero(rank, size):
    """An optimizer that holds a share of the parameters."""
    model = mlp()
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=RLSOptimizer, model=model
    )
    return after_refusal(model, optimizer)


def after_refusal(model, optimizer):
    """Whether anything moved, and the message."""
    ddp = DDP(model)
    own = getattr(optimizer, "optim", optimizer)
    before = copy.deepcopy((model.state_dict(), own.state_dict()["state"]))
    ddp(minibatch(mlp, 1, 5)[0]).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        after = (model.state_dict(), own.state_dict()["state"])
        return str(error), all(map(equal, before, after))
    return "no error", False


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def long(rank, size, options):
    """400 steps at a cosine rate; the test error."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    model.double()
    optimizer = RLSOptimizer(model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    wrapped = DDP(model) if size > 1 else model
    ranks = [rank] if size > 1 else [0, 1]
    for step in range(400):
        x = torch.cat([minibatch(mlp, number_of(step, 0, r), 16)[0] for r in ranks])
        (wrapped(x) - target(x)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    x = minibatch(mlp, 10**7, 1000)[0]
    with torch.no_grad():
        return float((model(x) - target(x)).square().mean())


def target(x):
    return torch.stack([x[:, i] * x[:, i + 1] + math.sin(i) * x[:, i + 2] for i in range(4)], 1)


def bytes_here(optimizer):
    """Of the matrices on this process."""
    return sum(e["P"].numel() * 8 for e in optimizer.state.values() if "P" in e)


def shared(rank, size, make, options):
    """Sharded matrices: ten steps; then five from the whole state in an optimizer made anew."""
    model = make()
    optimizer = RLSOptimizer(model, shard_matrices=True, **options)
    weights = ddp_process(make, rank, 10, model=model, optimizer=optimizer)
    held, state = bytes_here(optimizer), copy.deepcopy(optimizer.state_dict())
    other = make()
    other.load_state_dict(model.state_dict())
    again = RLSOptimizer(other, shard_matrices=True, **options)
    again.load_state_dict(state)
    on = [
        {
            k: v
            for k, v in ddp_process(make, rank, 5, model=m, optimizer=o, start=10).items()
            if "W" in k
        }
        for m, o in ((model, optimizer), (other, again))
    ]
    return {k: v for k, v in weights.items() if k[0] == "W"}, state, held, on


def replicated(rank, size, make, options):
    """The same with all matrices everywhere."""
    model = make()
    optimizer = RLSOptimizer(model, **options)
    ddp_process(make, rank, 10, model=model, optimizer=optimizer)
    return state_of(model, optimizer), optimizer.state_dict(), bytes_here(optimizer)


def pruned(rank, size, options):
    """Half of the channels go between two times three steps; the state, or why they cannot."""
    torch.manual_seed(2)
    layers = (nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, stride=2), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3)).double()
    optimizer = RLSOptimizer(model, **options)
    ddp_process(cnn, rank, 3, model=model, optimizer=optimizer)
    pruner = RLSPruner(model, optimizer, minibatch(cnn, 1, 2)[0], ratio=0.5)
    before = copy.deepcopy(model.state_dict())
    try:
        pruner.step()
    except ValueError as error:
        return str(error), equal(before, model.state_dict())
    assert model[0].out_channels == 8
    return ddp_process(cnn, rank, 3, model=model, optimizer=optimizer, start=3)


def shared_refuses(rank, size):
    """A gradient that is not finite, of a layer that one process owns."""
    model = mlp()
    optimizer, ddp = RLSOptimizer(model, shard_matrices=True), DDP(model)
    ddp(minibatch(mlp, 1 + rank, 5)[0]).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad[0, 0] = math.inf
    optimizer.step()
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

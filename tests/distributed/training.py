"""The same training by several processes and by one that sees all their minibatches in turn."""

import itertools
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from rlscuda import RLSOptimizer


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def cnn():
    torch.manual_seed(2)
    layers = (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2))
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3)).double()


SHAPES = {mlp: (8,), cnn: (4, 6, 6)}
OUTPUTS = {mlp: 4, cnn: 3}


def minibatch(make, number, rows):
    """Inputs and targets, the same wherever they are made."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, *SHAPES[make], generator=generator, dtype=torch.float64) + 0.3
    return x, torch.randn(rows, OUTPUTS[make], generator=generator, dtype=torch.float64)


def number_of(step, micro, rank):
    return 1 + rank + 10 * micro + 1000 * step


def state_of(model, optimizer):
    """Weights and the whole state, by name of parameter and entry."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"W {name}": p.detach().clone() for p, name in names.items()}
    for p, entries in optimizer.state.items():
        for entry, value in entries.items():
            tensors[f"{entry} {names[p]}"] = torch.as_tensor(value).clone()
    return tensors


def spread(ranks):
    """The entries in which the states of the ranks are not equal to the bit."""
    first = ranks[0]
    assert all(other.keys() == first.keys() for other in ranks)
    return [k for k in first if not all(torch.equal(other[k], first[k]) for other in ranks)]


def distance(one, other, of):
    """The largest absolute difference of the entries that begin with some text."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one if k.startswith(of))


def same(ranks, tolerance=1e-15):
    """Asserts that ranks, each with its state and that of one process, end with the same."""
    states = [state for state, *_ in ranks]
    assert not spread(states)
    assert distance(states[0], ranks[0][1], "P ") <= 2 * tolerance
    assert distance(states[0], ranks[0][1], "W ") <= tolerance


def backward(model, make, numbers, rows):
    x, y = minibatch_of_ranks(make, numbers, rows)
    loss = (model(x) - y).square().mean()
    loss.backward()


def minibatch_of_ranks(make, numbers, rows):
    parts = [minibatch(make, number, n) for number, n in zip(numbers, rows)]
    return tuple(map(torch.cat, zip(*parts)))


def one_process(make, size, steps, micro=1, rows=5, **options):
    """The state after training on the minibatches of all ranks, joined."""
    model = make()
    optimizer = RLSOptimizer(model, **options)
    for step in range(steps):
        for part in range(micro):
            numbers = [number_of(step, part, rank) for rank in range(size)]
            backward(model, make, numbers, [rows] * size)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)


def ddp_process(
    make, place, steps, micro=1, rows=5, model=None, optimizer=None, start=0, **options
):
    """The state of one rank after training on its own minibatches, under DDP."""
    model = make() if model is None else model
    optimizer = optimizer or RLSOptimizer(model, **options)
    ddp = DDP(model)
    for step, part in itertools.product(range(start, start + steps), range(micro)):
        numbers = [number_of(step, part, place)]
        if part + 1 < micro:
            with ddp.no_sync():
                backward(ddp, make, numbers, [rows])
            continue
        backward(ddp, make, numbers, [rows])
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer)


@contextmanager
def counted_reductions():
    """The type and the bytes of every all-reduce inside, in turn."""
    calls, original = [], dist.all_reduce

    def count(tensor, *args, **kwargs):
        calls.append((tensor.dtype, tensor.numel() * tensor.element_size()))
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", count):
        yield calls

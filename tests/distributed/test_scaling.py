"""What is computed of many processes, against closed forms; no process is launched."""

import argparse
import json
import math

import pytest
import torch
from torch import nn

from benchmarks import tables
from benchmarks.distributed import checks, constants, scaling
from benchmarks.distributed.counting import Call, Counter, Work
from benchmarks.distributed.layout import busiest, owner_of_most, seen, step_of
from benchmarks.distributed.networks import Network, llama7b, resnet50
from benchmarks.distributed.owners import Matrix, matrices_of, owned_step, shares
from rlscuda import RLSOptimizer
from rlscuda.optim.steps import spectral

OUTPUTS, INPUTS = (150, 150, 7), (21, 21, 151)  # with the biases' columns; two see one input
RANK, SLOTS = 16, 7


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 150), nn.Linear(20, 150), nn.Linear(150, 7)

    def forward(self, x):
        return self.head(self.a(x) * self.b(x))


@pytest.fixture(scope="module")
def given():
    return seen(Network("tiny", Tiny, (4, 20), "4 rows"))


def matrices(size):
    """Columns of each P: on one process the two layers of one input have one."""
    return [21, 151] if size == 1 else [21, 21, 151]


def rows(c, size, rank):
    """First and last + 1, of parts as large as the first."""
    most = math.ceil(c / size)
    return min(rank * most, c), min((rank + 1) * most, c)


def lacking(c, size, rank):
    """Rows of others in the blocks of which a process has some."""
    m, (start, stop) = math.ceil(c / math.ceil(c / 64)), rows(c, size, rank)
    blocks = {row // m for row in range(start, stop)}
    return [row for row in range(c) if row // m in blocks and not start <= row < stop]


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_bytes_of_ddp(given, size):
    step = step_of(given, "ddp", size, 0)
    assert step.weights == 4 * sum(c * n for c, n in zip(OUTPUTS, INPUTS))
    assert step.matrices == 4 * sum(n**2 for n in matrices(size))
    once = len(matrices(size)) * (8 * SLOTS + 4)  # health and power of each P
    assert step.state == step.weights + step.matrices + once
    keys, summaries = 8 * (2 * RANK * 3 + 2 * 3 + 2), 4 * (RANK * sum(INPUTS) + RANK * 3)
    calls = [Call("all_reduce", keys), Call("all_reduce", summaries)]
    assert step.calls == (calls if size > 1 else [])
    assert step == step_of(given, "ddp", size, size - 1)


@pytest.mark.parametrize("size, rank", [(2, 0), (2, 1), (4, 3), (5, 2), (64, 6), (64, 63)])
def test_bytes_of_fsdp2(given, size, rank):
    step = step_of(given, "fsdp2", size, rank)
    parts = [rows(c, size, rank) for c in OUTPUTS]
    here = [stop - start for start, stop in parts]
    assert step.weights == 4 * sum(c * n for c, n in zip(here, INPUTS))
    assert step.matrices == 4 * sum(n**2 for n in matrices(size))
    assert step.state == step.weights + step.matrices + 3 * (8 * SLOTS + 4)
    exchanges = []
    for c, n, together in ((150, 21, 2), (7, 151, 1)):  # of one shape at once
        own = lacking(c, size, rank)
        others = [lacking(c, size, other) for other in range(size) if other != rank]
        start, stop = rows(c, size, rank)
        given_away = sum(start <= row < stop for lacked in others for row in lacked)
        if own or any(others):
            row = 4 * together * n
            exchanges.append(Call("all_to_all_single", row * len(own), row * given_away))
    found = [c for c in step.calls if c.kind != "all_reduce"]
    assert sorted(found, key=str) == sorted(exchanges, key=str)
    ddp = step_of(given, "ddp", size, rank).calls
    assert step.calls[:3] == [*ddp, Call("all_reduce", 4)]
    norms = [c.bytes for c in step.calls[3:] if c.kind == "all_reduce"]
    assert sorted(norms) == [4, 4, 8, 8]  # a peak and a length of each layer
    product = 0
    for c, n, (start, stop) in zip(OUTPUTS, INPUTS, parts):
        m = math.ceil(c / math.ceil(c / 64))
        blocks = math.ceil(stop / m) - start // m if stop > start else 0
        product += 2 * blocks * m * n * n
    assert step.work.product == product


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_bytes_of_shard_matrices(given, size):
    steps = [step_of(given, "shard_matrices", size, rank) for rank in range(size)]
    heavy, busy = owner_of_most(given, size)
    assert steps[heavy].matrices == max(step.matrices for step in steps) >= 4 * 151**2
    assert steps[busy].work.product == max(step.work.product for step in steps)
    assert sum(step.work.product for step in steps) == step_of(given, "ddp", 1, 0).work.product
    # the matrix of the head is the largest, then those of the two before it come
    owned = {1: [[0, 1, 2]], 2: [[2], [0, 1]]}.get(size, [[2], [0], [1], *[[]] * (size - 3)])
    sizes = [sum(OUTPUTS[i] * INPUTS[i] for i in own) for own in owned]
    for step, own in zip(steps, owned, strict=True):
        expected = matrices(1) if size == 1 else [INPUTS[i] for i in own]
        assert step.matrices == 4 * sum(n**2 for n in expected)
        if size > 1:
            ddp = step_of(given, "ddp", size, 0).calls
            broadcasts = [Call("broadcast", 4 * count) for count in sizes if count]
            assert step.calls == ddp + broadcasts  # every weight once


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_busiest_processes(given, size):
    steps = [step_of(given, "fsdp2", size, rank) for rank in range(size)]
    products = [step.work.product for step in steps]
    exchanges = [[c for c in step.calls if c.kind == "all_to_all_single"] for step in steps]
    traffic = [sum(call.wire(size) for call in calls) for calls in exchanges]
    most, exchanging = busiest(given, size)
    assert (products[most], traffic[exchanging]) == (max(products), max(traffic))
    taken, sent = (sum(getattr(c, x) for y in exchanges for c in y) for x in ("bytes", "sent"))
    assert taken == sent  # every row that is given is taken


def test_the_networks_are_what_they_are_called():
    convolutional = seen(Network("r", resnet50, (1, 3, 64, 64), ""))
    assert len(convolutional.stages) == 54
    assert sum(p.numel() for p in convolutional.network.meta().parameters()) == 25_557_032
    model = Network("l", llama7b, (1, 1, 4096), "").meta()
    assert sum(p.numel() for p in model.parameters()) == 32 * (4 * 4096 + 3 * 11008) * 4096
    assert len(list(model.parameters())) == 224


def test_work_is_counted_by_its_kind():
    x, w = torch.ones(3, 8), torch.ones(8, 5)
    with Counter().counting() as counter:
        (x @ w).add_(1).view(-1)
        torch.empty(9).copy_(torch.zeros(9))
    assert counter.work == Work(direction=2 * 3 * 8 * 5, passes=4 * (2 * 15 + 3 * 9))


def test_meta_and_real_steps_ask_for_the_same(given, monkeypatch):
    monkeypatch.setattr(spectral, "ONE_CALL", set())  # as on the devices that meta stands for
    model = Tiny()
    optimizer = RLSOptimizer(model, process_group=None)
    model(torch.randn(4, 20)).square().sum().backward()
    with Counter().counting() as counter:
        optimizer.step()
    said = step_of(given, "ddp", 1, 0).work
    assert (said.product, said.direction) == (counter.work.product, counter.work.direction)
    assert said.update == counter.work.update > 2 * 4 * (21**2 + 151**2)


def test_every_kind_of_work_has_a_speed(monkeypatch):
    monkeypatch.setattr(constants, "N", 128)
    seconds = {constants.LITTLE: 1e-4, constants.MUCH: 1e-2}
    speeds, over = constants.measured(seconds, rounds=1)
    assert all(0 < speed < math.inf for speed in vars(speeds).values())
    assert 0 < over < math.inf


def test_every_matrix_has_one_owner(given):
    found = matrices_of(given)
    assert [m.bytes for m in found] == [4 * 21**2, 4 * 21**2, 4 * 151**2]
    assert [m.moved for m in found] == [4 * 150 * 21, 4 * 150 * 21, 4 * 7 * 151]
    assert sum((m.work for m in found), Work()).product == step_of(given, "ddp", 2, 0).work.product
    some = [Matrix(size, 0, Work()) for size in torch.randint(1, 1000, (50,)).tolist()]
    for size in (1, 3, 8, 64):
        owned = shares(some, size)
        assert sorted(map(id, some)) == sorted(id(m) for share in owned for m in share)
        loads, largest = (
            [sum(m.bytes for m in share) for share in owned],
            max(m.bytes for m in some),
        )
        assert max(loads) <= sum(loads) / size + largest
    by_rows = step_of(given, "fsdp2", 4, 0)
    step = owned_step(found, by_rows, 4)
    assert step.matrices == 4 * 151**2
    assert by_rows.held - step.held == by_rows.matrices - step.matrices
    moved = 3 * (2 * 4 * 150 * 21 + 4 * 7 * 151) // 4 // 4, 3 * 4 * 150 * 21 // 4
    assert [(c.sent, c.bytes) for c in step.calls[3:]] == [moved, moved[::-1]]


def test_times_of_collectives():
    speeds = constants.Speeds(1, 1, 1, 1, 1, link=100.0, latency=0.5)
    calls = [Call("all_reduce", 1000), Call("broadcast", 400), Call("all_to_all_single", 700, 600)]
    assert speeds.waiting(calls, 1) == 0
    assert speeds.waiting(calls, 4) == pytest.approx(15 + 4 + 7 + 0.5 * (4 + 2 + 1))
    with pytest.raises(KeyError, match="gather"):
        speeds.waiting([Call("gather", 0)], 4)
    fitted = constants.link({checks.LITTLE: 2e-3, checks.MUCH: 2e-3 + checks.MUCH / 1e9})
    assert fitted["latency"] == 1e-3
    assert fitted["link"] == pytest.approx(1e9, rel=1e-5)


def test_assumed_speeds_are_all_given_or_none():
    def options(*line):
        parser = argparse.ArgumentParser()
        constants.add_options(parser)
        return constants.given(parser.parse_args(line))

    whole = ["--flops=2", "--memory-bandwidth=3", "--link-bandwidth=4", "--latency=5"]
    assert options() is None
    assert options(*whole) == constants.Speeds(2, 2, 3, 3, 2, 4, 5)
    assert options(*whole, "--training-flops=6").training == 6
    with pytest.raises(ValueError, match="--memory-bandwidth, --latency"):
        options(whole[0], whole[2])
    with pytest.raises(ValueError, match="> 0"):
        options(*whole, "--training-flops=0")


def test_a_training_that_does_something_else_is_an_error(monkeypatch):
    given = seen(checks.SMALL, **checks.OPTIONS[0])
    step = step_of(given, "ddp", 2, 0)
    monkeypatch.setattr(checks, "SIZES", (2,))
    monkeypatch.setattr(checks, "OPTIONS", checks.OPTIONS[:1])
    monkeypatch.setattr(checks, "SCHEMES", ("ddp",))
    right = [step.calls, step.matrices, step.state]
    others = [[*step.calls, Call("barrier", 0)], step.matrices + 4, step.state + 4]
    timed = {checks.LITTLE: 1.0, checks.MUCH: 2.0}
    for place in (None, 0, 1, 2):
        found = tuple(x if i != place else others[i] for i, x in enumerate(right))
        results = [[found] * 2, [timed] * 2]
        monkeypatch.setattr(checks, "launch", lambda size, jobs, results=results: results)
        if place is None:
            (record,), seconds = checks.check()
            assert record["state_bytes"] == [step.state] * 2 and seconds == {2: timed}
        else:
            with pytest.raises(AssertionError, match="ddp .* rank 0 of 2: said"):
                checks.check()


def test_where_schemes_end(given, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", [1, 2, 4])
    machines = {"measured": constants.Speeds(1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e-6)}
    memory = 10.0 * step_of(given, "ddp", 2, 0).matrices - 1
    record = scaling.network_record(given.network, machines, memory)
    ends = record["ends"]
    assert ends["replicated_above_share_from"] == 2  # one process shares a P
    assert ends["owned_within_share_from"] == 1 and ends["largest_is_the_floor_from"] == 2
    assert ends["rows_exchanged_from"] == 2  # 75 rows of each are one and a half blocks of 50
    document = {
        "environment": dict.fromkeys(("cpu", "cores", "load_at_start", "torch"), 1)
        | {"source_hash": "other", "started": "2000-01-01T"},
        "memory": {"bytes": memory, "assumed": True},
        "speeds": {"measured": vars(machines["measured"])},
        "step": {"measured": 1.0, "computed": 1.0},
        "trainings": [{"ranks": 1}],
        "all_reduce": {"bytes": 1 << 20, "ranks": 4, "measured": 1.0, "computed": 1.0},
        "networks": [record],
    }
    monkeypatch.setattr(tables.distributed, "SHOWN", ("1", "4"))
    text = tables.scaling(json.loads(json.dumps(document)))
    assert "| 4 | " in text and "not built" in text and "Stale" in text

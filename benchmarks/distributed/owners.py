"""What a step would cost if every `P` had one owner under FSDP2. The optimizer does not do this.

A rank keeps the rows of weights and moments that FSDP2 gives it. It sends the momentum of its rows
to the owner of their `P`, which makes the direction of the whole layer and sends the rows back.
Owners are chosen greedily, the largest matrix first, to the one that has the fewest elements.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.distributed.counting import Call, Counter, Work, held
from benchmarks.distributed.layout import Seen, Step, on_meta, one_of, ready_optimizer
from rlscuda.optim.state import ready
from rlscuda.optim.steps.stepping import step_layers
from rlscuda.optim.steps.whole import move_of


@dataclass(frozen=True)
class Matrix:
    """One `P`, which is of one layer.

    Attributes:
        bytes: Its own.
        moved: Of the momentum of its layer.
        work: Of a step of that.
    """

    bytes: int
    moved: int
    work: Work


def matrices_of(given: Seen) -> list[Matrix]:
    """Every `P` of a network that several processes train."""
    found = []
    with one_of(2, 0), on_meta("cpu"), torch.no_grad():
        _, optimizer = ready_optimizer(given, "ddp")
        registry, states = optimizer._registry, optimizer.state
        covered = list(registry.covered.values())
        ready(states, registry, covered, optimizer._fallback, alone=False)
        for one in covered:
            move = move_of(one, states, one.stage.summary)
            P = move.state["P"]
            moved = move.outputs * move.layer.fan_in * P.element_size()
            with Counter().counting() as counter:
                step_layers([move], {})
            found.append(Matrix(held(P), moved, counter.work))
    return found


def shares(matrices: Iterable[Matrix], size: int) -> list[list[Matrix]]:
    """The matrices of each of `size` owners."""
    owned: list[list[Matrix]] = [[] for _ in range(size)]
    heap = [(0, rank) for rank in range(size)]
    for matrix in sorted(matrices, key=lambda m: -m.bytes):
        load, rank = heap[0]
        owned[rank].append(matrix)
        heapq.heapreplace(heap, (load + matrix.bytes, rank))
    return owned


def owned_step(matrices: list[Matrix], rows: Step, size: int) -> Step:
    """The step of an owner that has the most of everything.

    Args:
        matrices: Of the network.
        rows: The step of FSDP2 of as many processes, with as much exchanged of the inputs.
        size: Processes.
    """
    if size == 1:
        return rows
    owned = [share for share in shares(matrices, size) if share]
    most = max(sum(m.bytes for m in share) for share in owned)
    counts = (sum(m.moved for m in matrices) // size,
              max(sum(m.moved for m in share) for share in owned))  # fmt: skip
    rank, owner = (count * (size - 1) // size for count in counts)  # what is of others
    calls = rows.calls[:3]  # of what was seen of the inputs, and whether gradients are finite
    calls += [Call("all_to_all_single", *counts) for counts in ((owner, rank), (rank, owner))]
    work = max((sum((m.work for m in share), Work()) for share in owned), key=lambda w: w.product)
    state = rows.state - rows.matrices + most
    return Step(rows.weights, most, state, calls, work)

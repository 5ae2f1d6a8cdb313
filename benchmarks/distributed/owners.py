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
from rlscuda.optim.layers import Layer
from rlscuda.optim.state import ready
from rlscuda.optim.steps.reduction import staged
from rlscuda.optim.steps.stepping import step_layers
from rlscuda.optim.steps.whole import _move


@dataclass(frozen=True)
class Matrix:
    """One `P` and the layers that have it.

    Attributes:
        bytes: Its own.
        moved: Of the momentum of its layers.
        work: Of a step of them.
    """

    bytes: int
    moved: int
    work: Work


def matrices_of(given: Seen) -> list[Matrix]:
    """Every `P` of a network."""
    found = []
    with one_of(1, 0), on_meta("cpu"), torch.no_grad():
        _, optimizer = ready_optimizer(given, "ddp")
        registry, states = optimizer._registry, optimizer.state
        ready(states, registry, list(registry.layers.values()), optimizer._fallback)
        summaries = staged(registry, states, optimizer._processes)
        together: dict[int, list[Layer]] = {}
        for weight, layer in registry.layers.items():
            together.setdefault(id(states[weight]["P"]), []).append(layer)
        for layers in together.values():
            moves = [_move(layer, registry, states, summaries) for layer in layers]
            P = moves[0].state["P"]
            moved = sum(m.outputs * m.layer.fan_in for m in moves) * P.element_size()
            with Counter().counting() as counter:
                step_layers(moves, {})
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
    owned = [share for share in shares(matrices, size) if share]
    most = max(sum(m.bytes for m in share) for share in owned)
    sent = sum(m.moved for m in matrices) // size
    returned = max(sum(m.moved for m in share) for share in owned)
    calls = rows.calls[:3]  # of what was seen of the inputs, and whether gradients are finite
    calls += [Call("all_to_all_single", count) for count in (sent, returned)] if size > 1 else []
    work = max((sum((m.work for m in share), Work()) for share in owned), key=lambda w: w.product)
    state = rows.state - rows.matrices + most
    return Step(rows.weights, most, state, calls, work, missing=0)

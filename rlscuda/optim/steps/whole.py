"""One step of an optimizer: all that may refuse comes before the first parameter moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rlscuda._torch import tree_map
from rlscuda.optim import advice
from rlscuda.optim.discovery import Covered, Registry
from rlscuda.optim.fallback import IN_P, Fallback
from rlscuda.optim.forms import COUNTS, span_of
from rlscuda.optim.layers import matrix_bytes
from rlscuda.optim.moves import Move, Workspace
from rlscuda.optim.ranks.processes import Processes
from rlscuda.optim.ranks.shards import local, rows_of
from rlscuda.optim.ranks.sharing import Sharing
from rlscuda.optim.staging import Summary
from rlscuda.optim.state import check_fits, ensure_momentum, forget, ready
from rlscuda.optim.steps.reduction import staged
from rlscuda.optim.steps.ridges import ensure_powers
from rlscuda.optim.steps.stepping import step_layers


def take_step(
    groups: list[dict[str, Any]],
    states: dict[Any, dict[str, Any]],
    registry: Registry,
    fallback: Fallback,
    processes: Processes,
    workspace: Workspace,
    each: bool,
) -> tuple[list[str], bool]:
    """Moves every parameter that has a gradient.

    Args:
        groups: The parameter groups, whose options have been checked.
        states: The optimizer's state.
        registry: Its layers.
        fallback: Its rule for all other parameters.
        processes: Those that train the model together.
        workspace: Memory kept from step to step.
        each: Whether every step has an update of `P`, whatever the groups say.

    Returns:
        What to warn of, and whether no input need be looked at before the next step.
    """
    covered = list(registry.covered.values())
    before = {one: states.get(one.layer.weight, {}) for one in covered}
    spans = {one: 1 if each else span_of(one.group, state) for one, state in before.items()}
    summaries = staged(spans, before, processes)
    moving = [one for one in covered if one.layer.weight.grad is not None]
    here, elsewhere = owned(moving, covered, processes.sharing)
    fresh = [one for one in here if "P" not in before[one]]
    try:
        ready(states, registry, here, fallback, processes.size == 1)
        moves = [move_of(one, states, summaries.get(one), spans[one]) for one in here]
        fallback.prepare(groups, in_P(covered), states)
        fallback.step(groups, states)
    except BaseException:
        for one in fresh:
            forget(states, one.layer, one.group)
        raise
    if processes.sharing is not None:
        _leave_to_owners(elsewhere, registry, states, processes.sharing)
    # all layers of a group have a buffer, or none: a schedule may turn momentum on, and off again
    kept = {id(m.group) for m in moves if m.group["momentum"] or "momentum_buffer" in m.state}
    for move in moves:
        if id(move.group) in kept:
            ensure_momentum(move.state, move.layer, move.group["form"])
    ensure_powers(moves)
    for move in moves:
        if move.shard is not None:
            move.state = tree_map(local, move.state)
    try:
        if moves:
            step_layers(moves, workspace, [one.layer for one in elsewhere])
        if processes.sharing is not None:
            layers = [one.layer for one in covered]
            processes.sharing.spread({layer.weight: layer.parameters() for layer in layers})
    except BaseException as error:
        advice.warn_cut_short(error)
        raise
    after = before | {one: states[one.layer.weight] for one in moving}
    for one in moving:
        after[one]["step"] += 1
    # a graph that needs the old values notices
    torch.autograd.graph.increment_version([p for one in moving for p in one.layer.parameters()])
    texts = [*advice.of_steps(moves), *_alone(processes, moves)]
    rests = all(_rests(one, state) for one, state in after.items())
    registry.clear()
    return texts, rests


def in_P(covered: Iterable[Covered]) -> set[int]:
    """The ids of what the RLS rule moves: weights, and biases in `P` unless those are frozen."""
    return {
        id(p)
        for weight, *biases in (one.layer.parameters() for one in covered)
        for p in (weight, *biases)
        if p is weight or weight.grad is not None or p.grad is None
    }


def _rests(one: Covered, state: dict[str, Any]) -> bool:
    """Whether the next step needs nothing of a layer's input: no summary, and most likely no X."""
    return not span_of(one.group, state) and one.stage.factors is None


def owned(
    moving: list[Covered], covered: list[Covered], sharing: Sharing | None
) -> tuple[list[Covered], list[Covered]]:
    """The layers that move here, and those that other processes move."""
    if sharing is None:
        return moving, []
    sharing.assign({c.layer.weight: matrix_bytes(c.layer, c.group["dtype"]) for c in covered})
    here = [one for one in moving if sharing.is_here(one.layer.weight)]
    elsewhere = [one for one in moving if not sharing.is_here(one.layer.weight)]
    return here, elsewhere


def _leave_to_owners(
    elsewhere: list[Covered],
    registry: Registry,
    states: dict[Any, dict[str, Any]],
    sharing: Sharing,
) -> None:
    """Keeps of layers that other processes own the count of their steps alone."""
    there = {one.layer for one in elsewhere}
    for weight, layer in registry.layers.items():
        if not sharing.is_here(weight) and (layer in there or "P" in states.get(weight, ())):
            own = states[weight]
            states[weight] = {name: own.get(name, 0) for name in COUNTS}
            for bias in layer.parameters()[1:]:
                states[bias].update(IN_P)


def move_of(
    one: Covered, states: dict[Any, dict[str, Any]], summary: Summary | None, span: int = 1
) -> Move:
    """What a layer is to move by, whose entries are ready.

    Raises:
        ValueError: They are not those of the layer as it is.
    """
    layer, group, stage = one.layer, one.group, one.stage
    state = states[layer.weight]
    check_fits(layer, state, group)
    return Move(layer, group, stage, state, summary, one.whole, span, rows_of(layer.weight))


def _alone(processes: Processes, moves: list[Move]) -> Iterator[str]:
    # a layer that nobody has called says nothing, and rows elsewhere move with those here
    tells = any(move.summary is not None and move.shard is None for move in moves)
    text = processes.apart() if tells else None
    if text is not None:
        yield text

"""One step of an optimizer: all that may refuse comes before the first parameter moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlscuda._torch import tree_map
from rlscuda.optim import advice
from rlscuda.optim.discovery import Registry
from rlscuda.optim.fallback import IN_P, Fallback
from rlscuda.optim.forms import COUNTS, span_of
from rlscuda.optim.layers import Layer, matrix_bytes
from rlscuda.optim.moves import Move, Workspace
from rlscuda.optim.ranks.processes import Processes
from rlscuda.optim.ranks.shards import local, rows_of
from rlscuda.optim.ranks.sharing import Sharing
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
) -> list[str]:
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
        What to warn of.
    """
    moving = [registry.layers[w] for w in registry.group_of if w.grad is not None]
    groups_of = registry.group_of.items()
    spans = {w: 1 if each else span_of(group, states.get(w, {})) for w, group in groups_of}
    summaries = staged(spans, registry, states, processes)
    here, elsewhere = owned(moving, registry, processes.sharing)
    fresh = [layer for layer in here if "P" not in states.get(layer.weight, ())]
    try:
        ready(states, registry, here, fallback, processes.size == 1)
        moves = [_move(layer, registry, states, summaries, spans) for layer in here]
        fallback.prepare(groups, covered(registry), states)
        fallback.step(groups, states)
    except BaseException:
        for layer in fresh:
            forget(states, layer, registry.group_of[layer.weight])
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
            step_layers(moves, workspace, elsewhere)
        if processes.sharing is not None:
            layers = [registry.layers[w] for w in registry.group_of]
            processes.sharing.spread({layer.weight: layer.parameters() for layer in layers})
    except BaseException as error:
        advice.warn_cut_short(error)
        raise
    for layer in moving:
        states[layer.weight]["step"] += 1
    # a graph that needs the old values notices
    torch.autograd.graph.increment_version([p for layer in moving for p in layer.parameters()])
    texts = [*advice.of_steps(moves, registry.stages), *_alone(processes, moves)]
    registry.clear()
    return texts


def all_rest(registry: Registry, states: dict[Any, dict[str, Any]]) -> bool:
    """Whether nobody need look at the inputs before the next step, as every `P` rests in it."""
    return all(
        not span_of(group, states.get(weight, {}))
        and (group["form"] == "spectral" or weight.device.type != "cpu")  # no factors of gradients
        for weight, group in registry.group_of.items()
    )


def covered(registry: Registry) -> set[nn.Parameter]:
    """What the RLS rule moves: weights, and biases in `P` unless their weight is frozen."""
    return {
        p
        for weight in registry.group_of
        for p in registry.layers[weight].parameters()
        if p is weight or weight.grad is not None or p.grad is None
    }


def owned(
    moving: list[Layer], registry: Registry, sharing: Sharing | None
) -> tuple[list[Layer], list[Layer]]:
    """The layers that move here, and those that other processes move."""
    if sharing is None:
        return moving, []
    groups = registry.group_of
    sharing.assign({w: matrix_bytes(registry.layers[w], groups[w]["dtype"]) for w in groups})
    here = [layer for layer in moving if sharing.is_here(layer.weight)]
    elsewhere = [layer for layer in moving if not sharing.is_here(layer.weight)]
    return here, elsewhere


def _leave_to_owners(
    elsewhere: list[Layer],
    registry: Registry,
    states: dict[Any, dict[str, Any]],
    sharing: Sharing,
) -> None:
    """Keeps of layers that other processes own the count of their steps alone."""
    for weight, layer in registry.layers.items():
        if not sharing.is_here(weight) and (layer in elsewhere or "P" in states.get(weight, ())):
            own = states[weight]
            states[weight] = {name: own.get(name, 0) for name in COUNTS}
            for bias in layer.parameters()[1:]:
                states[bias].update(IN_P)


def _move(
    layer: Layer,
    registry: Registry,
    states: dict[Any, dict[str, Any]],
    summaries: dict,
    spans: dict[Any, int],
) -> Move:
    weight = layer.weight
    group, state = registry.group_of[weight], states[weight]
    check_fits(layer, state, group)
    moves_bias = registry.members.issuperset(layer.parameters())
    factors = registry.stages[weight].factors
    return Move(
        layer, group, state, summaries.get(weight), factors, moves_bias, spans[weight],
        rows_of(weight),
    )  # fmt: skip


def _alone(processes: Processes, moves: list[Move]) -> Iterator[str]:
    # a layer that nobody has called says nothing, and rows elsewhere move with those here
    tells = any(move.summary is not None and move.shard is None for move in moves)
    text = processes.apart() if tells else None
    if text is not None:
        yield text

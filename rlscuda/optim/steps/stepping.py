"""One step of many layers: an operator call for all of them, and a matrix product for each.

paper     D = G P_old, then P moves, then W along D / h
natural   P moves, then W along D = G P_new
adaptive  likewise, D normalised by row
spectral  P moves, then W along the direction that G's momentum has in the metric of P
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlscuda.optim.layers import Layer
from rlscuda.optim.moves import Move, Workspace, prepare
from rlscuda.optim.ranks.shards import local
from rlscuda.optim.steps.matrices import products, update_matrices
from rlscuda.optim.steps.spectral import write_directions
from rlscuda.optim.steps.weights import biases_of, complete_products, move_weights

_nonfinite = torch.ops.rlscuda.nonfinite.default

# Bytes of products that wait for their weight step: what a cache holds, or what fills a GPU.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


def step_layers(moves: list[Move], workspace: Workspace, elsewhere: Sequence[Layer] = ()) -> None:
    """Updates the matrix of every layer and moves its weight; a non-finite gradient voids it all.

    Args:
        moves: The layers.
        workspace: Memory kept from step to step.
        elsewhere: Layers that other processes move, whose gradients are here, too.
    """
    found_inf = _found_inf(moves, elsewhere)
    batches: dict[tuple, list[Move]] = {}
    for move in moves:
        P, weight = move.state["P"], move.layer.weight
        shard = move.shard
        where = None if shard is None else (shard.mesh, shard.size)
        kind = P.dtype, weight.dtype, P.device
        key = (id(move.group), move.span, *kind, move.layer.blocks > 1, where)
        batches.setdefault(key, []).append(move)
    for batch in batches.values():
        for chunk in _chunks(batch):
            P = chunk[0].state["P"]
            _step_chunk(chunk, found_inf.get(P.device), workspace)


def _found_inf(moves: list[Move], elsewhere: Sequence[Layer]) -> dict[torch.device, Tensor]:
    """One bool a device: whether any gradient is not finite; where factors agree, theirs is."""
    gradients: dict[torch.device, list[Tensor]] = {}
    unsure = [move.layer for move in moves if move.factors is None]
    for layer in (*unsure, *elsewhere):
        given = [local(p.grad) for p in layer.parameters() if p.grad is not None]
        gradients.setdefault(layer.weight.device, []).extend(given)
    flags = {device: _nonfinite(tensors) for device, tensors in gradients.items()}
    for shard in {move.shard.mesh: move.shard for move in moves if move.shard}.values():
        for device, flag in flags.items():
            anywhere = flag.to(torch.float32)
            shard.sum(anywhere)
            flags[device] = anywhere > 0
    if len(flags) > 1:
        first = next(iter(flags))
        anywhere = torch.stack([flag.to(first, non_blocking=True) for flag in flags.values()]).any()
        flags = {device: anywhere.to(device, non_blocking=True) for device in flags}
    return flags


def _chunks(batch: list[Move]) -> Iterator[list[Move]]:
    """Parts of a batch whose products fit the workspace together."""
    limit = _CHUNK_BYTES.get(batch[0].layer.weight.device.type, 0)
    together: dict[int, list[Move]] = {}  # layers that share a P step with it
    for move in batch:
        together.setdefault(id(move.state["P"]), []).append(move)
    chunk: list[Move] = []
    used = 0
    for moves in together.values():
        elements = sum(_most_rows(move) * move.layer.fan_in for move in moves)
        size = elements * moves[0].state["P"].element_size()
        if chunk and used + size > limit:
            yield chunk
            chunk, used = [], 0
        chunk += moves
        used += size
    yield chunk


def _most_rows(move: Move) -> int:
    """Rows of its weight on any process, so that all of them form the same chunks."""
    return move.layer.outputs if move.shard is None else move.shard.most


def _step_chunk(chunk: list[Move], found_inf: Tensor | None, workspace: Workspace) -> None:
    """The step of layers of one group, dtype and device."""
    group, P = chunk[0].group, chunk[0].state["P"]
    form, bounded = group["form"], group["trust_ratio"] < math.inf
    prepare(chunk, workspace)
    biases, bias_gradients = biases_of(chunk, P)
    norms, bias_rows = None, [P.new_empty(0)] * len(chunk)
    if form == "paper":  # its product is with the P of before the update, whose row is lost then
        norms = complete_products(chunk, biases, bias_gradients, products(chunk, P))
    h = update_matrices(chunk, group, found_inf)
    if form == "spectral":
        write_directions(chunk, bias_gradients, h, group, workspace)
    elif form != "paper":
        bias_rows = products(chunk, P)
        if bounded:
            norms = complete_products(chunk, biases, bias_gradients, bias_rows)
            bias_rows = [P.new_empty(0)] * len(chunk)
    move_weights(chunk, group, h, biases, bias_gradients, bias_rows, norms if bounded else None)

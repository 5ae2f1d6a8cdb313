"""The updates of the matrices of many layers, and the products with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlscuda import _C
from rlscuda._torch import foreach_add_
from rlscuda.functional.gemm import multiply
from rlscuda.optim.forms import NORMALISED, compounded
from rlscuda.optim.moves import Move, first_of_each
from rlscuda.optim.steps.ridges import has_ridge, raise_matrices

_rls_update = torch.ops.rlscuda.foreach_rls_update_.default


def update_matrices(chunk: list[Move], group: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Updates every `P` that does not rest.

    Returns:
        h of each group in turn, NaN where its weight may not move.
    """
    if not chunk[0].span:
        return _at_rest(chunk, found_inf)
    group = compounded(group, chunk[0].span)
    first = first_of_each(chunk)
    moves = list(first.values())
    layers, states = [move.layer for move in moves], [move.state for move in moves]
    projection, projected, inputs = _projections(moves, group)
    shrinkage, blocked, rows = group["shrinkage"], layers[0].blocks > 1, [m.rows for m in moves]
    powers = [state["power"] for state in states] if "power" in states[0] else []
    if blocked and powers:  # the operator takes one a matrix: here all blocks of a group share it
        rows = [
            normalised(r, state["power"], state["health"], group["gain"], found_inf)
            for r, state in zip(rows, states)
        ]
        powers = []
    for r, state in zip(rows, states) if has_ridge(group) else ():
        if "ridge_power" in state:
            follow_power(r, state["ridge_power"], state["health"], 0.0, found_inf)
    h = _rls_update(
        [state["P"] for state in states], [layer.split(r) for layer, r in zip(layers, rows)],
        powers, [state["health"] for state in states], found_inf, projection, projected, inputs,
        group["forgetting"], group["gain"], 1 - shrinkage, shrinkage * group["initial_scale"],
        group["drift"] or 0.0, group["initial_scale"], group["form"] in NORMALISED,
    )  # fmt: skip
    if has_ridge(group):
        raise_matrices(moves, group, h, projected, inputs)
    if not blocked and len(moves) == len(chunk):
        return h
    parts = list(h.split([layer.groups * layer.blocks for layer in layers]))
    if blocked:  # lambda + kappa s P s of the whole row: every block has added its part to lambda
        least = group["forgetting"]
        parts = [(p - least).view(one.groups, -1).sum(1) + least for p, one in zip(parts, layers)]
    own = dict(zip(first, parts))
    return torch.cat([own[id(move.state["P"])] for move in chunk])


def _at_rest(chunk: list[Move], found_inf: Tensor | None) -> Tensor:
    """What stands for the h of matrices that rest; the step counts all the same, or is refused."""
    states = [move.state for move in first_of_each(chunk).values()]
    counters = [state["health"] for state in states]
    taken, refused = counters[0].new_zeros(2, len(_C.health_slots))
    taken[_C.health_slots.index("steps")] = refused[_C.health_slots.index("refused")] = 1
    h = chunk[0].state["P"].new_ones(sum(move.layer.groups for move in chunk))
    if found_inf is None:
        counts = [taken] * len(counters)
    else:
        h.masked_fill_(found_inf, math.nan)
        matrices = [len(state["P"]) if state["P"].dim() == 3 else 1 for state in states]
        of = {count: torch.where(found_inf, count * refused, taken) for count in {*matrices}}
        counts = [of[count] for count in matrices]
    foreach_add_(counters, counts)
    return h


def _projections(
    chunk: list[Move], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the update may use of rows X P known already, and what it turns into rows X P_new.

    Returns:
        S P where the summary is the mean of X; X P; X. No tensors at all without factors, and empty
        ones for a layer without.
    """
    mean = group["summary"] == "mean" and group["rank"] == 1
    turns = group["form"] != "paper"
    if all(move.factors is None for move in chunk):
        return [], [], []
    none = chunk[0].product[:0]
    parts = [
        (
            move.projected.mean(0, keepdim=True) if mean else none,
            move.projected if turns else none,
            move.factors.x if turns else none,
        )
        if move.factors is not None and move.projected is not None
        else (none, none, none)
        for move in chunk
    ]
    projection, projected, inputs = (list(part) for part in zip(*parts))
    return projection, projected, inputs


def normalised(
    rows: Tensor, power: Tensor, health: Tensor, gain: float, found_inf: Tensor | None
) -> Tensor:
    """The rows of a layer over the root of their running power, as the operator has it for one P.

    Args:
        rows: [groups, r, n].
        power: [groups], updated; see `follow_power`.
        health: The layer's counters.
        gain: Of an update, at least.
        found_inf: One bool; where it is true, `power` stays.
    """
    if not rows.shape[1]:
        return rows
    now, fits = follow_power(rows, power, health, gain, found_inf)
    scale = torch.where(fits, torch.where(now > 0, now.rsqrt(), 0.0), math.nan)
    return (rows * scale[:, None, None]).to(rows.dtype)


def follow_power(
    rows: Tensor, power: Tensor, health: Tensor, gain: float, found_inf: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Lets a running power take in some rows; without any it stays.

    Args:
        rows: [groups, r, n].
        power: [groups], updated; see `rlscuda.reference.running_power`.
        health: The layer's counters.
        gain: Of an update, at least.
        found_inf: One bool; where it is true, `power` stays.

    Returns:
        The power that counts for these rows [groups], and whether the dtype can hold theirs.
    """
    if not rows.shape[1]:
        return power, power.isfinite()
    seen, before = rows.double().square().mean((1, 2)), power.double()
    steps, earlier = (health[_C.health_slots.index(name)] for name in ("steps", "earlier"))
    kappa = (1 / (steps + earlier + 1)).clamp(min=gain)
    known = (before > 0) & before.isfinite()
    now = torch.where(known, before.lerp(seen, kappa), seen)
    kept = torch.where(known, before.lerp(torch.minimum(seen, 100 * before), kappa), seen)
    fits = seen <= torch.finfo(power.dtype).max
    enters = fits if found_inf is None else fits & ~found_inf
    power.copy_(torch.where(enters, kept, power))
    return now, fits


def products(chunk: list[Move], P: Tensor) -> list[Tensor]:
    """Writes every product G P, without a bias' part unless it goes through the factors.

    Returns:
        For each layer the row of `P` [n] or [groups, n] that the bias' part takes, an empty tensor
        where it takes none.
    """
    none = P.new_empty(0)
    bias_rows = [none] * len(chunk)
    for i, move in enumerate(chunk):
        layer, matrix = move.layer, move.state["P"]
        if move.factors is not None:
            projected = move.projected
            if projected is None:  # by the P of now
                x = move.factors.x
                projected = P.new_empty(len(x), layer.fan_in)
                layer.multiply(x, matrix, out=projected)
                if layer.bias:
                    projected += layer.bias_row(matrix)
            delta = move.factors.delta
            multiply(delta.t(), projected, move.product, varying=len(delta))
            continue
        layer.multiply(move.grad, matrix, out=move.product)
        if layer.bias and move.outputs:  # rows of a weight may all be on other processes
            bias_rows[i] = layer.bias_row(matrix)
    return bias_rows

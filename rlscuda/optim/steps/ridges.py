"""The ridges of matrices that forget: whatever an input no longer excites stays bounded.

The rule is that of `functional.rls_update_`, but one step in 16 raises all that is due, of all
layers together; in a captured graph, to which the host does not come back, each step does. The
device counts whose turn it is. The ridge is absolute, or follows the running power of the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlscuda import _C
from rlscuda.functional.ridges import (
    RESETS,
    ROWS,
    WAIT,
    captured,
    ridge_rows,
    ridge_weight,
    share_of_power,
    turn_of,
    turns_of,
)
from rlscuda.optim.forms import NORMALISED, age_of
from rlscuda.optim.moves import Move

_rls_update = torch.ops.rlscuda.foreach_rls_update_.default
_UPDATES = _C.health_slots.index("updates")


def has_ridge(group: dict[str, Any]) -> bool:
    """Whether the matrices of a group forget, and have a ridge."""
    return group["forgetting"] < 1 and group["ridge"] != 0


def ensure_powers(moves: Iterable[Move]) -> None:
    """Makes the running power of the inputs that a ridge follows, where the form has none."""
    made: dict[int, Tensor] = {}
    for move in moves:
        group, state = move.group, move.state
        follows = group["ridge"] is None and group["form"] not in NORMALISED
        if has_ridge(group) and follows and "ridge_power" not in state:
            zeros = state["P"].new_zeros(move.layer.groups)
            state["ridge_power"] = made.setdefault(id(state["P"]), zeros)


def raise_matrices(
    moves: list[Move],
    group: dict[str, Any],
    h: Tensor,
    projected: list[Tensor],
    inputs: list[Tensor],
) -> None:
    """Raises the coordinates whose turn it is, where the update was not refused.

    Args:
        moves: The first layer of each `P`, which has been updated.
        group: Their group, with the constants of the update.
        h: Of each matrix in turn, NaN where it was refused or reset.
        projected: Rows X P, which become those of the new `P`; empty for none, see `products`.
        inputs: X.
    """
    wait = 1 if captured(h) else min(WAIT, turns_of(group["forgetting"]))
    # without an input there was no update, and nothing was forgotten
    updates = [(age_of(move.state) + 1) // move.span for move in moves]
    due = [m.summary is not None and count % wait == 0 for m, count in zip(moves, updates)]
    if not any(due):
        return
    counts = [move.layer.groups * move.layer.blocks for move in moves]
    rows = [
        _rows(move, group, part, wait) if now else move.state["P"][..., :0, :]
        for move, part, now in zip(moves, h.split(counts), due)
    ]
    slots = len(_C.health_slots)
    counted = torch.zeros(len(moves), slots, dtype=torch.float64, device=h.device)
    for start in range(0, max(part.shape[-2] for part in rows), ROWS):
        some = [part[..., start : start + ROWS, :] for part in rows]
        _rls_update(
            [move.state["P"] for move in moves],
            [(part * part.shape[-2] ** 0.5).contiguous() for part in some],  # the gain is over r
            [], list(counted), None, [], projected, inputs, 1.0, 1.0, 1.0, 0.0, 0.0,
            group["initial_scale"], False,
        )  # fmt: skip
    for move, own in zip(moves, counted):
        move.state["health"][RESETS] += own[RESETS]


def _rows(move: Move, group: dict[str, Any], h: Tensor, wait: int) -> Tensor:
    """The rows of the coordinates of a layer's matrices whose turn it is, zeros for the others."""
    P, forgetting = move.state["P"], group["forgetting"]
    turn = (move.state["health"][_UPDATES] / (len(h) * wait)).long()
    weight = torch.where(h.isnan(), 0, _ridges(move, group) * ridge_weight(forgetting, wait))
    turn_now = turn_of(turn, P.shape[-1], forgetting, wait)
    return ridge_rows(P, weight.unsqueeze(-1) if P.dim() == 3 else weight, *turn_now)


def _ridges(move: Move, group: dict[str, Any]) -> Tensor:
    """The ridge of each matrix of a layer; its start as long as its input was 0."""
    layer, P = move.layer, move.state["P"]
    if group["ridge"] is not None:
        return P.new_full((layer.groups * layer.blocks,), group["ridge"], dtype=torch.float64)
    share = group["gain"] * share_of_power(group["forgetting"], P.shape[-1], P.dtype)
    normalised = group["form"] in NORMALISED  # what enters then has a power of 1
    power = move.state["power" if normalised else "ridge_power"].double()
    known = torch.ones_like(power) if normalised else power
    ridges = torch.where(power > 0, share * known, 1 / group["initial_scale"])
    return ridges.repeat_interleave(layer.blocks)

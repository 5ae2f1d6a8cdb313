"""What the state of gates must hold before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from rlscuda.files.documents import check, short
from rlscuda.pruning.blocks.stand_ins import Mapped, description_of, made_of
from rlscuda.pruning.gates.gate import Gate


class SavedGate(TypedDict):
    """Of a gate whose branch is there."""

    theta: float
    below: int
    worth: float
    open: bool


class SavedRemoval(TypedDict):
    """Of a branch that is gone: what was put in the place of its exit, and what it was worth."""

    stand_in: dict[str, Any]
    worth: float


class SavedGates(TypedDict):
    """Of `LayerGates.state_dict`."""

    gates: dict[str, SavedGate]
    gone: dict[str, SavedRemoval]
    steps: int
    last_removal: int
    generator: Tensor


def check_state(state: Any, names: list[str], alive: Mapping[str, Gate], with_maps: bool) -> None:
    """Checks a state of gates against those it is for.

    Args:
        state: What should be one.
        names: Of all branches.
        alive: Those not gone, by name.
        with_maps: Whether a linear map may stand in for a branch.

    Raises:
        ValueError: It is of gates on other branches, a branch that it has is gone here, or a value
            is none that gates can have.
    """
    check(state, SavedGates, "state")
    gates, gone = state["gates"], state["gone"]
    if sorted([*gates, *gone]) != sorted(names):
        raise ValueError(
            f"state must be of gates on {sorted(names)}, got {sorted([*gates, *gone])}"
        )
    if missing := gates.keys() - alive.keys():
        raise ValueError(f"{sorted(missing)} are gone: make gates for a whole model first")
    if state["steps"] < 0 or state["last_removal"] > state["steps"]:
        raise ValueError(
            f"steps must be at least 0 and not before the last removal, got {state['steps']} and "
            f"{state['last_removal']}"
        )
    for name, own in gates.items():
        if not 0 <= own["theta"] <= 1:
            raise ValueError(f"theta of {name!r} must lie in [0, 1], got {own['theta']}")
        if not 0 <= own["below"] <= state["steps"]:
            raise ValueError(
                f"below of {name!r} must lie in [0, {state['steps']}], got {own['below']}"
            )
    for name in gone.keys() & alive.keys():
        made, block = made_of(gone[name]["stand_in"]), alive[name].block
        own = block.stand_ins[block.exit]
        if isinstance(made, Mapped) and made.outputs == own.outputs and with_maps:
            continue
        if description_of(made) != description_of(own):
            raise ValueError(
                f"what stands in for {name!r} must be {description_of(own)}"
                f"{' or a map' if with_maps else ''}, got {gone[name]['stand_in']}"
            )
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError):
        raise ValueError(
            f"generator must be the state of one, got {short(state['generator'])}"
        ) from None

"""Why the RLS rule does not cover a place of a model: its kind, and the others in the model."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.optim.kinds.places import Place, refusal

Users = dict[int, list[Place]]  # id of a parameter -> the places that hold it


def is_in(place: Place, chosen: set[Any]) -> bool:
    """Whether a place or its module is among the chosen."""
    return place in chosen or place.module in chosen


def reasons_of(
    model: nn.Module,
    places: list[Place],
    users: Users,
    included: set[Any] | None,
    excluded: set[Any],
) -> dict[Place, str]:
    """Why each place is not to be covered; '' where it is."""
    reasons: dict[Place, str] = {}
    decoders = [m for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)]
    crossed = [getattr(module, "multihead_attn", None) for module in decoders]
    for place in places:
        reason = refusal(place) or ""
        if not reason and included is not None and not is_in(place, included):
            reason = "not in include"
        if not reason and is_in(place, excluded):
            reason = "excluded"
        if not reason and place.module in crossed:
            reason = "its query differs from its key and value"
        reasons[place] = reason
    alone = dict(reasons)
    sharing = _sharing(model)
    for place, reason in alone.items():
        if reason:
            continue
        weight, module = cast(nn.Parameter, place.own_weight), place.module
        for other in users[id(weight)]:
            also = f"its weight is also that of {other.name!r}"
            if alone[other]:
                reasons[place] = f"{also}: {alone[other]}"
            elif getattr(other.module, "groups", 1) != getattr(module, "groups", 1):
                reasons[place] = f"{also}, in other groups"
            elif is_transposed(other.module) != is_transposed(module):
                reasons[place] = f"{also}, transposed"
        if there := sharing.get(weight):
            reasons[place] = f"its weight lies in the memory of {there!r}, another parameter"
    return reasons


def _sharing(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameters that begin where another does, and its name: it would move twice."""
    at: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.data_ptr():  # a plain one, not on meta
            at.setdefault(parameter.data_ptr(), []).append((name, parameter))
    together = [members for members in at.values() if len(members) > 1]
    return {
        parameter: members[0 if i else 1][0]
        for members in together
        for i, (_, parameter) in enumerate(members)
    }

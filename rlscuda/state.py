"""The state of a covered layer: its entries, and their way through `load_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda import _C
from rlscuda.layers import Layer, state_dtype


def initial_state(layer: Layer, group: dict[str, Any]) -> dict[str, Any]:
    """A layer's entries before its first step.

    `P` [n, n] or [groups, n, n]; `step`, `updates` and `missing` count on the host; `health` are
    the counters that kernels keep; `power` [groups] and moments where the form has them.
    """
    weight = layer.weight
    dtype = state_dtype(weight, group["dtype"])

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    P = torch.eye(layer.fan_in, dtype=dtype, device=weight.device).mul_(group["initial_scale"])
    state: dict[str, Any] = {
        "step": 0,
        "updates": 0,
        "missing": 0,
        "P": P if layer.groups == 1 else P.repeat(layer.groups, 1, 1),
        "health": zeros(_C.health_slots, dtype=torch.float64),
    }
    outputs = weight.shape[0]
    if group["form"] == "adaptive":
        state["power"] = zeros(layer.groups)
        state["first_moment"] = zeros(outputs, layer.fan_in)
        state["second_moment"] = zeros(outputs)
    elif group["momentum"]:
        state["momentum_buffer"] = zeros(outputs, layer.fan_in)
    return state


def _entries(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> list[tuple[nn.Parameter, Mapping[str, Any]]]:
    """Pairs each parameter with the entries saved for it, by position as torch does."""
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    own = [p for group in groups for p in group["params"]]
    return [
        (p, state_dict["state"][key]) for p, key in zip(own, saved) if key in state_dict["state"]
    ]


def check_state(
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    layers: Mapping[nn.Parameter, Layer],
) -> None:
    """Raises ValueError where a saved state is not one of these groups and layers."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must have the keys 'state' and 'param_groups'")
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"state_dict must have groups of {expected} parameters, got {sizes}")
    for saved, group in zip(state_dict["param_groups"], groups):
        if "fallback_ratio" not in saved:
            raise ValueError("state_dict is not that of an RLSOptimizer: its groups have no "
                             "'fallback_ratio'")  # fmt: skip
        if (saved["form"], saved["momentum"] > 0) != (group["form"], group["momentum"] > 0):
            raise ValueError(f"state_dict is of form {saved['form']!r} with momentum "
                             f"{saved['momentum']}, the optimizer of {group['form']!r} with "
                             f"{group['momentum']}")  # fmt: skip
    for parameter, entries in _entries(state_dict, groups):
        layer = layers.get(parameter)
        if (layer is not None) != ("P" in entries):
            name = layer.name if layer is not None else "a fallback parameter"
            raise ValueError(f"state_dict and optimizer disagree on whether {name} has a matrix P")
        if layer is not None and tuple(entries["P"].shape) != layer.matrix_shape:
            raise ValueError(f"P of {layer.name!r} must be {list(layer.matrix_shape)}, got "
                             f"{list(entries['P'].shape)} in state_dict")  # fmt: skip


def restore_dtypes(
    state: dict[nn.Parameter, dict[str, Any]],
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    layers: Mapping[nn.Parameter, Layer],
) -> None:
    """Puts back what torch's loader cast to the parameter's dtype, as tensors of our own."""
    for parameter, entries in _entries(state_dict, groups):
        for name, value in entries.items():
            if isinstance(value, Tensor) and parameter in layers:
                state[parameter][name] = value.detach().to(parameter.device, copy=True)
            elif state[parameter][name] is value and isinstance(value, Tensor):
                state[parameter][name] = value.clone()

"""The state of a covered layer: its entries, and their way through `load_state_dict`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda import _C
from rlscuda.optim.fallback import ENTRIES, IN_P, Fallback
from rlscuda.optim.forms import COUNTS, NORMALISED, OPTIONS, age_of, as_now, check_complete
from rlscuda.optim.layers import Layer, state_dtype
from rlscuda.optim.ranks.shards import like_rows, rows_of

if TYPE_CHECKING:
    from rlscuda.optim.discovery import Covered, Registry
    from rlscuda.optim.staging import Stage

_DTYPES = (torch.float32, torch.float64)
_BY_ROW = ("momentum_buffer", "first_moment", "second_moment")
_OF_FALLBACK = set().union(*ENTRIES.values())


def _shapes(layer: Layer, form: str) -> dict[str, tuple[int, ...]]:
    """The tensors that every state of a layer holds, besides its counters."""
    rows, slots = layer.outputs, len(_C.health_slots)
    shapes: dict[str, tuple[int, ...]] = {"P": layer.matrix_shape, "health": (slots,)}
    if form in NORMALISED:
        shapes["power"] = (layer.groups,)
    if form == "spectral":
        shapes["momentum_buffer"] = (rows, layer.fan_in)
    if form == "adaptive":
        shapes["first_moment"] = (rows, layer.fan_in)
        shapes["second_moment"] = (rows,)
    return shapes


def initial_state(
    layer: Layer, group: dict[str, Any], shared: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A layer's entries before its first step, of which it may share some with another.

    `P` [n, n] or [groups, n, n]; `step` counts on the host, for random draws and the turns of `P`;
    `health` are the counters that the kernels keep and follow; `power` [groups] and moments where
    the form has them.
    """
    device, dtype = layer.weight.device, state_dtype(layer.weight, group["dtype"])
    state: dict[str, Any] = {**dict.fromkeys(COUNTS, 0), **shared}
    for name, shape in _shapes(layer, group["form"]).items():
        if name in _BY_ROW:
            state[name] = _zero_rows(layer, shape, dtype)
        elif name not in shared:
            kind = torch.float64 if name == "health" else dtype
            state[name] = torch.zeros(shape, dtype=kind, device=device)
    if not shared:
        torch.diagonal(state["P"], dim1=-2, dim2=-1).fill_(group["initial_scale"])
    return state


def _zero_rows(layer: Layer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An entry that has a row for each of the weight, where that is."""
    rows = rows_of(layer.weight)
    here = (rows.stop - rows.start if rows else shape[0], *shape[1:])
    return like_rows(layer.weight, torch.zeros(here, dtype=dtype, device=layer.weight.device))


def ensure_state(
    states: dict,
    layer: Layer,
    group: dict[str, Any],
    fallback: Fallback,
    shared: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """A layer's entries, made before its first step; float64 once its weight is.

    Args:
        states: The optimizer's, which gives a parameter without entries an empty dictionary.
        layer: The layer.
        group: Its parameter group.
        fallback: The rule that may have had its bias.
        shared: Entries that a new one is to have in common with another.
    """
    state = states[layer.weight]
    if "P" not in state:
        state.update(initial_state(layer, group, shared))
        for own in (states[bias] for bias in layer.parameters()[1:]):
            own.update(IN_P if fallback.starts(own) else {})
    elif layer.weight.dtype == torch.float64 and state["P"].dtype != torch.float64:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        state.update({k: v.to(torch.float64, copy=True) for k, v in tensors.items()})
    return state


def ensure_momentum(state: dict[str, Any], layer: Layer, form: str) -> None:
    """Makes the buffer of a form that may do without."""
    if form not in NORMALISED and "momentum_buffer" not in state:
        shape = (layer.outputs, layer.fan_in)
        state["momentum_buffer"] = _zero_rows(layer, shape, state["P"].dtype)


def _of_input(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries that describe the input, which layers of one input have in common."""
    return {name: state[name] for name in ("P", "power", "ridge_power", "health") if name in state}


def ready(
    states: dict, registry: Registry, moving: list[Covered], fallback: Fallback, alone: bool
) -> None:
    """Makes the entries of layers about to move: one `P` for those that see the same inputs.

    That holds from their first step on. Where one of them sees another input, or none has to move
    but the other, it goes on with a copy; so do all of a process that is not `alone`.
    """
    groups = {one.layer: one.group for one in moving}

    def shown(layer: Layer, stage: Stage) -> frozenset[int]:
        return frozenset(stage.tokens if alone else {layer.index})

    sharing: dict[int, list[tuple[Layer, dict[str, Any]]]] = {}
    for weight, layer in registry.layers.items():
        state = states.get(weight, {})
        if "P" in state:
            sharing.setdefault(id(state["health"]), []).append((layer, state))
    for mates in sharing.values():
        parts: dict[tuple, dict[str, Tensor]] = {}
        for layer, state in mates if len(mates) > 1 else ():
            tokens = shown(layer, registry.stages[layer.weight])
            key = (tokens, id(groups.get(layer)), id(state["P"]))
            own = _of_input(state)
            if key not in parts:
                parts[key] = {k: v.clone() for k, v in own.items()} if parts else own
            state.update(parts[key])
    first: dict[frozenset[int], Layer] = {}
    for one in moving:
        shared: dict[str, Tensor] = {}
        if "P" not in states[one.layer.weight] and (tokens := shown(one.layer, one.stage)):
            mate = first.setdefault(tokens, one.layer)
            shared = _of_input(states[mate.weight])
        ensure_state(states, one.layer, one.group, fallback, shared)


def forget(states: dict, layer: Layer, group: dict[str, Any]) -> None:
    """Takes back the entries of `initial_state`, from a state that may have others."""
    entries = states.get(layer.weight, {})
    for name in (*COUNTS, "momentum_buffer", "ridge_power", *_shapes(layer, group["form"])):
        entries.pop(name, None)
    for parameter in layer.parameters():
        if parameter is not layer.weight and parameter in states:
            states[parameter].pop("in_P", None)
        if not states.get(parameter, True):
            del states[parameter]


def check_fits(layer: Layer, state: Mapping[str, Any], group: dict[str, Any]) -> None:
    """Raises ValueError where a layer's weight, gradient or options are not what `P` was made for.

    Whatever refuses a layer must do so before the first one moves.
    """
    weight, P, form = layer.weight, state["P"], group["form"]
    kept = ("power" in state, "first_moment" in state)
    if kept != (form in NORMALISED, form == "adaptive"):
        raise ValueError(f"the state of {layer.name!r} is not one of form {form!r}: the form of a "
                         "group cannot change once it has stepped")  # fmt: skip
    if group["max_fan_in"] != layer.max_fan_in:
        raise ValueError(
            "the max_fan_in of a group cannot change once its layers are known: "
            f"{layer.name!r} has {layer.max_fan_in}, its group {group['max_fan_in']}"
        )
    if weight.device != P.device:
        raise ValueError(
            f"the weight of {layer.name!r} is on {weight.device}, its P on {P.device}: move the "
            "model before the optimizer is made, or load its state_dict after"
        )
    rows = layer.outputs
    moment = state.get("first_moment", state.get("momentum_buffer"))
    same_rows = moment is None or moment.shape[0] == rows
    if not same_rows or weight.numel() != rows * layer.columns:
        expected = [rows if moment is None else len(moment), layer.fan_in]
        raise ValueError(f"the weight of {layer.name!r} must be {expected} with its bias, got "
                         f"{[rows, weight.numel() // rows + layer.bias]}")  # fmt: skip
    if weight.grad is not None and weight.grad.layout != torch.strided:
        raise ValueError(f"the gradient of {layer.name!r} must be dense, got {weight.grad.layout}")


@torch.no_grad()
def restart(state: dict[str, Any], memory: int) -> None:
    """Lets a layer's moments start anew, and its gain as if `memory` updates had been seen.

    Nothing is read from the device.
    """
    for name in _BY_ROW:
        if name in state:
            state[name].zero_()
    steps, earlier = (state["health"][_C.health_slots.index(name)] for name in ("steps", "earlier"))
    earlier.add_(steps).clamp_(max=memory)
    steps.zero_()
    state["since"] = state["step"] - min(age_of(state), memory)


def _entries(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]]
) -> list[tuple[nn.Parameter, Mapping[str, Any]]]:
    """Pairs each parameter with the entries saved for it, by position as torch does."""
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    own = [p for group in groups for p in group["params"]]
    return [
        (p, state_dict["state"][key]) for p, key in zip(own, saved) if key in state_dict["state"]
    ]


def _check_state(
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    layers: Mapping[nn.Parameter, Layer],
    fallback_entries: Set[str] | None,
) -> None:
    """Raises ValueError where a saved state is not one of these groups, layers and fallback rule.

    Args:
        state_dict: The saved state.
        groups: The groups of the optimizer.
        layers: Its covered weights.
        fallback_entries: What its fallback rule keeps for a parameter; None where unknown.
    """
    _check_structure(state_dict)
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(f"state_dict must have groups of {expected} parameters, got {sizes}")
    forms = {}
    for saved, group in zip(state_dict["param_groups"], groups):
        if not saved.keys() >= OPTIONS:
            raise ValueError("state_dict is not that of an RLSOptimizer: its groups have no "
                             f"{sorted(OPTIONS - saved.keys())}")  # fmt: skip
        _check_options(saved)
        for name in ("form", "max_fan_in"):
            if saved[name] != group[name]:
                raise ValueError(f"state_dict is of {name} {saved[name]!r}, the optimizer of "
                                 f"{group[name]!r}")  # fmt: skip
        if (saved["fallback_lr"] is None) != (group["fallback_lr"] is None):
            raise ValueError("state_dict and optimizer disagree on whose rate lr is, that of the "
                             "layers or of the fallback rule")  # fmt: skip
        forms.update(dict.fromkeys(group["params"], group["form"]))
    for parameter, entries in _entries(state_dict, groups):
        layer = layers.get(parameter)
        if entries.keys().isdisjoint({"P", *IN_P} | _OF_FALLBACK):
            continue  # all of it is of others
        if (layer is not None) != ("P" in entries):
            name = layer.name if layer is not None else "a fallback parameter"
            raise ValueError(f"state_dict and optimizer disagree on whether {name} has a matrix P")
        if layer is not None:
            _check_layer(layer, forms[parameter], entries)
            continue
        if "in_P" in entries:
            continue
        own = entries.keys() & _OF_FALLBACK  # the rest is of others
        if fallback_entries is not None and own and own != fallback_entries:
            raise ValueError(f"state_dict has fallback entries {sorted(own)}, the fallback "
                             f"rule keeps {sorted(fallback_entries)}")  # fmt: skip
        if fallback_entries:
            _check_fallback({name: entries[name] for name in own}, parameter)


def _check_structure(state_dict: Any) -> None:
    """Raises ValueError where what holds the entries and the options has not the usual types."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must have the keys 'state' and 'param_groups'")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(e, Mapping) for e in state.values()):
        raise ValueError("state of state_dict must map parameters to dicts of their entries")
    if not isinstance(groups, Sequence) or not all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), Sequence)
        and all(isinstance(key, (int, str)) for key in group["params"])
        for group in groups
    ):
        raise ValueError("param_groups of state_dict must be a list of dicts, each with its params")


def _check_options(saved: Mapping[str, Any]) -> None:
    """Raises ValueError where an option of a saved group is of another type or out of its range."""
    plain = (type(None), bool, int, float, str, torch.dtype, Tensor)
    for name in sorted(OPTIONS):
        value = saved[name]
        if not isinstance(value, plain) or isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} in state_dict must be one value, got {type(value).__name__}")
    try:
        check_complete(saved)
    except ValueError as error:
        raise ValueError(f"state_dict has an option out of its range: {error}") from None
    peak = saved["peak_lr"]
    if not isinstance(peak, (int, float)) or not 0 <= peak < math.inf:
        raise ValueError(f"peak_lr in state_dict must be >= 0 and finite, got {peak!r}")
    if not isinstance(saved["fallback_decays"], bool):
        raise ValueError("fallback_decays in state_dict must be a bool, got "
                         f"{saved['fallback_decays']!r}")  # fmt: skip


def _check_fallback(entries: Mapping[str, Any], parameter: nn.Parameter) -> None:
    """Raises ValueError where the moments or the count of a fallback parameter do not fit it."""
    for name, value in entries.items():
        if value is None and name == "momentum_buffer":
            continue
        shape = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be {list(shape)}, got {got} in state_dict")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} in state_dict must be floating point and dense, got "
                             f"{value.dtype}, {value.layout} on {value.device}")  # fmt: skip
        if name == "step" and not 0 <= value.item() < math.inf:
            raise ValueError(f"step of a fallback parameter in state_dict must be a count, got "
                             f"{value.item()}")  # fmt: skip


def _check_layer(layer: Layer, form: str, entries: Mapping[str, Any]) -> None:
    where = f"of {layer.name!r} in state_dict"
    step, since = entries.get("step"), entries.get("since", 0)
    if not isinstance(step, int) or not 0 <= step < 2**63:
        raise ValueError(f"step {where} must be an int >= 0, got {step!r}")
    if not isinstance(since, int) or not 0 <= since <= step:
        raise ValueError(f"since {where} must be an int in [0, {step}], got {since!r}")
    shapes = _shapes(layer, form)
    if "momentum_buffer" in entries:
        shapes["momentum_buffer"] = (layer.outputs, layer.fan_in)
    if "ridge_power" in entries:
        shapes["ridge_power"] = (layer.groups,)
    for name, shape in shapes.items():
        value = entries.get(name)
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} {where} must be {list(shape)}, got {got}")
        wanted = torch.float64 if name == "health" else entries["P"].dtype
        if value.dtype != wanted or wanted not in _DTYPES:
            raise ValueError(f"{name} {where} must be float32 or float64, as P is, got "
                             f"{value.dtype}")  # fmt: skip
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} {where} must be a dense tensor with data, got "
                             f"{value.layout} on {value.device}")  # fmt: skip
    for name, count in zip(_C.health_slots, entries["health"].tolist()):
        if name != "largest_gain" and not 0 <= count < math.inf:
            raise ValueError(f"the counter {name} {where} must be a count, got {count}")


def _restore_dtypes(
    state: Mapping[Any, dict[str, Any]],
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    layers: Mapping[nn.Parameter, Layer],
) -> None:
    """Puts back what torch's loader cast to the parameter's dtype, as tensors of our own."""
    made: dict[tuple, Tensor] = {}  # layers of one input go on sharing what describes it
    for parameter, entries in _entries(state_dict, groups):
        for name, value in entries.items():
            if isinstance(value, Tensor) and parameter in layers:
                key = (id(value), id(entries.get("health")), parameter.device)
                if key not in made:
                    made[key] = value.detach().to(parameter.device, copy=True).contiguous()
                state[parameter][name] = made[key]
            elif state[parameter][name] is value and isinstance(value, Tensor):
                state[parameter][name] = value.clone()


@contextmanager
def guarded_load(
    optimizer: Optimizer, layers: Mapping[nn.Parameter, Layer], fallback_entries: Set[str] | None
) -> Iterator[None]:
    """Lets `load_state_dict` check a state before it changes anything, and keep its dtypes.

    The check comes after the user's own hooks, which may replace the state.

    Raises:
        ValueError: The state is not one of the optimizer's groups, layers and fallback rule.
    """
    given: dict[str, Any] = {}

    def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = as_now(state_dict)
        _check_state(state_dict, optimizer.param_groups, layers, fallback_entries)
        given.update(state_dict)
        return state_dict

    def restore(_: Optimizer) -> None:
        _restore_dtypes(optimizer.state, given, optimizer.param_groups, layers)

    hooks = [optimizer.register_load_state_dict_pre_hook(check)]
    hooks.append(optimizer.register_load_state_dict_post_hook(restore, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

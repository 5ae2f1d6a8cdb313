"""What a description says of a model: made of it, checked, and made into a model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

import rlscuda
from rlscuda._torch import pre_hooks, unwrapped
from rlscuda.files.documents import check, short
from rlscuda.pruning.blocks.stand_ins import StandIn, description_of, made_of
from rlscuda.pruning.running.calls import all_tensors


class TensorEntry(TypedDict):
    """What a manifest says of a parameter or buffer."""

    shape: list[int]
    dtype: str
    parameter: bool
    requires_grad: bool


class ModuleEntry(TypedDict):
    """What a manifest says of a module."""

    type: str
    attributes: dict[str, Any]


class Manifest(TypedDict):
    """What a file says of its model."""

    torch: str
    rlscuda: str
    modules: dict[str, ModuleEntry]
    tensors: dict[str, TensorEntry]
    ties: dict[str, str]


StandIns = dict[str, dict[str, Any]]  # older files have none


class Described(TypedDict):
    """Of `describe`."""

    manifest: Manifest
    tensors: dict[str, Tensor]


def _is_numeric(value: Any) -> bool:
    """Whether an attribute is a number or a list or tuple of such: what pruning may change."""
    if type(value) in (list, tuple, torch.Size):
        return all(_is_numeric(item) for item in value)
    return type(value) in (int, float)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _check_savable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(isinstance(hook, BasePruningMethod) for hook in pre_hooks(module).values()):
            raise ValueError(
                f"{name!r} has a mask, which the factory's model has not: make it permanent "
                "first, with torch.nn.utils.prune.remove"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name!r} keeps extra state, which a file without code cannot hold")
    for name, tensor in all_tensors(model).items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name!r} must be a dense tensor with data, got {tensor.layout} on "
                             f"{tensor.device}")  # fmt: skip


def _manifest(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says of the model, and the tensors that it holds: each once."""
    entries: dict[str, Any] = {}
    ties: dict[str, str] = {}
    first: dict[Tensor, str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in all_tensors(model).items():
        if tensor in first:  # tensors hash by identity
            ties[name] = first[tensor]
            continue
        first[tensor] = name
        kept[name] = tensor.detach()
        entries[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "parameter": isinstance(tensor, nn.Parameter),
            "requires_grad": tensor.requires_grad,
        }
    modules = {
        name: {
            "type": type(module).__name__,
            "attributes": {
                key: _encode(value)
                for key, value in vars(module).items()
                if not key.startswith("_") and _is_numeric(value)
            },
        }
        for name, module in model.named_modules()
    }
    versions = {"torch": str(torch.__version__), "rlscuda": rlscuda.__version__}
    stand_ins = {n: description_of(m) for n, m in model.named_modules() if isinstance(m, StandIn)}
    own = {"modules": modules, "stand_ins": stand_ins, "tensors": entries, "ties": ties}
    return {**versions, **own}, kept


def describe(model: nn.Module) -> Described:
    """What `rebuild` needs to make a pruned model again, to be part of a checkpoint.

    Returns:
        `manifest`, made of what JSON has, and `tensors` by name, which share the model's memory.

    Raises:
        ValueError: The model holds what such a description cannot, or a mask.
    """
    model = unwrapped(model)
    _check_savable(model)
    manifest, tensors = _manifest(model)
    return {"manifest": cast(Manifest, manifest), "tensors": tensors}


def _put_stand_ins(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Puts what stood in for removed blocks into a model, each where the model has a module."""
    stand_ins = manifest.get("stand_ins", {})
    check(stand_ins, StandIns, "the stand-ins of the file")
    for name, description in stand_ins.items():
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the factory does not fit the file: it has no module {name!r}, which "
                             "was removed") from None  # fmt: skip
        model.set_submodule(name, made_of(description))


def _check_modules(model: nn.Module, saved: Mapping[str, Any]) -> None:
    own = {name: type(module).__name__ for name, module in model.named_modules()}
    if own.keys() != saved.keys():
        _raise_difference("modules", saved.keys(), own.keys())
    for name, entry in saved.items():
        if entry["type"] != own[name]:
            raise ValueError(f"the factory does not fit the file: {name!r} must be a "
                             f"{entry['type']}, got {own[name]}")  # fmt: skip


def _check_attributes(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """A saved number is one, and so are those of a list or tuple, which has its own length."""
    for name, module in model.named_modules():
        for key, value in saved[name]["attributes"].items():
            current = vars(module).get(key)
            if _is_numeric(current) and not _is_alike(_decoded(value, key, name), current):
                raise ValueError(
                    f"the file does not fit: {key} of {name!r} must be like {current}, got "
                    f"{short(value)}"
                )


def _decoded(value: Any, key: str, name: str) -> Any:
    try:
        return _decode(value)
    except (KeyError, TypeError, RecursionError):
        raise ValueError(f"{key} of {name!r} must be numbers, got {short(value)}") from None


def _is_alike(value: Any, current: Any) -> bool:
    if isinstance(current, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(current)
        return same and all(_is_alike(item, own) for item, own in zip(value, current))
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _raise_difference(what: str, saved: Any, own: Any) -> None:
    def listed(names: Any) -> str:
        return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"

    raise ValueError(
        f"the factory does not fit the file: {what} that only the file has: "
        f"{listed(saved - own)}; that only the factory's model has: {listed(own - saved)}"
    )


def _check_tensors(
    model: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    entries, ties, own = manifest["tensors"], manifest["ties"], all_tensors(model)
    names = entries.keys() | ties.keys()
    if names != own.keys():
        _raise_difference("parameters and buffers", names, own.keys())
    if entries.keys() != tensors.keys() or not set(ties.values()) <= entries.keys():
        raise ValueError("the file's manifest does not list the tensors that the file holds")
    for name in own:
        entry, tensor = entries[ties.get(name, name)], tensors[ties.get(name, name)]
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if (shape, dtype) != (entry["shape"], entry["dtype"]):
            raise ValueError(f"{name!r} must be {entry['shape']} {entry['dtype']} by the file's "
                             f"manifest, got {shape} {dtype}")  # fmt: skip
        whole = list(own[name].shape)
        if len(shape) != len(whole) or any(kept > all_ for kept, all_ in zip(shape, whole)):
            raise ValueError(
                f"the factory does not fit the file: {name!r} {shape} is no pruned {whole}"
            )
        if entry["requires_grad"] and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name!r} cannot require a gradient, being {dtype}")
        if isinstance(own[name], nn.Parameter) != entry["parameter"]:
            kinds = ("parameter", "buffer") if entry["parameter"] else ("buffer", "parameter")
            raise ValueError(f"the factory does not fit the file: {name!r} must be a {kinds[0]}, "
                             f"got a {kinds[1]}")  # fmt: skip


def rebuild(factory: Callable[[], nn.Module], described: Mapping[str, Any]) -> nn.Module:
    """Makes the model again that `describe` described; `load_pruned` without the file.

    Args:
        factory: Makes the model as it was before pruning; its weights do not matter.
        described: The description; its tensors are copied.

    Raises:
        ValueError: The description is none, or the factory's model has other modules, types, names
            or dimensions.
        TypeError: `factory` does not return a module.
    """
    check(described, Described, "the file")
    manifest, tensors = described["manifest"], described["tensors"]
    made = factory()
    if not isinstance(made, nn.Module):
        raise TypeError(f"factory must return a module, got {type(made).__name__}")
    model = unwrapped(made)
    _put_stand_ins(model, manifest)
    _check_modules(model, manifest["modules"])
    _check_attributes(model, manifest["modules"])
    _check_tensors(model, manifest, tensors)
    loaded: dict[str, Tensor] = {}
    own = all_tensors(model)
    for name, entry in manifest["tensors"].items():
        device = "cpu" if own[name].is_meta else own[name].device
        loaded[name] = tensors[name].to(device, copy=True)
        if entry["parameter"]:
            loaded[name] = nn.Parameter(loaded[name], requires_grad=entry["requires_grad"])
    for name in own:
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, loaded[manifest["ties"].get(name, name)])
    for name, module in model.named_modules():
        for key, value in manifest["modules"][name]["attributes"].items():
            value, current = _decode(value), vars(module).get(key)
            if _is_numeric(current) and value != current:
                setattr(module, key, value)
    return made

"""Pruned models as files without pickled code: a manifest and the tensors, in one safetensors file.

The file is an ordinary safetensors file. Its header's metadata hold the manifest (JSON): format
version, versions of torch and rlscuda, of each module its type and numeric attributes, of each
parameter and buffer its shape and dtype, which names are one tensor, and the SHA-256 of each
tensor's bytes. The state of an optimizer, where one is saved, is the uint8 tensor `.optimizer`:
bytes of `torch.save`. The metadata hold the SHA-256 of the manifest, too. One file is replaced in
one step, so model and optimizer are always of the same moment.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer

import rlscuda
from rlscuda._archive import load_archive, save_archive
from rlscuda._atomic import write_atomically
from rlscuda._documents import check, short
from rlscuda.pruning._inputs import optional
from rlscuda.pruning.isolation import all_tensors

FORMAT = "rlscuda-pruned"
VERSION = 1
_OPTIMIZER = ".optimizer"  # no parameter's name starts with a dot


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


class Described(TypedDict):
    """Of `describe`."""

    manifest: Manifest
    tensors: dict[str, Tensor]


StrPath = str | os.PathLike[str]


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
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
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
    return {**versions, "modules": modules, "tensors": entries, "ties": ties}, kept


def _optimizer_bytes(optimizer: Optimizer) -> Tensor:
    """The state as [bytes] uint8, sure to be loadable without code."""
    stream = io.BytesIO()
    save_archive(optimizer.state_dict(), stream)
    stream.seek(0)
    try:
        load_archive(stream)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the state of {type(optimizer).__name__} cannot be saved without code: {error}"
        ) from None
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def describe(model: nn.Module) -> Described:
    """What `rebuild` needs to make a pruned model again, to be part of a checkpoint.

    Returns:
        `manifest`, made of what JSON has, and `tensors` by name, which share the model's memory.

    Raises:
        ValueError: The model holds what such a description cannot, or a mask.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    _check_savable(model)
    manifest, tensors = _manifest(model)
    return {"manifest": cast(Manifest, manifest), "tensors": tensors}


def save_pruned(model: nn.Module, path: StrPath, *, optimizer: Optimizer | None = None) -> None:
    """Writes a model, and the state of its optimizer, to one safetensors file.

    Saved are all parameters and buffers with their shapes, dtypes, ties and `requires_grad`, and
    the numeric attributes of every module; not the code, hooks, modes or random generators.

    Args:
        model: Any model whose modules have the types that its factory gives them.
        path: The file; it is replaced in one step, or stays as it was.
        optimizer: Whose state to keep for `load_optimizer`.

    Raises:
        ValueError: The model or the state holds what such a file cannot, or a mask.
        ImportError: safetensors is missing.
    """
    safetensors = optional("safetensors.torch", "pruning")
    described = describe(model)
    manifest, kept = described["manifest"], described["tensors"]
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in kept.items()}
    if optimizer is not None:
        tensors[_OPTIMIZER] = _optimizer_bytes(optimizer)
    text = json.dumps({**manifest, "sha256": {name: _sha256_of(t) for name, t in tensors.items()}})
    metadata = {"format": FORMAT, "version": str(VERSION), "manifest": text}
    metadata["sha256"] = _sha256(text.encode())
    data = safetensors.save(tensors, metadata)
    write_atomically(Path(path), lambda stream: stream.write(data))


def _read(path: StrPath, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors whose names are wanted."""
    safetensors = optional("safetensors", "pruning")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} was not written by save_pruned")
            if metadata.get("version") != str(VERSION):
                raise ValueError(f"{path} must be of format version {VERSION}, got "
                                 f"{metadata.get('version')}")  # fmt: skip
            text = metadata["manifest"]
            if metadata.get("sha256", _sha256(text.encode())) != _sha256(text.encode()):
                raise _damaged(path, "the manifest")
            manifest = json.loads(text)
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if wanted(name)}
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    check(manifest, Manifest, f"the manifest of {path}")
    if "sha256" in manifest:  # older files have none
        check(manifest["sha256"], dict[str, str], f"the checksums of {path}")
        if names != manifest["sha256"].keys():
            raise _damaged(path, "a tensor's name")
        for name, tensor in tensors.items():
            if _sha256_of(tensor) != manifest["sha256"][name]:
                raise _damaged(path, repr(name))
    return manifest, tensors


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of(tensor: Tensor) -> str:
    return _sha256(tensor.reshape(-1).view(torch.uint8).numpy())


def _damaged(path: StrPath, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what} is not what its SHA-256 was taken of; put back a copy "
        "of the file, or save the model again"
    )


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


def load_pruned(factory: Callable[[], nn.Module], path: StrPath) -> nn.Module:
    """Rebuilds a model that `save_pruned` wrote.

    The factory's model is checked against the whole file first; then every parameter and buffer is
    replaced by the saved one, on the device that the factory chose, and every numeric attribute
    that pruning changed is set.

    Args:
        factory: Makes the model as it was before pruning; its weights do not matter.
        path: The file.

    Returns:
        The factory's model, pruned, in the mode in which the factory left it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, of another format version or no such file at all, or the
            factory's model has other modules, types, names or dimensions.
        TypeError: `factory` does not return a module.
        ImportError: safetensors is missing.
    """
    manifest, tensors = _read(path, lambda name: name != _OPTIMIZER)
    return rebuild(factory, {"manifest": manifest, "tensors": tensors})


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
    model = getattr(made, "_orig_mod", made)  # what torch.compile wraps
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


def load_optimizer(optimizer: Optimizer, path: StrPath) -> None:
    """Loads the state that `save_pruned(..., optimizer=...)` kept.

    Training then goes on exactly as it would have.

    Args:
        optimizer: Made for the loaded model in the way of the saved one.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no optimizer, or `optimizer.load_state_dict` refuses its state.
        ImportError: safetensors is missing.

    Example:
        >>> save_pruned(model, path, optimizer=opt)           # doctest: +SKIP
        >>> model = load_pruned(make_model, path)             # doctest: +SKIP
        >>> opt = RLSOptimizer(model, lr=0.1)                 # doctest: +SKIP
        >>> load_optimizer(opt, path)                         # doctest: +SKIP
    """
    _, tensors = _read(path, lambda name: name == _OPTIMIZER)
    if _OPTIMIZER not in tensors:
        raise ValueError(f"{path} holds no optimizer: it was saved without optimizer=")
    if tensors[_OPTIMIZER].dtype != torch.uint8:
        raise ValueError(f"{path}: the optimizer must be bytes, got {tensors[_OPTIMIZER].dtype}")
    stream = io.BytesIO(tensors[_OPTIMIZER].numpy().tobytes())
    try:
        state = load_archive(stream)
    except Exception as error:  # damaged bytes lead to errors of any type
        raise ValueError(f"{path}: the optimizer's state is damaged: {error}") from None
    optimizer.load_state_dict(state)

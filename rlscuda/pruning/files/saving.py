"""Pruned models as files without pickled code: a manifest and the tensors, in one safetensors file.

The file is an ordinary safetensors file. Its header's metadata hold the manifest (JSON): format
version, versions of torch and rlscuda, of each module its type and numeric attributes, of each
parameter and buffer its shape and dtype, which names are one tensor, and the SHA-256 of each
tensor's bytes. The state of an optimizer, where one is saved, is the uint8 tensor `.optimizer`:
bytes of `torch.save`. The metadata hold the SHA-256 of the manifest, too. One file is replaced in
one step, so model and optimizer are always of the same moment.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.files.archives import load_archive, save_archive
from rlscuda.pruning.files.manifest import Manifest, describe, rebuild
from rlscuda.pruning.files.sealed import StrPath, read_sealed, write_sealed

FORMAT = "rlscuda-pruned"
VERSION = 1
_OPTIMIZER = ".optimizer"  # no parameter's name starts with a dot


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
    described = describe(model)
    manifest, kept = described["manifest"], described["tensors"]
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in kept.items()}
    if optimizer is not None:
        tensors[_OPTIMIZER] = _optimizer_bytes(optimizer)
    write_sealed(path, (FORMAT, VERSION), manifest, tensors)


def _read(path: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and all tensors, if every bit is as it was written."""
    return read_sealed(path, (FORMAT, VERSION), Manifest, "save_pruned")


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
    manifest, tensors = _read(path)
    tensors.pop(_OPTIMIZER, None)
    return rebuild(factory, {"manifest": manifest, "tensors": tensors})


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
    _, tensors = _read(path)
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

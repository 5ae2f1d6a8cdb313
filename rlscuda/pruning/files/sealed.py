"""Safetensors files whose every bit is checked: tensors, a document of JSON, and their SHA-256.

The header's metadata hold the document under `manifest`, the name and version of the format, and
the SHA-256 of the document, which itself has that of each tensor's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlscuda.files.atomic import write_atomically
from rlscuda.files.documents import check
from rlscuda.optional import optional

StrPath = str | os.PathLike[str]


def write_sealed(
    path: StrPath, form: tuple[str, int], manifest: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Writes a file; it is replaced in one step, or stays as it was.

    Args:
        path: The file.
        form: Name and version of the format.
        manifest: What JSON has.
        tensors: Contiguous, on the CPU.
    """
    safetensors = optional("safetensors.torch", "pruning")
    text = json.dumps({**manifest, "sha256": {name: _sha256_of(t) for name, t in tensors.items()}})
    metadata = {"format": form[0], "version": str(form[1]), "manifest": text}
    metadata["sha256"] = _sha256(text.encode())
    data = safetensors.save(tensors, metadata)
    write_atomically(Path(path), lambda stream: stream.write(data))


def read_sealed(
    path: StrPath, form: tuple[str, int], hint: Any, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and all tensors of a file, if every bit is as it was written.

    Args:
        path: The file.
        form: Name and version of the format.
        hint: Type of the document, see `check`.
        writer: The function that writes such files, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, of another format or version.
        ImportError: safetensors is missing.
    """
    safetensors = optional("safetensors", "pruning")
    load = optional("safetensors.torch", "pruning").load
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    data = Path(path).read_bytes()  # by one opening: another file can take the name meanwhile
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if metadata.get("format") != form[0]:
            raise ValueError(f"{path} was not written by {writer}")
        if metadata.get("version") != str(form[1]):
            raise ValueError(f"{path} must be of format version {form[1]}, got "
                             f"{metadata.get('version')}")  # fmt: skip
        text = metadata["manifest"]
        if metadata.get("sha256", _sha256(text.encode())) != _sha256(text.encode()):
            raise _damaged(path, "the manifest")
        manifest = json.loads(text)
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    check(manifest, hint, f"the manifest of {path}")
    if "sha256" in manifest:  # older files have none
        check(manifest["sha256"], dict[str, str], f"the checksums of {path}")
        if tensors.keys() != manifest["sha256"].keys():
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

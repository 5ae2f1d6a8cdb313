"""Compares the files of two folders: tensors to the bit, all else by value."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

TIMES = {"seconds", "epoch_seconds", "latency_seconds"}  # keys and columns that tell the time
BUILD = {"source_hash", "cuda", "cuda_archs"}  # of an extension of its own
MAY_GO = {"report.png"}
_TIMED = re.compile(r"latency|seconds of training|milliseconds a step|report\.png")
_TIMED_ON_PAGE = re.compile(
    r"latency(, \d+ images?)?( [\d.]+ [mµn]?s)*( [\d.]+× (fast|slow)er| the same)"
    r"|The same figures are in report\.png ?\.|(?<=from )rlscuda[\w.]*(?= import)"
)


def _archive(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _pruned(path: Path) -> Any:
    """A file of `save_pruned`, whose checksums follow from the rest."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    optimizer = tensors.pop(".optimizer", None)
    if optimizer is not None:
        tensors["optimizer"] = _archive(io.BytesIO(optimizer.numpy().tobytes()))
    manifest = json.loads(metadata.pop("manifest"))
    del manifest["sha256"], metadata["sha256"]
    return metadata, manifest, tensors


def _table(path: Path) -> Any:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _page(path: Path) -> list[str]:
    """The visible words of a page."""
    text = re.sub(r"(?s)<(style|title)\b.*?</\1>", "", path.read_text())
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())
    return _TIMED_ON_PAGE.sub("", text).split()


def _printed(path: Path) -> list[str]:
    """Lines of the terminal without times, and tables without the widths that follow from them."""
    lines = (line for line in path.read_text().splitlines() if not _TIMED.search(line))
    return [" ".join(re.sub(r"[━─]+|\d+\.\d s$", " ", line).split()) for line in lines]


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _archive,
    ".safetensors": _pruned,
    ".json": lambda path: json.loads(path.read_text()),
    ".csv": _table,
    ".html": _page,
    ".out": _printed,
    ".txt": lambda path: path.read_text().splitlines(),
    ".png": lambda path: "a picture",  # its curves are over time
}


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and values in a nest of containers, each with its place, and the containers."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in BUILD:
                yield from leaves(type(item) if key in TIMES else item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}[{number}]")
    yield place, type(value) if isinstance(value, (dict, list, tuple)) else value


def same(one: Any, other: Any) -> bool:
    """Whether two leaves are the same; tensors to the bit, so NaN is NaN and -0.0 is not 0.0."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and (one == other or (one != one and other != other))
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def _short(one: Any) -> str:
    if isinstance(one, Tensor):
        return f"{one.dtype} {list(one.shape)} {one.flatten()[:3].tolist()}"
    return repr(one)[:80]


def _files(folder: Path) -> dict[str, Path]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: p for name, p in found.items() if p.is_file() and p.name not in MAY_GO}


def differences(base: Path, here: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """Compares all files of two folders.

    Returns:
        What was compared by the suffix of the files, and where they differ.
    """
    counts: dict[str, Counter[str]] = {}
    ones, others = _files(base), _files(here)
    found = [f"{name}: only in {where}" for where, names in
             (("the base", ones.keys() - others.keys()), ("the tree", others.keys() - ones.keys()))
             for name in sorted(names)]  # fmt: skip
    for name in sorted(ones.keys() & others.keys()):
        read = READERS.get(ones[name].suffix, Path.read_bytes)
        one, other = (dict(leaves(read(files[name]))) for files in (ones, others))
        count = counts.setdefault(ones[name].suffix, Counter())
        tensors = [leaf for leaf in one.values() if isinstance(leaf, Tensor)]
        count += Counter(files=1, tensors=len(tensors), values=len(one) - len(tensors),
                         numbers=sum(tensor.numel() for tensor in tensors))  # fmt: skip
        for place in sorted(one.keys() | other.keys()):
            if place not in one or place not in other:
                found.append(f"{name}{place}: only in the {'base' if place in one else 'tree'}")
            elif not same(one[place], other[place]):
                found.append(f"{name}{place}: {_short(one[place])} in the base, "
                             f"{_short(other[place])} in the tree")  # fmt: skip
    return counts, found

"""What functions of the library read, damaged."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import damages
import torch
from case import Case, file, nothing, spread
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlscuda import RLSOptimizer
from rlscuda.pruning.files.saving import load_optimizer, load_pruned
from rlscuda.zoo import ImageShape, mlp


def _metadata(change: Callable[[dict[str, Any], Random], dict[str, Any]]) -> damages.Damage:
    """Another manifest, with the checksums that go with it left out."""

    def damage(path: Path, random: Random) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        metadata.pop("sha256", None)
        manifest = json.loads(metadata["manifest"])
        manifest.pop("sha256", None)
        save_file(tensors, path, {**metadata, **change(manifest, random)})

    damage.__name__ = change.__name__
    return damage


def manifest_value(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {"manifest": json.dumps(damages.mutated(manifest, random, damages.HOSTILE[:24]))}


def attribute(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    under = ("modules", random.choice(["fc1", "fc2", ""]), "attributes")
    under = under if manifest["modules"][under[1]]["attributes"] else ("modules",)
    return {"manifest": json.dumps(damages.mutated(manifest, random, damages.HOSTILE[:24], under))}


def manifest_text(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {"manifest": random.choice((
        "[" * damages.DEEP, '{"a":' * damages.DEEP, "", "null", "5", "[]", "{}", "NaN", '"x"', "{",
        json.dumps({**manifest, "modules": None}), json.dumps({**manifest, "ties": {"a": "b"}}),
    ))}  # fmt: skip


def other_version(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {random.choice(["version", "format"]): random.choice(["", "2", "x" * 1000])}


def optimizer_bytes(path: Path, random: Random) -> None:
    """Other bytes of the optimizer's state."""
    with safe_open(path, "pt") as file:
        metadata = {"manifest": file.metadata()["manifest"], "format": "rlscuda-pruned"}
    manifest = json.loads(metadata["manifest"])
    manifest.pop("sha256", None)
    metadata |= {"manifest": json.dumps(manifest), "version": "1"}
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    state = tensors[".optimizer"]
    tensors[".optimizer"] = random.choice((
        state[: len(state) // 2], state[:0], state.float(), state.flip(0), state.bfloat16(),
        torch.randint(0, 256, (500,), dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8),
    )).clone()  # fmt: skip
    save_file(tensors, path, metadata)


def _whole() -> torch.nn.Module:
    return mlp(ImageShape(1, 8, 8), 3)


def _load_pruned() -> None:
    path = "pruned/pruned.safetensors"
    try:
        model = load_pruned(_whole, path)
        load_optimizer(RLSOptimizer(model), path)
    except (ValueError, FileNotFoundError, PermissionError):  # as documented
        pass


def pruned_files(count: int) -> Iterator[Case]:
    """Files of ``save_pruned``."""
    path = "pruned/pruned.safetensors"
    changes = (manifest_value, attribute, manifest_text, manifest_value, other_version)
    ways = (*map(_metadata, changes),
            optimizer_bytes, damages.truncate, damages.flip, damages.noise, damages.append,
            damages.text, damages.erase, damages.folder, damages.pipe, damages.itself)  # fmt: skip
    for (damage,) in spread(count, ways * count):
        yield Case(f"{path}: {damage.__name__}", file(path, damage), call=_load_pruned)


def _load_state(form: str, seed: int) -> None:
    """A state that was changed is refused with a ValueError, or trains on."""
    random = Random(seed)
    torch.manual_seed(0)

    def make() -> tuple[torch.nn.Module, RLSOptimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
        return model, RLSOptimizer(model, form=form)

    def train(model: torch.nn.Module, optimizer: RLSOptimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    under = random.choice([(), ("state",), ("param_groups", 0), ("state", 0), ("state", 2)])
    state = damages.mutated(
        optimizer.state_dict(), random, damages.HOSTILE + damages.tensors(), under
    )
    twin, other = make()
    train(twin, other)
    before = [p.detach().clone() for p in twin.parameters()]
    kept = str(other.state_dict())
    try:
        other.load_state_dict(state)
    except ValueError:
        assert str(other.state_dict()) == kept
        assert all(map(torch.equal, before, twin.parameters()))
        return
    train(twin, other)


def states(count: int) -> Iterator[Case]:
    """States of the optimizer."""

    for seed in range(count):
        form = ("adaptive", "paper", "natural", "spectral")[seed % 4]
        yield Case(f"state of {form} {seed}", nothing,
                   call=functools.partial(_load_state, form, seed))  # fmt: skip

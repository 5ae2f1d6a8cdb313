"""The register of scenarios, and how they write what they saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer


class Scenario(NamedTuple):
    """What is run in a folder of its own, and the scenarios whose files it goes on from."""

    run: Callable[..., None]
    after: tuple[str, ...]


SCENARIOS: dict[str, Scenario] = {}


def scenario(*after: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function, which writes to the current folder.

    Args:
        after: Scenarios whose folders the function is given, and leaves as they are.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        SCENARIOS[function.__name__] = Scenario(function, after)
        return function

    return register


def write(name: str, value: Any) -> None:
    """Writes tensors (`.pt`), numbers and lists (`.json`) or a text, by the name's suffix."""
    path = Path(name)
    if path.suffix == ".pt":
        torch.save(value, path)
    else:
        path.write_text(json.dumps(value) if path.suffix == ".json" else str(value))


def write_training(name: str, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
    """Writes all that training goes on from."""
    write(name, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more})

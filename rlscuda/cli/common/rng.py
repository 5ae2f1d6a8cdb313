"""Every random stream a training run can touch: seeding, capturing and restoring them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds PyTorch (all devices), NumPy's global stream and Python's `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global stream is what user models draw from
    random.seed(seed)


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The state of every stream, made of tensors, tuples and numbers only."""
    stream: Any = np.random.get_state()  # noqa: NPY002
    algorithm, keys, position, has_gauss, gauss = stream
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `capture_rng` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    random.setstate(state["python"])

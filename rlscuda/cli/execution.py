"""How a run is executed: device, threads, how often it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rlscuda.cli.errors import UserError


@dataclasses.dataclass(frozen=True)
class Execution:
    """Options that may differ when a run is resumed.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads; None leaves PyTorch's own number.
        checkpoint_every: checkpoint after every so many steps too; 0 for epochs only.
        cache: where torchvision keeps downloads; None for the user's cache folder.
    """

    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")
        if self.checkpoint_every < 0:
            raise UserError(f"--checkpoint-every must be at least 0, got {self.checkpoint_every}")

    def prepare(self) -> torch.device:
        """Set the threads, make cuDNN deterministic, and return the device.

        Raises:
            UserError: there is no such device here.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"--device {name} is not here: PyTorch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        return device

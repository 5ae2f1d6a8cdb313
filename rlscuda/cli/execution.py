"""How a run is executed: device, threads, how often it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rlscuda.cli.errors import UserError, in_range

MOST_THREADS = 1024  # beyond what a system gives, where OpenMP ends the process


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
        if self.threads is not None:
            in_range("--threads", self.threads, 1, MOST_THREADS)
        in_range("--checkpoint-every", self.checkpoint_every, 0)

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
        except (RuntimeError, ValueError, OverflowError):
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

"""How a run is executed: device, threads, how often it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import check_options, in_range, option
from rlscuda.optional import optional

MOST_THREADS = 1024  # beyond what a system gives, where OpenMP ends the process


@dataclasses.dataclass(frozen=True)
class Execution:
    """Options that may differ when a run is resumed.

    Attributes:
        checkpoint_every: Of `rlscuda train` alone, which declares it.
        tensorboard: Likewise.
    """

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    threads: int | None = option(None, "CPU threads.", least=1, most=MOST_THREADS)
    cache: Path | None = option(None, "Where torchvision keeps its downloads.")
    checkpoint_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers, and that there is what the options need."""
        check_options(self)
        in_range("--checkpoint-every", self.checkpoint_every, 0)
        if self.tensorboard:
            optional("tensorboard", "cli")

    def prepare(self) -> torch.device:
        """Sets the threads, makes cuDNN deterministic, and returns the device.

        Raises:
            UserError: There is no such device here.
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

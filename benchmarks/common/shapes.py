"""The shapes that benchmarks share, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlscuda.zoo import ImageShape

SCHEMA = 1  # of results/*.json
FLOOR = "copy floor"  # the lane that copies as many bytes as the case moves at least
BASELINE = "Adam"  # what training steps are multiples of


@dataclass(frozen=True)
class UpdateCase:
    """One `rls_update_`: P [n, n], or [batch, n, n] where batch > 0, by `rank` rows."""

    n: int
    rank: int = 1
    batch: int = 0

    @property
    def name(self) -> str:
        """How tables name it."""
        size = f"[{self.batch}, {self.n}, {self.n}]" if self.batch else f"n = {self.n}"
        return size if self.rank == 1 else f"{size}, r = {self.rank}"

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """P near the identity and its rows."""
        generator = torch.Generator().manual_seed(self.n + self.rank)
        lead = (self.batch,) if self.batch else ()
        rank = (self.rank,) if self.batch or self.rank > 1 else ()
        rows = torch.randn(*lead, *rank, self.n, generator=generator, dtype=dtype)
        P = torch.eye(self.n, dtype=dtype, device=device).repeat(*lead, 1, 1)
        return P, rows.to(device)


UPDATES = [
    *(UpdateCase(n) for n in (64, 128, 256, 512, 1024, 4096, 8192)),
    *(UpdateCase(n, rank) for rank in (16, 64) for n in (128, 512, 1024)),
    UpdateCase(10, batch=256),
]


@dataclass(frozen=True)
class PatchCase:
    """The input of one layer: [N, C, H, W], or [N, n] for a Linear layer with kernel 1."""

    name: str
    shape: tuple[int, ...]
    kernel: int = 1
    padding: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def geometry(self) -> tuple:
        """The operators' arguments after x: kernel, stride, padding, dilation, groups, mode."""
        return [self.kernel] * 2, [1, 1], [self.padding] * 4, [1, 1], 1, 0

    @property
    def traffic(self) -> int:
        """Bytes of the input."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self, device: str = "cpu") -> Tensor:
        """The input, as [N, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*self.shape, generator=generator).to(self.dtype)
        x = x.to(device) if x.dim() == 4 else x[:, :, None, None].to(device)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


WIDE = (128, 64, 32, 32)
PATCHES = [
    PatchCase("[128, 64, 32, 32], 3 × 3", WIDE, 3, 1),
    PatchCase("[128, 64, 32, 32], 3 × 3, channels_last", WIDE, 3, 1, channels_last=True),
    PatchCase("[128, 64, 32, 32], 3 × 3, bfloat16", WIDE, 3, 1, torch.bfloat16),
    PatchCase("LeNet-5 layer 1, [128, 1, 28, 28], 5 × 5", (128, 1, 28, 28), 5, 2),
    PatchCase("LeNet-5 layer 2, [128, 6, 14, 14], 5 × 5", (128, 6, 14, 14), 5),
    PatchCase("Linear, [64, 784]", (64, 784)),
    PatchCase("Linear, [2048, 384]", (2048, 384)),
]


@dataclass(frozen=True)
class WeightCase:
    """One weight step: c outputs, n inputs and a bias."""

    name: str
    outputs: int
    inputs: int


WEIGHTS = [
    WeightCase("LeNet-5 layer 2, 16 × 151", 16, 150),
    WeightCase("ResNet-20, 64 × 577", 64, 576),
    WeightCase("MLP layer 1, 300 × 785", 300, 784),
    WeightCase("VGG-16, 512 × 2305", 512, 2304),
]


@dataclass(frozen=True)
class TrainingCase:
    """One training step of a model of `rlscuda train` on random images."""

    name: str
    model: str
    shape: ImageShape
    batch: int
    paper_target: float
    adaptive_target: float
    rounds: int


TRAININGS = [
    TrainingCase("MLP 784-300-100-10, batch 64", "mlp", ImageShape(1, 28, 28), 64, 2.0, 2.5, 120),
    TrainingCase("LeNet-5, batch 128", "lenet5", ImageShape(1, 28, 28), 128, 1.15, 1.25, 40),
    TrainingCase(
        "ResNet-20, 32 × 32, batch 128", "resnet20", ImageShape(3, 32, 32), 128, 1.15, 1.25, 6
    ),
]

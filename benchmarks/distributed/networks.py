"""Networks whose costs are computed, on the meta device, and one small enough to be trained.

Each has a forward, for it shows which layers see one input and therefore have one `P`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut (He et al. 2015), stride on the second.

    Args:
        inputs: Channels that come.
        width: Of the middle; four times as many leave.
        stride: Of the 3 x 3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.third = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (width, width, 4 * width))
        self.shortcut = None
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.norms.append(nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        y = F.relu(self.norms[1](self.second(y)))
        y = self.norms[2](self.third(y))
        return F.relu(y + (x if self.shortcut is None else self.norms[3](self.shortcut(x))))


def resnet50() -> nn.Module:
    """ResNet-50 for 224 x 224 images, of 53 convolutions and a classifier."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    """The seven linear layers of one Llama block; what is between them has no parameters here.

    Args:
        width: Of the residual stream.
        hidden: Of the gated part.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        x = x + self.o(self.q(y) * self.k(y) * self.v(y))
        y = x.tanh()
        return x + self.down(self.gate(y) * self.up(y))


def llama7b() -> nn.Module:
    """32 blocks of width 4096 and 11008, the 224 layers of a transformer of 7 billion weights."""
    return nn.Sequential(*(Block(4096, 11008) for _ in range(32)))


class Small(nn.Module):
    """All that the cost of a step depends on: shared and block-diagonal `P`, odd rows, a fallback.

    Of 2 processes and of 4, some blocks of rows are cut by the borders between them, some are not.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.a, self.b = nn.Linear(90, 150), nn.Linear(90, 150, bias=False)
        self.wide, self.even = nn.Linear(150, 100), nn.Linear(100, 256)
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(1)
        return self.head(self.even(self.wide(self.a(x).tanh() * self.b(x)).tanh()).tanh())


@dataclass(frozen=True)
class Network:
    """One whose costs are computed.

    Attributes:
        name: For tables.
        build: Makes it.
        input: Shape of the minibatch of one rank.
        minibatch: What that is, in words.
    """

    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...]
    minibatch: str

    def meta(self) -> nn.Module:
        """It, on no memory."""
        with torch.device("meta"):
            return self.build()

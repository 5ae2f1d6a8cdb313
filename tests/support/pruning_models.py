"""Small models of every structure that pruning has to follow, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda.zoo import ResidualBlock


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: expand, depthwise, project, add."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(True), nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """Each convolution sees the concatenation of all before it."""

    def __init__(self, channels: int = 4, growth: int = 3, layers: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        widths = [channels + i * growth for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(w, growth, 3, padding=1) for w in widths[:-1])
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm and MLP on channels_last, bare layer scale, residual."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 2, 2)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block over patches, with a position embedding."""

    def __init__(self, width: int = 8, heads: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.expand, self.project = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.project(F.gelu(self.expand(self.norm2(x))))
        return self.head(x.mean(1))


class Gated(nn.Module):
    """Squeeze and excitation, then a gated linear unit: one half times the sigmoid of the other."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.gate = nn.Conv2d(channels, 8, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        value, gate = self.gate(x * y[:, :, None, None]).chunk(2, dim=1)
        return self.head((value * torch.sigmoid(gate)).mean((2, 3)))


class Twice(nn.Module):
    """One convolution called twice, and two linear layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.shared(self.stem(x))))).mean((2, 3))
        return self.head(F.relu(self.first(x)) * torch.sigmoid(self.second(x)))


class Shuffle(nn.Module):
    """A channel shuffle, which torch-pruning takes for a change of no consequence."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.second(x).mean((2, 3)))


class HardCoded(nn.Module):
    """A view with the number of channels written into it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 8, 8, 8)
        return self.head(self.second(x).mean((2, 3)))


class ChannelSoftmax(nn.Module):
    """A softmax over channels, to which a removed one is not a zero one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).softmax(1).mean((2, 3)))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(6 * 2 * 2, 8), nn.ReLU(inplace=True), nn.Linear(8, 5),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs),
                   nn.ReLU(inplace=True), nn.MaxPool2d(2)]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        ResidualBlock(4, 4), ResidualBlock(4, 6, 2), ResidualBlock(6, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True),
        InvertedResidual(4, 2), InvertedResidual(4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.PReLU(8),
        nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.InstanceNorm2d(12, affine=True), nn.ReLU(),
        nn.Conv2d(12, 6, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the couplings that it has: name -> units."""

    name: str
    make: Callable[[], nn.Module]
    couplings: dict[str, int]

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(dtype)


def inputs(dtype: torch.dtype = torch.float32, size: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


ZOO = [
    Case("lenet", lenet, {"0": 4, "3": 6, "6": 8}),
    Case("vgg", vgg, {"0": 6, "4": 8, "8": 8}),
    Case("resnet", resnet, {"0": 4, "3.conv1": 4, "4.conv1": 6, "4.conv2": 6,
                            "5.conv1": 8, "5.conv2": 8}),
    Case("mobilenet", mobilenet, {"0": 4, "3.body.0": 8, "4.body.0": 12}),
    Case("dense", Dense, {"stem": 4, "convs.0": 3, "convs.1": 3, "convs.2": 3}),
    Case("convnext", ConvNeXt, {"stem": 6, "expand": 12}),
    Case("attention", Attention, {"patches": 4, "expand": 24}),
    Case("gated", Gated, {"stem": 6, "squeeze": 4, "gate": 4}),
    Case("twice", Twice, {"stem": 4, "first": 6}),
    Case("grouped", grouped, {"0": 2, "3": 3, "6": 6}),
]  # fmt: skip

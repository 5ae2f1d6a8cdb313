"""Networks that are timed and are no model of `rlscuda train`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a shortcut, 1 x 1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem without pooling (He et al. 2015)."""
    blocks, inputs = [], 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        inputs = outputs
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem, *blocks, *head)


def resnet50_layers() -> nn.ModuleList:
    """The convolutions and the classifier of ResNet-50 by themselves, for their shapes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [
                nn.Conv2d(inputs, width, 1, bias=False),
                nn.Conv2d(width, width, 3, bias=False),
                nn.Conv2d(width, 4 * width, 1, bias=False),
            ]
            if block == 0:
                layers.append(nn.Conv2d(inputs, 4 * width, 1, bias=False))
            inputs = 4 * width
    return nn.ModuleList([*layers, nn.Linear(2048, 1000)])


def vgg16(classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32 x 32 images: thirteen convolutions and a linear classifier."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))


def vgg16_layers() -> nn.ModuleList:
    """The thirteen convolutions of VGG-16 with a classifier for 32 x 32 images."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    layers = [nn.Conv2d(a, b, 3) for a, b in zip(widths, widths[1:])]
    return nn.ModuleList([*layers, nn.Linear(512, 10)])

"""Networks that are timed and are no model of `rlscuda train`."""

from __future__ import annotations

from torch import nn

from rlscuda import zoo

IMAGES = zoo.ImageShape(3, 32, 32)


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem without pooling (He et al. 2015)."""
    return zoo.resnet(IMAGES, 10, widths=(64, 128, 256, 512), blocks=2)


def vgg16() -> nn.Module:
    """VGG-16 of convolutions with bias and one linear layer."""
    return zoo.vgg16(IMAGES, 10, hidden=(), bias=True)


def vgg16_layers() -> nn.ModuleList:
    """The convolutions and the classifier of `vgg16` by themselves, for their shapes."""
    return nn.ModuleList(m for m in vgg16() if isinstance(m, (nn.Conv2d, nn.Linear)))


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

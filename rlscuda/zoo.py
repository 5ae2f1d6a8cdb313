"""The networks that the command line, the benchmarks and the tests know by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class ImageShape(NamedTuple):
    """Shape of one input image.

    Args:
        channels: Channels.
        height: Rows of pixels.
        width: Columns of pixels.
    """

    channels: int
    height: int
    width: int


def lenet5(
    shape: ImageShape,
    classes: int,
    widths: tuple[int, int] = (6, 16),
    hidden: Sequence[int] = (120, 84),
) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; images under 32 pixels are padded by 2, as MNIST is.

    Args:
        shape: Of one image.
        classes: Number of classes.
        widths: Channels of the two convolutions.
        hidden: Units of the linear layers before the last.

    Raises:
        ValueError: The images are smaller than 12 x 12, where nothing is left after the pooling.
    """
    channels, height, width = shape
    if min(height, width) < 12:
        raise ValueError(f"lenet5 needs images of at least 12 x 12 pixels, got {height} x {width}")
    padding = 2 if min(height, width) < 32 else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    first, second = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            **_linear(second * height * width, hidden, classes, relus=2),
        )
    )


def mlp(shape: ImageShape, classes: int, hidden: Sequence[int] = (300, 100)) -> nn.Module:
    """Multilayer perceptron with ReLU; of 28 x 28 images 784-300-100-10 by default.

    Args:
        shape: Of one image, which is flattened.
        classes: Number of classes.
        hidden: Units of the linear layers before the last.
    """
    inputs = shape.channels * shape.height * shape.width
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **_linear(inputs, hidden, classes)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut, projected where the shape changes.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H/stride, W/stride]."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def resnet(shape: ImageShape, classes: int, widths: Sequence[int], blocks: int) -> nn.Module:
    """ResNet for small images (He et al. 2016, section 4.2), with 1 x 1 projections.

    Args:
        shape: Of one image.
        classes: Number of classes.
        widths: Channels of each stage; all but the first halve the image.
        blocks: Residual blocks a stage: 1, 2, 3 at three widths are ResNet-8, -14, -20.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(shape.channels, widths[0], 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(),
    )
    inputs = widths[0]
    for stage, width in enumerate(widths, 1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            layers[f"block{stage}{block}"] = ResidualBlock(inputs, width, stride)
            inputs = width
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inputs, classes))
    return nn.Sequential(layers)


def resnet20(shape: ImageShape, classes: int) -> nn.Module:
    """ResNet-20: three stages of three residual blocks, of 16, 32 and 64 channels.

    Args:
        shape: Of one image.
        classes: Number of classes.
    """
    return resnet(shape, classes, widths=(16, 32, 64), blocks=3)


def vgg(
    shape: ImageShape,
    classes: int,
    widths: Sequence[int],
    depths: Sequence[int],
    hidden: Sequence[int] = (),
    pixels: int = 1,
    norm: bool = True,
    bias: bool = False,
) -> nn.Module:
    """VGG for small images (Simonyan and Zisserman 2015), with batch norm.

    Pooling rounds up, so that 28 x 28 images keep a pixel to the end of five stages.

    Args:
        shape: Of one image.
        classes: Number of classes.
        widths: Channels of each stage, which ends in a pooling.
        depths: Convolutions of each stage.
        hidden: Units of the linear layers before the last.
        pixels: Side of the image that the linear layers see.
        norm: Whether batch norm follows each convolution.
        bias: Whether the convolutions have one.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = shape.channels
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        for number in range(1, depth + 1):
            name = f"{stage}{number}"
            layers[f"conv{name}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=bias)
            if norm:
                layers[f"bn{name}"] = nn.BatchNorm2d(width)
            layers[f"relu{name}"] = nn.ReLU()
            inputs = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)
    layers.update(pool=nn.AdaptiveAvgPool2d(pixels), flatten=nn.Flatten())
    layers.update(_linear(inputs * pixels**2, hidden, classes))
    return nn.Sequential(layers)


def vgg16(
    shape: ImageShape, classes: int, hidden: Sequence[int] = (512, 512), bias: bool = False
) -> nn.Module:
    """VGG-16 for 32 x 32 images: 13 convolutions with batch norm, three linear layers.

    Args:
        shape: Of one image.
        classes: Number of classes.
        hidden: Units of the linear layers before the last.
        bias: Whether the convolutions have one.
    """
    widths, depths = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    return vgg(shape, classes, widths, depths, hidden, bias=bias)


def _linear(
    inputs: int, hidden: Sequence[int], classes: int, relus: int = 0
) -> OrderedDict[str, nn.Module]:
    """Linear layers `fc1`, `fc2`, ... with a ReLU after all but the last, after `relus` others."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, units in enumerate(hidden, 1):
        layers[f"fc{number}"] = nn.Linear(inputs, units)
        layers[f"relu{relus + number}"] = nn.ReLU()
        inputs = units
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(inputs, classes)
    return layers


NETWORKS: dict[str, Callable[[ImageShape, int], nn.Module]] = {
    "lenet5": lenet5,
    "mlp": mlp,
    "resnet20": resnet20,
    "vgg16": vgg16,
}

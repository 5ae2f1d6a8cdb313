"""The models that have a name, built for the images at hand, and factories from user modules."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.memory import check_fits


class ImageShape(NamedTuple):
    """Shape of one input image."""

    channels: int
    height: int
    width: int


def lenet5(shape: ImageShape, classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; images under 32 pixels are padded by 2, as MNIST is.

    Raises:
        UserError: the images are smaller than 12 × 12, where nothing is left after the pooling.
    """
    smallest = min(shape.height, shape.width)
    if smallest < 12:
        raise UserError(
            f"lenet5 needs images of at least 12 x 12 pixels, got {shape.height} x {shape.width}"
        )
    padding = 2 if smallest < 32 else 0
    height, width = (
        ((side + 2 * padding - 4) // 2 - 4) // 2 for side in (shape.height, shape.width)
    )
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape.channels, 6, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * height * width, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, classes),
        )
    )


def mlp(shape: ImageShape, classes: int) -> nn.Module:
    """Multilayer perceptron with hidden layers of 300 and 100 ReLU units (784-300-100-10)."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(shape.channels * shape.height * shape.width, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, classes),
        )
    )


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm and a shortcut, projected where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, H/stride, W/stride]."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def resnet20(shape: ImageShape, classes: int) -> nn.Module:
    """ResNet-20 for small images (He et al. 2016, section 4.2), with 1 × 1 projections."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(shape.channels, 16, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(16),
        relu=nn.ReLU(),
    )
    c_in = 16
    for stage, (c_out, first_stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
        for block, stride in enumerate((first_stride, 1, 1), 1):
            layers[f"block{stage}{block}"] = ResidualBlock(c_in, c_out, stride)
            c_in = c_out
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(c_in, classes))
    return nn.Sequential(layers)


def vgg16(shape: ImageShape, classes: int) -> nn.Module:
    """VGG-16 for 32 × 32 images: 13 convolutions with batch norm, three linear layers.

    Pooling rounds up, so that 28 × 28 images keep a pixel to the end.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    c_in = shape.channels
    for stage, widths in enumerate(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), 1):
        for number, c_out in enumerate(widths, 1):
            name = f"{stage}{number}"
            layers[f"conv{name}"] = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            layers[f"bn{name}"] = nn.BatchNorm2d(c_out)
            layers[f"relu{name}"] = nn.ReLU()
            c_in = c_out
        layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)
    layers.update(
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc1=nn.Linear(512, 512),
        relu1=nn.ReLU(),
        fc2=nn.Linear(512, 512),
        relu2=nn.ReLU(),
        fc3=nn.Linear(512, classes),
    )
    return nn.Sequential(layers)


MODELS = {"lenet5": lenet5, "mlp": mlp, "resnet20": resnet20, "vgg16": vgg16}


def build_model(name: str, shape: ImageShape, classes: int) -> nn.Module:
    """Build a model for images of ``shape`` and check that it answers with [N, classes].

    Args:
        name: a key of ``MODELS``, or ``module:factory``: a callable in an importable module (the
            current folder included). A factory receives those of ``in_channels``, ``image_size``
            (height, width) and ``num_classes`` that it has parameters for.
        shape: of one image.
        classes: number of classes.

    Raises:
        UserError: no such model, or the factory does not give a module that maps
            [N, channels, height, width] to [N, classes].
    """
    if name in MODELS:
        with torch.device("meta"):
            size = sum(p.numel() * p.itemsize for p in MODELS[name](shape, classes).parameters())
        check_fits(f"--model {name} for images {list(shape)} of {classes} classes", size)
        model = MODELS[name](shape, classes)
    elif ":" in name:
        model = _call_factory(name, shape, classes)
    else:
        raise UserError(
            f"--model must be one of {', '.join(MODELS)} or module:factory, got {name!r}"
        )
    _check_names(name, model)
    _check_output(name, model, shape, classes)
    return model


def _check_names(name: str, model: nn.Module) -> None:
    """Layers must have names that a file can hold."""
    for layer, _ in (*model.named_modules(), *model.named_parameters()):
        try:
            layer.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--model {name}: layers must have names that UTF-8 can say, got {layer!r}"
            ) from None


def _call_factory(name: str, shape: ImageShape, classes: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with reading(f"--model {name}: expected an importable module:factory"):
        factory = getattr(importlib.import_module(module_name), attribute)
    if not callable(factory):
        raise UserError(
            f"--model {name}: expected a callable that returns a module, got "
            f"{type(factory).__name__}"
        )
    offered = {
        "in_channels": shape.channels,
        "image_size": (shape.height, shape.width),
        "num_classes": classes,
    }
    signature = inspect.signature(factory)
    parameters = signature.parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        offered = {key: value for key, value in offered.items() if key in parameters}
    try:
        signature.bind(**offered)
    except TypeError as error:
        raise UserError(
            f"--model {name}: the factory can be given in_channels, image_size and num_classes "
            f"by name, nothing else: {error}"
        ) from None
    with reading(f"--model {name}: the factory failed"):
        model = factory(**offered)
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_output(name: str, model: nn.Module, shape: ImageShape, classes: int) -> None:
    """Send two blank images through the model in eval mode; no random stream moves."""
    expected = (2, classes)
    was_training = model.training
    model.eval()
    accepted = f"images [N, {', '.join(map(str, shape))}]"
    try:
        with (
            reading(f"--model {name} does not accept {accepted}"),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            output = model(torch.zeros(2, *shape))
    finally:
        model.train(was_training)
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if got != expected:
        raise UserError(
            f"--model {name} must map [2, {', '.join(map(str, shape))}] to logits "
            f"{list(expected)}, got {list(got) if isinstance(got, tuple) else got}"
        )

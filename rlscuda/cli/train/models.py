"""The models of `--model`, built for the images at hand and checked before they are trained."""

from __future__ import annotations

import importlib
import inspect
import os
import sys

import torch
from torch import Tensor, nn

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.memory import check_fits
from rlscuda.optional import optional
from rlscuda.zoo import NETWORKS, ImageShape


def build_model(name: str, shape: ImageShape, classes: int) -> nn.Module:
    """Builds a model for images of a shape and checks that it answers with [N, classes].

    Args:
        name: One of `NETWORKS`; `torchvision:NAME` or `timm:NAME`, with new weights; or
            `module:factory`, a callable in an importable module (the current folder included),
            which receives those of `in_channels`, `image_size` (height, width) and `num_classes`
            that it has parameters for.
        shape: Of one image.
        classes: Number of classes.

    Raises:
        UserError: There is no such model, or it does not map [N, channels, height, width] to
            [N, classes].
    """
    library, _, rest = name.partition(":")
    if name in NETWORKS:
        model = _from_zoo(name, shape, classes)
    elif library in ("torchvision", "timm"):
        with reading(f"--model {name}"):  # one that was built for another PyTorch fails anyhow
            model = _from_library(library, rest, shape, classes)
    elif ":" in name:
        model = _call_factory(name, shape, classes)
    else:
        raise UserError(
            f"--model must be one of {', '.join(NETWORKS)} or module:factory, torchvision:NAME, "
            f"timm:NAME, got {name!r}"
        )
    _check_names(name, model)
    _check_output(name, model, shape, classes)
    return model


def _from_zoo(name: str, shape: ImageShape, classes: int) -> nn.Module:
    try:
        with torch.device("meta"):
            parameters = NETWORKS[name](shape, classes).parameters()
    except ValueError as error:  # of images that are too small
        raise UserError(str(error)) from None
    size = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
    check_fits(f"--model {name} for images {list(shape)} of {classes} classes", size)
    return NETWORKS[name](shape, classes)


def _from_library(library: str, name: str, shape: ImageShape, classes: int) -> nn.Module:
    if library == "torchvision":
        models = optional("torchvision.models", "vision")
        return models.get_model(name, weights=None, num_classes=classes)
    timm = optional("timm", "vision")
    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=shape.channels)


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
    """Sends two blank images through the model in eval mode; no random stream moves."""
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

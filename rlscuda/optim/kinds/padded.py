"""Subclasses of `nn.Conv2d` that pad their input first: tried, not trusted.

Networks that come from TensorFlow pad by "same": to the right and the bottom by one more where the
total is odd, by amounts that the image's size decides, or that were fixed when the module was made.
timm's `Conv2dSame` and the `Conv2dStaticSamePadding` of EfficientNets are such, each with a forward
of its own. What a forward does is found out by calling copies of the module: itself on a small
image, and a twin of few channels and random weights on an image of each size that comes, in both
modes. They must put out what a convolution of the input padded with zeros does.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda._torch import HOOKS, has_own_forward, own_parameters

Padding = tuple[int, int, int, int]  # left, right, top, bottom

_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()


def pads_itself(module: nn.Module) -> bool:
    """Whether a module is a Conv2d with a forward of its own."""
    return isinstance(module, nn.Conv2d) and has_own_forward(module, nn.Conv2d)


def is_padded_convolution(module: nn.Module) -> bool:
    """Whether a module with a forward of its own is a convolution of its padded input.

    It is tried on small images of several sizes; `padding_of` tries others when they come. One that
    holds more tensors than weight and bias is none: what they are now, they need not be later.
    """
    weight = own_parameters(module).get("weight")
    if not isinstance(module, nn.Conv2d) or weight is None or weight.dtype not in _CLOSE:
        return False
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    if not {name for name, _ in tensors} <= {"weight", "bias"}:
        return False
    extents = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size)]
    height, width = (max(e, s) + s for e, s in zip(extents, module.stride))
    sizes = ((height, width), (height + 1, width), (height, width + 1))
    paddings = [padding_of(module, *size) for size in sizes]
    return None not in paddings and _once(module, "whole", _agrees_whole, sizes[0], paddings[0])


def padding_of(module: nn.Conv2d, height: int, width: int) -> Padding | None:
    """How a module pads an image of a size; None where it is no convolution of a padded input."""
    return _once(module, (height, width), _found, height, width)


def _once(module: nn.Conv2d, what: Any, find: Any, *args: Any) -> Any:
    """What is found out of a module, once for its kernel; None where its forward raises."""
    sizes = (tuple(size) for size in (module.kernel_size, module.stride, module.dilation))
    key = what, type(module), *sizes
    known = _known.setdefault(module, {})
    if key not in known:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                known[key] = find(module, *args)
        except Exception:  # of another's forward, which may be anything
            known[key] = None
    return known[key]


def _found(module: nn.Conv2d, height: int, width: int) -> Padding | None:
    generator = torch.Generator("cpu").manual_seed(height * 65_537 + width)
    twin = _twin(module, generator)
    channels = twin.weight.shape[1] * twin.groups
    x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64,
                    device="cpu")  # fmt: skip
    outputs = [twin.train(mode).forward(x.clone()) for mode in (True, True, False)]
    candidates = itertools.product(*(_candidates(twin, x, outputs[0], d) for d in (-1, -2)))
    for columns, rows in candidates:
        padding = (*columns, *rows)
        if all(_same(y, _convolved(twin, x, padding)) for y in outputs):
            return padding
    return None


def _agrees_whole(module: nn.Conv2d, size: tuple[int, int], padding: Padding) -> bool:
    """Whether a module with its own weights does the same as its twin."""
    own, weight = copied(module, {}), module.weight
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, weight.shape[1] * module.groups, *size, generator=generator, device="cpu")
    x = x.to(weight.device, weight.dtype)
    return _same(own.forward(x.clone()), _convolved(own, x, padding))


def _candidates(module: nn.Conv2d, x: Tensor, y: Tensor, dim: int) -> Iterator[tuple[int, int]]:
    """Paddings before and after along a dimension that give an output of its size."""
    stride, extent = module.stride[dim], module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
    total = (y.shape[dim] - 1) * stride + extent - x.shape[dim]
    for before in range(total + stride):
        yield before, max(total - before, 0)


def _convolved(module: nn.Conv2d, x: Tensor, padding: Padding) -> Tensor:
    padded = F.pad(x, padding)
    return F.conv2d(padded, module.weight, module.bias, module.stride, 0, module.dilation,
                    module.groups)  # fmt: skip


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    scale = float(second.abs().max())
    return float((first - second).abs().max()) <= _CLOSE[first.dtype] * scale


def _twin(module: nn.Conv2d, generator: torch.Generator) -> nn.Conv2d:
    """A float64 copy on the CPU of at most two groups, of two channels in and out each."""
    groups = min(module.groups, 2)
    outputs = min(module.weight.shape[0] // module.groups, 2) * groups
    inputs = min(module.weight.shape[1], 2)

    def drawn(*shape: int) -> nn.Parameter:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return nn.Parameter(values)

    new = {module.weight: drawn(outputs, inputs, *module.kernel_size)}
    if module.bias is not None:
        new[module.bias] = drawn(outputs)
    twin = copied(module, new)
    twin.in_channels, twin.out_channels, twin.groups = inputs * groups, outputs, groups
    return twin


def copied(module: nn.Conv2d, new: dict[Any, nn.Parameter]) -> nn.Conv2d:
    """A deep copy without hooks, with other parameters in place of some."""
    memo: dict[int, Any] = {id(old): parameter for old, parameter in new.items()}
    for name in HOOKS:
        memo[id(getattr(module, name))] = OrderedDict()
    return copy.deepcopy(module, memo)

"""What a Conv2d with a forward of its own does, seen while it does it.

A weight-standardised convolution makes its weight of the parameter, others pad by what they find.
All calls of `torch.conv2d` in a forward are watched: where there is one, its output is the
module's, and its input is the module's with zeros around it, then the module is that convolution,
on this input. Nothing of it is taken for granted on another.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlscuda.optim.kinds.padded import copied

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class NotProven(ValueError):
    """A module is not seen to be a convolution of its padded input; says why."""


class _Watch(TorchFunctionMode):
    """Lists the calls of `torch.conv2d`: the arguments by name, and the output."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.conv2d:
            self.calls.append(({**dict(zip(_NAMES, args)), **(kwargs or {})}, output))
        return output


@torch.no_grad()
def convolution_of(
    module: nn.Conv2d, x: Tensor, training: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """The convolution that a module is: its padded input [N, C, H, W] and its weight.

    Args:
        module: A Conv2d; a copy of it is called, without hooks.
        x: Its input [N, C, H, W].
        training: The copy's mode.

    Returns:
        The input, the weight, and whether that is the module's parameter itself.

    Raises:
        NotProven: Its forward raises, or is not one convolution of the input with zeros around it,
            with the module's own stride, dilation, groups and bias.
    """
    watch, module = _Watch(), copied(module, {}).train(training)
    try:
        with watch:
            output = module.forward(x)
    except Exception as error:  # of another's forward, which may be anything
        raise NotProven(f"its forward raises {type(error).__name__}: {error}") from error
    if len(watch.calls) != 1 or output is not watch.calls[0][1]:
        raise NotProven("its output is not that of one convolution")
    found = watch.calls[0][0]
    own = (_pair(module.stride), _pair(module.dilation), module.groups)
    if (_pair(found.get("stride", 1)), _pair(found.get("dilation", 1)), found.get("groups", 1)) != (
        own
    ):
        raise NotProven("its convolution has another stride, dilation or number of groups")
    if found.get("bias") is not module.bias or found["weight"].shape != module.weight.shape:
        raise NotProven("its convolution has another bias or shape of the weight")
    padded = F.pad(found["input"], _around(module, found.get("padding", 0)))
    more = [large - small for large, small in zip(padded.shape[2:], x.shape[2:])]
    places = itertools.product(*(range(size + 1) for size in more))
    if padded.shape[:2] != x.shape[:2] or not any(
        torch.equal(padded, F.pad(x, (left, more[1] - left, top, more[0] - top)))
        for top, left in places
    ):
        raise NotProven("the input of its convolution is not its own with zeros around it")
    return padded, found["weight"].detach(), found["weight"] is module.weight


def smallest_image(module: nn.Conv2d) -> Tensor:
    """Zeros [1, C, H, W] on which a module can be tried."""
    weight = module.weight
    sizes = [
        max(d * (k - 1) + 1, s) + s
        for d, k, s in zip(module.dilation, module.kernel_size, module.stride)
    ]
    return weight.new_zeros(1, weight.shape[1] * module.groups, *sizes)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _around(module: nn.Conv2d, padding: Any) -> list[int]:
    """Zeros left, right, above and below that `torch.conv2d` adds of itself."""
    if isinstance(padding, str):
        both = [d * (k - 1) * (padding == "same") for d, k in zip(module.dilation,
                                                                  module.kernel_size)]  # fmt: skip
        return [side for total in both[::-1] for side in (total // 2, total - total // 2)]
    return [side for amount in _pair(padding)[::-1] for side in (amount, amount)]

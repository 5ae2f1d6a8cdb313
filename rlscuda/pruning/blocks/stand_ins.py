"""What takes the place of the modules of a branch that goes: it fits whatever code calls it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import tree_leaves


class StandIn(nn.Module, ABC):
    """A module in the place of another, called in the same way.

    Args:
        outputs: 0 where the other puts out a tensor; else the length of the tuple it puts out, of
            which only the first item is made.
    """

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of the first tensor among the arguments."""
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        y = self.make(x)
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y

    @abstractmethod
    def make(self, x: Tensor) -> Tensor:
        """The first output."""


class Passed(StandIn):
    """Passes its input on, as a copy where something may write to it."""

    def __init__(self, outputs: int = 0, copies: bool = False):
        super().__init__(outputs)
        self.copies = copies

    def make(self, x: Tensor) -> Tensor:
        """The input."""
        return x.clone() if self.copies else x


class Absent(StandIn):
    """A branch that is gone: zeros.

    Args:
        outputs: See `StandIn`.
        whole: Whether the zeros have a shape, for code that writes to them; else they are one.
        channel: Dimension of the channels.
        width: Channels, or 0 for those of the input.
        strides: By how much each dimension after the batch is shortened, 1 for the channels.
    """

    def __init__(
        self,
        outputs: int = 0,
        whole: bool = False,
        channel: int = 1,
        width: int = 0,
        strides: tuple[int, ...] = (),
    ):
        super().__init__(outputs)
        self.whole, self.channel, self.width, self.strides = whole, channel, width, tuple(strides)

    def make(self, x: Tensor) -> Tensor:
        """Zeros like the input, of the branch's shape."""
        if not self.whole:
            return x.new_zeros(())
        sizes = [-(-size // stride) for size, stride in zip(x.shape[1:], self.strides)]
        if self.width:
            sizes[self.channel - 1] = self.width
        return x.new_zeros((x.shape[0], *sizes))


class Mapped(StandIn):
    """A linear map of the branch's input, with a bias.

    Args:
        outputs: See `StandIn`.
        kernel: Side of the square kernel over the pixels, or 0 for a Linear of the last dimension.
        inputs: Channels that come in.
        width: Channels that go out.
        stride: Of the kernel.
    """

    def __init__(self, outputs: int, kernel: int, inputs: int, width: int, stride: int = 1):
        super().__init__(outputs)
        self.map: nn.Module = (
            nn.Conv2d(inputs, width, kernel, stride, kernel // 2)
            if kernel
            else nn.Linear(inputs, width)
        )

    def make(self, x: Tensor) -> Tensor:
        """The map of the input."""
        return self.map(x)


def description_of(stand_in: StandIn) -> dict[str, Any]:
    """The class of a stand-in and what it was made of, as it is now: for `made_of`."""
    own: dict[str, Any] = {"kind": type(stand_in).__name__, "outputs": stand_in.outputs}
    if isinstance(stand_in, Passed):
        own["copies"] = stand_in.copies
    elif isinstance(stand_in, Absent):
        names = ("whole", "channel", "width", "strides")
        own |= {name: getattr(stand_in, name) for name in names}
        own["strides"] = list(stand_in.strides)
    elif isinstance(stand_in, Mapped):
        layer: Any = stand_in.map
        if isinstance(layer, nn.Linear):
            own |= {"kernel": 0, "inputs": layer.in_features, "width": layer.out_features}
        else:
            own |= {"kernel": layer.kernel_size[0], "inputs": layer.in_channels}
            own |= {"width": layer.out_channels, "stride": layer.stride[0]}
    return own


_MOST = 2**31 - 1
_BOUNDS = {  # of the numbers in a description; a file may be anybody's
    "outputs": (0, 1 << 16), "channel": (-1, 8), "strides": (1, _MOST), "stride": (1, _MOST),
    "inputs": (1, _MOST),
}  # fmt: skip
_KINDS: dict[str, type[StandIn]] = {kind.__name__: kind for kind in (Passed, Absent, Mapped)}


def made_of(description: dict[str, Any]) -> StandIn:
    """A stand-in as `description_of` has it; weights, which it has not, are on the meta device.

    Raises:
        ValueError: It describes none.
    """
    options = dict(description)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"a stand-in must be {' | '.join(_KINDS)}, got {kind!r}")
    try:
        for name, value in options.items():
            least, most = _BOUNDS.get(name, (0, _MOST))
            for number in value if name == "strides" else (value,):
                if not isinstance(number, int) or not least <= number <= most:
                    raise TypeError(f"{name} must be integers from {least} to {most}")
        with torch.device("meta"):
            return _KINDS[kind](**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"no {kind} is described by {options}: {error}") from None

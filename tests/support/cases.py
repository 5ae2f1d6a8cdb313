"""Named layers and the inputs they are tested on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvCase:
    """A convolution: its arguments, the size of its input, and whether that is channels_last."""

    name: str
    options: dict = field(default_factory=dict)
    size: tuple[int, int] = (7, 6)
    channels: tuple[int, int] = (4, 6)
    channels_last: bool = False

    def layer(self, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        layer = nn.Conv2d(*self.channels, **{"kernel_size": 3, **self.options}).to(dtype)
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return layer.to(memory_format=memory)

    def input(self, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
        x = torch.randn(batch, self.channels[0], *self.size, dtype=dtype)
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(memory_format=memory)


def conv_grid() -> list[ConvCase]:
    """Stride x padding x padding mode x dilation x groups x bias x channels_last, where valid."""
    cases = []
    grid = itertools.product(
        (1, (2, 1)), (0, (1, 2), "same"), ("zeros", "reflect", "replicate", "circular"),
        (1, (1, 2)), (1, 2), (True, False), (False, True),
    )  # fmt: skip
    for stride, padding, mode, dilation, groups, bias, last in grid:
        if padding == "same" and stride != 1 or padding == 0 and mode != "zeros":
            continue
        options = {"stride": stride, "padding": padding, "padding_mode": mode,
                   "dilation": dilation, "groups": groups, "bias": bias}  # fmt: skip
        name = "-".join(
            str(v).replace(" ", "") for v in (stride, padding, mode, dilation, groups)
        )  # fmt: skip
        name += ("-bias" if bias else "") + ("-last" if last else "")
        cases.append(ConvCase(name, options, channels_last=last))
    return cases


CONVOLUTIONS = [
    *conv_grid(),
    ConvCase("even_kernel_same", {"kernel_size": (2, 4), "padding": "same"}),
    ConvCase("even_kernel_same_reflect",
             {"kernel_size": (4, 2), "padding": "same", "padding_mode": "reflect"}),
    ConvCase("depthwise", {"groups": 4, "padding": 1}, channels=(4, 8)),
    ConvCase("depthwise_last", {"groups": 4}, channels=(4, 4), channels_last=True),
    ConvCase("pointwise", {"kernel_size": 1}),
    ConvCase("pointwise_stride_last", {"kernel_size": 1, "stride": 2}, channels_last=True),
    ConvCase("one_output_pixel", {"kernel_size": (7, 6)}),
    ConvCase("one_row", {"kernel_size": (1, 5), "padding": (0, 2)}, size=(1, 9)),
    ConvCase("one_channel", {"kernel_size": 2}, channels=(1, 1)),
]  # fmt: skip


def unfolded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The im2col matrix of a convolution by PyTorch's own pad and unfold: [groups, N * L, n]."""
    pad = list(layer._reversed_padding_repeated_twice)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    columns = F.unfold(
        F.pad(x, pad, mode=mode), layer.kernel_size, layer.dilation, 0, layer.stride
    )  # [N, C kh kw, L]
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

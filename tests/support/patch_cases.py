"""Convolution geometries and memory layouts that the patch ops are tested and timed on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchCase:
    """A named input shape and the keyword arguments of the convolution over it."""

    name: str
    shape: tuple[int, int, int, int]
    kernel_size: int | tuple[int, int]
    options: dict = field(default_factory=dict)

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)


CASES = [
    PatchCase("3x3", (4, 16, 9, 11), 3, {"padding": 1}),
    PatchCase("3x3_valid", (4, 5, 9, 19), 3, {"padding": "valid"}),
    PatchCase("same_even", (2, 3, 8, 10), (4, 2), {"padding": "same", "dilation": (1, 3)}),
    PatchCase("four_sided", (2, 3, 6, 9), (3, 2), {"padding": (0, 3, 2, 1)}),
    PatchCase("1x1", (5, 9, 4, 7), 1),
    PatchCase("1x1_stride", (3, 8, 8, 8), 1, {"stride": 2}),
    PatchCase("1x1_padding", (2, 4, 3, 3), 1, {"padding": 1}),
    PatchCase("stride", (3, 6, 11, 13), 3, {"stride": 2, "padding": 1}),
    PatchCase("stride_uneven", (3, 4, 12, 17), (5, 2), {"stride": (3, 2), "padding": (2, 1)}),
    PatchCase("stride_beyond_kernel", (2, 3, 10, 20), 2, {"stride": (5, 4)}),
    PatchCase("dilation", (2, 4, 13, 17), 3, {"dilation": (2, 3), "padding": (2, 3)}),
    PatchCase("dilation_stride", (2, 4, 13, 17), (3, 2), {"dilation": 2, "stride": (1, 2)}),
    PatchCase("groups", (3, 12, 7, 9), 3, {"groups": 3, "padding": 1}),
    PatchCase("depthwise", (3, 10, 8, 8), 3, {"groups": 10, "padding": 1, "stride": 2}),
    PatchCase("one_channel", (70, 1, 12, 12), 5),
    PatchCase("three_channels", (2, 3, 20, 33), 7, {"padding": 3, "stride": 2}),
    PatchCase("one_image", (1, 17, 5, 8), 3, {"padding": 1}),
    PatchCase("size_one", (1, 1, 1, 1), 1),
    PatchCase("kernel_larger_than_input", (3, 9, 2, 2), 5, {"padding": 2}),
    PatchCase("narrow", (3, 40, 4, 4), 3, {"padding": 1}),
    PatchCase("column", (3, 5, 19, 1), (3, 1), {"padding": (1, 0)}),
    PatchCase("many_images", (150, 2, 3, 3), 2),
    PatchCase("many_channels", (2, 150, 3, 9), 3, {"padding": 1}),
    PatchCase("wide", (1, 2, 3, 2100), (2, 3), {"padding": 1}),
    PatchCase("tall", (1, 1, 700, 9), 3, {"padding": 1}),
    PatchCase("pixel_batch", (200, 20, 1, 1), 1),
    PatchCase("pixel_batch_few", (130, 3, 1, 1), 1),
] + [
    PatchCase(f"{mode}{suffix}", (2, channels, 7, 9), kernel, {"padding_mode": mode, **options})
    for mode in ("reflect", "replicate", "circular")
    for suffix, channels, kernel, options in (
        ("", 4, 3, {"padding": 1}),
        ("_stride", 9, (5, 3), {"padding": (3, 2), "stride": 2}),
        ("_same", 3, (2, 4), {"padding": "same", "dilation": 2}),
    )
]  # fmt: skip

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x [N, C, H, W] in several memory layouts."""
    n, c, h, w = x.shape
    wide = torch.cat([x.flip(3), x], 3)
    deep = torch.cat([x, x.flip(1)], 1).to(memory_format=torch.channels_last)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "every_other_image": x.repeat_interleave(2, 0)[::2],
        "slice_of_width": wide[..., w:],
        "slice_of_channels": deep[:, :c],
        "every_other_column": x.repeat_interleave(2, 3)[..., ::2],
        "odd_address": torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        "transposed": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }

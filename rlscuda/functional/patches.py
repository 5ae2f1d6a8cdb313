"""Typed wrappers of the patch ops: the mean, a sketch or random rows of the im2col matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlscuda.functional.calls import call, check_tensor, fake

IntOrPair = int | Sequence[int]
Padding = int | Sequence[int] | str
Geometry = tuple[list[int], list[int], list[int], list[int], int, int]

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # the operators take the index
_mean = torch.ops.rlscuda.patch_mean.default
_sketch = torch.ops.rlscuda.patch_sketch.default
_sample = torch.ops.rlscuda.patch_sample.default


def patch_mean(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    ones: bool = False,
) -> Tensor:
    """The mean im2col patch over all samples and positions, without the im2col matrix.

    Equals `F.unfold(x, ...).mean((0, 2))` for zero padding and one group; x is read once.

    Args:
        x: Input of the convolution, [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or
            float16. NCHW and channels_last are read where they lie.
        kernel_size: As in `torch.nn.Conv2d`.
        stride: As in `torch.nn.Conv2d`.
        padding: An integer, a pair, 'same', 'valid', or (left, right, top, bottom).
        dilation: As in `torch.nn.Conv2d`.
        groups: As in `torch.nn.Conv2d`.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        ones: Append the column of ones that stands for a bias.

    Returns:
        [groups, n], n = C/groups · kh · kw in the order of `F.unfold` (+ 1 with `ones`): float64
        for a float64 x, else float32. Not differentiable.

    Raises:
        TypeError: A dtype that is not supported, or an argument of the wrong type.
        ValueError: An empty x, or a geometry that does not fit x.

    Example:
        >>> patch_mean(torch.ones(8, 3, 32, 32), 3, padding=1).shape
        torch.Size([1, 27])
    """
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_mean, _images(x), *geometry, ones)


def patch_sketch(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    rank: int,
    seed: int,
    offset: int = 0,
    padding_mode: str = "zeros",
    ones: bool = False,
) -> Tensor:
    """Random-sign sums of the im2col patches: s_j = (1/√R) Σ_i ε_ij x_i.

    R is the number of patches, N · L, and ε_ij = ±1 a hash of (seed, j, offset + i). The sketch is
    unbiased: E[Σ_j s_j s_jᵀ / rank] = XᵀX / R. Two batches a, b of R_a and R_b patches, b at
    `offset` + R_a, combine to the sketch of both: √(R_a/R) s_a + √(R_b/R) s_b, R = R_a + R_b.

    Args:
        x: See `patch_mean`.
        kernel_size: See `patch_mean`.
        stride: See `patch_mean`.
        padding: See `patch_mean`.
        dilation: See `patch_mean`.
        groups: See `patch_mean`.
        rank: Number of rows of the sketch.
        seed: Any 64-bit integer; one per layer and step.
        offset: Number of patches sketched before under this seed.
        padding_mode: See `patch_mean`.
        ones: Append a column of ones to the matrix; in the sketch it is (1/√R) Σ_i ε_ij.

    Returns:
        [groups, rank, n (+ 1)], float64 for a float64 x, else float32. Not differentiable.

    Raises:
        TypeError: See `patch_mean`.
        ValueError: See `patch_mean`; also `rank` < 1 or `offset` < 0.
    """
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_sketch, _images(x), *geometry, ones, rank, seed, offset)


def patch_sample(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    rank: int,
    seed: int,
    offset: int = 0,
    padding_mode: str = "zeros",
    ones: bool = False,
) -> tuple[Tensor, Tensor]:
    """A random patch of each of `rank` random images.

    Row j comes from the image b that minimises a hash of (seed, j, offset + b), at the position
    that a second hash names. Of two batches, b at `offset` + N_a, the row of the smaller key is the
    sample of both.

    Args:
        x: See `patch_mean`.
        kernel_size: See `patch_mean`.
        stride: See `patch_mean`.
        padding: See `patch_mean`.
        dilation: See `patch_mean`.
        groups: See `patch_mean`; every group has the same images and positions.
        rank: Number of rows.
        seed: Any 64-bit integer; one per layer and step.
        offset: Number of images sampled from before under this seed.
        padding_mode: See `patch_mean`.
        ones: Append the column of ones that stands for a bias.

    Returns:
        The rows [groups, rank, n (+ 1)], float64 for a float64 x, else float32, and the keys
        int64 [rank], not negative. Not differentiable.

    Raises:
        TypeError: See `patch_mean`.
        ValueError: See `patch_mean`; also `rank` < 1 or `offset` < 0.
    """
    geometry = conv_geometry(kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_sample, _images(x), *geometry, ones, rank, seed, offset)


def conv_geometry(
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """The arguments of a convolution as the operators take them, which check what they are.

    Returns:
        Kernel size, stride, padding (left, right, top, bottom), dilation, groups, padding mode
        as an index of `PADDING_MODES`.

    Raises:
        TypeError: An argument is neither an integer nor a pair.
        ValueError: One has another length, or a text is none of those that stand for a padding.
    """
    kernel, step = _pair("kernel_size", kernel_size), _pair("stride", stride)
    dilate = _pair("dilation", dilation)
    if padding_mode not in PADDING_MODES:
        modes = ", ".join(PADDING_MODES)
        raise ValueError(f"padding_mode must be one of {modes}, got {padding_mode!r}")
    pad = _padding(padding, kernel, step, dilate)
    return kernel, step, pad, dilate, groups, PADDING_MODES.index(padding_mode)


def _pair(name: str, value: IntOrPair) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be an integer or a pair, got {type(value).__name__}")
    if len(value) != 2 and (name, len(value)) != ("padding", 4):
        four = ", or four for padding" if name == "padding" else ""
        raise ValueError(f"{name} must be one or two integers{four}, got {value}")
    return list(value)


def _padding(padding: Padding, kernel: list[int], stride: list[int], dilation: list[int]):
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding != "same":
            raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
        if stride != [1, 1]:
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        high, wide = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return [wide // 2, wide - wide // 2, high // 2, high - high // 2]
    pair = _pair("padding", padding)
    return [pair[1], pair[1], pair[0], pair[0]] if len(pair) == 2 else pair


def _images(x: Tensor) -> Tensor:
    check_tensor("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    return x.detach() if x.dim() == 4 else x.detach().unsqueeze(0)


def _like(x: Tensor, groups: int, rows: list[int], kernel_size: list[int], ones: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = x.shape[1] // groups * kernel_size[0] * kernel_size[1] + ones
    return x.new_empty([groups, *rows, n], dtype=dtype)


@fake("patch_mean")
def _(x, kernel_size, stride, padding, dilation, groups, padding_mode, ones):
    return _like(x, groups, [], kernel_size, ones)


@fake("patch_sketch")
def _(x, kernel_size, stride, padding, dilation, groups, padding_mode, ones, rank, seed, offset):
    return _like(x, groups, [rank], kernel_size, ones)


@fake("patch_sample")
def _(x, kernel_size, stride, padding, dilation, groups, padding_mode, ones, rank, seed, offset):
    rows = _like(x, groups, [rank], kernel_size, ones)
    return rows, x.new_empty([rank], dtype=torch.int64)

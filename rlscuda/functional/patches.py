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
_SEEDS = 1 << 63
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
    x = _images(x)
    geometry = conv_geometry(x, kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_mean, x, *geometry, ones)


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
        [groups, rank, n (+ 1)]: float64 for a float64 x, else float32. Not differentiable.

    Raises:
        TypeError: See `patch_mean`.
        ValueError: See `patch_mean`; also `rank` < 1 or `offset` < 0.
    """
    x = _images(x)
    geometry = conv_geometry(x, kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_sketch, x, *geometry, ones, *_draw(rank, seed, offset))


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
    x = _images(x)
    geometry = conv_geometry(x, kernel_size, stride, padding, dilation, groups, padding_mode)
    return call(_sample, x, *geometry, ones, *_draw(rank, seed, offset))


def conv_geometry(
    x: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """The arguments of a convolution as the ops take them, checked against x [N, C, H, W].

    Returns:
        Kernel size, stride, padding (left, right, top, bottom), dilation, groups, padding mode
        as an index of `PADDING_MODES`.
    """
    kernel = _pair("kernel_size", kernel_size, 1)
    step = _pair("stride", stride, 1)
    dilate = _pair("dilation", dilation, 1)
    if padding_mode not in PADDING_MODES:
        modes = ", ".join(PADDING_MODES)
        raise ValueError(f"padding_mode must be one of {modes}, got {padding_mode!r}")
    pad = _padding(padding, kernel, step, dilate)
    _, channels, height, width = x.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of x, got {groups}")
    for amount, size in zip(pad, (width, width, height, height), strict=True):
        if padding_mode == "reflect" and amount >= size:
            raise ValueError(f"reflect padding must be less than {size}, got {amount}")
        if padding_mode == "circular" and amount > size:
            raise ValueError(f"circular padding must be at most {size}, got {amount}")
    padded = [height + pad[2] + pad[3], width + pad[0] + pad[1]]
    spans = [d * (k - 1) + 1 for d, k in zip(dilate, kernel, strict=True)]
    if spans[0] > padded[0] or spans[1] > padded[1]:
        raise ValueError(f"the dilated kernel {spans} must fit the padded input, got {padded}")
    return kernel, step, pad, dilate, groups, PADDING_MODES.index(padding_mode)


def _pair(name: str, value: IntOrPair, least: int) -> list[int]:
    if isinstance(value, int):
        pair = [value, value]
    elif isinstance(value, (tuple, list)):
        pair = list(value)
    else:
        raise TypeError(f"{name} must be an integer or a pair, got {type(value).__name__}")
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value}")
    return pair


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
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        if any(not isinstance(p, int) or p < 0 for p in padding):
            raise ValueError(f"padding must be integers of at least 0, got {padding}")
        return list(padding)
    high, wide = _pair("padding", padding, 0)
    return [wide, wide, high, high]


def _draw(rank: int, seed: int, offset: int) -> tuple[int, int, int]:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
    if not -_SEEDS <= seed < _SEEDS or max(rank, offset) >= _SEEDS:
        raise ValueError(
            f"rank, seed and offset must be 64-bit integers, got {rank}, {seed} and {offset}"
        )
    return rank, seed, offset


def _checked(x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got {list(x.shape)}")
    return x.detach() if x.requires_grad else x


def _images(x: Tensor) -> Tensor:
    check_tensor("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    x = _checked(x)
    return x if x.dim() == 4 else x.unsqueeze(0)


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

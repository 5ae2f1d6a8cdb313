"""The specification of the patch ops: pad, unfold, then the plain formula, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15
_SIGN, _IMAGE, _POSITION = 1, 2, 3


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def random_bits(seed: int, purpose: int, rank: int, counters: Tensor) -> Tensor:
    """The 64-bit hash of (seed, purpose, j, counter) of csrc/counter_rng.h.

    Args:
        seed: Any 64-bit integer.
        purpose: 1 for signs, 2 for images, 3 for positions.
        rank: Number of streams.
        counters: int64 [m].

    Returns:
        int64 [rank, m], the bits of an unsigned number.
    """
    start = _mix(torch.tensor(_signed(seed + purpose * _WEYL)))
    keys = _mix(start + torch.arange(rank) * _signed(_WEYL))
    return _mix(keys[:, None] + counters * _signed(_WEYL))


def signs(rank: int, rows: int, seed: int, offset: int = 0) -> Tensor:
    """The random signs of rows offset, …, offset + rows - 1: float64 [rank, rows]."""
    row = torch.arange(offset, offset + rows)
    first = offset >> 6
    words = torch.arange(first, (offset + rows - 1 >> 6) + 1)
    bits = random_bits(seed, _SIGN, rank, words)[:, (row >> 6) - first] >> (row & 63) & 1
    return 1.0 - 2.0 * bits.double()


def patch_rows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: int = 0,
    ones: bool = False,
) -> Tensor:
    """The im2col matrix, of L positions an image.

    Args:
        x: Input of the convolution [N, C, H, W]; C is divisible by `groups`.
        kernel_size: (kh, kw).
        stride: Pair.
        padding: (left, right, top, bottom).
        dilation: Pair.
        groups: Groups of the convolution.
        padding_mode: Index of zeros, reflect, replicate, circular.
        ones: Whether a column of ones follows, which stands for a bias.

    Returns:
        float64 [groups, N * L, n (+ 1)], n = C/groups · kh · kw in the order of `F.unfold`.
    """
    mode = ("constant", "reflect", "replicate", "circular")[padding_mode]
    padded = F.pad(x.detach().double(), list(padding), mode=mode)
    columns = F.unfold(
        padded, tuple(kernel_size), dilation=tuple(dilation), stride=tuple(stride)
    )  # [N, C * kh * kw, L]
    split = columns.unflatten(1, (groups, -1))
    rows = split.permute(1, 0, 3, 2).flatten(1, 2)
    return F.pad(rows, (0, 1), value=1.0) if ones else rows


def patch_mean(x: Tensor, *geometry) -> Tensor:
    """The mean row of the im2col matrix.

    Args:
        x: Input of the convolution [N, C, H, W].
        *geometry: The other arguments of `patch_rows`.

    Returns:
        float64 [groups, n (+ 1)].
    """
    return patch_rows(x, *geometry).mean(1)


def patch_sketch(x: Tensor, *geometry, rank: int, seed: int, offset: int = 0) -> Tensor:
    """(1/√R) E X for random signs E [rank, R] and the im2col matrix X of R rows.

    Args:
        x: Input of the convolution [N, C, H, W].
        *geometry: The other arguments of `patch_rows`.
        rank: Rows of the sketch.
        seed: Any 64-bit integer.
        offset: Rows of X sketched before under this seed.

    Returns:
        float64 [groups, rank, n (+ 1)].
    """
    rows = patch_rows(x, *geometry)
    count = rows.shape[1]
    return signs(rank, count, seed, offset) @ rows / count**0.5


def patch_sample(
    x: Tensor, *geometry, rank: int, seed: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """One random patch of each of `rank` random images, and the hashes that chose the images.

    Args:
        x: Input of the convolution [N, C, H, W].
        *geometry: The other arguments of `patch_rows`.
        rank: Rows drawn.
        seed: Any 64-bit integer.
        offset: Images drawn from before under this seed.

    Returns:
        float64 [groups, rank, n (+ 1)] and int64 [rank].
    """
    rows = patch_rows(x, *geometry)
    images = x.shape[0]
    positions = rows.shape[1] // images
    counters = torch.arange(offset, offset + images)
    keys, image = _shift(random_bits(seed, _IMAGE, rank, counters), 1).min(1)
    place = _shift(random_bits(seed, _POSITION, rank, counters), 1) % positions
    chosen = image * positions + place.gather(1, image[:, None])[:, 0]
    return rows[:, chosen], keys

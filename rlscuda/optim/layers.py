"""Layers whose input an inverse autocorrelation matrix can describe, and why others cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.functional.gemm import multiply
from rlscuda.functional.patches import PADDING_MODES
from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.optim.kinds.padded import padding_of, pads_itself
from rlscuda.optim.kinds.recurrent import RECURRENT

SUMMARIES = ("mean", "sketch", "sample")


@dataclass(eq=False)
class Layer:
    """One RLS-trained layer: its parameters, the geometry of its im2col matrix and of its `P`.

    Above a fan-in of `max_fan_in`, `P` is block-diagonal: of each group, `blocks` matrices of
    `block_size` consecutive columns, the last of them filled up with columns of zeros.

    Attributes:
        name: Qualified name in the model.
        module: One that `Place` knows.
        index: Place among the model's layers; part of the seed of its random signs.
        bias: Whether the bias is a column of ones inside `P`.
        names: Of the weight and the bias in the module.
        weight: The weight [c, n], [n, c] where `transposed`, or [c, C/groups, *kernel]; a mask put
            on later leaves it here.
        bias_parameter: The bias [c], or None.
        columns: Fan-in without the bias.
        transposed: Whether the weight is that of the Conv1D of transformers.
        crossed: Whether an attention was seen whose query, key and value are not one tensor.
        max_fan_in: The largest block of `P`; None for no blocks.
        geometry: Kernel size, stride, padding (left, right, top, bottom), dilation, groups and
            padding mode, as the operators take them; a Linear is a 1 x 1 convolution, a Conv1d one
            of images of one line, a Conv3d one of its slabs.
        depth: Kernel size, stride, dilation and padding (before, after) along a volume's depth.
        pads: Whether the module pads its input in a forward of its own; `images` then are padded,
            and the geometry has no padding.
    """

    name: str
    module: Any
    index: int
    bias: bool
    names: tuple[str, str] = ("weight", "bias")
    weight: nn.Parameter = field(init=False)
    bias_parameter: nn.Parameter | None = field(init=False)
    columns: int = field(init=False)
    transposed: bool = field(init=False)
    crossed: bool = False
    max_fan_in: int | None = None
    geometry: tuple = field(init=False)
    depth: tuple = field(init=False)
    pads: bool = field(init=False)

    def __post_init__(self):
        m = self.module
        weight, bias = self.names
        self.weight = getattr(m, weight)
        self.bias_parameter = own_parameters(m).get(bias)
        self.transposed = is_transposed(m)
        self.columns = self.weight.numel() // max(1, self.outputs)
        self.depth = (1, 1, 1, (0, 0))
        self.pads = pads_itself(m)
        if self.weight.dim() == 2:
            self.geometry = ([1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1, 0)
            return
        if self.pads:
            padding = [(0, 0), (0, 0)]
        elif isinstance(m.padding, str):
            total = [d * (k - 1) * (m.padding == "same") for d, k in zip(m.dilation, m.kernel_size)]
            padding = [(t // 2, t - t // 2) for t in total]
        else:
            padding = [(p, p) for p in m.padding]
        mode = 0 if self.pads else PADDING_MODES.index(m.padding_mode)
        self.set_axes(list(zip(m.kernel_size, m.stride, m.dilation, padding)), mode)

    def set_axes(self, axes: list[tuple], mode: int) -> None:
        """Sets the geometry.

        Args:
            axes: Kernel size, stride, dilation and padding (before, after) along each dimension.
            mode: Index of `PADDING_MODES`.
        """
        self.depth, *plane = [self.depth] * (3 - len(axes)) + axes
        kernel, stride, dilation, (rows, columns) = map(list, zip(*plane))
        self.geometry = (kernel, stride, [*columns, *rows], dilation, self.module.groups, mode)

    def factors_pay(self, x: Tensor, dtype: torch.dtype | None) -> bool:
        """Whether the factored product (P X^T) delta is possible and cheaper than G P.

        That is N (m + c) < m c for N input rows and blocks of m columns, asked for with a margin
        that pays for the probe of the factors; away from the CPU that probe would have to be
        waited for.

        Args:
            x: The input.
            dtype: That the user asks for `P`, or None.
        """
        weight = self.weight
        if weight.dim() != 2 or isinstance(self.module, (nn.MultiheadAttention, *RECURRENT)):
            return False
        outputs, m = self.outputs, self.block_size
        rows = x.numel() // self.columns
        if 2 * rows * (m + outputs) >= m * outputs or x.device.type != "cpu":
            return False
        return x.dtype == weight.dtype == state_dtype(weight, dtype)

    @property
    def outputs(self) -> int:
        """c: rows of the weight as a matrix, see `as_rows`."""
        return self.weight.shape[1 if self.transposed else 0]

    def as_rows(self, like_weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as [c, columns]."""
        if self.transposed:
            return like_weight.t()
        return like_weight if like_weight.dim() == 2 else like_weight.flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """What `as_rows` gives, in the weight's shape again."""
        return rows.t() if self.transposed else rows.reshape(self.weight.shape)

    def alike(self, other: Layer) -> bool:
        """Whether both make the same rows of one input, for one matrix that describes it."""
        kinds = [
            (x.columns, x.bias, x.max_fan_in, x.geometry, x.depth, x.weight.dtype, x.weight.device)
            + ((x.module,) if x.pads else ())
            for x in (self, other)
        ]
        return self.groups == 1 and kinds[0] == kinds[1]

    @property
    def groups(self) -> int:
        """The groups of a convolution, each of an input and a `P` of its own."""
        return self.geometry[4]

    @property
    def fan_in(self) -> int:
        """n: the columns of the im2col matrix, with the bias' column of ones."""
        return self.columns + self.bias

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of `P`: [n, n], or [groups * blocks, m, m]."""
        m, count = self.block_size, self.groups * self.blocks
        return (m, m) if count == 1 else (count, m, m)

    @property
    def blocks(self) -> int:
        """Blocks on the diagonal of the `P` of each group."""
        return -(-self.fan_in // self.max_fan_in) if self.max_fan_in else 1

    @property
    def block_size(self) -> int:
        """m: the columns of a block, which are as even as they can be."""
        return -(-self.fan_in // self.blocks)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that one step of this layer moves."""
        return (
            [self.weight, cast(nn.Parameter, self.bias_parameter)] if self.bias else [self.weight]
        )

    def images(self, x: Tensor) -> Tensor:
        """The layer's input as [N, C, H, W] without a copy where its strides allow."""
        if self.weight.dim() == 2:
            return x.reshape(-1, x.shape[-1], 1, 1)
        x = x if x.dim() == self.weight.dim() else x.unsqueeze(0)
        if self.pads:
            return self._padded(x)
        if x.dim() == 5:
            return self._slabs(x)
        return x if x.dim() == 4 else x.unsqueeze(2)

    def _padded(self, x: Tensor) -> Tensor:
        """Images as the module's own forward pads them.

        Raises:
            RuntimeError: What it does with images of this size is no convolution.
        """
        padding = padding_of(self.module, *x.shape[2:])
        if padding is None:
            raise RuntimeError(
                f"{self.name!r} is no convolution of a padded input for images of "
                f"{list(x.shape[2:])}, as its {type(self.module).__name__} was for others: exclude "
                "it"
            )
        return F.pad(x, padding)

    def _slabs(self, x: Tensor) -> Tensor:
        """Volumes [N, C, D, H, W] as images [N D', C kd, H, W]: kd planes an output plane."""
        size, stride, dilation, padding = self.depth
        mode = PADDING_MODES[self.geometry[5]]
        if mode == "zeros":
            x = F.pad(x, (0, 0, 0, 0, *padding))
        places = torch.arange(x.shape[2], device=x.device)
        if mode != "zeros":
            places = F.pad(places[None].double(), padding, mode=mode)[0].long()
        windows = places.unfold(0, dilation * (size - 1) + 1, stride)[:, ::dilation]
        return x[:, :, windows].movedim(2, 1).flatten(2, 3).flatten(0, 1)

    def plane(self, weight: Tensor) -> Tensor:
        """A weight, or rows of it, as the operators take it, [c, n] or [c, C/groups, kh, kw]."""
        if self.transposed:
            return weight.t()
        if weight.dim() == 5:  # whatever its memory format, the operators read it in order
            return weight.view(*weight.shape[:3], -1)
        return weight.unsqueeze(2) if weight.dim() == 3 else weight

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Of each block its place and the first and last + 1 of its columns."""
        m = self.block_size
        for k in range(self.blocks):
            yield k, k * m, min((k + 1) * m, self.fan_in)

    def split(self, rows: Tensor) -> Tensor:
        """Rows [groups, r, n] as the operator takes them beside `P`: [r, n] or [..., r, m]."""
        if self.blocks > 1:
            filled = F.pad(rows, (0, self.blocks * self.block_size - self.fan_in))
            rows = filled.unflatten(2, (self.blocks, -1)).movedim(2, 1).flatten(0, 1)
        return rows.contiguous() if len(rows) > 1 else rows[0]

    def multiply(self, rows: Tensor, P: Tensor, out: Tensor) -> None:
        """Writes rows P [k, fan_in], of rows [k, fan_in] or without the bias' column."""
        n = rows.shape[1]
        if P.dim() == 2:
            multiply(rows, P[:n], out)
            return
        rows, out = (t.unflatten(0, (self.groups, -1)) for t in (rows, out))
        for k, start, stop in self.spans():
            size, inner = stop - start, min(n, stop) - start
            blocks = P[k :: self.blocks, :inner, :size]
            torch.bmm(rows[..., start : start + inner], blocks, out=out[..., start:stop])

    def bias_row(self, P: Tensor) -> Tensor:
        """The row of `P` [n] or [groups, n] that the bias' part of a product takes."""
        if self.blocks == 1:
            return P[..., self.columns, :]
        *_, (k, start, stop) = self.spans()
        row = P[k :: self.blocks, self.columns - start, : stop - start]
        return F.pad(row, (start, 0))

    def positions(self, images: Tensor) -> int:
        """Patches an image: output height times output width."""
        if self.weight.dim() == 2:
            return 1
        (kh, kw), (sh, sw), (left, right, top, bottom), (dh, dw), _, _ = self.geometry
        height = (images.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1
        width = (images.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1
        return height * width


def matrix_bytes(layer: Layer, requested: torch.dtype | None) -> int:
    """Bytes of the layer's `P`, of the dtype that `state_dtype` gives it."""
    item = torch.finfo(state_dtype(layer.weight, requested)).bits // 8
    return math.prod(layer.matrix_shape) * item


def state_dtype(weight: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of `P`: float64 for float64 parameters or on request, else float32."""
    return torch.float64 if torch.float64 in (weight.dtype, requested) else torch.float32

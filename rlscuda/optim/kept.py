"""What is kept when channels are removed: of a tensor, and of what an optimizer has of a layer.

Rows of a weight (output channels) leave `P` as it is; columns (inputs) are taken out of it by a
Schur downdate, since a slice would belong to a layer that still sees them; the groups of a
depthwise convolution go with their matrices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda._torch import version_of
from rlscuda.closed_form.formulas import downdate
from rlscuda.optim.forms import COUNTS
from rlscuda.optim.layers import Layer
from rlscuda.optim.staging import Factors, Stage, Summary


@dataclass(frozen=True, eq=False)
class Kept:
    """Which elements of a tensor remain: those at some places along each dimension.

    Attributes:
        of: The old shape.
        axes: Places that remain along each dimension, int64, on the CPU; None where all do.

    Example:
        >>> kept = Kept.along((3, 4), {1: torch.tensor([0, 2])})
        >>> kept.shape, kept.index.tolist()
        ((3, 2), [0, 2, 4, 6, 8, 10])
    """

    of: tuple[int, ...]
    axes: tuple[Tensor | None, ...]

    @classmethod
    def along(cls, of: tuple[int, ...], kept: Mapping[int, Tensor]) -> Kept:
        """What remains of a tensor of shape `of` that is cut along some dimensions.

        Args:
            of: The old shape.
            kept: Dimension -> places that remain along it, int64.
        """
        axes = {dim: places.cpu() for dim, places in kept.items()}
        return cls(tuple(of), tuple(axes.get(dim) for dim in range(len(of))))

    @classmethod
    def from_index(cls, index: Tensor, of: tuple[int, ...]) -> Kept:
        """What remains of a tensor of shape `of`, from the flat place of each element that does.

        Args:
            index: Places in the flattened old tensor, int64, in the new shape.
            of: The old shape.

        Raises:
            ValueError: The elements are not those of some places along each dimension.
        """
        axes = {}
        for dim, old in enumerate(of if index.dim() == len(of) else ()):
            line = index.movedim(dim, 0).reshape(len(index.movedim(dim, 0)), -1)[:, 0]
            places = line // math.prod(of[dim + 1 :]) % old
            if not torch.equal(places, torch.arange(old, device="cpu")):
                axes[dim] = places
        kept = cls.along(of, axes)
        if not torch.equal(kept.index, index.flatten()):
            raise ValueError(
                f"index [{list(index.shape)}] is not made of places along each dimension of "
                f"{list(of)}"
            )
        return kept

    @property
    def shape(self) -> tuple[int, ...]:
        """The new shape."""
        return tuple(size if axis is None else len(axis) for size, axis in zip(self.of, self.axes))

    @property
    def index(self) -> Tensor:
        """Places of what remains in the flattened old tensor, int64 [numel of the new one]."""
        index = torch.zeros((), dtype=torch.int64, device="cpu")
        for dim, size in enumerate(self.of):
            index = index[..., None] * size + self.places(dim)
        return index.flatten()

    def places(self, dim: int) -> Tensor:
        """Places that remain along dimension `dim`, int64 on the CPU, ascending."""
        axis = self.axes[dim]
        return torch.arange(self.of[dim], device="cpu") if axis is None else axis

    def same(self, other: Kept) -> bool:
        """Whether both keep the same elements."""
        return self.of == other.of and all(
            torch.equal(self.places(dim), other.places(dim)) for dim in range(len(self.of))
        )

    def mask(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, of the old shape, with zeros in place of what does not remain."""
        masked = tensor.clone()
        for dim, axis in enumerate(self.axes):
            if axis is not None:
                gone = torch.ones(self.of[dim], dtype=torch.bool, device="cpu")
                gone[axis] = False
                masked.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
        return masked

    def take(self, tensor: Tensor) -> Tensor:
        """What remains of `tensor`, on its device and in its memory format; always a new tensor.

        Args:
            tensor: Of the old shape, or with dimensions of size 1 (as a factored second moment has)
                instead of the old size.

        Raises:
            ValueError: Its shape is another.
        """
        fits = len(tensor.shape) == len(self.of) and all(
            size in (1, old) for size, old in zip(tensor.shape, self.of)
        )
        if not fits:
            raise ValueError(f"expected a tensor of shape {list(self.of)}, or with dimensions of "
                             f"size 1, got {list(tensor.shape)}")  # fmt: skip
        taken = tensor
        for dim, axis in enumerate(self.axes):
            if axis is not None and tensor.shape[dim] == self.of[dim]:
                taken = taken.index_select(dim, axis.to(tensor.device))
        if taken is tensor:
            return tensor.clone()
        last = torch.channels_last
        if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
            return taken.contiguous(memory_format=last)
        return taken


Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Kept]]  # old parameter -> the new one, and how
Change = tuple[Any, Any, Any]  # an object, dict or list; its attribute, key or place; what it gets


@dataclass(eq=False)
class KeptLayer:
    """What is kept of a layer, as its matrices and moments see it.

    Attributes:
        layer: The layer, as it was.
        rows: Rows of the weight, int64.
        groups: Groups, int64 [g].
        columns: Columns of the `P` of each of them, int64 [g, k], a bias' column last.
    """

    layer: Layer
    rows: Tensor
    groups: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: Layer, weight: Kept) -> KeptLayer:
        """What is kept of a layer of whose weight that is kept."""
        out, into = (1, 0) if layer.transposed else (0, 1)
        rows = weight.places(out)
        groups = torch.unique(rows // (layer.outputs // layer.groups))
        area = layer.columns // weight.of[into]
        columns = weight.places(into)[:, None] * area + torch.arange(area, device="cpu")
        return cls(layer, rows, groups, _with_bias(layer, columns.view(1, -1), len(groups)))

    @classmethod
    def of_columns(cls, layer: Layer, kept: Tensor) -> KeptLayer:
        """What is kept of a layer that keeps im2col columns, see `inputs`.

        Raises:
            ValueError: They are not int64 [k], ascending, in range and as many in each group.
        """
        name, n, total = layer.name, layer.columns, layer.groups * layer.columns
        if kept.dtype != torch.int64 or kept.dim() != 1 or not len(kept):
            got = f"{kept.dtype} {list(kept.shape)}"
            raise ValueError(f"kept of {name!r} must be int64 [k], got {got}")
        if kept[0] < 0 or kept[-1] >= total or not (kept.diff() > 0).all():
            raise ValueError(f"kept of {name!r} must be ascending columns from 0 to {total - 1}")
        counts = torch.bincount(kept // n, minlength=layer.groups)
        groups = counts.nonzero().flatten()
        if counts[groups].unique().numel() > 1:
            raise ValueError(
                f"kept of {name!r} must be as many in each group, got {counts.tolist()}"
            )
        rows = torch.arange(layer.outputs, device="cpu")
        columns = (kept % n).view(len(groups), -1)
        return cls(layer, rows, groups, _with_bias(layer, columns, len(groups)))

    @property
    def inputs(self) -> Tensor:
        """The im2col columns that are kept, over the channels of all groups, without the bias."""
        columns = self.columns[:, :-1] if self.layer.bias else self.columns
        return (self.groups[:, None] * self.layer.columns + columns).flatten()

    @cached_property
    def cut(self) -> Layer:
        """The layer as its matrices will see it."""
        new = copy.copy(self.layer)
        new.columns = self.columns.shape[1] - new.bias
        new.geometry = (*new.geometry[:4], len(self.groups), *new.geometry[5:])
        return new

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the new `P`."""
        return self.cut.matrix_shape

    def matrix(self, P: Tensor) -> Tensor:
        """The new `P` of a live one: the same tensor where no column and no group goes."""
        layer, device = self.layer, P.device
        lost = self.columns.shape[1] < layer.fan_in
        if not lost and len(self.groups) == layer.groups:
            return P
        blocks = P.reshape(layer.groups, layer.blocks, *P.shape[-2:])[self.groups.to(device)]
        if lost:
            parts = [
                self._block(group, own[start:stop])
                for group, own in zip(blocks, self.columns)
                for _, start, stop in self.cut.spans()
            ]
            blocks = torch.stack(parts)
        return blocks.to(P.dtype).reshape(self.matrix_shape)

    def _block(self, old: Tensor, columns: Tensor) -> Tensor:
        """The block of a new `P` of some old columns, of which old blocks may have given parts."""
        parts = []
        for block, (_, start, stop) in zip(old, self.layer.spans()):
            gone = torch.ones(len(block), dtype=torch.bool, device="cpu")
            inside = columns[(columns >= start) & (columns < stop)] - start
            if len(inside):
                gone[inside] = False
                parts.append(downdate(block, gone.nonzero().flatten().to(block.device)))
        filling = parts[0].new_ones(self.cut.block_size - len(columns))
        return torch.block_diag(*parts, filling.diag())

    def entries(self, state: Mapping[str, Any], made: dict[tuple, Tensor]) -> dict[str, Any]:
        """The layer's state after the cut, which keeps the same columns of every group.

        Args:
            state: As it was.
            made: New matrices by the old ones that layers of one input share, and their columns.

        Raises:
            ValueError: The state has an entry that is not known.
        """
        new: dict[str, Any] = {}
        for name, value in state.items():
            if name == "P":
                key = (id(value), *self.columns.flatten().tolist())
                new[name] = made[key] if key in made else self.matrix(value)
                made[key] = new[name]
            elif name in ("first_moment", "momentum_buffer"):
                new[name] = _select(_select(value, 0, self.rows), 1, self.columns[0])
            elif name == "second_moment":
                new[name] = _select(value, 0, self.rows)
            elif name in ("power", "ridge_power"):
                new[name] = _select(value, 0, self.groups)
            elif name in ("health", *COUNTS):
                new[name] = value
            else:
                raise ValueError(f"the state of {self.layer.name!r} has an unknown {name!r}")
        return new

    def changes(self, weight: nn.Parameter, bias: nn.Parameter | None) -> list[Change]:
        """Those of the layer itself, whose parameters are replaced by these."""
        values = {"columns": self.cut.columns, "geometry": self.cut.geometry}
        values |= {"weight": weight, "bias_parameter": bias}
        return [(self.layer, name, value) for name, value in values.items()]

    def stage(self, stage: Stage) -> Stage:
        """What was staged, cut likewise; the old one is left to forwards still on their way."""
        new = copy.copy(stage)
        new.summary = None if stage.summary is None else self._summary(stage.summary)
        new.factors = None if stage.factors is None else self._factors(stage.factors)
        return new

    def _summary(self, summary: Summary) -> Summary:
        rows = _select(_select(summary.rows, 0, self.groups), 2, self.columns[0])
        return Summary(summary.kind, rows, summary.count, summary.keys)

    def _factors(self, factors: Factors) -> Factors | None:
        if version_of(factors.x) != factors.version:
            return None  # no longer what the forward saw
        x = _select(factors.x, 1, self.inputs)
        return Factors(x, _select(factors.delta, 1, self.rows), version_of(x))


def cut_states(
    kept: Mapping[nn.Parameter, KeptLayer], states: Mapping[Any, Mapping[str, Any]]
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state after the cut of each layer that has one, see `KeptLayer.entries`."""
    made: dict[tuple, Tensor] = {}
    return {w: one.entries(states[w], made) for w, one in kept.items() if w in states}


def _with_bias(layer: Layer, columns: Tensor, groups: int) -> Tensor:
    """Columns [g or 1, k] for so many groups, with that of the bias where the layer has one."""
    columns = columns.expand(groups, -1)
    return F.pad(columns, (0, 1), value=layer.columns) if layer.bias else columns


def _select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    if len(kept) == tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, kept.to(tensor.device))

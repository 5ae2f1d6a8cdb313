"""Which elements of a tensor remain when channels are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """Which elements of a tensor remain: those at some places along each dimension.

    Attributes:
        of: The old shape.
        axes: Places that remain along each dimension, int64, on the CPU; None where all do.
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
        """Places that remain along a dimension, int64."""
        axis = self.axes[dim]
        return torch.arange(self.of[dim], device="cpu") if axis is None else axis

    def same(self, other: Kept) -> bool:
        """Whether both keep the same elements."""
        return self.of == other.of and all(
            torch.equal(self.places(dim), other.places(dim)) for dim in range(len(self.of))
        )

    def mask(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the old shape, with zeros in place of what does not remain."""
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

"""Couplings: channels that can only be removed together, and all couplings of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlscuda.optim.kinds.modules import is_consumer


@dataclass(frozen=True, eq=False)
class Member:
    """A module, bare parameter or raw input that meets a coupling.

    Attributes:
        name: Qualified name of the module or parameter; for a raw input its number among the
            tensors of the example inputs.
        kind: `in` or `out`, the side of a module on which the channels are; `both` where they pass
            through it (norm layers, depthwise convolutions, embeddings, bare parameters); `input`
            for a raw input of the model.
        indices: Channels of each unit [units, k], int64, on that side of the module.
    """

    name: str
    kind: str
    indices: Tensor

    def columns(self, module: nn.Module) -> Tensor:
        """The columns of the im2col matrix that the units take on the input side.

        Args:
            module: The Linear or convolution of that name, see `is_consumer`.

        Returns:
            [units, columns] int64, ascending, in `F.unfold` order; for a grouped convolution within
            the matrix of each group.

        Raises:
            ValueError: The units are not on the input side of a Linear or convolution.
        """
        if self.kind != "in" or not is_consumer(module):
            raise ValueError(
                f"columns are those of the input side of a Linear or convolution, got side "
                f"{self.kind!r} of {type(module).__name__} {self.name!r}"
            )
        area = math.prod(getattr(module, "kernel_size", ()))
        # the units hold the same positions of every group, and the first comes first
        first = self.indices[:, : self.indices.shape[1] // getattr(module, "groups", 1)]
        return (first[:, :, None] * area + torch.arange(area, device="cpu")).flatten(1)


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels that can only be removed together, unit by unit.

    Attributes:
        name: That of the first module that produces them, or `input` for raw inputs.
        units: How many can be removed on their own, of which one must stay.
        members: All that meets them.
        places: Name of a parameter or buffer and a dimension of it -> where the units lie along
            it, int64 [units, k].
        labels: Which tells each unit from all others of the structure, int64 [units].
    """

    name: str
    units: int
    members: list[Member]
    places: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)
    labels: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def member(self, name: str, kind: str) -> Member:
        """The member of that name and side.

        Raises:
            KeyError: There is none.
        """
        for member in self.members:
            if (member.name, member.kind) == (name, kind):
                return member
        raise KeyError(f"coupling {self.name!r} has no member {name!r} on side {kind!r}")


@dataclass(frozen=True, eq=False)
class Width:
    """An attribute of a module that says how many channels its forward deals with.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute, an int or a sequence of them.
        item: Its place in the sequence, None for an int.
        size: What it is now.
        channels: What the attribute counts: for each axis of channels in the forward that is of
            its size, the coupling and unit of each channel that has one.
    """

    module: str
    attribute: str
    item: int | None
    size: int
    channels: list[list[tuple[str, int]]]


@dataclass(frozen=True, eq=False)
class Family:
    """Dimensions of one head that are multiplied by one another, or passed on, and no more.

    Of a product (queries and keys) both sides are rows of layers that make them; of values the
    right side is columns of layers that take what is made of them.

    Attributes:
        coupling: Name of the coupling that has them.
        units: The unit of each dimension, int64 [d].
        left: By layer its rows, int64 [d], of each head that shares the dimensions.
        right: Likewise, of values by layer its columns.
        product: Whether both sides are rows.
        scaled: Whether the product is divided by the root of d.
        free: Whether nothing else meets them, so that another basis of them would do as well.
    """

    coupling: str
    units: Tensor
    left: dict[str, list[Tensor]]
    right: dict[str, list[Tensor]]
    product: bool
    scaled: bool
    free: bool


@dataclass(frozen=True, eq=False)
class Structure:
    """The couplings of a model.

    Attributes:
        model: The model.
        couplings: Those that can be pruned, in the order of the modules that produce them.
        refused: Name of a coupling that cannot be pruned -> why.
        output_shapes: Shapes of the model's outputs for the example inputs.
        input_widths: Channels of each raw input, by its number, that pruning could follow.
        shapes: Shape of every parameter and buffer when the model was traced.
        widths: Attributes that follow the channels.
        families: Dimensions of heads.
        elsewhere: Modules whose weights are also used outside of them.
    """

    model: nn.Module
    couplings: list[Coupling]
    refused: dict[str, str]
    output_shapes: list[tuple[int, ...]]
    input_widths: dict[str, int]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    widths: list[Width] = field(default_factory=list, repr=False)
    families: list[Family] = field(default_factory=list, repr=False)
    elsewhere: frozenset[str] = frozenset()

    def coupling(self, name: str) -> Coupling:
        """The coupling of that name.

        Raises:
            KeyError: There is none; the message says why if it was refused.
        """
        for coupling in self.couplings:
            if coupling.name == name:
                return coupling
        reason = self.refused.get(name)
        raise KeyError(f"no coupling {name!r}" + (f": {reason}" if reason else ""))

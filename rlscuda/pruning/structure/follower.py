"""Follows labels through a forward: every operation that torch runs, below autograd.

What an operation makes of labels is said in `rules`. What only moves elements is run on the
labels themselves, so that no change of shape can be misread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from rlscuda._torch import Operator, TorchDispatchMode, writes
from rlscuda.pruning.structure.rules import rule_of
from rlscuda.pruning.structure.rules.labels import Labels, Planes, simplified, varying
from rlscuda.pruning.structure.rules.registry import tensors_in


@dataclass(frozen=True, eq=False)
class Site:
    """Where a forward gives an axis of channels its size: a reshape or a split.

    Attributes:
        module: Name of the module whose forward it is.
        line: File and line.
        size: Of the axis.
        labels: That of each of its channels, int64 [size].
        outer: Whether other axes of channels lie within it, as dimensions lie within heads; None
            where there are no others.
    """

    module: str
    line: str
    size: int
    labels: Tensor
    outer: bool | None = None


@dataclass(frozen=True, eq=False)
class Table:
    """Channels that a forward lays out in an array, which has to stay one.

    Attributes:
        labels: int64, of the shape of the array.
        axis: The only axis along which it can shrink; None where several may be tried.
        line: Where, file and line.
    """

    labels: Tensor
    axis: int | None = None
    line: str = ""


@dataclass(frozen=True, eq=False)
class Product:
    """Inner products of activations, as those of queries and keys.

    Attributes:
        left: Labels of the one, int64 [rows, d].
        right: Of the other, likewise.
        scaled: Whether what is made of them is divided by the root of their d.
    """

    left: Tensor
    right: Tensor
    scaled: bool


class Scales(TorchFunctionMode):
    """Tells a follower when attention scales its logits by its own width."""

    def __init__(self, follower: Follower):
        super().__init__()
        self._follower = follower

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self._follower.scaled = kwargs.get("scale") is None
        try:
            return function(*args, **kwargs)
        finally:
            self._follower.scaled = False


class Follower(TorchDispatchMode):
    """Follows the labels of a model's parameters, buffers and inputs while it is entered.

    Args:
        model: The model, whose modules are named in reasons.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.labels = Labels()
        self.tables: list[Table] = []
        self.sites: list[Site] = []
        self.products: list[Product] = []
        self.scaled = False  # whether the attention that runs divides by the root of its width
        self.met: set[int] = set()  # ids of parameters and buffers that an operation took
        self.elsewhere: set[str] = set()  # modules whose tensors the forward of another took
        self._owners: dict[int, set[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), set()).add(name)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._planes: Any = WeakIdKeyDictionary()
        self._views: Any = WeakIdKeyDictionary()  # a view -> what it is of, and how
        self._running = ""

    # -- what is known ------------------------------------------------------------------------

    def planes(self, tensor: Any) -> Planes:
        """The planes of a tensor; none of anything else."""
        return self._planes.get(tensor, []) if isinstance(tensor, Tensor) else []

    def give(self, tensor: Tensor, planes: Iterable[Tensor]) -> None:
        """Sets the planes of a tensor; what is fixed from end to end is as good as without."""
        self._planes[tensor] = [p for p in simplified(planes) if not self.labels.all_fixed(p)]

    def operand(self, tensor: Tensor) -> tuple[tuple[int, ...], Planes]:
        """Shape and planes, as `pointwise` takes them; of size 1 where it has been expanded."""
        strides = tensor.stride() if tensor.layout is torch.strided else tensor.shape
        shape = tuple(size if step else 1 for size, step in zip(tensor.shape, strides))
        return shape, self.planes(tensor)

    def fix_all(self, tensors: Iterable[Any], reason: str) -> None:
        """Lets nothing go that some tensors have."""
        for tensor in tensors:
            for plane in self.planes(tensor):
                self.labels.fix(plane, reason)

    @property
    def where(self) -> str:
        """The operation that runs, and the line of the model that called it."""
        _, line = self._place()
        return f"{self._running} ({line})" if line else self._running

    def _place(self) -> tuple[str, str]:
        """The module in whose forward an operation runs, and the line, if that is not torch's."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if id(owner) in self._names:
                path = frame.f_code.co_filename.replace("\\", "/")
                short = "/".join(path.split("/")[-2:])
                line = "" if "/torch/nn/" in path else f"{short}:{frame.f_lineno}"
                return self._names[id(owner)], line
            frame = frame.f_back
        return "", ""

    # -- what operations tell -----------------------------------------------------------------

    def table(self, labels: Tensor, axis: int | None = None) -> None:
        """Notes an array of channels; axes of size 1 are left out.

        Where the axis is known, the same array is no longer tried along another.
        """
        if axis is None:
            labels = labels.squeeze()
        else:
            same = labels.squeeze()
            self.tables = [
                table
                for table in self.tables
                if table.axis is not None or not torch.equal(table.labels, same)
            ]
        if labels.dim() > 1 or axis is not None:
            self.tables.append(Table(labels, axis, self._place()[1]))

    def site(self, tensor: Tensor) -> None:
        """Notes the sizes of the axes of channels that the model has just given a tensor."""
        module, line = self._place()
        for plane in self.planes(tensor):
            for axis in varying(plane):
                others = [a for a in range(plane.dim()) if a != axis]
                flat = plane.permute(axis, *others).reshape(plane.shape[axis], -1)
                outer = axis < max(varying(plane)) if len(varying(plane)) > 1 else None
                found = Site(module, line, plane.shape[axis], self.labels.derive(flat), outer)
                self.sites.append(found)

    def product(self, left: Planes, right: Planes) -> None:
        """Notes planes along whose last axes two activations are multiplied and summed."""
        for one in left:
            for other in right:
                size = one.shape[-1]
                if size > 1 and other.shape[-1] == size:
                    both = [t.reshape(-1, size) for t in torch.broadcast_tensors(one, other)]
                    rows = torch.unique(torch.cat(both, 1), dim=0)
                    self.products.append(Product(rows[:, :size], rows[:, size:], self.scaled))

    # -- the dispatch -------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        taken = tensors_in((args, kwargs))
        self.met.update(id(tensor) for tensor in taken)
        for owners in filter(None, (self._owners.get(id(tensor)) for tensor in taken)):
            if self._place()[0] not in owners:
                self.elsewhere |= owners
        if any(self.planes(tensor) for tensor in taken):
            self._running = func.overloadpacket.__name__
            made = rule_of(func)(self, func, args, kwargs, output)
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if not (isinstance(made, list) and made and isinstance(made[0], list)):
                made = [made] * len(outputs)
            for tensor, planes in zip(outputs, made):
                if isinstance(tensor, Tensor):
                    self.give(tensor, planes)
        self._follow_view(func, args, kwargs, output)
        return output

    def _follow_view(self, func: Operator, args: tuple, kwargs: Mapping, output: Any) -> None:
        """Notes what a view is of; what was written into a view is written into that."""
        if writes(func):
            target = args[0] if args and isinstance(args[0], Tensor) else None
            if target is not None and target in self._views:
                self._write_back(target)
        elif func.is_view and args and isinstance(args[0], Tensor):
            for place, view in enumerate(tensors_in(output)):
                several = isinstance(output, (list, tuple))
                self._views[view] = (args[0], func, args[1:], kwargs, place if several else None)

    def _write_back(self, view: Tensor) -> None:
        base, func, args, kwargs, place = self._views[view]
        planes = self.planes(view)
        if planes:
            written = []
            old = self.planes(base)
            for i, plane in enumerate(planes):
                hole = torch.zeros([1] * base.dim(), dtype=torch.int64, device="cpu")
                full = old[i] if i < len(old) else hole
                full = full.expand(base.shape).contiguous()
                part = func(full, *args, **kwargs)
                part = part if place is None else part[place]
                part.copy_(plane.expand(part.shape))
                written.append(full)
            self.give(base, written)
        if base in self._views:
            self._write_back(base)

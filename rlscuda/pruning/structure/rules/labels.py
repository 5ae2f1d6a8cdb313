"""Labels of channels: which elements of tensors belong to which channel, and what must go together.

Every axis of every parameter, and the channels of the model's inputs, get labels, which are
integers. What hangs on a tensor are *planes*: int64 tensors of its number of dimensions, whose
sizes are its own or 1, with the label of each element. A plane *varies* along the axes where its
size is more than 1. An axis along which no plane varies is of a fixed size: batch, pixels, tokens.

Channels that must go together have their labels joined. Of a plane that varies along several axes,
as (head, dimension) does, a projection onto some of them gives *derived* labels: one for each set
of labels, which goes where all of that set go, and never before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = 0  # the label of what can never go


@dataclass(eq=False)
class Labels:
    """All labels of a model, and which of them are joined.

    Attributes:
        reasons: Label of a set -> why it is fixed.
        members: Derived label -> those it stands for, ascending.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    members: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=lambda: [FIXED])
    _derived: dict[tuple[int, ...], int] = field(default_factory=dict)

    def new(self, count: int) -> Tensor:
        """Labels that nothing has, int64 [count]."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count, device="cpu")

    def find(self, label: int) -> int:
        """The representative of all that a label is joined with; that of fixed ones is 0."""
        parent = self._parent
        root = label
        while root != parent[root]:
            root = parent[root]
        while label != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, labels: Tensor) -> list[int]:
        """The representatives of the labels of a tensor, in its order."""
        return [self.find(label) for label in labels.flatten().tolist()]

    def join(self, first: int, second: int) -> None:
        """Makes two labels go together."""
        first, second = sorted((self.find(first), self.find(second)))
        if first == second:
            return
        self._parent[second] = first  # the smaller one, so that fixed stays fixed
        if second in self.reasons:
            self.reasons.setdefault(first, self.reasons.pop(second))

    def join_all(self, *tensors: Tensor) -> None:
        """Joins the labels of tensors that can be broadcast together, element by element."""
        rows = torch.stack([t.flatten() for t in torch.broadcast_tensors(*tensors)], 1)
        for first, *others in torch.unique(rows, dim=0).tolist():
            for other in others:
                self.join(first, other)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Lets some labels never go."""
        for label in torch.unique(labels).tolist():
            root = self.find(label)
            if root != FIXED:
                self.reasons.setdefault(root, reason)

    def fixed(self, root: int) -> str:
        """Why a set of labels cannot go, or ''."""
        return "it is of a fixed size" if root == FIXED else self.reasons.get(root, "")

    def all_fixed(self, plane: Tensor) -> bool:
        """Whether no label of a plane can go."""
        first = int(plane[(0,) * plane.dim()])
        if not self.fixed(self.find(first)):
            return False
        return all(self.fixed(self.find(label)) for label in torch.unique(plane).tolist())

    def derive(self, rows: Tensor) -> Tensor:
        """The derived label of each row of labels [count, any], int64 [count]."""
        kinds, places = torch.unique(rows, dim=0, return_inverse=True)
        found = [self._of_set(tuple(sorted(set(row)))) for row in kinds.tolist()]
        return torch.tensor(found, device="cpu")[places]

    def _of_set(self, members: tuple[int, ...]) -> int:
        if len(members) == 1:
            return members[0]
        if members not in self._derived:
            self._derived[members] = label = int(self.new(1))
            self.members[label] = members
        return self._derived[members]

    def resolve(self) -> None:
        """Joins each derived label whose members are all one, and fixes what any other meets."""
        waiting = dict(self.members)
        while True:
            whole = [
                label
                for label, members in waiting.items()
                if len(set(map(self.find, members))) == 1
            ]
            if not whole:
                break
            for label in whole:
                self.join(label, waiting.pop(label)[0])
        for label in waiting:
            self.fix(
                torch.tensor([label], device="cpu"), "it goes with only a part of what it meets"
            )

    def copy(self) -> Labels:
        """The same labels, to be joined further."""
        return Labels(
            dict(self.reasons), dict(self.members), list(self._parent), dict(self._derived)
        )


Planes = list[Tensor]


def varying(plane: Tensor) -> frozenset[int]:
    """The axes along which a plane varies."""
    return frozenset(axis for axis, size in enumerate(plane.shape) if size > 1)


def compressed(full: Tensor) -> Tensor:
    """A plane of size 1 along every axis where it is the same everywhere."""
    for axis in range(full.dim()):
        if full.shape[axis] > 1:
            first = full.narrow(axis, 0, 1)
            if bool((full == first).all()):
                full = first
    return full


def simplified(planes: Iterable[Tensor]) -> Planes:
    """Those that vary, compressed."""
    return [plane for plane in map(compressed, planes) if plane.numel() > 1]


def aligned(planes: Planes, dims: int) -> Planes:
    """Planes with axes of size 1 in front, as broadcasting has them."""
    return [plane[(None,) * (dims - plane.dim())] for plane in planes]


def project(labels: Labels, plane: Tensor, axes: Iterable[int]) -> Tensor:
    """A plane that varies along `axes` alone: derived labels stand for what lies along others."""
    keep = sorted(axes)
    others = [axis for axis in range(plane.dim()) if axis not in keep]
    if all(plane.shape[axis] == 1 for axis in others):
        return plane
    shape = [size if axis in keep else 1 for axis, size in enumerate(plane.shape)]
    return labels.derive(plane.permute(*keep, *others).reshape(math.prod(shape), -1)).view(shape)


def reduced(labels: Labels, planes: Planes, axes: Iterable[int], keepdim: bool) -> Planes:
    """The planes of what is summed over some axes."""
    gone = set(axes)
    found = []
    for plane in planes:
        left = project(labels, plane, varying(plane) - gone)
        if not keepdim:
            left = left.squeeze(tuple(gone))
        found.append(left)
    return simplified(found)


def pointwise(
    labels: Labels, operands: Sequence[tuple[Sequence[int], Planes]], where: str
) -> Planes:
    """The planes of what an operation on each element by itself makes of its operands.

    Args:
        labels: All labels; those that meet are joined, those that meet something fixed are fixed.
        operands: Shape and planes of each.
        where: The operation, for reasons.
    """
    dims = max(len(shape) for shape, _ in operands)
    sized = [([1] * (dims - len(shape)) + list(shape), aligned(p, dims)) for shape, p in operands]
    for i, (_, planes) in enumerate(sized):
        for plane in planes:
            axes = varying(plane)
            for j, (shape, others) in enumerate(sized):
                if i == j:
                    continue
                met = frozenset().union(*map(varying, others)) if others else frozenset()
                bare = {axis for axis in axes if shape[axis] > 1 and axis not in met}
                if bare:
                    labels.fix(
                        project(labels, plane, bare),
                        f"it meets something of a fixed size in {where}",
                    )
    found: Planes = []
    for _, planes in sized:
        for plane in planes:
            found = _met(labels, found, plane)
    return found


def _met(labels: Labels, found: Planes, plane: Tensor) -> Planes:
    """Planes of one tensor with one more that meets them."""
    for place, other in enumerate(found):
        common = varying(plane) & varying(other)
        if not common:
            continue
        labels.join_all(project(labels, plane, common), project(labels, other, common))
        if varying(plane) <= varying(other):
            return found
        if varying(other) <= varying(plane):
            return [*found[:place], plane, *found[place + 1 :]]
    return [*found, plane]

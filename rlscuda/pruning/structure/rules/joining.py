"""What takes tensors apart and puts them together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlscuda.pruning.structure.rules.labels import (
    Planes,
    pointwise,
    project,
    varying,
)
from rlscuda.pruning.structure.rules.moving import filled, moved
from rlscuda.pruning.structure.rules.registry import Following, name_of, rule


@rule("split", "split_with_sizes", "unbind", "chunk", "tensor_split", "unsafe_split",
       "unsafe_split_with_sizes", "unsafe_chunk")  # fmt: skip
def _split(f, op, args, kwargs, output):
    x = args[0]
    name = name_of(op)
    dim = kwargs.get("dim", args[-1] if len(args) > (1 if name == "unbind" else 2) else 0)
    dim %= x.dim()
    made = moved(f, op, args, kwargs, output)
    sizes = {part.shape[dim] for part in output} if name != "unbind" else set()
    for plane in f.planes(x):
        if dim in varying(plane) and len(output) > 1 and len(sizes) == 1 and name != "unbind":
            parts = plane.unflatten(dim, (len(output), -1)).movedim(dim, 0)
            f.table(parts.flatten(1), -1)  # part by part, whatever goes along other axes
    if name != "unbind":
        f.site(x)
        for part, planes in zip(output, made):
            f.give(part, planes)
            f.site(part)
    return made


@rule("glu")
def _glu(f, op, args, kwargs, output):
    x = args[0]
    dim = (kwargs.get("dim", args[1] if len(args) > 1 else -1)) % x.dim()
    size = x.shape[dim] // 2
    halves = []
    for start in (0, size):
        halves.append([p.narrow(dim, start, size) if p.shape[dim] > 1 else p for p in f.planes(x)])
    return pointwise(f.labels, [(tuple(output.shape), half) for half in halves], f.where)


@rule("pixel_shuffle")
def _pixel_shuffle(f, op, args, kwargs, output):
    x, factor = args
    for plane in f.planes(x):
        if varying(plane) == {x.dim() - 3}:
            f.table(plane.reshape(-1, factor * factor), 0)
    return moved(f, op, args, kwargs, output)


@rule("cat", "concat", "_cat")
def _cat(f, op, args, kwargs, output):
    tensors = [t for t in args[0] if t.numel() or t.dim() > 1]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
    return _joined(f, tensors, dim)


@rule("stack")
def _stack(f, op, args, kwargs, output):
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
    rows = [t.unsqueeze(dim) for t in args[0]]
    for row, tensor in zip(rows, args[0]):
        f.give(row, [p.unsqueeze(dim) for p in f.planes(tensor)])
    return _joined(f, rows, dim)


def _joined(f: Following, tensors: Sequence[Tensor], dim: int) -> Planes:
    """Planes of tensors that are put side by side."""
    along = [[p for p in f.planes(t) if dim in varying(p)] for t in tensors]
    sides = []
    for tensor, own in zip(tensors, along):
        shape = [1 if axis == dim else size for axis, size in enumerate(tensor.shape)]
        others = [p for p in f.planes(tensor) if dim not in varying(p)]
        # what varies along `dim` and more meets its neighbours by what it is along the rest
        others += [project(f.labels, p, varying(p) - {dim}) for p in own if len(varying(p)) > 1]
        sides.append((shape, [p for p in others if p.numel() > 1]))
    beside = pointwise(f.labels, sides, f.where)
    if not any(along):
        return beside
    width = torch.broadcast_shapes(
        *[
            [1 if axis == dim else size for axis, size in enumerate(p.shape)]
            for own in along
            for p in own
        ]
    )
    parts = []
    for tensor, own in zip(tensors, along):
        for plane in own[1:]:
            f.labels.fix(plane, f"it has several axes in {f.where}")
        size = [tensor.shape[dim] if axis == dim else w for axis, w in enumerate(width)]
        plane = own[0] if own else torch.zeros([1] * len(width), dtype=torch.int64, device="cpu")
        parts.append(filled(f, plane.expand(size)))
    plain = [
        p
        for p in beside
        if not varying(p) <= set().union(*(varying(o) for own in along for o in own))
    ]
    return [torch.cat(parts, dim), *plain]

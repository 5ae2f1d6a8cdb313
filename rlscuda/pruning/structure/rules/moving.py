"""What works on each element by itself, and what moves elements: run on the labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlscuda.pruning.structure.rules.labels import (
    Planes,
    compressed,
    pointwise,
    varying,
)
from rlscuda.pruning.structure.rules.registry import Following, name_of, rule, tensors_in


def full_plane(plane: Tensor, like: Tensor) -> Tensor:
    """A plane in the size of its tensor."""
    return plane.expand(like.shape).contiguous()


@rule("hardswish", "_to_copy", "_prelu_kernel", "fill", "zero", "tril", "triu", "copy",
      "lift_fresh", "native_dropout", "dropout", "bernoulli", "floor_divide",
      "masked_fill", "where")  # fmt: skip
def by_element(f, op, args, kwargs, output):
    """Each element by itself."""
    return pointwise(f.labels, [f.operand(t) for t in tensors_in((args, kwargs))], f.where)


@rule("_softmax", "_safe_softmax", "_log_softmax", "zeros_like", "ones_like", "empty_like",
       "full_like", "rand_like", "randn_like", "sort", "detach", "alias", "clone",
       "_softmax_backward_data")  # fmt: skip
def _same(f, op, args, kwargs, output):
    return f.planes(args[0])


@rule("cumsum", "cumprod", "logcumsumexp")
def _running(f, op, args, kwargs, output):
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % max(args[0].dim(), 1)
    for plane in f.planes(args[0]):
        if dim in varying(plane):
            f.labels.fix(plane, f"each has all before it in {f.where}")
    return f.planes(args[0])


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def _fresh(f, op, args, kwargs, output):
    """Of the size of another tensor, where that is so along its channels."""
    found = []
    if output.dim() == args[0].dim():
        for plane in f.planes(args[0]):
            if all(own in (1, size) for own, size in zip(plane.shape, output.shape)):
                found.append(plane)
    f.give(output, found)
    f.site(output)
    return found


def _apply(op: Any, full: Tensor, x: Tensor, args: tuple, kwargs: dict) -> Any:
    """A moving operation on labels."""
    name = name_of(op)
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"):
        if isinstance(args[0], torch.dtype):
            raise TypeError("a view of another dtype")
        return full.reshape(args[0])
    rest = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    if "pad" in name and name != "constant_pad_nd":
        return op(full.double(), *rest, **kwargs).long()
    if name == "constant_pad_nd":
        return op(full, rest[0])
    return op(full, *rest, **kwargs)


@rule("view", "_unsafe_view", "_reshape_alias", "repeat", "index_select", "flip", "roll",
       "gather", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
       "replication_pad1d", "replication_pad2d", "replication_pad3d", "native_channel_shuffle",
       "pixel_unshuffle", "im2col", "rot90", "take_along_dim", "repeat_interleave")  # fmt: skip
def moved(f, op, args, kwargs, output):
    """What moves elements of its first argument, run on the labels."""
    x, rest = args[0], args[1:]
    several = isinstance(output, (list, tuple))
    outputs = output if several else [output]
    made: list[Planes] = [[] for _ in outputs]
    for plane in f.planes(x):
        if _beside(op, plane, rest):
            made[0].append(plane)
            continue
        try:
            moved = _apply(op, full_plane(plane, x), x, rest, kwargs)
        except Exception:
            f.labels.fix(plane, f"its labels do not pass {f.where}")
            continue
        for found, part, actual in zip(made, moved if several else [moved], outputs):
            if part.shape != actual.shape:
                f.labels.fix(plane, f"its labels do not pass {f.where}")
                continue
            part = filled(f, compressed(part))
            found.append(part)
            if len(varying(part)) > len(varying(plane)):
                f.table(part)
                f.site(x)
    if name_of(op) in ("view", "_unsafe_view") or _takes_channels(f, op, args, kwargs, output):
        f.give(output, made[0])
        f.site(output)
    return made if several else made[0]


def _takes_channels(f: Following, op: Any, args: tuple, kwargs: dict, output: Any) -> bool:
    """Whether an operation takes the first or the last channels; halves say nothing of a size."""
    if name_of(op) != "slice":
        return False
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    some = output.shape[dim] not in (x.shape[dim], x.shape[dim] / 2)
    return some and any(dim in varying(plane) for plane in f.planes(x))


def _beside(op: Any, plane: Tensor, rest: tuple) -> bool:
    """Whether an operation pads, but only along axes where a plane does not vary."""
    if "pad" not in name_of(op):
        return False
    padded = {plane.dim() - 1 - i // 2 for i, amount in enumerate(rest[0]) if amount}
    return not padded & varying(plane)


def filled(f: Following, plane: Tensor) -> Tensor:
    """A plane whose holes, as of padding, have got labels, which are fixed."""
    holes = plane == 0
    if bool(holes.any()):
        new = f.labels.new(int(holes.sum()))
        f.labels.fix(new, f"it meets something of a fixed size in {f.where}")
        plane = plane.clone()
        plane[holes] = new
    return plane


@rule("as_strided")
def _strided(f, op, args, kwargs, output):
    fits = [all(s in (1, size) for s, size in zip(p.shape, args[1])) for p in f.planes(args[0])]
    if len(args[1]) == output.dim() and all(fits):  # of another memory format
        return f.planes(args[0])
    f.fix_all(args[:1], f"its labels do not pass {f.where}")
    return []


@rule("index")
def _index(f, op, args, kwargs, output):
    x, indices = args[0], args[1]
    found = []
    for plane in f.planes(x):
        taken = [i for i, index in enumerate(indices) if index is not None]
        if varying(plane) & set(taken) and any(f.planes(i) for i in indices if i is not None):
            f.labels.fix(plane, f"its places depend on data in {f.where}")
            continue
        cpu = [None if i is None else i.cpu() for i in indices]
        found.append(compressed(torch.ops.aten.index(full_plane(plane, x), cpu)))
    return found

"""Convolutions, norms and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlscuda.pruning.structure.rules.labels import (
    Planes,
    pointwise,
    project,
    varying,
)
from rlscuda.pruning.structure.rules.registry import (
    RULES,
    Following,
    Rule,
    name_of,
    rule,
    tensors_in,
)


@rule("convolution", "_convolution")
def _convolution(f, op, args, kwargs, output):
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    spatial = weight.dim() - 2
    for plane in f.planes(weight):  # its taps
        taps = {axis for axis in varying(plane) if axis > 1}
        if taps:
            f.labels.fix(project(f.labels, plane, taps), "the size of a kernel stays")
    for plane in f.planes(x):
        _stays(f, plane, {axis for axis in varying(plane) if axis > 1}, "convolved along")
    take = [project(f.labels, p, {1}).flatten() for p in f.planes(x) if 1 in varying(p)]
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    outs = [project(f.labels, p, {out_axis}).flatten() for p in f.planes(weight)
            if out_axis in varying(p)]  # fmt: skip
    ins = [project(f.labels, p, {in_axis}).flatten() for p in f.planes(weight)
           if in_axis in varying(p)]  # fmt: skip
    per_in, per_out = x.shape[1] // groups, output.shape[1] // groups
    # weight: [out, in / groups], of a transposed one [in, out / groups]
    if groups == 1:
        pointwise(f.labels, [((x.shape[1],), take), ((x.shape[1],), ins)], f.where)
        made = outs
    else:
        made = _grouped(f, take, ins, outs, groups, per_in, per_out, transposed)
    planes = [p.view(1, -1, *[1] * spatial) for p in made]
    if bias is not None:
        own = [p.view(1, -1, *[1] * spatial) for p in f.planes(bias)]
        shape = (1, output.shape[1], *[1] * spatial)
        planes = pointwise(f.labels, [(shape, planes), (shape, own)], f.where)
    return planes


def _stays(f: Following, plane: Tensor, axes: set[int], why: str) -> None:
    """Lets a plane not shrink along some axes, but along the one other that it may have."""
    rest = varying(plane) - axes
    if axes and len(rest) == 1:
        f.table(plane, *rest)
    if axes:
        f.labels.fix(project(f.labels, plane, axes), f"it is {why} in {f.where}")


def _grouped(
    f: Following, take: Planes, ins: Planes, outs: Planes, groups: int, per_in: int, per_out: int,
    transposed: bool,
) -> Planes:  # fmt: skip
    """Outputs of a convolution by groups; a depthwise one passes its channels on."""
    if transposed:  # one axis of the weight has all inputs, the other the outputs of one group
        for plane in (*take, *ins, *outs):
            f.labels.fix(plane, f"it is of a transposed convolution with groups: {f.where}")
        return []
    rows = [p.view(groups, per_out) for p in outs]
    x = [p.view(groups, per_in) for p in take]
    if per_in == 1:  # each channel makes per_out of its own
        pointwise(f.labels, [((groups, 1), x), ((groups, per_out), rows)], f.where)
        for plane in rows if per_out > 1 else ():
            f.table(plane, 0)
        return outs
    if per_out == 1:
        reason = "it takes several input channels and one output channel a group"
        for plane in (*take, *outs):
            f.labels.fix(plane, f"{reason}: {f.where}")
        return outs
    for plane in (*x, *rows):
        f.table(plane, 1)
    tied = [p.view(1, per_in) for p in ins]
    pointwise(f.labels, [((groups, per_in), x), ((1, per_in), tied)], f.where)
    return outs


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(f, op, args, kwargs, output):
    x = args[0]
    made = pointwise(f.labels, [f.operand(t) for t in (x, *tensors_in(args[2:4]))], f.where)
    first = output[0] if isinstance(output, (list, tuple)) else output
    f.give(first, made)
    f.site(first)
    return [made, [], []] if isinstance(output, (list, tuple)) else made


@rule("native_group_norm", "group_norm")
def _group_norm(f, op, args, kwargs, output):
    x = args[0]
    groups = args[6] if name_of(op) == "native_group_norm" else args[1]
    made = _by_channel(f, x, args[1:3] if groups is not args[1] else args[2:4])
    for plane in made:
        if 1 in varying(plane) and 1 < groups < x.shape[1]:
            f.table(project(f.labels, plane, {1}).view(groups, -1), 1)
        elif groups == x.shape[1] and groups > 1:
            f.labels.fix(plane, f"its groups are of one channel each in {f.where}")
    return [made, [], []] if isinstance(output, (list, tuple)) else made


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
       "batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "miopen_batch_norm",
       "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm_with_update",
       "_native_batch_norm_legit_functional")  # fmt: skip
def _batch_norm(f, op, args, kwargs, output):
    made = _by_channel(f, args[0], args[1:5])
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return [made, *[[] for _ in outputs[1:]]] if len(outputs) > 1 else made


def _by_channel(f: Following, x: Tensor, tensors: Sequence[Any]) -> Planes:
    """Planes of x when it meets vectors along dimension 1."""
    own = [t for t in tensors if isinstance(t, Tensor) and t.dim() == 1]
    tail = [1] * (x.dim() - 2)
    vectors = [((1, len(t), *tail), [p.view(1, -1, *tail) for p in f.planes(t)]) for t in own]
    return pointwise(f.labels, [f.operand(x), *vectors], f.where)


def _of_pixels(dims: int) -> Rule:
    """Rules of what works along the last dimensions, each channel by itself."""

    def rule(f, op, args, kwargs, output):
        x = args[0]
        first = x.dim() - dims
        found = []
        for plane in f.planes(x):
            pixels = {axis for axis in varying(plane) if axis >= first}
            _stays(f, plane, pixels, "pooled along")
            left = project(f.labels, plane, varying(plane) - pixels)
            if left.numel() > 1:
                found.append(left)
        return found

    return rule


for _dims in (1, 2, 3):
    for _name in ("max_pool{}d_with_indices", "avg_pool{}d", "_adaptive_avg_pool{}d",
                  "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "fractional_max_pool{}d",
                  "upsample_nearest{}d", "_upsample_nearest_exact{}d", "max_pool{}d"):  # fmt: skip
        RULES[_name.format(_dims)] = _of_pixels(_dims)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
              "_upsample_bicubic2d_aa", "grid_sampler_2d", "mkldnn_max_pool2d"):  # fmt: skip
    RULES[_name] = _of_pixels(2)
RULES["upsample_linear1d"] = _of_pixels(1)
RULES["upsample_trilinear3d"] = RULES["grid_sampler_3d"] = _of_pixels(3)


@rule("roi_align", "roi_pool")
def _roi(f, op, args, kwargs, output):
    return [p for p in f.planes(args[0]) if varying(p) <= {1}]

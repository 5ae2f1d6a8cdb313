"""What operations make of labels, by their names in torch's core library.

A rule gets the follower, the operation with its arguments, and its output, and gives the planes of
the output: one list, or one for each of several outputs. An operation without a rule fixes all that
it takes, by name, so that nothing is cut that is not understood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlscuda._torch import arguments_of
from rlscuda.pruning.structure.labels import (
    Planes,
    compressed,
    pointwise,
    project,
    reduced,
    varying,
)

if TYPE_CHECKING:
    from rlscuda.pruning.structure.follower import Follower

Rule = Callable[["Follower", Any, tuple, dict, Any], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def default(f: Follower, op: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    """By what torch says of an operation: on each element by itself, or a view; else nothing."""
    if torch.Tag.pointwise in op.tags:
        return _pointwise(f, op, args, kwargs, output)
    if op.is_view:
        return _moved(f, op, args, kwargs, output)
    f.fix_all(_flat((args, kwargs)), f"there is no rule for {f.where}")
    return []


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _flat(item)] if isinstance(value, (list, tuple)) else []


def _full(plane: Tensor, like: Tensor) -> Tensor:
    return plane.expand(like.shape).contiguous()


# -- elements by themselves, and moved ----------------------------------------------------------


@_rule("hardswish", "_to_copy", "_prelu_kernel", "fill", "tril", "triu", "copy", "lift_fresh",
       "native_dropout", "dropout", "bernoulli", "floor_divide", "masked_fill", "where")  # fmt: skip
def _pointwise(f, op, args, kwargs, output):
    return pointwise(f.labels, [f.operand(t) for t in _flat((args, kwargs))], f.where)


@_rule("_softmax", "_log_softmax", "cumsum", "cumprod", "zeros_like", "ones_like", "empty_like",
       "full_like", "rand_like", "randn_like", "sort", "detach", "alias", "clone",
       "_softmax_backward_data", "logcumsumexp")  # fmt: skip
def _same(f, op, args, kwargs, output):
    return f.planes(args[0])


@_rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
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
    name = op.overloadpacket.__name__
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


@_rule("view", "_unsafe_view", "_reshape_alias", "repeat", "index_select", "flip", "roll",
       "gather", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
       "replication_pad1d", "replication_pad2d", "replication_pad3d", "native_channel_shuffle",
       "pixel_unshuffle", "im2col", "rot90", "take_along_dim", "repeat_interleave")  # fmt: skip
def _moved(f, op, args, kwargs, output):
    x, rest = args[0], args[1:]
    several = isinstance(output, (list, tuple))
    outputs = output if several else [output]
    made: list[Planes] = [[] for _ in outputs]
    for plane in f.planes(x):
        if _beside(op, plane, rest):
            made[0].append(plane)
            continue
        try:
            moved = _apply(op, _full(plane, x), x, rest, kwargs)
        except Exception:
            f.labels.fix(plane, f"its labels do not pass {f.where}")
            continue
        for found, part, actual in zip(made, moved if several else [moved], outputs):
            if part.shape != actual.shape:
                f.labels.fix(plane, f"its labels do not pass {f.where}")
                continue
            part = _filled(f, compressed(part))
            found.append(part)
            if len(varying(part)) > len(varying(plane)):
                f.table(part)
                f.site(x)
    if len(outputs) == 1 and op.overloadpacket.__name__ in ("view", "_unsafe_view"):
        f.give(output, made[0])
        f.site(output)
    return made if several else made[0]


def _beside(op: Any, plane: Tensor, rest: tuple) -> bool:
    """Whether an operation pads, but only along axes where a plane does not vary."""
    if "pad" not in op.overloadpacket.__name__:
        return False
    padded = {plane.dim() - 1 - i // 2 for i, amount in enumerate(rest[0]) if amount}
    return not padded & varying(plane)


def _filled(f: Follower, plane: Tensor) -> Tensor:
    """A plane whose holes, as of padding, have got labels, which are fixed."""
    holes = plane == 0
    if bool(holes.any()):
        new = f.labels.new(int(holes.sum()))
        f.labels.fix(new, f"it meets something of a fixed size in {f.where}")
        plane = plane.clone()
        plane[holes] = new
    return plane


@_rule("as_strided")
def _strided(f, op, args, kwargs, output):
    fits = [all(s in (1, size) for s, size in zip(p.shape, args[1])) for p in f.planes(args[0])]
    if len(args[1]) == output.dim() and all(fits):  # of another memory format
        return f.planes(args[0])
    f.fix_all(args[:1], f"its labels do not pass {f.where}")
    return []


@_rule("index")
def _index(f, op, args, kwargs, output):
    x, indices = args[0], args[1]
    found = []
    for plane in f.planes(x):
        taken = [i for i, index in enumerate(indices) if index is not None]
        if varying(plane) & set(taken) and any(f.planes(i) for i in indices if i is not None):
            f.labels.fix(plane, f"its places depend on data in {f.where}")
            continue
        cpu = [None if i is None else i.cpu() for i in indices]
        found.append(compressed(torch.ops.aten.index(_full(plane, x), cpu)))
    return found


@_rule("split", "split_with_sizes", "unbind", "chunk", "tensor_split", "unsafe_split",
       "unsafe_split_with_sizes", "unsafe_chunk")  # fmt: skip
def _split(f, op, args, kwargs, output):
    x = args[0]
    name = op.overloadpacket.__name__
    dim = kwargs.get("dim", args[-1] if len(args) > (1 if name == "unbind" else 2) else 0)
    dim %= x.dim()
    made = _moved(f, op, args, kwargs, output)
    sizes = {part.shape[dim] for part in output} if name != "unbind" else set()
    for plane in f.planes(x):
        if dim in varying(plane) and len(output) > 1 and len(sizes) == 1 and name != "unbind":
            parts = plane.unflatten(dim, (len(output), -1)).movedim(dim, 0)
            f.table(parts.movedim(dim + 1, -1).flatten(1, -2) if plane.dim() > 1 else parts, -1)
    if name != "unbind":
        f.site(x)
        for part, planes in zip(output, made):
            f.give(part, planes)
            f.site(part)
    return made


@_rule("glu")
def _glu(f, op, args, kwargs, output):
    x = args[0]
    dim = (kwargs.get("dim", args[1] if len(args) > 1 else -1)) % x.dim()
    size = x.shape[dim] // 2
    halves = []
    for start in (0, size):
        halves.append([p.narrow(dim, start, size) if p.shape[dim] > 1 else p for p in f.planes(x)])
    return pointwise(f.labels, [(tuple(output.shape), half) for half in halves], f.where)


@_rule("pixel_shuffle")
def _pixel_shuffle(f, op, args, kwargs, output):
    x, factor = args
    for plane in f.planes(x):
        if varying(plane) == {x.dim() - 3}:
            f.table(plane.reshape(-1, factor * factor), 0)
    return _moved(f, op, args, kwargs, output)


@_rule("cat", "concat", "_cat")
def _cat(f, op, args, kwargs, output):
    tensors = [t for t in args[0] if t.numel() or t.dim() > 1]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
    return _joined(f, tensors, dim)


@_rule("stack")
def _stack(f, op, args, kwargs, output):
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.dim()
    rows = [t.unsqueeze(dim) for t in args[0]]
    for row, tensor in zip(rows, args[0]):
        f.give(row, [p.unsqueeze(dim) for p in f.planes(tensor)])
    return _joined(f, rows, dim)


def _joined(f: Follower, tensors: Sequence[Tensor], dim: int) -> Planes:
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
        parts.append(_filled(f, plane.expand(size)))
    plain = [
        p
        for p in beside
        if not varying(p) <= set().union(*(varying(o) for own in along for o in own))
    ]
    return [torch.cat(parts, dim), *plain]


# -- sums -----------------------------------------------------------------------------------------


@_rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm",
       "norm", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp", "nansum",
       "median", "count_nonzero", "topk")  # fmt: skip
def _reduce(f, op, args, kwargs, output):
    if op.overloadpacket.__name__ == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1) % args[0].dim()
        for plane in f.planes(args[0]):
            if dim in varying(plane):
                f.labels.fix(plane, f"its places depend on data in {f.where}")
        return [p for p in f.planes(args[0]) if dim not in varying(p)]
    if len(args) > 1 and isinstance(args[1], Tensor):  # the larger of two
        return _pointwise(f, op, args, kwargs, output)
    named = dict(zip((argument.name for argument in arguments_of(op)), args), **kwargs)
    x, dims = args[0], named.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(x.dim()))
    axes = [dim % x.dim() for dim in dims] if x.dim() else []
    return reduced(f.labels, f.planes(x), axes, bool(named.get("keepdim", False)))


def _contract(f: Follower, operands: Sequence[tuple[Any, Planes]], axes: Sequence[int]) -> Planes:
    """Planes of a sum of products: operands already stand as broadcasting has them."""
    return reduced(f.labels, pointwise(f.labels, operands, f.where), axes, False)


def _matmul(f: Follower, a: Tensor, b: Tensor) -> Planes:
    """A [..., m, k] times b [..., k, n]."""
    left = ((*a.shape, 1), [p[..., None] for p in f.planes(a)])
    right = ((*b.shape[:-2], 1, *b.shape[-2:]), [p.unsqueeze(-3) for p in f.planes(b)])
    dims = max(a.dim(), b.dim()) + 1
    return _contract(f, [left, right], [dims - 2])


@_rule("mm", "bmm", "matmul")
def _product(f, op, args, kwargs, output):
    if op.overloadpacket.__name__ == "bmm":
        f.product(f.planes(args[0]), [p.mT for p in f.planes(args[1])])
    return _matmul(f, args[0], args[1])


@_rule("addmm", "baddbmm")
def _added_product(f, op, args, kwargs, output):
    made = (tuple(output.shape), _matmul(f, args[1], args[2]))
    return pointwise(f.labels, [made, f.operand(args[0])], f.where)


@_rule("mv", "dot", "addmv")
def _vectors(f, op, args, kwargs, output):
    a, b = args[-2:] if op.overloadpacket.__name__ == "addmv" else args[:2]
    made = _contract(f, [f.operand(a), f.operand(b)], [a.dim() - 1])
    return made if len(args) == 2 else pointwise(
        f.labels, [(tuple(output.shape), made), f.operand(args[0])], f.where)  # fmt: skip


@_rule("linear")
def _linear(f, op, args, kwargs, output):
    x, weight, bias = (*args, *[kwargs.get("bias")] * (3 - len(args)))[:3]
    product = _contract(
        f,
        [((*x.shape[:-1], 1, x.shape[-1]), [p.unsqueeze(-2) for p in f.planes(x)]),
         f.operand(weight)],
        [x.dim()],
    )  # fmt: skip
    operands = [(tuple(output.shape), product)]
    return pointwise(f.labels, operands + ([f.operand(bias)] if bias is not None else []), f.where)


@_rule("_weight_norm_interface")
def _weight_norm(f, op, args, kwargs, output):
    made = pointwise(f.labels, [f.operand(t) for t in args[:2]], f.where)
    return [made, []]


@_rule("embedding")
def _embedding(f, op, args, kwargs, output):
    weight, index = args[:2]
    found = []
    for plane in f.planes(weight):
        if 0 in varying(plane):
            f.labels.fix(project(f.labels, plane, {0}), "its rows are looked up by data")
        if 1 in varying(plane):
            found.append(project(f.labels, plane, {1})[(0,) + (None,) * index.dim()])
    return found


def _for_each_head(planes: Planes, q: Tensor) -> Planes:
    """Planes of keys or values of which several heads may share one."""
    return [
        p.repeat_interleave(q.shape[-3] // p.shape[-3], -3)
        if p.dim() > 3 and p.shape[-3] > 1
        else p
        for p in planes
    ]


@_rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
       "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
       "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
       "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(f, op, args, kwargs, output):
    q, k, v = args[:3]
    keys, values = (_for_each_head(f.planes(t), q) for t in (k, v))
    f.product(f.planes(q), keys)
    heads = q.shape[:-2]
    logits = _contract(
        f,
        [((*q.shape[:-1], 1, q.shape[-1]), [p.unsqueeze(-2) for p in f.planes(q)]),
         ((*heads, 1, *k.shape[-2:]), [p.unsqueeze(-3) for p in keys])],
        [q.dim()],
    )  # fmt: skip
    shape = (*q.shape[:-1], k.shape[-2])
    for mask in _flat((args[3:], kwargs)):
        logits = pointwise(f.labels, [(shape, logits), f.operand(mask)], f.where)
    made = _contract(
        f,
        [((*shape, 1), [p[..., None] for p in logits]),
         ((*heads, 1, *v.shape[-2:]), [p.unsqueeze(-3) for p in values])],
        [q.dim() - 1],
    )  # fmt: skip
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return [made, *[[] for _ in outputs[1:]]] if len(outputs) > 1 else made


# -- layers ---------------------------------------------------------------------------------------


@_rule("convolution", "_convolution")
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
    # x [in], weight's axes: of a plain one [out, in / groups], of a transposed one [in, out / groups]
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


def _stays(f: Follower, plane: Tensor, axes: set[int], why: str) -> None:
    """Lets a plane not shrink along some axes, but along the one other that it may have."""
    rest = varying(plane) - axes
    if axes and len(rest) == 1:
        f.table(plane, *rest)
    if axes:
        f.labels.fix(project(f.labels, plane, axes), f"it is {why} in {f.where}")


def _grouped(
    f: Follower, take: Planes, ins: Planes, outs: Planes, groups: int, per_in: int, per_out: int,
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


@_rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(f, op, args, kwargs, output):
    x = args[0]
    made = pointwise(f.labels, [f.operand(t) for t in (x, *_flat(args[2:4]))], f.where)
    first = output[0] if isinstance(output, (list, tuple)) else output
    f.give(first, made)
    f.site(first)
    return [made, [], []] if isinstance(output, (list, tuple)) else made


@_rule("native_group_norm", "group_norm")
def _group_norm(f, op, args, kwargs, output):
    x = args[0]
    groups = args[6] if op.overloadpacket.__name__ == "native_group_norm" else args[1]
    made = _by_channel(f, x, args[1:3] if groups is not args[1] else args[2:4])
    for plane in made:
        if 1 in varying(plane) and 1 < groups < x.shape[1]:
            f.table(project(f.labels, plane, {1}).view(groups, -1), 1)
        elif groups == x.shape[1] and groups > 1:
            f.labels.fix(plane, f"its groups are of one channel each in {f.where}")
    return [made, [], []] if isinstance(output, (list, tuple)) else made


@_rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
       "batch_norm", "_batch_norm_impl_index", "cudnn_batch_norm", "miopen_batch_norm",
       "_batch_norm_no_update", "_batch_norm_with_update", "batch_norm_with_update",
       "_native_batch_norm_legit_functional")  # fmt: skip
def _batch_norm(f, op, args, kwargs, output):
    made = _by_channel(f, args[0], args[1:5])
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return [made, *[[] for _ in outputs[1:]]] if len(outputs) > 1 else made


def _by_channel(f: Follower, x: Tensor, tensors: Sequence[Any]) -> Planes:
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


@_rule("roi_align", "roi_pool")
def _roi(f, op, args, kwargs, output):
    return [p for p in f.planes(args[0]) if varying(p) <= {1}]

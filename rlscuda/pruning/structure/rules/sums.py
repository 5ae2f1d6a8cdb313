"""What sums over axes: statistics, products of matrices, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlscuda._torch import arguments_of
from rlscuda.pruning.structure.rules.labels import (
    Planes,
    pointwise,
    project,
    reduced,
    varying,
)
from rlscuda.pruning.structure.rules.moving import by_element
from rlscuda.pruning.structure.rules.registry import Following, name_of, rule, tensors_in


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm",
       "norm", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp", "nansum",
       "median", "count_nonzero", "topk")  # fmt: skip
def _reduce(f, op, args, kwargs, output):
    if name_of(op) == "topk":
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1) % args[0].dim()
        for plane in f.planes(args[0]):
            if dim in varying(plane):
                f.labels.fix(plane, f"its places depend on data in {f.where}")
        return [p for p in f.planes(args[0]) if dim not in varying(p)]
    if len(args) > 1 and isinstance(args[1], Tensor):  # the larger of two
        return by_element(f, op, args, kwargs, output)
    named = dict(zip((argument.name for argument in arguments_of(op)), args), **kwargs)
    x, dims = args[0], named.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(x.dim()))
    axes = [dim % x.dim() for dim in dims] if x.dim() else []
    return reduced(f.labels, f.planes(x), axes, bool(named.get("keepdim", False)))


def contracted(f: Following, operands: Sequence[tuple[Any, Planes]], axes: Sequence[int]) -> Planes:
    """Planes of a sum of products: operands already stand as broadcasting has them."""
    return reduced(f.labels, pointwise(f.labels, operands, f.where), axes, False)


def _matmul(f: Following, a: Tensor, b: Tensor) -> Planes:
    """A [..., m, k] times b [..., k, n]."""
    left = ((*a.shape, 1), [p[..., None] for p in f.planes(a)])
    right = ((*b.shape[:-2], 1, *b.shape[-2:]), [p.unsqueeze(-3) for p in f.planes(b)])
    dims = max(a.dim(), b.dim()) + 1
    return contracted(f, [left, right], [dims - 2])


@rule("mm", "bmm", "matmul")
def _product(f, op, args, kwargs, output):
    if name_of(op) == "bmm":
        f.product(f.planes(args[0]), [p.mT for p in f.planes(args[1])])
    return _matmul(f, args[0], args[1])


@rule("addmm", "baddbmm")
def _added_product(f, op, args, kwargs, output):
    made = (tuple(output.shape), _matmul(f, args[1], args[2]))
    return pointwise(f.labels, [made, f.operand(args[0])], f.where)


@rule("mv", "dot", "addmv")
def _vectors(f, op, args, kwargs, output):
    a, b = args[-2:] if name_of(op) == "addmv" else args[:2]
    made = contracted(f, [f.operand(a), f.operand(b)], [a.dim() - 1])
    return made if len(args) == 2 else pointwise(
        f.labels, [(tuple(output.shape), made), f.operand(args[0])], f.where)  # fmt: skip


@rule("linear")
def _linear(f, op, args, kwargs, output):
    x, weight, bias = (*args, *[kwargs.get("bias")] * (3 - len(args)))[:3]
    product = contracted(
        f,
        [((*x.shape[:-1], 1, x.shape[-1]), [p.unsqueeze(-2) for p in f.planes(x)]),
         f.operand(weight)],
        [x.dim()],
    )  # fmt: skip
    operands = [(tuple(output.shape), product)]
    return pointwise(f.labels, operands + ([f.operand(bias)] if bias is not None else []), f.where)


@rule("_weight_norm_interface")
def _weight_norm(f, op, args, kwargs, output):
    made = pointwise(f.labels, [f.operand(t) for t in args[:2]], f.where)
    return [made, []]


@rule("embedding")
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


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
       "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
       "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
       "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(f, op, args, kwargs, output):
    q, k, v = args[:3]
    keys, values = (_for_each_head(f.planes(t), q) for t in (k, v))
    f.product(f.planes(q), keys)
    heads = q.shape[:-2]
    logits = contracted(
        f,
        [((*q.shape[:-1], 1, q.shape[-1]), [p.unsqueeze(-2) for p in f.planes(q)]),
         ((*heads, 1, *k.shape[-2:]), [p.unsqueeze(-3) for p in keys])],
        [q.dim()],
    )  # fmt: skip
    shape = (*q.shape[:-1], k.shape[-2])
    for mask in tensors_in((args[3:], kwargs)):
        logits = pointwise(f.labels, [(shape, logits), f.operand(mask)], f.where)
    made = contracted(
        f,
        [((*shape, 1), [p[..., None] for p in logits]),
         ((*heads, 1, *v.shape[-2:]), [p.unsqueeze(-3) for p in values])],
        [q.dim() - 1],
    )  # fmt: skip
    outputs = output if isinstance(output, (list, tuple)) else [output]
    return [made, *[[] for _ in outputs[1:]]] if len(outputs) > 1 else made

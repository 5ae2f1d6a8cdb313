"""Attributes of modules that change with the shapes of their tensors, as `out_channels` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rlscuda._torch import BatchNorm, Convolution, InstanceNorm, has_one_width
from rlscuda.optim.kept import Kept
from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.pruning.couplings import Width


def attributes_of(
    model: nn.Module,
    tensors: Mapping[str, Kept],
    widths: Sequence[Width],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Name of a module -> its attributes that change.

    Args:
        model: The model, as it was before.
        tensors: What is kept of its parameters and buffers.
        widths: Attributes that follow channels.
        removed: Name of a coupling -> the units that go.

    Raises:
        ValueError: Channels of different numbers have one attribute.
    """
    found: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for width in widths:
        module = modules[width.module]
        value = getattr(module, width.attribute)
        old = value if width.item is None else value[width.item]
        gone = {
            sum(unit in removed.get(name, ()) for name, unit in channels)
            for channels in width.channels
        } - {0}
        if len(gone) > 1:
            raise ValueError(f"{width.attribute}={old} of {width.module!r} would have to be "
                             f"{' and '.join(str(old - g) for g in sorted(gone))}")  # fmt: skip
        for count in gone:
            changed = found.setdefault(width.module, {})
            if width.item is None:
                changed[width.attribute] = old - count
            else:
                items = list(changed.get(width.attribute, value))
                items[width.item] = old - count
                changed[width.attribute] = type(value)(items)
    for name, module in modules.items():
        shapes = {
            own: kept.shape
            for own in _own_tensors(module)
            if (kept := tensors.get(f"{name}.{own}" if name else own)) is not None
        }
        if shapes:
            changed = {k: v for k, v in _of_shapes(module, shapes).items()
                       if getattr(module, k, v) != v}  # fmt: skip
            if changed:
                found.setdefault(name, {}).update(changed)
    return found


def _own_tensors(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters("", False, False),
                                 *module.named_buffers("", False, False))]  # fmt: skip


def by_tensors(module: nn.Module) -> set[str]:
    """Attributes of a module of torch's that go by the shapes of its tensors."""
    tensors = (*module.named_parameters("", False), *module.named_buffers("", False))
    return set(_of_shapes(module, {name: tuple(tensor.shape) for name, tensor in tensors}))


def _of_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The attributes that a module of some kinds has with tensors of these shapes."""
    weight = shapes.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        width = (shapes.get("in_proj_weight") or shapes["q_proj_weight"])[1]
        same = has_one_width(module)
        k, v = (shapes.get(f"{part}_proj_weight", (0, 0))[1] for part in "kv")
        return {"embed_dim": width, "head_dim": width // module.num_heads,
                "num_heads": module.num_heads,  # stays, also where a head is as wide
                "kdim": width if same else k or module.kdim,
                "vdim": width if same else v or module.vdim}  # fmt: skip
    if isinstance(module, nn.RNNBase):
        return {"input_size": shapes["weight_ih_l0"][1]} if "weight_ih_l0" in shapes else {}
    if isinstance(module, (BatchNorm, InstanceNorm)):
        return (
            {"num_features": next(s for s in shapes.values() if s)[0]}
            if any(shapes.values())
            else {}
        )
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if is_transposed(module):
        return {"nx": weight[0], "nf": weight[1]}
    if isinstance(module, Convolution):
        per, groups = weight[1], module.groups
        if module.transposed:
            return {"in_channels": weight[0], "out_channels": per * groups}
        if groups > 1 and groups == module.in_channels:
            groups = weight[0] // (module.out_channels // module.groups)
        return {"out_channels": weight[0], "in_channels": per * groups, "groups": groups}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": weight}
    return {}

"""Layers that can have a mask: what is checked before, what is written, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from rlscuda._torch import own_buffers, own_parameters, pre_hooks
from rlscuda.optim.kinds.modules import COVERED


@dataclass(frozen=True)
class MaskLayer:
    """One layer to put a mask on.

    Attributes:
        name: Qualified name.
        module: The layer.
        weight: Its weight [c, n] or [c, C/groups, *kernel].
        bias: Its bias [c] where that is inside P, else None.
        P: Inverse autocorrelation [groups, k, k] in float64; k is n, or n + 1 with the bias.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    P: Tensor

    @property
    def columns(self) -> int:
        """n: inputs of one output."""
        return self.weight[0].numel()

    @property
    def old_mask(self) -> Tensor | None:
        """The mask that torch.nn.utils.prune has put on it."""
        return own_buffers(self.module)["weight_mask"] if is_masked(self.module) else None

    def rows(self) -> Tensor:
        """The weight that the layer computes with, and the bias if inside P: [c, k], float64."""
        rows, mask = self.weight.detach().double().flatten(1), self.old_mask
        if mask is not None:
            rows = rows * mask.flatten(1)
        if self.bias is not None:
            rows = torch.cat([rows, self.bias.detach().double()[:, None]], 1)
        return rows

    def pattern_groups(self, m: int) -> Tensor:
        """Columns [n / m, m] of m consecutive inputs; of a convolution, at one kernel position.

        Raises:
            ValueError: The inputs are no multiple of m.
        """
        inputs = self.weight.shape[1]
        if inputs % m:
            raise ValueError(f"its inputs must be a multiple of {m}, got {inputs}")
        columns = torch.arange(self.columns, device=self.P.device)
        return columns.view(inputs, -1).t().reshape(-1, m)

    def moments(self, optimizer: Optimizer | None) -> list[Tensor]:
        """The weight's part of every tensor of its shape in the optimizer's state, as views."""
        state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(self.weight, {})
        rows = [(len(self.weight), self.columns + extra) for extra in (0, 1)]
        views = []
        for name, value in state.items():
            if not isinstance(value, Tensor) or name == "P":
                continue
            if value.shape == self.weight.shape:
                views.append(value)
            elif value.shape in rows:
                views.append(value[:, : self.columns])
        return views


def is_masked(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune has put a mask on a module's weight."""
    return "weight_orig" in own_parameters(module) and "weight_mask" in own_buffers(module)


def mask_layer(model: nn.Module, name: str, matrices: Mapping[str, Tensor]) -> MaskLayer:
    """The layer of a name and its matrix, checked.

    Raises:
        ValueError: See `prune_weights`.
    """
    if name not in matrices:
        raise ValueError(f"there is no matrix of {name!r}, only of {', '.join(matrices) or 'none'}")
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"the model has no layer {name!r}")
    module = modules[name]
    if not isinstance(module, COVERED):
        raise ValueError(f"{name!r} must be a Linear or convolution, got {type(module).__name__}")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(f"MultiheadAttention uses the weight of {name!r} without calling it, and "
                         "so past a mask")  # fmt: skip
    weight = own_parameters(module).get("weight_orig" if is_masked(module) else "weight")
    if weight is None:
        raise ValueError(f"the weight of {name!r} must be a parameter of it, plain or masked")
    for other_name, other in modules.items():
        if other is not module and any(p is weight for p in own_parameters(other).values()):
            raise ValueError(f"the weight of {name!r} is also that of {other_name!r}, which the "
                             "mask would not reach")  # fmt: skip
    bias = own_parameters(module).get("bias")
    P = _checked_matrix(name, module, weight[0].numel(), matrices[name])
    layer = MaskLayer(name, module, weight, bias if P.shape[-1] > weight[0].numel() else None, P)
    if not torch.isfinite(layer.rows()).all():
        raise ValueError(f"the weight and bias of {name!r} must be finite")
    return layer


def _checked_matrix(name: str, module: nn.Module, n: int, P: Tensor) -> Tensor:
    P, groups = P.unsqueeze(0) if P.dim() == 2 else P, getattr(module, "groups", 1)
    plain_bias = own_parameters(module).get("bias") is not None
    shapes = [[groups, n, n]] + [[groups, n + 1, n + 1]] * plain_bias
    if list(P.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"the matrix of {name!r} must be {expected}, got {list(P.shape)}")
    P = P.detach().to(next(module.parameters()).device, torch.float64)
    if not torch.isfinite(P).all() or (P - P.mT).abs().max() > 1e-6 * P.abs().max():
        raise ValueError(f"the matrix of {name!r} must be finite and symmetric")
    return P


@torch.no_grad()
def write_mask(
    layer: MaskLayer, keep: Tensor, rows: Tensor, moments: Iterable[Tensor], permanent: bool
) -> None:
    """Writes weight, bias and mask in place.

    Args:
        layer: The layer.
        keep: What stays [c, n].
        rows: The new weights, with the bias if inside P [c, k], 0 where not kept.
        moments: Views of an optimizer's state, shaped [c, n] or as the weight; 0 where not kept.
        permanent: Leaves no mask.
    """
    weight, module, n = layer.weight, layer.module, layer.columns
    weight.copy_(rows[:, :n].view(weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(rows[:, n])
    for view in moments:
        view.mul_(keep.view(view.shape))
    mask, old = keep.view(weight.shape).to(weight.dtype), layer.old_mask
    if old is not None:
        old.copy_(mask)
        if permanent:
            prune.remove(module, "weight")
        else:
            module.weight = weight * mask
    elif not permanent:
        prune.custom_from_mask(module, "weight", mask)


def undo_of(layer: MaskLayer, moments: Iterable[Tensor]) -> Callable[[], None]:
    """A function that brings back what `write_mask` changes, to the bit and in its order."""
    module = layer.module
    registries: list[dict[Any, Any]] = [
        own_parameters(module), own_buffers(module), pre_hooks(module),
    ]  # fmt: skip
    contents = [dict(registry) for registry in registries]
    attribute = vars(module).get("weight")
    touched = [layer.weight, layer.bias, layer.old_mask, *moments]
    values = [(tensor, tensor.detach().clone()) for tensor in touched if tensor is not None]

    @torch.no_grad()
    def undo() -> None:
        for registry, content in zip(registries, contents):
            registry.clear()
            registry.update(content)
        vars(module).pop("weight", None)
        if attribute is not None:
            vars(module)["weight"] = attribute
        for tensor, value in values:
            tensor.copy_(value)

    return undo

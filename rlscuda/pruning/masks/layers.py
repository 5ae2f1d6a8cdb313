"""Layers that can have a mask: what is checked before, what is written, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from rlscuda._torch import is_masked, own_buffers, own_parameters, plain_or_masked, pre_hooks
from rlscuda.optim.kinds.modules import COVERED


@dataclass(frozen=True)
class MaskLayer:
    """One layer to put a mask on.

    Attributes:
        name: Qualified name.
        module: The layer.
        weight: Its weight [c, n] or [c, C/groups, *kernel].
        bias: Its bias [c] where that is inside P, else None; without P, where it is its own.
        P: Inverse autocorrelation [groups, k, k] in float64, k being n, or n + 1 with the bias;
            None where the weights are not refitted.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    P: Tensor | None

    @property
    def columns(self) -> int:
        """n: inputs of one output."""
        return self.weight[0].numel()

    @property
    def old_mask(self) -> Tensor | None:
        """The mask that torch.nn.utils.prune has put on it."""
        return own_buffers(self.module)["weight_mask"] if is_masked(self.module) else None

    @property
    def old_bias_mask(self) -> Tensor | None:
        """That on its bias."""
        there = self.bias is not None and is_masked(self.module, "bias")
        return own_buffers(self.module)["bias_mask"] if there else None

    def kept(self) -> Tensor:
        """What its masks have left so far: bool [c, k]."""
        everything = torch.ones_like(self.weight, dtype=torch.bool).flatten(1)
        keep = everything if self.old_mask is None else self.old_mask.flatten(1) != 0
        if self.bias is not None:
            mask = self.old_bias_mask
            last = everything[:, :1] if mask is None else mask[:, None] != 0
            keep = torch.cat([keep, last], 1)
        return keep

    def rows(self) -> Tensor:
        """The weight that the layer computes with, with `bias` where it has one: [c, k] float64."""
        rows = self.weight.detach().double().flatten(1)
        if self.bias is not None:
            rows = torch.cat([rows, self.bias.detach().double()[:, None]], 1)
        return rows.masked_fill(~self.kept(), 0)

    def pattern_groups(self, m: int) -> Tensor:
        """Columns [n / m, m] of m consecutive inputs; of a convolution, at one kernel position.

        Raises:
            ValueError: The inputs are no multiple of m.
        """
        inputs = self.weight.shape[1]
        if inputs % m:
            raise ValueError(f"its inputs must be a multiple of {m}, got {inputs}")
        columns = torch.arange(self.columns, device=self.weight.device)
        return columns.view(inputs, -1).t().reshape(-1, m)

    def moments(self, optimizer: Optimizer | None) -> list[tuple[Tensor, slice]]:
        """The parts of an optimizer's state that are of single weights, as views.

        Returns:
            Each with the columns of [c, k] that it holds; the order of elements is theirs.
        """
        found: list[tuple[Tensor, slice]] = []
        n, bias = self.columns, self.bias
        for value in _tensors(optimizer, self.weight):
            if value.shape in (self.weight.shape, (len(self.weight), n)):
                found.append((value, slice(n)))
            elif value.shape == (len(self.weight), n + 1):
                width = n if bias is None else n + 1
                found.append((value[:, :width], slice(width)))
        if bias is not None:
            own = (value for value in _tensors(optimizer, bias) if value.shape == bias.shape)
            found += [(value, slice(n, n + 1)) for value in own]
        return found


def _tensors(optimizer: Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps for a parameter, its matrix apart."""
    state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [v for name, v in state.items() if isinstance(v, Tensor) and name != "P"]


def mask_layer(
    model: nn.Module, name: str, matrices: Mapping[str, Tensor] | None, bias: bool = False
) -> MaskLayer:
    """The layer of a name and its matrix, checked.

    Args:
        model: The model.
        name: Of the layer.
        matrices: By name of a layer; None for a layer that is not refitted.
        bias: Whether the bias is the layer's to mask though no matrix has it.

    Raises:
        ValueError: See `prune_weights`.
    """
    if matrices is not None and name not in matrices:
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
    weight = plain_or_masked(module, "weight")
    if weight is None:
        raise ValueError(f"the weight of {name!r} must be a parameter of it, plain or masked")
    for other_name, other in modules.items():
        if other is not module and any(p is weight for p in own_parameters(other).values()):
            raise ValueError(f"the weight of {name!r} is also that of {other_name!r}, which the "
                             "mask would not reach")  # fmt: skip
    n = weight[0].numel()
    P = None if matrices is None else _checked_matrix(name, module, n, matrices[name])
    own = bias or (P is not None and P.shape[-1] > n)
    layer = MaskLayer(name, module, weight, plain_or_masked(module, "bias") if own else None, P)
    if not torch.isfinite(layer.rows()).all():
        raise ValueError(f"the weight and bias of {name!r} must be finite")
    return layer


def _checked_matrix(name: str, module: nn.Module, n: int, P: Tensor) -> Tensor:
    P, groups = P.unsqueeze(0) if P.dim() == 2 else P, getattr(module, "groups", 1)
    has_bias = plain_or_masked(module, "bias") is not None
    shapes = [[groups, n, n]] + [[groups, n + 1, n + 1]] * has_bias
    if list(P.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"the matrix of {name!r} must be {expected}, got {list(P.shape)}")
    P = P.detach().to(next(module.parameters()).device, torch.float64)
    if not torch.isfinite(P).all() or (P - P.mT).abs().max() > 1e-6 * P.abs().max():
        raise ValueError(f"the matrix of {name!r} must be finite and symmetric")
    return P


@torch.no_grad()
def write_mask(
    layer: MaskLayer,
    keep: Tensor,
    rows: Tensor,
    moments: Iterable[tuple[Tensor, slice]],
    permanent: bool,
) -> None:
    """Writes weight, bias and masks in place; the bias has one only where some of it goes.

    Args:
        layer: The layer.
        keep: What stays [c, k].
        rows: The new weights, with the bias if there is one [c, k], 0 where not kept.
        moments: See `MaskLayer.moments`; 0 where not kept.
        permanent: Leaves no mask.
    """
    weight, module, n = layer.weight, layer.module, layer.columns
    for view, columns in moments:
        view.mul_(keep[:, columns].reshape(view.shape))
    weight.copy_(rows[:, :n].view(weight.shape))
    _write(module, "weight", weight, keep[:, :n].view(weight.shape), layer.old_mask, permanent)
    if layer.bias is not None:
        old, kept = layer.old_bias_mask, keep[:, n]
        layer.bias.copy_(rows[:, n])
        if old is not None or not kept.all():
            _write(module, "bias", layer.bias, kept, old, permanent)


def _write(
    module: nn.Module, name: str, value: Tensor, keep: Tensor, old: Tensor | None, permanent: bool
) -> None:
    """Puts a mask on a parameter, or changes the one that it has."""
    mask = keep.to(value.dtype)
    if old is not None:
        old.copy_(mask)
        if permanent:
            prune.remove(module, name)
        else:
            setattr(module, name, value * mask)
    elif not permanent:
        prune.custom_from_mask(module, name, mask)


def undo_of(layer: MaskLayer, moments: Iterable[tuple[Tensor, slice]]) -> Callable[[], None]:
    """A function that brings back what `write_mask` changes, to the bit and in its order."""
    module = layer.module
    registries: list[dict[Any, Any]] = [
        own_parameters(module), own_buffers(module), pre_hooks(module),
    ]  # fmt: skip
    contents = [dict(registry) for registry in registries]
    attributes = {name: vars(module).get(name) for name in ("weight", "bias")}
    views = (view for view, _ in moments)
    touched = [layer.weight, layer.bias, layer.old_mask, layer.old_bias_mask, *views]
    values = [(tensor, tensor.detach().clone()) for tensor in touched if tensor is not None]

    @torch.no_grad()
    def undo() -> None:
        for registry, content in zip(registries, contents):
            registry.clear()
            registry.update(content)
        for name, attribute in attributes.items():
            vars(module).pop(name, None)
            if attribute is not None:
                vars(module)[name] = attribute
        for tensor, value in values:
            tensor.copy_(value)

    return undo

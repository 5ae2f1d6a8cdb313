r"""Layers of a pruned model, fitted in turn to what the whole model's put out.

Compensation fits each layer as if its input were otherwise the whole model's; but the layers before
it were cut as well, and their errors add up. Here each layer, in the order of the forward, gets

.. math:: \arg\min_{V} \; \tfrac{1}{N} \lVert X' V^T - X W^T \rVert^2
          + \delta \lVert V - V_0 \rVert^2

of the rows X' that the pruned layers before it make, fitted anew already, the outputs :math:`X W^T`
of the whole model's layer on the same batches, and the compensated weight :math:`V_0`. With A the
autocorrelation of X' and R the correlation of X' with what :math:`V_0` lacks of the outputs,
:math:`V = V_0 + ((A + \delta I)^{-1} R)^T`.

Source: the reconstruction of He, Zhang and Sun 2017 (arXiv 1707.06168).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.closed_form.formulas import damped_inverse
from rlscuda.optim.kept import Kept
from rlscuda.optim.kinds.modules import has_inputs_first
from rlscuda.optim.layers import Layer
from rlscuda.pruning.choice.targets import parameter_holders
from rlscuda.pruning.matrices.calibration import observing, pruning_layers, row_parts
from rlscuda.pruning.matrices.layers import ProvenLayer, layer_values, layer_weight
from rlscuda.pruning.running.calls import feed, inference, isolated_copy
from rlscuda.pruning.running.measure import _plain_attention
from rlscuda.pruning.surgery.plan import Surgery
from rlscuda.pruning.surgery.transaction import pruned_copy

Pairs = Callable[[], Iterable[tuple[Any, Any]]]  # of each batch, what either model is given

_WIDEST = 8192  # columns of a layer that is fitted


@torch.no_grad()
def refit(
    model: nn.Module,
    pairs: Callable[[Surgery], Iterable[tuple[Any, Any]]],
    settle: Callable[[nn.Module, Surgery], Any],
    damping: float,
    surgery: Surgery,
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The weights and biases of a pruned model whose layers are fitted in turn.

    Left as they are: layers before the first that loses inputs, those that share their parameters,
    wear a mask, make their weight of the parameter or have more than 8192 columns, and those that
    the model does not call.

    Args:
        model: The whole model; copies of it are run, in eval mode.
        pairs: Gives what whole and pruned model are fed, batch by batch, each time from the start.
        settle: Lets the batch norms of a pruned copy follow, before anything is fitted to them.
        damping: Relative to the mean of the autocorrelation's diagonal.
        surgery: What is to be removed.
        values: Compensated weights and biases by name, in their full shapes.

    Returns:
        `values` with those of the layers that were fitted, of the parameters' dtypes and devices.

    Raises:
        TypeError: A batch is none that `feed` takes.
        ValueError: A layer sees non-finite input.
    """
    whole, pruned = isolated_copy(model), pruned_copy(model, surgery, values)
    batches = partial(pairs, surgery)
    settle(pruned, surgery)
    full = dict(model.named_parameters(remove_duplicate=False))
    found = dict(values)
    for layer in _in_order(pruned, batches, surgery):
        fit = _Fit(layer, surgery.tensors.get(f"{layer.name}.weight"))
        fit.watch(whole, pruned, batches)
        if not fit.rows:
            continue
        for own, new in layer_values(layer.module, fit.weight(damping)).items():
            name = f"{layer.name}.{own}"
            layer.module.get_parameter(own).copy_(new)
            kept, value = surgery.tensors.get(name), found.get(name, full[name].detach()).clone()
            found[name] = new if kept is None else _written(value, kept, new)
    return found


def _written(value: Tensor, kept: Kept, new: Tensor) -> Tensor:
    """A full value with what is kept of it replaced."""
    flat = value.flatten()
    flat[kept.index.to(flat.device)] = new.flatten()
    return flat.view(value.shape)


def _in_order(pruned: nn.Module, batches: Pairs, surgery: Surgery) -> list[Layer]:
    """The layers to be fitted, as the forward calls them."""
    holders = parameter_holders(pruned)
    layers = [
        layer
        for layer in pruning_layers(pruned, None, others=True)
        if own_parameters(layer.module).get("weight") is not None
        and all(p is None or holders[id(p)] == 1 for p in own_parameters(layer.module).values())
        and not isinstance(layer, ProvenLayer)
        and layer.fan_in <= _WIDEST
    ]
    called: dict[Layer, None] = {}
    with inference(pruned), observing(layers, lambda layer, x: called.setdefault(layer)):
        for _, batch in batches():
            feed(pruned, batch)
            break
    order = list(called)
    changed = (i for i, layer in enumerate(order) if _loses_inputs(layer, surgery))
    return order[next(changed, len(order)) :]


def _loses_inputs(layer: Layer, surgery: Surgery) -> bool:
    kept = surgery.tensors.get(f"{layer.name}.weight")
    axis = 0 if has_inputs_first(layer.module) else 1
    return kept is not None and kept.axes[axis] is not None


class _Fit:
    """The least squares of one layer of the pruned model.

    Attributes:
        rows: How many rows it has seen, of each group.
    """

    def __init__(self, layer: Layer, kept: Kept | None):
        self.layer, self.rows = layer, 0
        self.places = None if kept is None else kept.places(int(has_inputs_first(layer.module)))
        shape = (layer.groups, layer.fan_in, layer.fan_in)
        self.A = torch.zeros(shape, dtype=torch.float64, device=layer.weight.device)
        self.W = layer_weight(layer.module, self.A)
        self.R = torch.zeros_like(self.W)

    def watch(self, whole: nn.Module, pruned: nn.Module, batches: Pairs) -> None:
        """Shows both models the batches."""
        outputs: list[Tensor] = []
        handle = whole.get_submodule(self.layer.name).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        seeing = observing([self.layer], lambda layer, x: self.add(x, outputs.pop(0)))
        try:
            with inference(whole), inference(pruned), _plain_attention(), seeing:
                for of_whole, of_pruned in batches():
                    feed(whole, of_whole)
                    feed(pruned, of_pruned)
        finally:
            handle.remove()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in an input of the pruned layer and the output of the whole one."""
        layer = self.layer
        channels = -1 if layer.weight.dim() == 2 else 1 - layer.weight.dim()
        y = y.detach().movedim(channels, -1).to(self.A.device, torch.float64)
        if self.places is not None:
            y = y.index_select(-1, self.places.to(y.device))
        targets = y.reshape(-1, layer.groups, self.W.shape[1]).movedim(1, 0)  # [groups, N, c]
        start = 0
        for rows in row_parts(layer, x):
            stop = start + rows.shape[1]
            lacking = targets[:, start:stop] - rows @ self.W.mT
            self.A.baddbmm_(rows.mT, rows)
            self.R.baddbmm_(lacking.mT, rows)
            start = stop
        self.rows += start

    def weight(self, damping: float) -> Tensor:
        """V [groups, c / groups, n]."""
        steps = [
            r @ damped_inverse(a, damping) for a, r in zip(self.A / self.rows, self.R / self.rows)
        ]
        return self.W + torch.stack(steps)

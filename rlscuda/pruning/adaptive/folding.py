r"""Channels that put out a constant, folded into the bias of the layer that takes them.

A channel whose norm has the weight 0 and a bias puts out relu(bias), say, whatever comes in. In a
linear layer, or a convolution without padding, :math:`b \leftarrow b + \sum w_j c_j` makes up for
it exactly. With padding a constant is none at the border; there the least-squares fit of the
remaining weights does what can be done, and norms after it follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.optim.layers import Layer
from rlscuda.pruning.matrices.calibration import observing, pruning_layers
from rlscuda.pruning.running.calls import ExampleInputs, call, inference
from rlscuda.reference import patch_rows

_SPREAD = 1e-6  # of a constant, relative to the larger of itself and one
_IMAGES = 16  # of each batch, that are looked at


@torch.no_grad()
def fold_constants(
    model: nn.Module, lost: Mapping[str, Tensor], inputs: Iterable[ExampleInputs]
) -> dict[str, Tensor]:
    """Weights and biases after the constants among some columns have been folded.

    Args:
        model: The model; it runs in eval mode.
        lost: im2col columns that layers are to lose, int64, by layer name.
        inputs: What it is called with, which shows what is constant.

    Returns:
        New values by parameter name: a weight of 0 in the columns that were constant, and the bias
        that makes up for them. Of layers without padding, groups, and with a bias of their own.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    names = [name for name in lost if _exact(modules[name])]
    layers = [layer for layer in pruning_layers(model, None) if layer.name in names]
    layers = [layer for layer in layers if layer.bias]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(layer: Layer, x: Tensor) -> None:
        images = layer.images(x.detach())[:_IMAGES]
        rows = patch_rows(images, *layer.geometry)[0][:, lost[layer.name].to(x.device)]
        least, most = rows.amin(0), rows.amax(0)
        if layer.name in seen:
            before = seen[layer.name]
            least, most = torch.minimum(least, before[0]), torch.maximum(most, before[1])
        seen[layer.name] = (least, most)

    with inference(model), observing(layers, see):
        for example in inputs:
            call(model, example)
    values: dict[str, Tensor] = {}
    for name, (least, most) in seen.items():
        middle = (least + most) / 2
        constant = most - least <= _SPREAD * middle.abs().clamp(min=1)
        columns = lost[name].to(middle.device)[constant]
        if not len(columns):
            continue
        module = modules[name]
        weight, bias = module.weight.double().flatten(1).clone(), module.bias.double()
        bias = bias + weight[:, columns] @ middle[constant]
        weight[:, columns] = 0
        values[f"{name}.weight"] = weight.view(module.weight.shape).to(module.weight)
        values[f"{name}.bias"] = bias.to(module.bias)
    return values


def _exact(module: Any) -> bool:
    """Whether a constant input adds a constant to each output of a layer with a bias."""
    if own_parameters(module).get("bias") is None or getattr(module, "groups", 1) > 1:
        return False
    padding = getattr(module, "padding", 0)
    return padding == "valid" or (not isinstance(padding, str) and not any(_as_tuple(padding)))


def _as_tuple(padding: Any) -> tuple[int, ...]:
    return padding if isinstance(padding, tuple) else (padding,)

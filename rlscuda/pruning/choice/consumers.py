"""The layers that take a coupling's channels, as the algebra sees them, and their way back.

A grouped convolution is as many consumers as it has groups: each has a matrix of its own and takes
its own part of the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.closed_form import formulas as algebra
from rlscuda.closed_form.formulas import Consumer
from rlscuda.pruning.structure.trace import Coupling

Matrices = Mapping[str, Tensor]  # layer name -> float64 [groups, n, n], the bias' column last


def layer_weight(module: nn.Linear | nn.Conv2d, P: Tensor) -> Tensor:
    """The weight as [groups, c / groups, n] float64, with the bias' column where `P` has it."""
    weight = module.weight.detach().double().flatten(1)
    if P.shape[-1] > weight.shape[1]:
        assert module.bias is not None
        weight = torch.cat([weight, module.bias.detach().double()[:, None]], 1)
    return weight.unflatten(0, (P.shape[0], -1)).to(P.device)


def output_energy(module: Any, P: Tensor) -> list[float]:
    """What losing all its inputs would cost a layer: the variance of its outputs, once a group."""
    inputs = torch.arange(module.weight[0].numel(), device=P.device)
    parts = [algebra.output_energy(p, w, inputs) for p, w in zip(P, layer_weight(module, P))]
    return [sum(parts)] * len(parts)


def consumers_of(
    coupling: Coupling,
    modules: Mapping[str, Any],
    matrices: Matrices,
    energy: Callable[[str], list[float]],
) -> list[Consumer]:
    """The consumers of one coupling whose matrix is known, each in units of its output's energy.

    Args:
        coupling: The coupling.
        modules: The model's modules by name.
        matrices: Inverse autocorrelation matrices by layer.
        energy: Name of a layer -> its `output_energy`.
    """
    found = []
    for member in coupling.members:
        if member.kind == "in" and member.name in matrices:
            module, P = modules[member.name], matrices[member.name]
            blocks = member.columns(module).to(P.device)
            for p, w, scale in zip(P, layer_weight(module, P), energy(member.name)):
                found.append(Consumer(p, w, blocks, 1 / scale if scale > 0 else 0.0))
    return found


def feeds_one_layer(coupling: Coupling, modules: Mapping[str, Any]) -> bool:
    """Whether one layer, ungrouped, takes the channels, and nothing but them."""
    consumers = [member for member in coupling.members if member.kind == "in"]
    if len(consumers) != 1:
        return False
    module = modules[consumers[0].name]
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or getattr(module, "groups", 1) > 1:
        return False
    return consumers[0].indices.numel() == module.weight.shape[1]

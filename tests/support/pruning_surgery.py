"""What the tests of surgery share: training, removing every other unit, comparing all there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery import transaction
from rlscuda.pruning.surgery.plan import Surgery, plan
from support.pruning_models import inputs


def training(model: nn.Module, optimizer, steps: int = 2, seed: int = 1) -> list[float]:
    """Steps on random data; the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(inputs(dtype, seed=seed + step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def every_other(structure: Structure) -> dict[str, list[int]]:
    """Every other unit of every coupling, the last never."""
    return {c.name: list(range(0, c.units - 1, 2)) for c in structure.couplings}


def operate(model, optimizers, surgery, values, x) -> list:
    """Carries out a surgery; what takes it back."""
    done: list = []
    transaction.operate(model, optimizers, surgery, values, x, done)
    return done


def prune(model: nn.Module, optimizers: Any = (), x: Tensor | None = None, **options) -> Surgery:
    """Removes every other unit of a model."""
    x = inputs(next(model.parameters()).dtype) if x is None else x
    structure = trace(model, x, **options)
    surgery = plan(structure, every_other(structure))
    every = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
    operate(structure.model, every, surgery, {}, x)
    return surgery


def gathered(tensor: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The elements of a tensor at flat places."""
    return tensor.detach().flatten()[index].view(shape)


def everything(model: nn.Module, optimizer) -> dict[str, Any]:
    """All that a surgery may change: values (copied) and identities."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple)):
                found[f"{name}.{key}"] = value
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} is"] = id(tensor)
        found[f"{name} data"] = tensor.detach().clone()
        found[f"{name} grad is"] = id(tensor.grad)
        found[f"{name} grad"] = None if tensor.grad is None else tensor.grad.clone()
    for i, group in enumerate(optimizer.param_groups):
        found[f"group {i}"] = {k: v for k, v in group.items() if k != "params"}
        found[f"group {i} params"] = (id(group["params"]), [id(p) for p in group["params"]])
    for i, (parameter, entries) in enumerate(optimizer.state.items()):
        found[f"state {i} of"] = id(parameter)
        for key, value in entries.items():
            found[f"state {i} {key} is"] = id(value) if isinstance(value, Tensor) else value
            found[f"state {i} {key}"] = value.clone() if isinstance(value, Tensor) else value
    registry = getattr(optimizer, "_registry", None)
    for key in ("layers", "stages", "covered"):
        for i, (parameter, value) in enumerate(getattr(registry, key, {}).items()):
            found[f"{key} {i}"] = (id(parameter), id(value))
            if key == "layers":
                found[f"layer {i}"] = [
                    id(value.weight), id(value.bias_parameter), value.columns, value.geometry
                ]  # fmt: skip
            if key == "stages":
                found[f"stage {i}"] = [id(value.summary), value.calls, id(value.factors)]
    if hasattr(optimizer, "_fallback"):
        inner = optimizer._fallback
        found["fallback"] = (id(inner._inner), inner._trained, inner._fusable)
    return found


def changed(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    """What is not the same, to the bit."""
    return {
        key
        for key in first.keys() | second.keys()
        if key not in first
        or key not in second
        or not (
            torch.equal(first[key], second[key])
            if isinstance(first[key], Tensor) and isinstance(second[key], Tensor)
            else first[key] == second[key]
        )
    }

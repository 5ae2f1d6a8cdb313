"""Half of an architecture's channels taken away: by couplings, and by torch-pruning."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning.running.calls import ExampleInputs, call, map_tensors, output_tensors
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.structure.units import follow
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy

RATIO = 0.5
PROJECTIONS = ("qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj",
               "q_lin", "k_lin", "v_lin", "q_attention", "c_attn")  # fmt: skip


def parameters(model: nn.Module) -> int:
    """How many a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def ours(model: nn.Module, example: ExampleInputs) -> dict[str, Any]:
    """Traces, removes half of the units of every coupling, and runs what is left."""
    shapes = _shapes(model.eval(), example)
    trains = _trains(model, example)
    began = time.perf_counter()
    structure = trace(model, example)
    seconds = time.perf_counter() - began
    halves = {c.name: range(int(RATIO * c.units)) for c in structure.couplings if c.units > 1}
    surgery = plan(structure, halves)
    pruned = pruned_copy(model, surgery, {})
    if _shapes(pruned.eval(), example) != shapes:
        raise ValueError("the pruned model puts out other shapes")
    if trains and not _trains(pruned, example):
        raise ValueError("the pruned model fails in training mode")
    return {
        "left": parameters(pruned) / parameters(model), "parameters": parameters(model),
        "couplings": len(structure.couplings), "refused": structure.refused,
        "single": sum(c.units == 1 for c in structure.couplings), "seconds": seconds,
        "trains": trains,
    }  # fmt: skip


def theirs(model: nn.Module, example: ExampleInputs) -> dict[str, Any]:
    """The same by torch-pruning: heads of attention are given, layers of the outputs ignored."""
    import torch_pruning

    shapes, before = _shapes(model.eval(), example), parameters(model)
    trains = _trains(model, example)
    heads = _heads(model)
    began = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model.eval(), example, torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO, num_heads=dict(heads), ignored_layers=_last(model, example),
        forward_fn=call, output_transform=lambda y: sum(
            t.float().sum() for t in output_tensors(y) if t.grad_fn is not None),
    )  # fmt: skip
    pruner.step()
    seconds = time.perf_counter() - began
    for module in model.modules():  # as its examples do for timm
        qkv = getattr(module, "qkv", None)
        if qkv in heads and isinstance(qkv, nn.Linear) and hasattr(module, "head_dim"):
            module.num_heads = pruner.num_heads[qkv]
            module.head_dim = qkv.out_features // (3 * module.num_heads)
            module.attn_dim = qkv.out_features // 3
    if _shapes(model.eval(), example) != shapes:
        raise ValueError("its model puts out other shapes")
    if trains and not _trains(model, example):
        raise ValueError("its model fails in training mode")
    return {"left": parameters(model) / before, "seconds": seconds}


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Projection of attention -> its heads."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        count = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        count = getattr(module, "n_heads", count)
        if not isinstance(count, int):
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[module] = count
        for name, child in module.named_children():
            if name in PROJECTIONS:
                found[child] = count
    return found


def _last(model: nn.Module, example: ExampleInputs) -> list[nn.Module]:
    """The layers whose channels the model puts out."""
    followed = follow(model, example)
    out = {followed.labels.find(label) for label in followed.put_out}
    names = {
        side[0]
        for side, labels, _ in followed.sides
        if side[1] == "out" and out.intersection(followed.labels.roots(labels))
    }
    return [module for name, module in model.named_modules() if name in names]


@torch.no_grad()
def _shapes(model: nn.Module, example: ExampleInputs) -> list[tuple[int, ...]]:
    return [tuple(output.shape) for output in output_tensors(call(model, example))]


@torch.no_grad()
def _trains(model: nn.Module, example: ExampleInputs) -> bool:
    """Whether a model runs in training mode; it is left in eval mode."""

    def again(tensor: Tensor) -> Tensor:  # norms want several values a channel
        return torch.cat([tensor] * 2)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        call(model.train(), map_tensors(again, example))
        return True
    except Exception:
        return False
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        model.eval()

"""Training by `RLSOptimizer`: every form and option on small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, WIDE, images, loss_of, make
from recording import scenario, write, write_training
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from rlscuda import RLSOptimizer

FORMS = ("adaptive", "paper", "natural", "spectral")
STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.6, "weight_decay": 0.02},
    "forgetting": {"forgetting": 0.95, "gain": 0.05},
    "shrinkage": {"forgetting": 0.95, "shrinkage": 0.1, "initial_scale": 0.5},
    "drift": {"drift": 0.1, "beta2": 0.9, "eps": 1e-3},
    "mean": {"summary": "mean"},
    "sketch": {"summary": "sketch", "rank": 3, "seed": 5},
    "sample": {"summary": "sample", "rank": 5, "seed": 6},
    "untrusted": {"trust_ratio": float("inf"), "lr": 0.01},
    "trusted": {"trust_ratio": 0.01},
    "sgd": {"fallback": "sgd", "fallback_lr": 0.02},
    "of_one's_own": {"fallback": lambda groups: torch.optim.RMSprop(groups, momentum=0.5)},
    "tensor": {"lr": torch.tensor(0.05)},
    "double": {"dtype": torch.float64},
    "chosen": {"include": ["*"], "exclude": ["3"]},
}


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS, seed: int = 0,
          after_step: Callable[[], object] = lambda: None) -> list[float]:  # fmt: skip
    """The losses of some steps."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, seed + step)
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.item())
    return losses


def _kinds() -> Iterator[tuple[str, nn.Module, str]]:
    """A name, a new network and a form each."""
    for form in FORMS:
        for name in (*NETWORKS, *WIDE):
            yield f"{name}_{form}", make(name), form
        yield f"double_{form}", make("cnn", torch.float64), form
        yield f"half_{form}", make("mlp", torch.bfloat16), form


@scenario()
def training_forms() -> None:
    for name, model, form in _kinds():
        optimizer = RLSOptimizer(model, form=form)
        schedule = CosineAnnealingLR(optimizer, 2 * STEPS)
        losses = train(model, optimizer, after_step=schedule.step)
        write_training(f"{name}.pt", model, optimizer, losses=losses, rate=schedule.state_dict())
        write(f"{name}.txt", f"{optimizer.coverage()}\n{optimizer.health()}")


@scenario("training_forms")
def training_resumed(begun: Path) -> None:
    for name, model, form in _kinds():
        saved = torch.load(begun / f"{name}.pt", weights_only=True)
        optimizer = RLSOptimizer(model, form=form)
        schedule = CosineAnnealingLR(optimizer, 2 * STEPS)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["rate"])
        losses = train(model, optimizer, seed=STEPS, after_step=schedule.step)
        write_training(f"{name}.pt", model, optimizer, losses=losses)


@scenario()
def training_options() -> None:
    for option, values in OPTIONS.items():
        for form in ("paper", "natural") if option == "trusted" else FORMS:  # the others refuse it
            model = make("cnn")
            optimizer = RLSOptimizer(model, form=form, **values)
            losses = train(model, optimizer, 3)
            write_training(f"{option}_{form}.pt", model, optimizer, losses=losses)
            write(f"{option}_{form}.txt", optimizer.coverage())


@scenario()
def training_groups() -> None:
    """Groups of their own rates, some added later, a frozen bias, a schedule and a restart."""
    for form in FORMS:
        model = make("cnn")
        matrices = [p for p in model[:5].parameters() if p.dim() > 1]
        vectors = [p for p in model[:5].parameters() if p.dim() == 1]
        model[10].bias.requires_grad_(False)
        groups = [{"params": matrices, "lr": 0.02, "momentum": 0.3},
                  {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
        optimizer = RLSOptimizer(groups, 0.05, model=model, form=form)
        losses = train(model, optimizer, 2)
        optimizer.add_param_group({"params": model[5].parameters(), "fallback_lr": 0.01})
        optimizer.add_param_group({"params": model[7:].parameters(), "form": "natural"})
        schedule = OneCycleLR(optimizer, 0.1, total_steps=STEPS, cycle_momentum=False)
        losses += train(model, optimizer, 3, after_step=schedule.step)
        optimizer.restart(memory=10)
        losses += train(model, optimizer, 2)
        write_training(f"{form}.pt", model, optimizer, losses=losses)
        write(f"{form}.txt", f"{optimizer.coverage()}\n{optimizer.health()}")


def _closed(model: nn.Module, optimizer: Optimizer, seed: int) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        return loss

    return closure


@scenario()
def training_ways() -> None:
    """Closures, accumulated gradients, eval mode, copies, and a gradient that is not finite."""
    for form in FORMS:
        model = make("cnn")
        optimizer = RLSOptimizer(model, form=form)
        losses = [optimizer.step(_closed(model, optimizer, seed)).item() for seed in range(3)]
        model.eval()
        for step in range(2):  # of two batches
            (loss_of(model, 3 + step) + loss_of(model, 4)).backward()
            loss_of(model, 5).backward()
            optimizer.step()
            loss_of(model, 6).backward()  # of no step
            model.zero_grad()
        twin, copied = copy.deepcopy((model, optimizer))
        losses += train(model, optimizer, 2) + train(twin, copied, 1)
        optimizer.zero_grad()
        (loss_of(model, 5) * float("nan")).backward()
        optimizer.step()
        losses += train(model, optimizer, 1)
        write_training(f"{form}.pt", model, optimizer, losses=losses, twin=twin.state_dict())
        write(f"{form}.txt", optimizer.health())


@scenario()
def training_warned() -> None:
    """What the optimizer warns of: warnings.json has the texts."""
    model = make("mlp")
    optimizer = RLSOptimizer(model, form="paper", lr=0.5, trust_ratio=float("inf"))
    for step in range(6):  # of one row, then of a forward that is not the layer's own
        optimizer.zero_grad()
        row, layer = images(step, 1), model[1]
        y = model(row) if step < 3 else F.linear(row.flatten(1), layer.weight, layer.bias)
        y.square().mean().backward()
        optimizer.step()
    write_training("unseen.pt", model, optimizer)
    for parameter in model.parameters():
        parameter.grad = None
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == m] for m in (1, 0))
    RLSOptimizer([{"params": matrices}, {"params": vectors, "lr": 0.3}], model=model)
    RLSOptimizer(nn.LayerNorm(4))

"""Pruning by the library: every source of matrices, target and structure, and training on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, images, loss_of, make
from recording import scenario, write, write_training
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from training import FORMS, train

from rlscuda import RLSOptimizer
from rlscuda.pruning import (
    PruneSchedule,
    PruningRecord,
    RLSPruner,
    Round,
    SketchTracker,
    calibrate,
    disagreement,
    load_optimizer,
    load_pruned,
    measure,
    own_matrices,
    prune_weights,
    ratio_after,
    save_pruned,
    transfer_state,
)

LOADER = [images(seed) for seed in (30, 31)]


def trained(name: str, steps: int = 4, **options: Any) -> tuple[nn.Module, RLSOptimizer]:
    model = make(name)
    optimizer = RLSOptimizer(model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def prune(
    name: str, model: nn.Module, optimizer: Any, named: bool = False, **options: Any
) -> RLSPruner:
    """One step and what it says; then training goes on, and is written down."""
    example = images(count=2, dtype=next(model.parameters()).dtype)
    pruner = RLSPruner(model, optimizer, {"input": example} if named else example, **options)
    report = pruner.step()
    write(f"{name}.json", [report.to_dict(), pruner.state_dict()])
    write(f"{name}.txt", str(report).split("\n\n")[0])  # the gains are in the other file
    if not report.kept_inputs:
        losses = train(model, optimizer, 2, seed=20)
        write_training(f"{name}.pt", model, optimizer, losses=losses)
    return pruner


@scenario()
def pruning_own() -> None:
    for name in NETWORKS:
        prune(name, *trained(name), ratio=0.5)
    prune("wide", *trained("wide"), ratio=0.4)
    for form in FORMS[1:]:
        prune(form, *trained("cnn", form=form), ratio=0.4, loader=LOADER)
    prune("forgetting", *trained("mlp", form="paper", forgetting=0.9), ratio=0.4, damping=0.01)
    model = make("depthwise", torch.float64)
    optimizer = RLSOptimizer(model)
    train(model, optimizer)
    prune("double", model, optimizer, ratio=0.4)


@scenario()
def pruning_sketch() -> None:
    for name in NETWORKS:
        model = make(name)
        optimizer, tracker = Adam(model.parameters()), SketchTracker(model, 5, 0.9, seed=3)
        train(model, optimizer)
        pruner = prune(name, model, optimizer, ratio=0.5, tracker=tracker, loader=LOADER)
        pruner.step(ratio=0.7)
        train(model, optimizer, 2, seed=40)
        other = SketchTracker(model, 5, 0.9, seed=3)
        other.load_state_dict(tracker.state_dict())
        write(f"{name}_tracker.pt", [tracker.state_dict(), other.matrices()])


@scenario()
def pruning_calibration() -> None:
    for name in NETWORKS:
        model = make(name)
        optimizer = SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        train(model, optimizer)
        prune(name, model, optimizer, ratio=0.5, loader=LOADER)
        write(f"{name}_matrices.pt", calibrate(model, LOADER))


@scenario()
def pruning_choices() -> None:
    """Targets, scopes, importances and what else decides who goes."""
    choices: dict[str, dict[str, Any]] = {
        "by_name": {"ratio": {"0": 0.5, "5*": 0.25}},
        "params": {"target_params": 0.6},
        "flops": {"target_flops": 0.5, "scope": "global"},
        "global": {"ratio": 0.4, "scope": "global", "round_to": 2},
        "one_shot": {"ratio": 0.4, "selection": "one-shot"},
        "uncompensated": {"ratio": 0.4, "compensate": False, "adapt_norms": False},
        "ignored": {"ratio": 0.4, "ignored": ["5.*", "10"], "round_to": 4},
        "few": {"ratio": 0.4, "loader": [LOADER[0][:8]]},  # of which it warns
        "named": {"ratio": 0.4, "named": True, "loader": [{"input": x, "y": 1} for x in LOADER]},
        "pairs": {"ratio": 0.4, "source": "calibration", "loader": [(x, 1) for x in LOADER]},
        "inputs": {"ratio": 0.4, "include_inputs": True},
        "loss": {"max_loss": 0.2, "evaluate": lambda model: loss_of(model, 50).item()},
        **{importance: {"ratio": 0.4, "importance": importance, "compensate": importance != "l1"}
           for importance in ("l1", "l2", "taylor", "bn_scale", "random")},
    }  # fmt: skip
    for name, options in choices.items():
        prune(name, *trained("cnn", 3), **{"loader": LOADER, **options})


@scenario()
def pruning_weights() -> None:
    three, two = ({"pattern": (n, 4), "layers": ["5.conv", "10"]} for n in (3, 2))
    cases: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("cnn", {"sparsity": 0.5}, three),
        ("cnn", two, {"sparsity": 0.8}),
        ("mlp", {"sparsity": 0.7}, {"sparsity": 0.8}),
    )
    for number, (network, options, again) in enumerate(cases):
        model, optimizer = trained(network, 3)
        report = prune_weights(model, calibrate(model, LOADER), optimizer=optimizer, **options)
        write(f"{number}.txt", report)
        write(f"{number}.json", [[row.name, row.cost, row.loss] for row in report])
        losses = train(model, optimizer, 2)
        masks = [row.mask for row in report]
        write_training(f"{number}.pt", model, optimizer, losses=losses, masks=masks)
        more = prune_weights(model, calibrate(model, LOADER), permanent=True, **again)
        write(f"{number}_more.pt", [model.state_dict(), [row.mask for row in more]])


@scenario()
def pruning_matrices() -> None:
    for form in FORMS:
        model, optimizer = trained("cnn", form=form)
        own, exact = own_matrices(optimizer, damping=0.1), calibrate(model, LOADER, damping=0.01)
        write(f"{form}.pt", [own, exact])
        write(f"{form}.json", disagreement(own, exact))
    curves = ("one_shot", "linear", "iterative", "cubic", "one_cycle")
    write("curves.json", [[ratio_after(c, 0.7, k, 4) for k in range(5)] for c in curves])


@scenario()
def pruning_measured() -> None:
    recurrent = nn.LSTM(4, 6, 2, batch_first=True)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model, shape in ((recurrent, (2, 3, 4)), (encoder, (2, 5, 8))):
        cost = measure(model, torch.randn(shape), batch_size=4, repeats=1)
        write(f"{type(model).__name__}.json", asdict(cost))


@scenario()
def pruning_between() -> None:
    """A pruning between the backward and the step."""
    for name in ("mlp", "wide"):
        for form in FORMS:
            model, optimizer = trained(name, 3, form=form)
            optimizer.zero_grad()
            loss_of(model, 9).backward()
            RLSPruner(model, optimizer, images(count=2), ratio=0.3).step()
            optimizer.step()
            losses = train(model, optimizer, 2)
            write_training(f"{name}_{form}.pt", model, optimizer, losses=losses)


@scenario()
def pruning_schedule() -> None:
    """Rounds that recover, a round that is rolled back, and a snapshot before all of them."""
    for name, tracked in (("cnn", False), ("attention", True)):
        model = make(name)
        tracker = SketchTracker(model) if tracked else None
        optimizer = RLSOptimizer(model)
        train(model, optimizer)
        pruner = RLSPruner(model, optimizer, images(count=2), ratio=0.5, loader=LOADER,
                           tracker=tracker)  # fmt: skip
        snapshot = pruner.snapshot()
        changes: list[Round] = []
        schedule = PruneSchedule(pruner, 0.6, 3, "linear", warmup=2, tolerance=0.1, budget=2,
                                 on_change=changes.append)  # fmt: skip
        outcomes = []
        for epoch, loss in enumerate((2.0, 1.0, 1.5, 1.0995, 2.0, 3.0, 1.0)):
            train(model, optimizer, 2, seed=10 * epoch)
            outcomes.append(schedule.after_epoch(loss))
            write_training(f"{name}{epoch}.pt", model, optimizer)
        write(f"{name}.json", [outcomes, [change.to_dict() for change in changes],
                               schedule.state_dict(), pruner.state_dict()])  # fmt: skip
        snapshot.restore()
        losses = train(model, optimizer, 2)
        write_training(f"{name}_restored.pt", model, optimizer, losses=losses)


def _optimizers(model: nn.Module) -> dict[str, Optimizer]:
    return {"rls": RLSOptimizer(model), "adam": Adam(model.parameters(), 3e-3)}


@scenario()
def pruning_saved() -> None:
    for name in NETWORKS:
        for kind in ("rls", "adam"):
            model = make(name)
            optimizer = _optimizers(model)[kind]
            train(model, optimizer)
            prune(f"{name}_{kind}", model, optimizer, ratio=0.5, loader=LOADER,
                  source="calibration")  # fmt: skip
            save_pruned(model, f"{name}_{kind}.safetensors", optimizer=optimizer)


@scenario("pruning_saved")
def pruning_loaded(begun: Path) -> None:
    for path in sorted(begun.glob("*.safetensors")):
        name, kind = path.stem.split("_")
        model = load_pruned(lambda name=name: make(name), path)
        optimizer = _optimizers(model)[kind]
        load_optimizer(optimizer, path)
        losses = train(model, optimizer, 2, seed=60)
        write_training(f"{path.stem}.pt", model, optimizer, losses=losses)
        save_pruned(model, path.name, optimizer=optimizer)


@scenario()
def pruning_transfer() -> None:
    """torch-pruning itself has pruned the model."""
    import torch_pruning as tp

    for kind in ("rls", "adam"):
        model = make("cnn")
        optimizer = _optimizers(model)[kind]
        train(model, optimizer)
        record = PruningRecord(model, images(count=2))
        pruner = tp.pruner.BasePruner(
            model, images(count=2), tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
            ignored_layers=[model[12]],
        )  # fmt: skip
        pruner.step()
        transfer_state(optimizer, record.replaced(pruner.pruning_history()))
        losses = train(model, optimizer, 2)
        write_training(f"{kind}.pt", model, optimizer, losses=losses)

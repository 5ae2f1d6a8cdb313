"""Checkpoint files, one per optimizer, and what they must hold before any of it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.files.documents import check, short
from rlscuda.optim.fallback import ENTRIES
from rlscuda.optimizer import RLSOptimizer

FORMAT = "rlscuda-checkpoint"
VERSION = 1
_ENTRIES = {"sgd": ENTRIES["sgd"], "adam": ENTRIES["adamw"]}


class Checkpoint(TypedDict):
    """What a file holds."""

    format: str
    version: int
    run: str
    optimizer_name: str
    training: dict[str, Any]


class Row(TypedDict):
    """What one epoch gave: the columns of `metrics.csv`."""

    optimizer: str
    epoch: int
    steps: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float
    lr: float


class PrunedRow(Row, total=False):
    """What it gave where the network is pruned meanwhile, more columns."""

    parameters: int
    flops: float
    pruning: str
    changed_val_loss: float
    changed_val_accuracy: float


class SavedStreams(TypedDict):
    """Of `capture_rng`."""

    torch: Tensor
    device: Tensor | None
    numpy: tuple[str, Tensor, int, int, float]
    python: tuple[int, tuple[int, ...], float | None]


class SavedOptimizer(TypedDict):
    """Of any optimizer's `state_dict`."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class SavedTraining(TypedDict):
    """Of `Trainer.state_dict`."""

    model: dict[str, Tensor]
    optimizer: SavedOptimizer
    scheduler: dict[str, Any]
    rng: SavedStreams
    shuffler: Tensor
    order: Tensor | None
    epoch: int
    step: int
    loss_sum: Tensor
    epoch_seconds: float
    history: list[PrunedRow]
    pruning: dict[str, Any] | None


COLUMNS = tuple(Row.__annotations__)
PRUNING_COLUMNS = tuple(PrunedRow.__annotations__)[len(COLUMNS) :]


def save_checkpoint(path: Path, run: str, optimizer_name: str, training: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: The file to replace.
        run: Fingerprint of the run, see `RunConfig.fingerprint`.
        optimizer_name: `rls`, `sgd` or `adam`.
        training: Of `Trainer.state_dict`.
    """
    document = Checkpoint(
        format=FORMAT, version=VERSION, run=run, optimizer_name=optimizer_name, training=training
    )
    write_atomically(path, lambda stream: save_archive(document, stream))


def load_checkpoint(path: Path, run: str, optimizer_name: str) -> dict[str, Any]:
    """Reads a checkpoint and checks that it belongs to this run.

    Returns:
        The `training` part, its tensors on the CPU.

    Raises:
        UserError: The file is truncated or damaged, is no checkpoint of this program, or belongs to
            another run or optimizer. Nothing is written.
    """
    kept = "; nothing was overwritten"
    try:
        with open(path, "rb") as stream:
            document = load_archive(stream)
    except Exception as error:  # damaged bytes lead to errors of any type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or was not "
            f"written by rlscuda ({reason[0][:120]}){kept}; put back a copy of "
            f"it, or delete it and summary.json: train --resume trains {optimizer_name} again"
        ) from None
    with reading(f"{path} is not an rlscuda checkpoint", kept):
        check(document, Checkpoint, "the checkpoint")
    if document["format"] != FORMAT:
        raise UserError(f"{path} is not an rlscuda checkpoint{kept}")
    if document["version"] != VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {document['version']}, expected "
            f"{VERSION}{kept}"
        )
    if document["optimizer_name"] != optimizer_name:
        raise UserError(
            f"{path} holds a run of the optimizer {document['optimizer_name']}, expected "
            f"{optimizer_name}{kept}"
        )
    if document["run"] != run:
        raise UserError(
            f"{path} belongs to another run (fingerprint {document['run'][:12]}, this run's "
            f"config.json and data give {run[:12]}){kept}"
        )
    return document["training"]


def check_training(
    state: Any,
    name: str,
    epochs: int,
    steps: int,
    images: int,
    scheduler: LRScheduler,
    prunes: bool,
) -> None:
    """Checks the types of a saved training, and its position against the run's.

    Args:
        state: Of a file.
        name: Of the run's optimizer.
        epochs: Of the run.
        steps: Of an epoch.
        images: That are trained on.
        scheduler: Of the run, new.
        prunes: Whether the network is pruned meanwhile.

    Raises:
        ValueError: The first thing that does not fit.
    """
    check(state, SavedTraining, "the training")
    epoch, step, order, history = (state[key] for key in ("epoch", "step", "order", "history"))
    _require(0 <= epoch <= epochs, f"epoch must lie in [0, {epochs}]", epoch)
    _require(0 <= step < max(1, steps), f"step must lie in [0, {steps - 1}]", step)
    _require(len(history) == epoch, f"the history must have {epoch} rows", len(history))
    for number, row in enumerate(history, 1):
        place = (name, number, number * steps)
        found = (row["optimizer"], row["epoch"], row["steps"])
        _require(found == place, f"row {number} of the history must be that of {place}", found)
        _require(0 <= row["seconds"] < math.inf, "seconds must be a duration", row["seconds"])
        _require(0 <= row["val_accuracy"] <= 1, "an accuracy must lie in [0, 1]",
                 row["val_accuracy"])  # fmt: skip
        _require(not prunes or {"parameters", "flops", "pruning"} <= row.keys(),
                 "a row must have parameters, flops and pruning", ", ".join(row))  # fmt: skip
    _require((order is None) == (step == 0), "only an epoch in progress has an order", short(order))
    if order is not None:
        whole = torch.arange(images)
        fits = order.dtype == torch.int64 and order.shape == (images,)
        _require(fits and torch.equal(order.sort().values, whole),
                 f"order must be a permutation of {images} images", short(order))  # fmt: skip
    _require(state["loss_sum"].shape == () and state["loss_sum"].dtype == torch.float64,
             "loss_sum must be one float64", short(state["loss_sum"]))  # fmt: skip
    position = state["rng"]["numpy"][2]
    _require(0 <= position <= 624, "NumPy's position must lie in [0, 624]", position)
    _require((state["pruning"] is not None) == prunes,
             "the pruning must be there as in config.json", short(state["pruning"]))  # fmt: skip
    check_like(state["scheduler"], scheduler.state_dict(), "the scheduler")
    _require(state["scheduler"]["base_lrs"] == scheduler.base_lrs,
             f"the scheduler must start from {scheduler.base_lrs}",
             state["scheduler"]["base_lrs"])  # fmt: skip
    done = epoch * steps + step
    _require(state["scheduler"]["last_epoch"] == done, f"the scheduler must be at step {done}",
             state["scheduler"]["last_epoch"])  # fmt: skip


def check_network(state: Any, model: nn.Module, optimizer: Optimizer, name: str) -> None:
    """Checks the weights and the optimizer's state against those of the run's network.

    `RLSOptimizer` checks its own entries when it loads them.

    Args:
        state: Passed by `check_training`.
        model: A network of the saved shape.
        optimizer: New, of that network.
        name: Of the optimizer.

    Raises:
        ValueError: The first thing that does not fit.
    """
    check_like(state["model"], model.state_dict(), "the network")
    _check_groups(state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
    if isinstance(optimizer, RLSOptimizer):
        return
    parameters = list(model.parameters())
    for key, entries in state["optimizer"]["state"].items():
        _require(0 <= key < len(parameters), f"there are {len(parameters)} parameters", key)
        names = _ENTRIES[name]
        _require(entries.keys() == names, f"each must have {sorted(names)}", sorted(entries))
        for entry, value in entries.items():
            if entry == "momentum_buffer" and value is None:
                continue
            own = torch.zeros(()) if entry == "step" else parameters[key]
            check_like(value, own, f"{entry} of parameter {key}")


def _check_groups(groups: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Checks an optimizer's options, of which a schedule may have lowered the step size."""
    _require(len(groups) == len(own), f"the optimizer must have {len(own)} groups", len(groups))
    for saved, group in zip(groups, own):
        _require(saved.keys() == group.keys(), f"a group must have {sorted(group)}", sorted(saved))
        for name, value in group.items():
            if name in ("lr", "peak_lr"):  # what a schedule changes
                rate, start = saved[name], group["initial_lr"]
                _require(type(rate) is float and 0 <= rate <= start,
                         f"{name} must lie in [0, {start}]", short(rate))  # fmt: skip
            else:
                same = type(saved[name]) is type(value) and saved[name] == value
                _require(same, f"{name} must be {value}, as in config.json", short(saved[name]))


def check_like(value: Any, own: Any, where: str) -> None:
    """Checks that a value has the keys, lengths, shapes and types of one's own.

    Raises:
        ValueError: It has not.
    """
    if isinstance(own, Tensor):
        check(value, Tensor, where)
        same = value.shape == own.shape and value.dtype == own.dtype
        _require(same, f"{where} must be {list(own.shape)} {own.dtype}", short(value))
        return
    _require(type(value) is type(own), f"{where} must be a {type(own).__name__}", short(value))
    if isinstance(own, dict):
        _require(value.keys() == own.keys(), f"{where} must have {', '.join(map(str, own))}",
                 ", ".join(map(str, value)))  # fmt: skip
        for key, entry in own.items():
            check_like(value[key], entry, f"{where}: {key}")
    elif isinstance(own, (list, tuple)):
        _require(len(value) == len(own), f"{where} must have {len(own)} entries", len(value))
        for place, entry in enumerate(own):
            check_like(value[place], entry, f"{where}[{place}]")


def _require(ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{expected}, got {got}")

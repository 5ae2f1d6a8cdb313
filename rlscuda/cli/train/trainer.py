"""The training loop of one optimizer, resumable to the bit from any step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.rng import capture_rng, restore_rng, seed_everything
from rlscuda.cli.data.dataset import Dataset, Split
from rlscuda.cli.train import processes
from rlscuda.cli.train.checkpoint import check_network, check_training, save_checkpoint
from rlscuda.cli.train.models import build_model
from rlscuda.cli.train.optimizers import build_optimizer, build_scheduler
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.pruning.adaptation import Adaptation
from rlscuda.cli.train.pruning.base import Pruning
from rlscuda.cli.train.pruning.gating import Gating
from rlscuda.cli.train.pruning.rounds import Rounds
from rlscuda.cli.train.pruning.specs import AdaptiveSpec, GateSpec, ScheduleSpec
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.files.manifest import Described, rebuild

EVALUATION_BATCH = 500
OnStep = Callable[["Trainer", Tensor], None]


class Trainer:
    """Model, optimizer, schedule, data order and position of one optimizer's training.

    Two trainers with the same config start from the same weights and see the same images in the
    same order, whatever their optimizer. Several processes take each step together.

    Args:
        config: The run.
        name: `rls`, `sgd` or `adam`.
        data: The data set, on the device to train on.
        checkpoint: The checkpoint file, written after each epoch; None for none.
        run: Fingerprint of the run, kept in the checkpoint.
        checkpoint_every: Steps after which the checkpoint is written too; 0 for never.
    """

    def __init__(
        self,
        config: RunConfig,
        name: str,
        data: Dataset,
        checkpoint: Path | None,
        run: str,
        checkpoint_every: int = 0,
    ):
        self.config, self.name, self.data = config, name, data
        self.device = device = data.train.images.device
        self.checkpoint, self.run, self.checkpoint_every = checkpoint, run, checkpoint_every
        self.steps_per_epoch = len(data.train) // config.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"--batch-size must be at most the {len(data.train)} training images, got "
                f"{config.batch_size}"
            )
        seed_everything(config.seed)
        self.model = self.whole_model()
        processes.check_network(self.model, config.model)
        self._averaged: nn.Module | None = None
        seed_everything(config.seed)
        self.shuffler = torch.Generator().manual_seed(config.seed)
        self.optimizer = self.new_optimizer(self.model)
        self.scheduler = build_scheduler(config, self.optimizer, self.total_steps)
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch in progress
        self.order: Tensor | None = None  # [N] int64, rows of the epoch in progress
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.epoch_seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.pruning: Pruning | None = None
        if name == "rls" and config.prune_schedule is not None:
            self.pruning = Rounds(self, ScheduleSpec.read(config.prune_schedule))
        if name == "rls" and config.prune_adaptive is not None:
            self.pruning = Adaptation(self, AdaptiveSpec.read(config.prune_adaptive))
        if name == "rls" and config.gates is not None:
            self.pruning = Gating(self, GateSpec.read(config.gates))

    def whole_model(self) -> nn.Module:
        """The network as it is before any training or pruning, on the device."""
        config, data = self.config, self.data
        return build_model(config.model, data.shape, data.classes).to(self.device)

    def new_optimizer(self, model: nn.Module) -> Optimizer:
        """An optimizer as that of the start, for a network."""
        return build_optimizer(self.config, self.name, model)

    def rebuild(self, network: Described) -> None:
        """Replaces the network by a described one, and the optimizer by a new one for it.

        The schedule of the step size goes on; no random stream moves.
        """
        streams = capture_rng(self.device)
        self.model = rebuild(self.whole_model, network)
        self.optimizer = self.new_optimizer(self.model)
        position = self.scheduler.state_dict()
        self.scheduler = build_scheduler(self.config, self.optimizer, self.total_steps)
        self.scheduler.load_state_dict(position)
        restore_rng(streams, self.device)

    @property
    def settings(self) -> dict[str, float]:
        """Step size and weight decay that the optimizer was built with, before any schedule."""
        return {option: self.optimizer.defaults[option] for option in ("lr", "weight_decay")}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the loss is not finite any more."""
        return self.epoch >= self.config.epochs or self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's mean training loss is NaN or infinite."""
        return bool(self.history) and not math.isfinite(self.history[-1]["train_loss"])

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def epochs(self, on_step: OnStep | None = None) -> Iterator[dict[str, Any]]:
        """Trains from the present position to the end, one epoch an iteration.

        The checkpoint holds an epoch before the epoch is yielded.

        Args:
            on_step: Called after each step with the trainer and the loss, still on its device.

        Yields:
            The epoch's row, see `rlscuda.cli.train.checkpoint.COLUMNS`.
        """
        while not self.finished:
            self._finish_epoch(on_step)
            loss, accuracy = self.validate()
            before = self.history[-1]["seconds"] if self.history else 0.0
            row = {
                "optimizer": self.name,
                "epoch": self.epoch + 1,
                "steps": self.steps_done,
                "train_loss": float(self.loss_sum) / self.steps_per_epoch,
                "val_loss": loss,
                "val_accuracy": accuracy,
                "seconds": before + self.epoch_seconds,
                "lr": self.scheduler.get_last_lr()[0],
            }
            self.history.append(row)
            self.epoch, self.step, self.order = self.epoch + 1, 0, None
            if self.pruning is not None:
                self.pruning.after_epoch(row, self.validate)
            self.save()
            yield row

    def validate(self) -> tuple[float, float]:
        """Mean cross-entropy and accuracy of the network now, on the validation images."""
        return evaluate(self.model, self.data, self.data.val)

    def prolong(self, epochs: int, lr: float | None = None) -> None:
        """Goes on for more epochs, with a new schedule of the step size and without checkpoints.

        Args:
            epochs: How many more.
            lr: Step size that the schedule starts with; by default a share of the run's: .3 for
                RLS, whose moments start anew, a fifth for others.
        """
        self.checkpoint = self.pruning = None
        share = 0.2
        if isinstance(self.optimizer, RLSOptimizer):
            self.optimizer.restart()
            share = 0.3
        lr = share * self.settings["lr"] if lr is None else lr
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
        self.config = dataclasses.replace(self.config, epochs=self.epoch + epochs)
        self.scheduler = build_scheduler(self.config, self.optimizer, self.steps_per_epoch * epochs)

    def _finish_epoch(self, on_step: OnStep | None) -> None:
        """Takes the remaining steps of the epoch in progress, or all steps of a new one."""
        if self.order is None:
            self.order = torch.randperm(len(self.data.train), generator=self.shuffler)
            self.loss_sum.zero_()
            self.epoch_seconds = 0.0
        order = self.order.to(self.device)
        self.model.train()
        started = self._clock()
        size = self.config.batch_size
        for start in range(self.step * size, self.steps_per_epoch * size, size):
            loss = self._train_step(order[start : start + size])
            self.step += 1
            if on_step is not None:
                on_step(self, loss)
            due = self.checkpoint_every and self.steps_done % self.checkpoint_every == 0
            if due and self.step < self.steps_per_epoch:
                self.epoch_seconds += self._clock() - started
                self.save()
                started = self._clock()
        self.epoch_seconds += self._clock() - started

    def _train_step(self, rows: Tensor) -> Tensor:
        rows = processes.share(rows)
        images = self.data.normalise(self.data.train.images[rows])
        labels = self.data.train.labels[rows]

        def criterion() -> Tensor:
            return F.cross_entropy(self._called(images), labels)

        self.optimizer.zero_grad()
        loss = criterion()
        loss.backward()
        if self.pruning is not None:
            self.pruning.after_backward(criterion, loss.detach())
        self.optimizer.step()
        if self.pruning is not None:
            self.pruning.after_step()
        self.scheduler.step()
        loss = processes.mean(loss.detach())
        self.loss_sum += loss
        return loss

    @property
    def _called(self) -> nn.Module:
        """What a step calls: the network, or what averages its gradients over the processes."""
        if processes.size() == 1:
            return self.model
        if self._averaged is None:  # at the first step, to which all processes come
            self._averaged = processes.averaged(self.model)
        return self._averaged

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def save(self) -> None:
        """Replaces the checkpoint, if there is to be one, by the present state."""
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.run, self.name, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, and the history that led here."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": capture_rng(self.device),
            "shuffler": self.shuffler.get_state(),
            "order": self.order,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "epoch_seconds": self.epoch_seconds,
            "history": self.history,
            "pruning": None if self.pruning is None else self.pruning.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the position that `state_dict` described.

        Raises:
            UserError: The model or the optimizer is not the one that was saved.
        """
        with reading(
            f"{self.checkpoint} does not fit the model {self.config.model} as it is now",
            "; nothing was overwritten",
        ):
            check_training(
                state,
                self.name,
                self.config.epochs,
                self.steps_per_epoch,
                len(self.data.train),
                self.scheduler,
                self.pruning is not None,
            )
            if self.pruning is not None:
                self.pruning.load_state_dict(state["pruning"])
            check_network(state, self.model, self.optimizer, self.name)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.shuffler.set_state(state["shuffler"])
            restore_rng(state["rng"], self.device)
        self.order = state["order"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum.copy_(state["loss_sum"])
        self.epoch_seconds = state["epoch_seconds"]
        self.history = list(state["history"])


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (in [0, 1]) of a model in eval mode on a split."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in zip(
        split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True
    ):
        logits = model(data.normalise(images))
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    model.train(was_training)
    return float(loss) / len(split), int(correct) / len(split)

"""One training run of the learning benchmark, and the pace of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.data import Split
from benchmarks.common.harness import Race
from benchmarks.learning import sources
from benchmarks.learning.optimizers import ROWS, Scheduled
from benchmarks.learning.tasks import Task
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically

POINTS, READ = 10, 500  # points of a curve, and the validation examples read at each
ROUNDS, CHUNK = 10, 20  # of a race; steps in one sample, so that work of every tenth step counts
SETTLED = 100  # steps before it: those in which an optimizer that settles down does more

Job = dict[str, Any]  # task, optimizer, settings, seed, steps, phase


class Training:
    """A run that can be saved between two steps, and gone on with.

    Args:
        job: What is run.
        task: That the job names.
        split: To learn from.
    """

    def __init__(self, job: Job, task: Task, split: Split):
        self.task, self.split, self.seed = task, split, job["seed"]
        self.model = task.build(self.seed)
        self.optimizer = Scheduled(
            job["optimizer"], self.model, task, job["steps"], self.seed, **job["settings"]
        )
        self.finite = True
        self.seconds, self.least = 0.0, math.inf  # the thread's own time of all steps, of one
        self.curve: list[list[float]] = []
        self._batches = sources.batches(split, task.batch, self.seed, task.augment)

    def advance(self, step: int) -> None:
        """Train up to a step, or until the loss is not finite.

        A step's time runs from `zero_grad` to its end, without the making of the minibatch.
        """
        while self.finite and self.optimizer.step_number < step:
            x, y = next(self._batches)
            start = time.thread_time()
            loss = _step(self.task, self.model, self.optimizer, x, y)
            taken = time.thread_time() - start
            self.seconds, self.least = self.seconds + taken, min(self.least, taken)
            self.finite = math.isfinite(loss.item())

    def state(self) -> dict[str, Any]:
        """All that `load` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizer.optimizers],
            "step": self.optimizer.step_number,
            "times": [self.seconds, self.least],
            "curve": self.curve,
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up the state of a run of the same job."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.optimizer.resume(state["step"])
        self.seconds, self.least = state["times"]
        self.curve = state["curve"]
        for _ in range(state["step"]):
            next(self._batches)
        torch.set_rng_state(state["random"])


def train(
    job: Job, task: Task, data_dir: Path, points: int = POINTS, checkpoint: Path | None = None
) -> Job:
    """The record of a job: the metrics at its end, its curve, and the time that its steps took.

    `seconds` is the thread's own time in all steps, `ms` its mean and `ms_min` the least of one.
    `curve` has a step and the validation metric of some examples at each point. Tuning has no
    curve and reads no test data. A run whose loss is not finite ends as diverged.

    Args:
        job: What is run.
        task: That the job names.
        data_dir: The folder of the images.
        points: Into which the run is divided.
        checkpoint: Where the run is kept at each point, to be gone on with; gone at its end.
    """
    splits, steps, tuning = task.source(data_dir), job["steps"], job["phase"] == "tune"
    run = Training(job, task, splits["train"])
    if checkpoint and checkpoint.is_file():
        with open(checkpoint, "rb") as stream:
            run.load(load_archive(stream))
    for point in [] if tuning else [steps * k // points for k in range(1, points)]:
        if point > run.optimizer.step_number:
            run.advance(point)
            value = task.measure(run.model, splits["validation"], READ)
            run.curve.append([run.optimizer.step_number, _round(value)])
            if checkpoint:
                write_atomically(checkpoint, partial(save_archive, run.state()))
    run.advance(steps)
    record = job | {"validation": None, "test": None, "curve": run.curve if run.finite else []}
    if run.finite:
        for name in ("validation",) if tuning else ("validation", "test"):
            record[name] = _round(task.measure(run.model, splits[name]))
            run.finite &= math.isfinite(record[name])
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    ms = {"ms": 1000 * run.seconds / run.optimizer.step_number, "ms_min": 1000 * run.least}
    times = {name: _round(value) for name, value in ({"seconds": run.seconds} | ms).items()}
    return record | {"diverged": not run.finite} | times


def pace(task: Task, row: str, data_dir: Path) -> dict[str, float]:
    """Time of a training step: `ms`, and `ratio` to that with fused AdamW, taken in turns."""
    split = task.source(data_dir)["train"]
    lanes = {name: _lane(task, name, split) for name in {row: 0, "adamw": 0}}
    for _ in range(SETTLED // CHUNK):
        for run in lanes.values():
            run()
    race = Race(lanes, clock=time.thread_time_ns)
    for _ in range(ROUNDS):
        race.round()
    ratio = race.ratio(row, "adamw")
    ms = 1000 * race.seconds(row)["median"] / CHUNK
    parts = {"ms": ms, "ratio": ratio["median"], "ratio_of_best": ratio["best"]}
    return {name: _round(value) for name, value in parts.items()}


def _lane(task: Task, row: str, split: Split) -> Callable[[], None]:
    model = task.build(0)
    rates = ROWS[row].rates
    settings = ROWS[row].settings | ({"lr": min(rates)} if rates else {})
    optimizer = Scheduled(row, model, task, 10**6, 0, **settings)
    batches = sources.batches(split, task.batch, 0, task.augment)
    drawn = [next(batches) for _ in range(CHUNK)]

    def run() -> None:
        for x, y in drawn:
            _step(task, model, optimizer, x, y)

    return run


def _step(task: Task, model: nn.Module, optimizer: Scheduled, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = task.loss(model, x, y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _round(value: float) -> float:
    return float(f"{value:.5g}")

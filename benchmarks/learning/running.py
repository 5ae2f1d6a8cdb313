"""One training run of the learning benchmark."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.learning import sources
from benchmarks.learning.optimizers import Scheduled
from benchmarks.learning.tasks import TASKS

POINTS, READ = 10, 500  # points of a curve, and the validation examples read at each

Job = dict[str, Any]  # task, optimizer, settings, seed, steps, phase


def train(job: Job, data_dir: Path) -> Job:
    """The record of a job: the metrics at its end, its curve, and the time that its steps took.

    A step's time is the thread's own from `zero_grad` to the step's end, without the making of
    the minibatch and without any evaluation. `curve` has a step, the seconds of all steps so far
    and the validation metric of some examples at each point; tuning goes without one. A run
    whose loss is not finite ends as diverged, without metrics.
    """
    task = TASKS[job["task"]]
    splits = task.source(data_dir)
    model = task.build(job["seed"])
    steps, settings = job["steps"], job["settings"]
    optimizer = Scheduled(job["optimizer"], model, task, steps, job["seed"], **settings)
    batches = sources.batches(splits["train"], task.batch, job["seed"], task.augment)
    points = {steps * k // POINTS for k in range(1, POINTS)} if job["phase"] != "tune" else set()
    times: list[float] = []
    curve: list[tuple[int, float, float]] = []
    record = job | {"diverged": False, "validation": None, "test": None}
    for step in range(1, steps + 1):
        x, y = next(batches)
        start = time.thread_time()
        model.zero_grad()
        loss = task.loss(model, x, y)
        loss.backward()
        optimizer.step()
        times.append(time.thread_time() - start)
        if not math.isfinite(loss.item()):
            record["diverged"] = True
            break
        if step in points:
            curve.append((step, sum(times), task.measure(model, splits["validation"], READ)))
    if not record["diverged"]:
        read = ("validation",) if job["phase"] == "tune" else ("validation", "test")
        record |= {name: task.measure(model, splits[name]) for name in read}
        record["diverged"] = not math.isfinite(record["validation"])
    return record | {
        "curve": curve,
        "seconds": sum(times),
        "ms": 1000 * statistics.median(times),
        "ms_min": 1000 * min(times),
    }

"""Quality of RLS and its peers on ten small tasks: equal steps, equal time, flatness.

Every peer's rate is chosen on validation data with one seed at the full budget, over the same
number of rates, and over up to two more where the best lies at an edge; `SEEDS` then train at the
chosen rate and are read on test data. `rls` is `RLSOptimizer(model)`, one setting for every task.

    python -m benchmarks.learning.quality --workers 2  # run, or go on after an interruption
    python -m benchmarks.learning.quality --one gpt rls --lr 0.1 --seed 0 --set rank=8  # one run
"""

from __future__ import annotations

import argparse
import ast
import json
import math

import torch

from benchmarks.common import grid
from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.running import Job, train
from benchmarks.learning.tasks import TASKS

SEEDS, TUNE_SEED, EXTENSIONS = (0, 1, 2), 100, 2


def score(record: Job) -> float:
    """Validation metric, the higher the better; the worst of all for a run that diverged."""
    if record["diverged"]:
        return -math.inf
    higher = TASKS[record["task"]].objective.higher_is_better
    return record["validation"] if higher else -record["validation"]


def beyond(rates: list[float], best: float) -> float | None:
    """The rate next to the best where that is the lowest or the highest of `rates`."""
    ordered = sorted(rates)
    if best == ordered[0]:
        return _neighbour(best, 1 / 3)
    return _neighbour(best, 3) if best == ordered[-1] else None


def _neighbour(rate: float, factor: float) -> float:
    """The next rate of the series ..., .01, .03, .1, .3, ..."""
    near = rate * factor
    power = 10.0 ** math.floor(math.log10(near) + 1e-6)
    return float(f"{min((1, 3, 10), key=lambda x: abs(math.log(near / power / x))) * power:.1g}")


def chosen(task: str, row: str, args: argparse.Namespace) -> Job:
    """The settings of a row on a task: the best rate in validation."""
    rates = list(ROWS[row].rates)
    if not rates:
        return {}
    records = {lr: _record(task, row, "tune", TUNE_SEED, {"lr": lr}, args) for lr in rates}
    for _ in range(EXTENSIONS):
        best = max(records, key=lambda lr: score(records[lr]))
        lr = beyond(list(records), best)
        if lr is None:
            break
        records[lr] = _record(task, row, "tune", TUNE_SEED, {"lr": lr}, args)
    return max(records.values(), key=score)["settings"]


def _record(
    task: str,
    row: str,
    phase: str,
    seed: int,
    settings: Job,
    args: argparse.Namespace,
    steps: int | None = None,
) -> Job:
    steps = steps or TASKS[task].steps
    job = {"task": task, "optimizer": row, "phase": phase, "seed": seed, "steps": steps}
    return grid.finish(job | {"settings": settings}, args, _train)


def _train(job: Job, args: argparse.Namespace) -> Job:
    return train(job, args.data_dir)


def equal_steps(pair: tuple[str, str], args: argparse.Namespace) -> str:
    """Tune a row on a task, then run its best setting with every seed."""
    task, row = pair
    settings = chosen(task, row, args)
    tests = [_record(task, row, "steps", seed, settings, args)["test"] for seed in SEEDS]
    return f"{task} {row} {settings} {tests}"


def one(args: argparse.Namespace) -> Job:
    """The record of the run that `--one` asks for."""
    task, row = args.one
    settings = dict(pair.split("=", 1) for pair in args.set)
    settings = {name: _value(text) for name, text in settings.items()}
    if args.lr is not None:
        settings["lr"] = args.lr
    steps = args.steps or TASKS[task].steps
    job = {"task": task, "optimizer": row, "phase": "steps", "seed": args.seed, "steps": steps}
    return train(job | {"settings": settings}, args.data_dir)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    parser = grid.parser(__doc__, "quality")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--optimizers", nargs="+", choices=ROWS, default=list(ROWS))
    add("--one", nargs=2, metavar=("TASK", "OPTIMIZER"), help="run this alone and print its record")
    add("--lr", type=float, help="of --one")
    add("--seed", type=int, default=0, help="of --one")
    add("--steps", type=int, help="of --one; by default all of the task's")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of --one")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(one(args)))
        return
    pairs = [(task, row) for task in args.tasks for row in args.optimizers]
    grid.run(equal_steps, pairs, args, {"seeds": SEEDS, "tune_seed": TUNE_SEED})


if __name__ == "__main__":
    main()

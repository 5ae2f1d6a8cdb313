"""Quality of RLS and its peers on ten small tasks: equal steps, equal time, flatness.

Every peer's rate is chosen on validation data with one seed at the full budget, over the same
number of rates, and over up to two more where the best lies at an edge; there a decay four times
the usual is tried too. `SEEDS` then train with what was best and are read on test data. `rls` is
`RLSOptimizer(model)`, one setting for every task. At equal time a peer does as many steps as fit
into the time of `rls`, by the measured pace of both.

    python -m benchmarks.learning.quality --workers 2  # run, or go on after an interruption
    python -m benchmarks.learning.quality --report     # tables and plot of the results
    python -m benchmarks.learning.quality --one gpt rls --lr 0.1 --seed 0 --set rank=8  # one run
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from importlib.metadata import version

import torch

from benchmarks.common import grid
from benchmarks.learning import report
from benchmarks.learning.optimizers import ROWS, Scheduled
from benchmarks.learning.running import Job, pace, train
from benchmarks.learning.tasks import TASKS, Task

SEEDS, TUNE_SEED, EXTENSIONS = (0, 1, 2), 100, 2


def score(task: Task, record: Job) -> float:
    """Validation metric, the higher the better; the worst of all for a run that diverged."""
    return -math.inf if record["diverged"] else task.objective.sign * record["validation"]


def neighbour(rates: list[float], best: float) -> float | None:
    """The rate next to the best in the series .01, .03, .1, ... where the best is at an edge."""
    if min(rates) < best < max(rates):
        return None
    place = round(2 * math.log10(best)) + (1 if best == max(rates) else -1)
    return float(f"{10 ** (place / 2):.0e}")


class Runs:
    """The runs of one row on one task, made or read from the journal."""

    def __init__(self, task: str, row: str, args: argparse.Namespace):
        self.task, self.row, self.args = TASKS[task], ROWS[row], args
        self.base = {"task": task, "optimizer": row}

    def run(self, phase: str, seed: int, settings: Job, steps: int | None = None) -> Job:
        """The record of one run."""
        job = {"phase": phase, "seed": seed, "steps": steps or self.task.steps}
        job = self.base | job | {"settings": self.row.settings | settings}
        return grid.finish(job, self.args, self._train)

    def tuned(self) -> Job:
        """The rate that is best in validation, and the decay if another is better, as settings."""
        records: dict[float, Job] = {}
        rates, extensions = list(self.row.rates), EXTENSIONS
        while rates:
            records |= {lr: self.run("tune", TUNE_SEED, {"lr": lr}) for lr in rates}
            best = max(records, key=lambda lr: score(self.task, records[lr]))
            beyond = neighbour(list(records), best) if extensions else None
            rates, extensions = [] if beyond is None else [beyond], extensions - 1
        if not records:
            return {}
        choices = [{"lr": best}, *({"lr": best, "weight_decay": d} for d in self.row.decays)]
        return max(choices, key=lambda c: score(self.task, self.run("tune", TUNE_SEED, c)))

    def ratio(self) -> float:
        """The time of a step over that of fused AdamW."""
        job = self.base | {"phase": "pace", "settings": self.row.settings}
        return grid.finish(job, self.args, self._pace)["ratio"]

    def _train(self, job: Job, args: argparse.Namespace) -> Job:
        return train(job, self.task, args.data_dir)

    def _pace(self, job: Job, args: argparse.Namespace) -> Job:
        return job | pace(self.task, job["optimizer"], args.data_dir)


def equal_steps(runs: Runs) -> list[Job]:
    """The row at its best rate, with every seed."""
    settings = runs.tuned()
    return [runs.run("steps", seed, settings) for seed in SEEDS]


def equal_time(runs: Runs) -> list[Job]:
    """The same in as many steps as take the time of the `rls` run."""
    if runs.row.is_default:
        return []
    ours = Runs(runs.task.name, "rls", runs.args).ratio()
    steps, settings = round(runs.task.steps * ours / runs.ratio()), runs.tuned()
    return [runs.run("time", seed, settings, steps) for seed in SEEDS]


def flatness(runs: Runs) -> list[Job]:
    """The default at three times its rate, and at a third."""
    if runs.base["optimizer"] != "rls":
        return []
    [(_, rate), *_] = Scheduled("rls", runs.task.build(0), runs.task, 1, 0).peaks
    pairs = [(factor, seed) for factor in (1 / 3, 3) for seed in SEEDS]
    return [runs.run("flat", seed, {"lr": rate * factor}) for factor, seed in pairs]


def paces(runs: Runs) -> list[Job]:
    """Only measures the row's pace."""
    runs.ratio()
    return []


PHASES = {"steps": equal_steps, "pace": paces, "time": equal_time, "flat": flatness}


def work(job: tuple[str, str, str], args: argparse.Namespace) -> str:
    """Do one phase of one row on one task."""
    phase, task, row = job
    records = PHASES[phase](Runs(task, row, args))
    tests = [record["test"] for record in records]
    return f"{phase} {task} {row} {records[0]['settings'] if records else ''} {tests}"


def one(args: argparse.Namespace) -> Job:
    """The record of the run that `--one` asks for."""
    name, row = args.one
    task = TASKS[name]
    settings = ROWS[row].settings | {k: _value(v) for k, v in (p.split("=", 1) for p in args.set)}
    settings |= {} if args.lr is None else {"lr": args.lr}
    job = {"task": name, "optimizer": row, "phase": "steps", "seed": args.seed}
    job |= {"steps": args.steps or task.steps, "settings": settings}
    return train(job, task, args.data_dir)


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
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    add("--forget", nargs="+", choices=ROWS, default=[], help="drop these rows' runs at first")
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
    grid.forget(args.journal, lambda record: record["optimizer"] in args.forget)
    versions = {name: version(name) for name in ("pytorch_optimizer", "scikit-learn")}
    for phase in () if args.report else args.phases:
        jobs = [(phase, task, row) for task in args.tasks for row in args.optimizers]
        grid.run(work, jobs, args, {"seeds": SEEDS, "tune_seed": TUNE_SEED}, versions)
    print(report.report(args.results))
    report.plot(args.results, args.plot)


if __name__ == "__main__":
    main()

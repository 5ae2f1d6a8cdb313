"""Two long runs: ResNet-20 on all of CIFAR-10 for 30 epochs, and the GPT for 5,000 steps.

The untouched default against SGD (for the ResNet by its known recipe), AdamW, Muon and SOAP, each
at a few rates, of which the best in validation is read on test data. A run is kept on disk at
each of its points, so that an interruption loses no more than a thirtieth of it.

    python -m benchmarks.learning.long_runs --workers 2  # run, or go on after an interruption
    python -m benchmarks.learning.long_runs --report     # the table of the results
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import grid
from benchmarks.learning import sources, tasks
from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.report import markdown
from benchmarks.learning.running import Job, train
from rlscuda import zoo

POINTS = 30
WHOLE = (45_000, 5_000, 10_000)  # training, validation and test images of CIFAR-10
RESNET20 = tasks.Task(
    "resnet20",
    "ResNet-20",
    tasks.ACCURACY,
    30 * (WHOLE[0] // 128),
    128,
    tasks.image_network(zoo.resnet20, "cifar10"),
    partial(sources.images, "cifar10", WHOLE),
    ("conv.weight", "fc.weight"),
    augment=True,
)
TASKS = {"resnet20": RESNET20, "gpt": replace(tasks.TASKS["gpt"], steps=5000)}
RATES: dict[str, dict[str, tuple[float | None, ...]]] = {
    "resnet20": {
        "rls": (None,),
        "sgd": (0.1, 0.3),
        "adamw": (1e-3, 3e-3),
        "muon": (3e-3, 0.01),
        "soap": (3e-3, 0.01),
    },
    "gpt": {
        "rls": (None,),
        "sgd": (0.1, 0.3),
        "adamw": (1e-3, 3e-3),
        "muon": (0.01, 0.03),
        "soap": (3e-3, 0.01),
    },
}


def work(run: tuple[str, str, float | None], args: argparse.Namespace) -> str:
    """Train once, from where an earlier try was kept."""
    name, row, rate = run
    settings = {} if rate is None else {"lr": rate}
    job = {"phase": "long", "task": name, "optimizer": row, "seed": 0, "settings": settings}
    job["steps"] = args.steps or TASKS[name].steps
    checkpoint = args.journal.parent / f"{name}-{row}-{rate}-{job['steps']}.pt"
    record = grid.finish(
        job, args, lambda job, args: train(job, TASKS[name], args.data_dir, POINTS, checkpoint)
    )
    return f"{name} {row} {rate} {record['validation']}"


def report(results: Path) -> str:
    """One line a row and task: its best rate in validation, and what it gives."""
    best: dict[tuple[str, str], Job] = {}
    for record in json.loads(results.read_text(encoding="utf-8"))["runs"]:
        key, sign = (record["task"], record["optimizer"]), TASKS[record["task"]].objective.sign
        known = [r for r in (record, best.get(key)) if r and not r["diverged"]]
        if known:
            best[key] = max(known, key=lambda r: sign * r["validation"])
    lines = [["task", "optimizer", "rate", "test", "seconds of training"]]
    for name, rates in RATES.items():
        for row in (row for row in rates if (name, row) in best):
            record, metric = best[name, row], TASKS[name].objective.metric
            rate = record["settings"].get("lr", "default")
            figures = [f"{record['test']:.4g}", f"{record['seconds']:.0f}"]
            lines.append([f"{TASKS[name].title}, {metric}", ROWS[row].title, str(rate), *figures])
    return markdown(lines)


def main() -> None:
    parser = grid.parser(__doc__, "long_runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=RATES["gpt"], default=list(RATES["gpt"]))
    parser.add_argument("--steps", type=int, help="of each run; by default all of the task's")
    args = parser.parse_args()
    if not args.report:
        runs = [(t, row, lr) for t in args.tasks for row in args.optimizers for lr in RATES[t][row]]
        grid.run(work, runs, args, {"points": POINTS})
    print(report(args.results))


if __name__ == "__main__":
    main()

"""Two long runs: ResNet-20 on all of CIFAR-10 for 30 epochs, and the GPT for 5,000 steps.

The untouched default against SGD, AdamW, Muon and SOAP. On the GPT each has two rates, of which
the better in validation is read on test data. On the ResNet, whose products are in bfloat16, each
has one setting: SGD's known recipe, and for the others a third of the rate that suits ResNet-8 in a
twenty-seventh of the steps. A run is kept on disk at each of its points, so that an interruption
loses no more than a thirtieth of it.

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
    bfloat16=True,
)
TASKS = {"resnet20": RESNET20, "gpt": replace(tasks.TASKS["gpt"], steps=5000)}
SETTINGS: dict[str, dict[str, tuple[dict[str, float], ...]]] = {
    "resnet20": {
        "rls": ({},),
        "sgd": ({"lr": 0.1},),
        "adamw": ({"lr": 3e-3, "weight_decay": 0.2},),
        "muon": ({"lr": 0.01},),  # the decay of .2 that suits ResNet-8 ended at 63 %
        "soap": ({"lr": 0.01},),
    },
    "gpt": {
        "rls": ({},),
        "sgd": ({"lr": 0.1}, {"lr": 0.3}),
        "adamw": ({"lr": 1e-3}, {"lr": 3e-3}),
        "muon": ({"lr": 0.01}, {"lr": 0.03}),
        "soap": ({"lr": 3e-3}, {"lr": 0.01}),
    },
}


def work(run: tuple[str, str, dict[str, float]], args: argparse.Namespace) -> str:
    """Train once, from where an earlier try was kept."""
    name, row, settings = run
    job = {"phase": "long", "task": name, "optimizer": row, "seed": 0, "settings": settings}
    job["steps"] = args.steps or TASKS[name].steps
    values = "".join(f"-{value}" for value in settings.values())
    checkpoint = args.journal.parent / f"{name}-{row}{values}-{job['steps']}.pt"
    record = grid.finish(
        job, args, lambda job, args: train(job, TASKS[name], args.data_dir, POINTS, checkpoint)
    )
    return f"{name} {row} {settings} {record['validation']}"


def report(results: Path) -> str:
    """One line a row and task: its best rate in validation, and what it gives."""
    best: dict[tuple[str, str], Job] = {}
    for record in json.loads(results.read_text(encoding="utf-8"))["runs"]:
        key, sign = (record["task"], record["optimizer"]), TASKS[record["task"]].objective.sign
        if record["settings"] not in SETTINGS[key[0]][key[1]]:
            continue
        known = [r for r in (record, best.get(key)) if r and not r["diverged"]]
        if known:
            best[key] = max(known, key=lambda r: sign * r["validation"])
    lines = [["task", "optimizer", "settings", "test", "seconds of training"]]
    for name, rows in SETTINGS.items():
        for row in (row for row in rows if (name, row) in best):
            record, metric = best[name, row], TASKS[name].objective.metric
            pairs = record["settings"].items()
            settings = ", ".join(f"{key} {value:g}" for key, value in pairs) or "untouched"
            figures = [f"{record['test']:.4g}", f"{record['seconds']:.0f}"]
            lines.append([f"{TASKS[name].title}, {metric}", ROWS[row].title, settings, *figures])
    return markdown(lines)


def main() -> None:
    parser = grid.parser(__doc__, "long_runs")
    add, rows = parser.add_argument, list(SETTINGS["gpt"])
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--optimizers", nargs="+", choices=rows, default=rows)
    add("--steps", type=int, help="of each run; by default all of the task's")
    args = parser.parse_args()
    if not args.report:
        pairs = [(task, row) for task in args.tasks for row in args.optimizers]
        runs = [(task, row, s) for task, row in pairs for s in SETTINGS[task][row]]
        grid.run(work, runs, args, {"points": POINTS})
    print(report(args.results))


if __name__ == "__main__":
    main()

"""Quality of RLS, SGD and Adam on five small tasks: accuracy by epoch, 3 seeds.

Every optimizer runs with cosine decay and gets the same number of settings on each task. A
setting is chosen on validation images (training images not trained on) after a schedule of
`TUNE_EPOCHS` epochs with one seed; the winner trains on the task's full schedule with
`SEEDS` and is read on test images. `rls_default` is `RLSOptimizer(model)`, one setting for
every task. The tuning schedule is shorter than the final one so that the whole grid takes about
an hour on two cores: it favours settings that learn fast, for all optimizers alike. The adaptive
form warms its step up by itself; 20 steps of warm-up changed SGD and Adam by less than a point
on the CIFAR CNN, so they go without.

    python -m benchmarks.learning.quality --workers 2  # run, or go on after an interruption
    python -m benchmarks.learning.quality --report     # tables and plot of the results
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import rlscuda
from benchmarks.common import data, grid
from benchmarks.common.training import Run, accuracy
from benchmarks.learning.tasks import TASKS

SEEDS, TUNE_SEED, TUNE_EPOCHS = (0, 1, 2), 100, 2

PAPER = {"form": "paper", "summary": "mean", "rank": 1, "gain": 0.1}
NATURAL = {"form": "natural", "summary": "sketch", "rank": 1, "gain": 0.01}
PLAIN = {"momentum": 0.9, "weight_decay": 0.0, "fallback": "adamw", "fallback_lr": 1e-3}

# optimizer -> (title, fixed arguments, the learning rates it is tuned over)
OPTIMIZERS = {
    "rls_default": ("RLS default", {}, ()),
    "rls_adaptive": ("RLS adaptive", {"form": "adaptive"}, (0.025, 0.05, 0.1, 0.2)),
    "rls_paper": ("RLS paper", PAPER | PLAIN, (0.025, 0.05, 0.1, 0.2)),
    "rls_natural": ("RLS natural", NATURAL | PLAIN, (0.025, 0.05, 0.1, 0.2)),
    "sgd": ("SGD+momentum", {"momentum": 0.9, "weight_decay": 5e-4}, (0.01, 0.03, 0.1, 0.3)),
    "adam": ("Adam", {}, (3e-4, 1e-3, 3e-3, 1e-2)),
}


def make_optimizer(job: dict, net: nn.Module) -> torch.optim.Optimizer:
    if job["optimizer"] == "sgd":
        return torch.optim.SGD(net.parameters(), **job["settings"])
    if job["optimizer"] == "adam":
        return torch.optim.Adam(net.parameters(), **job["settings"])
    return rlscuda.RLSOptimizer(net, seed=job["seed"], **job["settings"])


def train(job: dict, args: argparse.Namespace) -> dict:
    """Run one job and return its record; a run whose loss is not finite ends as diverged."""
    task = TASKS[job["task"]]
    splits = data.load(task.data, args.data_dir)
    fit, read = splits["train"], splits["validation" if job["phase"] == "tune" else "test"]
    torch.manual_seed(job["seed"])
    net = task.build()
    run = Run(net, make_optimizer(job, net), job["epochs"], len(fit.y), job["seed"])
    record = job | {"accuracy": [], "loss": [], "seconds": [], "diverged": False}
    while run.epoch < job["epochs"]:
        start = time.perf_counter()
        loss = run.train_epoch(fit)
        if not math.isfinite(loss):
            return record | {"diverged": True}
        record["seconds"].append(round(time.perf_counter() - start, 3))
        record["loss"].append(round(loss, 5))
        record["accuracy"].append(round(accuracy(net, read), 2))
    return record


def score(record: dict) -> float:
    return 0.0 if record["diverged"] else record["accuracy"][-1]


def run_pair(pair: tuple[str, str], args: argparse.Namespace) -> str:
    """Tune an optimizer on a task, then run its best setting with every seed."""
    task, name = pair
    _, fixed, rates = OPTIMIZERS[name]
    base = {"task": task, "optimizer": name}

    def record(phase: str, seed: int, epochs: int, settings: dict) -> dict:
        job = {"phase": phase, "seed": seed, "epochs": epochs, "settings": settings}
        return grid.finish(base | job, args, train)

    tuned = [record("tune", TUNE_SEED, TUNE_EPOCHS, fixed | {"lr": lr}) for lr in rates]
    best = max(tuned, key=score)["settings"] if tuned else fixed
    for seed in SEEDS:
        record("test", seed, TASKS[task].epochs, best)
    return f"{task} {name} {best}"


def final_runs(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Group the test runs by task and optimizer."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in runs:
        if record["phase"] == "test":
            groups.setdefault((record["task"], record["optimizer"]), []).append(record)
    return groups


def table(runs: list[dict], cell) -> str:
    """Markdown table of tasks by optimizers; `cell` turns a list of records into text."""
    groups = final_runs(runs)
    names = [n for n in OPTIMIZERS if any(key[1] == n for key in groups)]
    lines = ["| task (epochs) | " + " | ".join(OPTIMIZERS[n][0] for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for key, task in TASKS.items():
        if any(t == key for t, _ in groups):
            cells = [cell(groups[key, n]) if (key, n) in groups else "" for n in names]
            lines.append(f"| {task.title} ({task.epochs}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def last_accuracy(records: list[dict]) -> str:
    values = [score(r) for r in records]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def first_accuracy(records: list[dict]) -> str:
    return f"{statistics.mean((r['accuracy'] or [0.0])[0] for r in records):.1f}"


def chosen_rate(records: list[dict]) -> str:
    return f"{records[0]['settings'].get('lr', 'default')}"


def report(results: Path) -> str:
    """Return the markdown tables of a results file."""
    runs = json.loads(results.read_text())["runs"]
    parts = (
        ("Test accuracy %, mean ± standard deviation over the seeds:", last_accuracy),
        ("After the first epoch:", first_accuracy),
        ("Chosen learning rate:", chosen_rate),
    )
    return "\n\n".join(f"{title}\n\n{table(runs, cell)}" for title, cell in parts)


def plot(results: Path, path: Path) -> None:
    """Draw test accuracy by epoch, one panel a task, the band from worst to best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = final_runs(json.loads(results.read_text())["runs"])
    shown = [t for t in TASKS if any(key[0] == t for key in groups)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 4), squeeze=False)
    for axis, task in zip(axes[0], shown, strict=True):
        for color, name in enumerate(OPTIMIZERS):
            curves = [r["accuracy"] for r in groups.get((task, name), []) if not r["diverged"]]
            if curves:
                y, x = np.array(curves), np.arange(1, len(curves[0]) + 1)
                axis.plot(x, y.mean(0), "o-", ms=3, color=f"C{color}", label=OPTIMIZERS[name][0])
                axis.fill_between(x, y.min(0), y.max(0), color=f"C{color}", alpha=0.2)
        axis.set(title=TASKS[task].title, xlabel="epoch", ylabel="test accuracy %")
        axis.set_ylim(bottom=_floor(groups, task))
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _floor(groups: dict, task: str) -> float:
    """Lower edge of a panel: below the median first epoch, so that one bad curve hides none."""
    first = [
        r["accuracy"][0] for k, v in groups.items() if k[0] == task for r in v if r["accuracy"]
    ]
    return statistics.median(first) - 5


def main() -> None:
    parser = grid.parser(__doc__, "quality")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    args = parser.parse_args()
    if not args.report:
        heavy_first = [(task, name) for task in reversed(args.tasks) for name in args.optimizers]
        grid.run(run_pair, heavy_first, args, {"tune_epochs": TUNE_EPOCHS})
    print(report(args.results))
    plot(args.results, args.plot)


if __name__ == "__main__":
    main()

"""Quality of RLS, SGD and Adam on five small tasks: accuracy by epoch, 3 seeds.

Every optimizer runs with cosine decay and gets the same number of settings on each task. A
setting is chosen on validation images (training images not trained on) after a schedule of
``TUNE_EPOCHS`` epochs with one seed; the winner trains on the task's full schedule with
``SEEDS`` and is read on test images. ``rls_default`` is ``RLSOptimizer(model)``, one setting for
every task. The tuning schedule is shorter than the final one so that the whole grid takes about
an hour on two cores: it favours settings that learn fast, for all optimizers alike. The adaptive
form warms its step up by itself; 20 steps of warm-up changed SGD and Adam by less than a point
on the CIFAR CNN, so they go without.

    python -m benchmarks.learning.quality --workers 2  # run, or go on after an interruption
    python -m benchmarks.learning.quality --report     # tables and plot of the results

Each finished run is one line of the journal, so an interruption loses only the runs under way.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import rlscuda
from benchmarks.common import environment
from benchmarks.learning import tasks

ROOT = Path(__file__).resolve().parents[2]
BATCH, SEEDS, TUNE_SEED, TUNE_EPOCHS = 64, (0, 1, 2), 100, 2

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


@lru_cache(maxsize=1)
def load(data: str, folder: str) -> dict[str, tasks.Split]:
    return tasks.load(data, Path(folder))


def accuracy(net: nn.Module, split: tasks.Split) -> float:
    """Percentage of the split's images that ``net`` labels correctly."""
    net.eval()
    with torch.no_grad():
        pairs = zip(split.x.split(500), split.y.split(500), strict=True)
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in pairs)
    return 100 * right / len(split.y)


def train(job: dict, folder: str) -> dict:
    """Run one job and return its record; a run whose loss is not finite ends as diverged."""
    task = tasks.TASKS[job["task"]]
    data = load(task.data, folder)
    fit, read = data["train"], data["validation" if job["phase"] == "tune" else "test"]
    torch.manual_seed(job["seed"])
    net = task.build()
    optimizer = make_optimizer(job, net)
    steps = len(fit.y) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["epochs"] * steps)
    order = torch.Generator().manual_seed(job["seed"])
    record = job | {"accuracy": [], "loss": [], "seconds": [], "diverged": False}
    for _ in range(job["epochs"]):
        net.train()
        start, total = time.perf_counter(), 0.0
        for index in torch.randperm(len(fit.y), generator=order).split(BATCH)[:steps]:
            x = fit.x[index].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(x), fit.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            if not math.isfinite(total):
                return record | {"diverged": True}
        record["seconds"].append(round(time.perf_counter() - start, 3))
        record["loss"].append(round(total / steps, 5))
        record["accuracy"].append(round(accuracy(net, read), 2))
    return record


def score(record: dict) -> float:
    return 0.0 if record["diverged"] else record["accuracy"][-1]


def run_pair(task: str, name: str, args: argparse.Namespace) -> str:
    """Tune ``name`` on ``task``, then run its best setting with every seed."""
    torch.set_num_threads(1)
    _, fixed, rates = OPTIMIZERS[name]
    choices = [fixed | {"lr": lr} for lr in rates]
    base = {"task": task, "optimizer": name}
    tuned = [
        finish(
            base
            | {"phase": "tune", "seed": TUNE_SEED, "epochs": TUNE_EPOCHS, "settings": settings},
            args,
        )
        for settings in choices
    ]
    best = max(tuned, key=score)["settings"] if tuned else fixed
    for seed in SEEDS:
        epochs = tasks.TASKS[task].epochs
        finish(base | {"phase": "test", "seed": seed, "epochs": epochs, "settings": best}, args)
    return f"{task} {name} {best}"


def finish(job: dict, args: argparse.Namespace) -> dict:
    """Return the job's record from the journal, or run it and append it there."""
    for record in read_journal(args.journal)[1]:
        if all(record[key] == value for key, value in job.items()):
            return record
    record = train(job, str(args.data_dir))
    append(args.journal, record)
    return record


def append(journal: Path, record: dict) -> None:
    """Append one line in one write, so that two workers never mix theirs."""
    with open(journal, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def read_journal(journal: Path) -> tuple[list[dict], list[dict]]:
    """Return the environments and the runs of a journal."""
    lines = journal.read_text().splitlines() if journal.is_file() else []
    records = [json.loads(line) for line in lines if line]
    environments = [r["environment"] for r in records if "environment" in r]
    return environments, [r for r in records if "environment" not in r]


def repair(journal: Path) -> None:
    """Drop a last line that an interruption cut short."""
    if journal.is_file():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(journal, len(whole))


def conditions() -> dict:
    """The machine and the versions that the next runs use."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    hashed = {"threads_per_run": 1, "source_hash": environment.built_hash(), "started": started}
    return environment.machine() | environment.versions() | hashed


def run(args: argparse.Namespace) -> None:
    """Run what the journal lacks, heavy tasks first, and write the results file."""
    args.journal.parent.mkdir(parents=True, exist_ok=True)
    repair(args.journal)
    append(args.journal, {"environment": conditions() | {"workers": args.workers}})
    pairs = [(task, name) for task in reversed(args.tasks) for name in args.optimizers]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        for done in [pool.submit(run_pair, *pair, args) for pair in pairs]:
            print(done.result(), flush=True)
    environments, runs = read_journal(args.journal)
    constants = {"batch": BATCH, "tune_epochs": TUNE_EPOCHS, "train_images": tasks.TRAIN}
    constants |= {"validation_images": tasks.VALIDATION, "test_images": tasks.TEST}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    result = {"environments": environments, "constants": constants, "runs": runs}
    body = ",\n    ".join(json.dumps(r) for r in runs)
    head = json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2)
    args.results.write_text(head[:-2] + f',\n  "runs": [\n    {body}\n  ]\n}}\n')


def final_runs(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Group the test runs by task and optimizer."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in runs:
        if record["phase"] == "test":
            groups.setdefault((record["task"], record["optimizer"]), []).append(record)
    return groups


def table(runs: list[dict], cell) -> str:
    """Markdown table of tasks by optimizers; ``cell`` turns a list of records into text."""
    groups = final_runs(runs)
    names = [n for n in OPTIMIZERS if any(key[1] == n for key in groups)]
    lines = ["| task (epochs) | " + " | ".join(OPTIMIZERS[n][0] for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for key, task in tasks.TASKS.items():
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
    shown = [t for t in tasks.TASKS if any(key[0] == t for key in groups)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 4), squeeze=False)
    for axis, task in zip(axes[0], shown, strict=True):
        for color, name in enumerate(OPTIMIZERS):
            curves = [r["accuracy"] for r in groups.get((task, name), []) if not r["diverged"]]
            if curves:
                y, x = np.array(curves), np.arange(1, len(curves[0]) + 1)
                axis.plot(x, y.mean(0), "o-", ms=3, color=f"C{color}", label=OPTIMIZERS[name][0])
                axis.fill_between(x, y.min(0), y.max(0), color=f"C{color}", alpha=0.2)
        axis.set(title=tasks.TASKS[task].title, xlabel="epoch", ylabel="test accuracy %")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default=ROOT.parent / "shared" / "data")
    add("--journal", type=Path, default=ROOT / "runs" / "quality.jsonl")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    add("--plot", type=Path, default=ROOT / "benchmarks" / "results" / "quality.png")
    add("--workers", type=int, default=2, help="processes, one thread each")
    add("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--report", action="store_true", help="only print the tables and draw the plot")
    args = parser.parse_args()
    if not args.report:
        run(args)
    print(report(args.results))
    plot(args.results, args.plot)


if __name__ == "__main__":
    main()

"""Pruning compared: our pruner against torch-pruning's importances on the same networks.

Five networks are trained with three seeds each. Every method removes the same number of channels of
every layer, so FLOPs and parameters are equal, and nothing is trained afterwards; the statistics of
batch norm are re-estimated on training images for every method alike. Then what is left trains for
one epoch, with cosine decay, by a new `RLSOptimizer`; ours also by the one that was pruned along,
restarted, the others' also by Adam. Each of these takes the best of three learning rates by
validation images, on one seed at the middle ratio. For honesty the pruned architecture is also
trained from new weights, for as many epochs as the whole network was.

    python -m benchmarks.pruning.compare --workers 2  # run, or go on after an interruption
    python -m benchmarks.pruning.compare --report     # tables and plot of the results
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rlscuda
from benchmarks.common import data, environment, grid
from benchmarks.common.training import BATCH, Run, accuracy
from benchmarks.pruning import networks, plots
from benchmarks.pruning.methods import channels as methods
from benchmarks.pruning.methods.channels import METHODS
from benchmarks.pruning.networks import CASES
from rlscuda.pruning.running.measure import count_flops, count_parameters

CACHE = environment.ROOT / "runs" / "pruning"
SEEDS, TUNE_SEED, MIDDLE = (0, 1, 2), 0, 1
GRADIENTS: dict[tuple[str, int], dict] = {}  # of a worker, by case and seed
TUNED_ON = {"same": "sketch", "rls": "l2", "adam": "l2"}  # recovery -> the method that tunes it


def size(model: nn.Module, case: networks.Case) -> dict[str, Any]:
    """Parameters, FLOPs of one image and the output channels of every layer."""
    return {
        "parameters": count_parameters(model),
        "flops": count_flops(model, case.example),
        "widths": [c for m in model.modules() if (c := methods.channels(m))],
    }


def recover(subject: methods.Subject, kind: str, lr: float, seed: int) -> None:
    """Train what a method left for one epoch, with cosine decay from `lr`."""
    optimizer: torch.optim.Optimizer
    old, subject.optimizer = subject.optimizer, None  # else its hooks would go on observing
    if kind == "same":
        assert old is not None
        old.restart()
        optimizer = old
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
    elif kind == "rls":
        del old
        optimizer = rlscuda.RLSOptimizer(subject.model, lr=lr, form="adaptive", seed=seed)
    else:
        optimizer = torch.optim.Adam(subject.model.parameters(), lr=lr)
    count, plain = len(subject.split.y), torch.contiguous_format
    Run(subject.model, optimizer, 1, count, 1000 + seed, plain).train_epoch(subject.split)


def prepare(job: dict, args: argparse.Namespace) -> methods.Subject:
    """The trained network of a job; with its optimizer and tracker where the method reads them."""
    case = CASES[job["case"]]
    split = data.load(case.data, args.data_dir)["train"]
    gradients = GRADIENTS.setdefault((job["case"], job["seed"]), {})
    run, tracker = networks.tracked(job["case"], job["seed"], split, args.cache)
    if job["method"] in METHODS and METHODS[job["method"]].live:
        return methods.Subject(run.model, case.example, split, gradients, run.optimizer, tracker)
    model = case.build()  # a copy without their hooks
    model.load_state_dict(run.model.state_dict())
    return methods.Subject(model, case.example, split, gradients)


def measure(job: dict, args: argparse.Namespace) -> dict:
    """Run one job: prune, where it names a recovery train an epoch, and read."""
    case = CASES[job["case"]]
    splits = data.load(case.data, args.data_dir)
    torch.manual_seed(job["seed"])
    start = time.perf_counter()
    subject = prepare(job, args)
    if job["method"] == "scratch":
        methods.untrained(subject, job["ratio"])
        run = networks.begin(case, job["seed"], len(splits["train"].y), subject.model)
        while run.epoch < case.epochs:
            run.train_epoch(splits["train"])
    elif job["method"] != "whole":
        METHODS[job["method"]].prune(subject, job["ratio"])
        methods.reestimate(subject.model, splits["train"])
    if job["recovery"]:
        recover(subject, job["recovery"], job["lr"], job["seed"])
    parts = ("validation", "test") if tunes(job) else ("test",)
    read = {part: accuracy(subject.model, splits[part]) for part in parts}
    seconds = round(time.perf_counter() - start, 2)
    return job | {"accuracy": read} | size(subject.model, case) | {"seconds": seconds}


def tunes(job: dict) -> bool:
    """Whether a job is one of those that a learning rate is chosen by."""
    middle = CASES[job["case"]].ratios[MIDDLE]
    place = (job["seed"], job["ratio"], job["method"])
    return place == (TUNE_SEED, middle, TUNED_ON.get(job["recovery"]))


def candidates(case: str, recovery: str) -> list[dict]:
    """The jobs that the learning rate of a recovery is chosen by."""
    base = {"case": case, "seed": TUNE_SEED, "method": TUNED_ON[recovery]}
    base |= {"ratio": CASES[case].ratios[MIDDLE], "recovery": recovery}
    return [base | {"lr": lr} for lr in methods.RECOVERIES[recovery][1]]


def tuned_rate(case: str, recovery: str, args: argparse.Namespace) -> float:
    """The learning rate of a recovery that reads best on validation images."""
    records = [grid.finish(job, args, measure) for job in candidates(case, recovery)]
    return max(records, key=lambda r: (r["accuracy"]["validation"], -r["lr"]))["lr"]


def run_job(job: dict, args: argparse.Namespace) -> str:
    """Run one job, its recovery at the learning rate that was tuned before if it names none."""
    if "lr" not in job:
        kind = job["recovery"]
        job = job | {"lr": tuned_rate(job["case"], kind, args) if kind else None}
    record = grid.finish(job, args, measure)
    name = " ".join(str(value) for value in job.values())
    return f"{name}: {record['accuracy']['test']:.2f} in {record['seconds']} s"


def applicable(case: str) -> list[str]:
    """The methods that a network can be pruned by."""
    norm = any(isinstance(m, nn.BatchNorm2d) for m in CASES[case].build().modules())
    return [name for name, m in METHODS.items() if norm or not m.needs_norm]


def planned(cases: list[str], wanted: list[str], seeds: list[int]) -> list[dict]:
    """All jobs, those that all else is compared with first."""
    jobs = []
    for case in cases:
        plan = [("whole", 0.0, None)]
        for ratio in CASES[case].ratios:
            middle = ratio == CASES[case].ratios[MIDDLE]
            if middle or not CASES[case].slow:
                plan.append(("scratch", ratio, None))
            for name in applicable(case):
                plan.append((name, ratio, None))
                if middle or not CASES[case].slow:
                    plan += [(name, ratio, kind) for kind in METHODS[name].recovery]
        jobs += [
            {"case": case, "seed": seed, "method": method, "ratio": ratio, "recovery": kind}
            for seed in seeds
            for method, ratio, kind in plan
            if method in wanted
        ]
    recovered = dict.fromkeys((j["case"], j["recovery"]) for j in jobs if j["recovery"])
    jobs += [job for pair in recovered for job in candidates(*pair)]

    def rank(job: dict) -> tuple:
        kind, middle = job["recovery"], job["ratio"] == CASES[job["case"]].ratios[MIDDLE]
        used = job["method"] != "whole"  # the trained networks, each by one worker
        taken = "lr" not in job  # the rates, chosen by jobs that come before
        return used, job["method"] == "scratch", kind is not None, kind == "adam", taken, not middle

    return sorted(jobs, key=rank)


def main() -> None:
    """Run the benchmark, then print its tables and draw its plot."""
    parser = grid.parser(__doc__, "pruning")
    add, every = parser.add_argument, ["whole", *METHODS, "scratch"]
    add("--cache", type=Path, default=CACHE, help="of the trained networks")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--methods", nargs="+", choices=every, default=every)
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    args = parser.parse_args()
    if not args.report:
        constants = data.COUNTS | {
            "batch": BATCH,
            "calibration_images": methods.CALIBRATED,
            "scored_images": methods.SCORED,
            "estimated_images": methods.ESTIMATED,
            "squared_images": methods.SQUARED,
            "tracked_epochs": networks.TRACKED,
            "rank": networks.RANK,
        }
        jobs = planned(args.cases, args.methods, args.seeds)
        versions = {"torch_pruning": version("torch-pruning")}
        grid.run(run_job, jobs, args, constants, versions)
    print(plots.report(args.results))
    plots.plot(args.results, args.plot)


if __name__ == "__main__":
    main()

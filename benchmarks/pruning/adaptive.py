"""Half of the parameters gone while a network trains: which channels and branches, is learned.

A ResNet-20 of widths 8, 16, 32 and a VGG of five convolutions learn 5,000 images of CIFAR-10 for
twelve epochs by the default `RLSOptimizer` with cosine decay. After six of them, which all runs of
a seed share, `AdaptivePruner` takes three epochs to bring the network to half of its parameters;
`one shot` prunes by `RLSPruner` in the middle of these. Every run has the same epochs in all, and
the learning rate goes on as it would have.

Seeds 3 to 5 were run once, with what counts most, after everything had been chosen.

    python -m benchmarks.pruning.adaptive --workers 1  # run, or go on after an interruption
    python -m benchmarks.pruning.adaptive --report     # the table of the results
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import rlscuda
from benchmarks.common import data, grid
from benchmarks.common.data import CLASSES, Split
from benchmarks.common.training import BATCH, Run, accuracy
from benchmarks.learning.report import markdown
from rlscuda import zoo
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import AdaptivePruner, RLSPruner
from rlscuda.pruning.running.measure import count_flops, count_parameters

SEEDS, EPOCHS, WARMUP, PRUNING, SHOT = (0, 1, 2), 12, 6, 3, 8
HELD_OUT, HELD_METHODS = (3, 4, 5), ("whole", "shot", "output", "output-channels")
COUNTS = (5_000, 2_000, 10_000)  # training, validation and test images
CALIBRATED, TARGET = 256, 0.5  # images that measure branches and settle norms; parameters left
SHAPE = data.SHAPES["cifar10"]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: zoo.resnet(SHAPE, CLASSES, (8, 16, 32), 3),
    "vgg": lambda: zoo.vgg(SHAPE, CLASSES, (16, 32, 64), (1, 2, 2)),
}
TITLES = {"resnet20": "ResNet-20, 8/16/32", "vgg": "VGG, 16/32/64"}
BOTH = ("channels", "blocks")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # title, options of the pruner
    "whole": ("nothing goes", {}),
    "shot": ("one shot, channels", {}),
    "output": ("output penalty, channels and blocks", {"penalty": "output", "what": BOTH}),
    "output-channels": ("output penalty, channels", {"penalty": "output", "what": "channels"}),
    "output-blocks": ("output penalty, blocks", {"penalty": "output", "what": "blocks"}),
    "scale": ("scale penalty, channels and blocks", {"penalty": "scale", "what": BOTH}),
    "scale-channels": ("scale penalty, channels", {"penalty": "scale", "what": "channels"}),
    "scale-blocks": ("scale penalty, blocks", {"penalty": "scale", "what": "blocks"}),
}
PARTS = ("validation", "test")


class Training(Run):
    """A run whose steps a pruner sees."""

    pruner: AdaptivePruner | None = None

    def train_epoch(self, split: Split) -> float:
        """Train for one epoch in whole batches and return the mean loss."""
        self.model.train()
        steps, total = len(split.y) // BATCH, 0.0
        for index in torch.randperm(len(split.y), generator=self.order).split(BATCH)[:steps]:
            loss = F.cross_entropy(self.model(split.x[index]), split.y[index])
            self.optimizer.zero_grad()
            loss.backward()
            if self.pruner is not None:
                self.pruner.after_backward()
            self.optimizer.step()
            if self.pruner is not None:
                self.pruner.after_step()
            self.schedule.step()
            total += loss.item()
        self.epoch += 1
        return total / steps


def begun(job: dict, split: Split, folder: Path) -> Training:
    """The run of a network and seed after the warm-up, kept on disk once it is trained."""
    torch.manual_seed(job["seed"])
    model = NETWORKS[job["network"]]()
    optimizer = rlscuda.RLSOptimizer(model, seed=job["seed"])
    run = Training(
        model, optimizer, EPOCHS, len(split.y), job["seed"], torch.contiguous_format
    )  # fmt: skip
    path = folder / f"adaptive-{job['network']}-{job['seed']}.pt"
    if path.is_file():
        with open(path, "rb") as stream:
            run.load(load_archive(stream))
        return run
    for _ in range(WARMUP):
        run.train_epoch(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda stream: save_archive(run.state(), stream))
    return run


def measure(job: dict, args: argparse.Namespace) -> dict:
    """Run one job: prune and train from the warm-up to the last epoch."""
    splits, method = data.load("cifar10", args.data_dir, *COUNTS), job["method"]
    run = begun(job, splits["train"], args.journal.parent)
    start = time.process_time()
    model, loader = run.model, list(splits["train"].x[:CALIBRATED].split(128))
    whole, inputs = count_parameters(model), splits["train"].x[:1]
    options = METHODS[method][1] | job.get("options", {})
    if options:
        run.pruner = AdaptivePruner(
            model, run.optimizer, inputs, target_params=TARGET, warmup=0, epochs=PRUNING,
            loader=loader, compensate="in turn", **options,
        )  # fmt: skip
    left, report = [], ""
    for epoch in range(WARMUP + 1, EPOCHS + 1):
        run.train_epoch(splits["train"])
        if run.pruner is not None:
            run.pruner.after_epoch()
        elif method == "shot" and epoch == SHOT:
            RLSPruner(
                model, run.optimizer, inputs, target_params=TARGET, scope="global", loader=loader
            ).step()
        left.append(round(count_parameters(model) / whole, 4))
    if run.pruner is not None:
        report = str(run.pruner.report())
    size = {"left": left, "flops": count_flops(model, inputs), "report": report}
    seen = {part: accuracy(model, splits[part]) for part in PARTS}
    return job | size | seen | {"seconds": round(time.process_time() - start, 1)}


def run_job(job: dict, args: argparse.Namespace) -> str:
    """Run one job and say what came out."""
    record = grid.finish(job, args, measure)
    name = " ".join(str(value) for value in job.values())
    return f"{name}: {record['left'][-1]:.1%} left, {record['test']:.2f}, {record['seconds']} s"


def planned() -> Iterator[dict]:
    """All jobs; a VGG has no branches."""
    for seed in (*SEEDS, *HELD_OUT):
        for network in NETWORKS:
            for method in METHODS if seed in SEEDS else HELD_METHODS:
                if network == "resnet20" or method in ("whole", "shot") or "channels" in method:
                    yield {"network": network, "seed": seed, "method": method}


def report(path: Path) -> str:
    """The tables of a results file, in Markdown."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    parts = ([r for r in runs if r["seed"] in seeds] for seeds in (SEEDS, HELD_OUT))
    tables = [_table(part) for part in parts if part]
    return "\n\nSeeds by which nothing was chosen:\n\n".join(tables)


def _table(runs: list[dict]) -> str:
    lines = [["network", "what goes", "seeds", "parameters", "FLOPs", "validation", "test",
              "test, less the whole network's"]]  # fmt: skip
    for network in NETWORKS:
        whole = {r["seed"]: r for r in runs if (r["network"], r["method"]) == (network, "whole")}
        for method, (title, _) in METHODS.items():
            own = [r for r in runs if (r["network"], r["method"]) == (network, method)]
            if own:
                lines.append([TITLES[network], title, *_cells(own, whole)])
    return markdown(lines).rstrip()


def _cells(runs: list[dict], whole: dict[int, dict]) -> list[str]:
    gaps = [run["test"] - whole[run["seed"]]["test"] for run in runs if run["seed"] in whole]
    flops = [run["flops"] / whole[run["seed"]]["flops"] for run in runs if run["seed"] in whole]
    return [
        str(len(runs)),
        f"{statistics.fmean(run['left'][-1] for run in runs):.0%}",
        f"{statistics.fmean(flops):.0%}" if flops else "",
        _mean([run["validation"] for run in runs]),
        _mean([run["test"] for run in runs]),
        "" if runs[0]["method"] == "whole" or not gaps else _mean(gaps, "+"),
    ]


def _mean(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{spread}"


def main() -> None:
    """Run the benchmark, then print its table."""
    parser = grid.parser(__doc__, "adaptive")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    seeds = [*SEEDS, *HELD_OUT]
    parser.add_argument("--seeds", nargs="+", type=int, choices=seeds, default=seeds)
    args = parser.parse_args()
    if not args.report:
        chosen = [job for job in planned() if job["method"] in args.methods]
        jobs = [job for job in chosen if job["seed"] in args.seeds]
        constants = {
            "batch": BATCH, "epochs": EPOCHS, "warmup": WARMUP, "pruning": PRUNING, "shot": SHOT,
            "images": COUNTS, "calibrated": CALIBRATED, "target": TARGET, "shape": list(SHAPE),
        }  # fmt: skip
        grid.run(run_job, jobs, args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()

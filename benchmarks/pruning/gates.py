"""Branches that training prunes by `LayerGates`, and greedy removal from a network trained as long.

A ResNet-20 of widths 8, 16, 32 and a residual MLP learn 5,000 images of CIFAR-10 for ten epochs, by
the default `RLSOptimizer`. With gates, their probabilities learn for eight of them, at several
prices; what is left is trained on for two. Without, branches are removed one by one by the
validation loss: from the network of all ten epochs, and from that of eight, which is then trained
for two as well.

    python -m benchmarks.pruning.gates --workers 2  # run, or go on after an interruption
    python -m benchmarks.pruning.gates --report     # the tables of the results
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlscuda
from benchmarks.common import data, grid
from benchmarks.common.data import CLASSES, SHAPES, Split
from benchmarks.common.training import BATCH, Run, accuracy
from benchmarks.learning.report import markdown
from rlscuda import zoo
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import LayerGates, remove_blocks
from rlscuda.pruning.running.measure import count_flops

SEEDS, EPOCHS, GATED = (0, 1, 2), 10, 8
WIDTH = 128  # of the MLP
COUNTS = (5_000, 2_000, 5_000)  # training, validation and test images
BRANCHES, MOST = 9, 7  # of both networks, and those that are removed
CALIBRATED, JUDGED, TIMED = 500, 1_000, 10  # images of maps and norms, of the loss; steps timed
GREEDY = {  # name -> what becomes of branches, and whether the network is trained on
    "deleted at the end": ("delete", False),
    "maps at the end": ("map", False),
    "deleted, then trained": ("delete", True),
}
MAPPED = "gates, then maps"
GATES = {"gates": (0.01, 0.03, 0.06), MAPPED: (0.03,)}  # at these prices


class Residual(nn.Module):
    """x + F(x) of vectors [N, WIDTH], F being a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual_mlp() -> nn.Module:
    """`BRANCHES` residual layers on images of half the side."""
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, WIDTH),
        *(Residual() for _ in range(BRANCHES)), nn.ReLU(), nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: zoo.resnet(SHAPES["cifar10"], CLASSES, (8, 16, 32), 3),
    "mlp": residual_mlp,
}
TITLES = {"resnet20": "ResNet-20", "mlp": "residual MLP"}
MAPS = {"resnet20": "3x3", "mlp": "linear"}  # that a branch of it becomes


def begun(name: str, seed: int, split: Split) -> tuple[nn.Module, rlscuda.RLSOptimizer, Run]:
    """A new network, its optimizer and its run."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    optimizer = rlscuda.RLSOptimizer(model, seed=seed)
    return model, optimizer, Run(model, optimizer, EPOCHS, len(split.y), seed)


def trained(name: str, seed: int, split: Split, epochs: int, folder: Path) -> tuple:
    """The whole network of a seed after so many epochs, kept on disk."""
    parts = begun(name, seed, split)
    run, path = parts[2], folder / f"gates-{name}-{seed}-{epochs}.pt"
    if path.is_file():
        run.load(torch.load(path, weights_only=True))
        return parts
    if epochs > GATED:
        run.load(trained(name, seed, split, GATED, folder)[2].state())
    while run.epoch < epochs:
        run.train_epoch(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(torch.save, run.state()))
    return parts


def work(job: dict[str, Any], args: argparse.Namespace) -> str:
    """All that one way makes of the network of one seed."""
    record = grid.finish(job, args, _run)
    return f"{job} {[(p['branches'], p['test']) for p in record['points']]}"


def _run(job: dict, args: argparse.Namespace) -> dict:
    splits = data.load("cifar10", args.data_dir, *COUNTS)
    job_of = _gated if "price" in job else _greedy
    return job | {"points": job_of(job, splits, args.journal.parent)}


def _gated(job: dict, splits: dict[str, Split], folder: Path) -> list[dict]:
    train = splits["train"]
    model, optimizer, run = begun(job["network"], job["seed"], train)
    images = train.x[:CALIBRATED].split(250)
    gates = LayerGates(
        model, train.x[:1], optimizer, total_steps=GATED * (len(train.y) // BATCH),
        price=job["price"], by="flops", seed=job["seed"],
        **({"maps": images, "tolerance": 0.5} if job["way"] == MAPPED else {}),
    )  # fmt: skip
    whole, flops, seconds = (
        step_seconds(job["network"], job["seed"], train),
        count_flops(model, train.x[:1]),
        [],
    )
    for _ in range(GATED):
        start = time.thread_time()
        run.train_epoch(train, gates.step)
        seconds.append((time.thread_time() - start) / (len(train.y) // BATCH) / whole)
    report = gates.finish(images)
    while run.epoch < EPOCHS:
        run.train_epoch(train)
    point = _read(model, splits["test"], flops, sum(gate.state == "on" for gate in report.gates))
    thetas = [gate.theta for gate in report.gates]
    return [point | {"thetas": thetas, "step": seconds}]


def step_seconds(name: str, seed: int, split: Split) -> float:
    """A step of the whole network without gates, of this thread."""
    run = begun(name, seed, split)[2]
    few = Split(split.x[: TIMED * BATCH], split.y[: TIMED * BATCH])
    run.train_epoch(few)
    start = time.thread_time()
    run.train_epoch(few)
    return (time.thread_time() - start) / TIMED


def _greedy(job: dict, splits: dict[str, Split], folder: Path) -> list[dict]:
    (way, goes_on), place = GREEDY[job["way"]], (job["network"], job["seed"])
    way = MAPS[job["network"]] if way == "map" else way
    train, points = splits["train"], []
    images, inputs = train.x[:CALIBRATED].split(250), train.x[:1]
    x, y = (part[:JUDGED] for part in (splits["validation"].x, splits["validation"].y))

    @torch.no_grad()
    def loss(one: nn.Module) -> float:
        one.eval()
        pairs = zip(x.split(500), y.split(500), strict=True)
        return sum(float(F.cross_entropy(one(a), b, reduction="sum")) for a, b in pairs) / JUDGED

    model, optimizer, run = trained(*place, train, GATED if goes_on else EPOCHS, folder)
    flops, left = count_flops(model, inputs), BRANCHES
    for gone in range(MOST + 1):
        if goes_on:
            model, optimizer, run = trained(*place, train, GATED, folder)
        if count := gone if goes_on else min(gone, 1):
            remove_blocks(
                model, inputs, images, optimizers=optimizer, count=count, ways=(way,), evaluate=loss
            )
            left = BRANCHES - gone
        while goes_on and run.epoch < EPOCHS:
            run.train_epoch(train)
        points.append(_read(model, splits["test"], flops, left))
    return points


def _read(model: nn.Module, split: Split, flops: int, branches: int) -> dict[str, Any]:
    """What a network is worth, and its share of the whole one's FLOPs."""
    share = count_flops(model, split.x[:1]) / flops
    return {"test": accuracy(model, split), "flops": share, "branches": branches}


def report(results: Path) -> str:
    """Of each network, accuracy by the branches left after greedy removal, and by price."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    tables = []
    for network in NETWORKS:
        own = [run for run in runs if run["network"] == network]
        tables += [_greedy_table(network, own), _gated_table(network, own)]
    return "\n".join(markdown(table) for table in tables if len(table) > 1)


def _greedy_table(network: str, runs: list[dict]) -> list[list[str]]:
    counts = range(MOST + 1)
    lines = [[f"{TITLES[network]}, branches left", *(str(BRANCHES - gone) for gone in counts)]]
    for way in GREEDY:
        own = [run["points"] for run in runs if run["way"] == way]
        if own:
            lines.append([way, *(_mean(p[k]["test"] for p in own) for k in counts)])
    return lines


def _gated_table(network: str, runs: list[dict]) -> list[list[str]]:
    lines = [[f"{TITLES[network]}, price", "branches left", "FLOPs", "accuracy", "undecided",
              "step, first and last"]]  # fmt: skip
    for way, price in ((way, price) for way, prices in GATES.items() for price in prices):
        own = [run["points"][0] for run in runs if run["way"] == way and run.get("price") == price]
        if own:
            open_ones = [t for p in own for t in p["thetas"] if 0.02 < t < 0.98]
            steps = [_mean((p["step"][at] for p in own), 2) for at in (0, -1)]
            lines.append([
                f"{way}, {price}", ", ".join(str(p["branches"]) for p in own),
                _mean((100 * p["flops"] for p in own), 0) + " %", _mean(p["test"] for p in own),
                str(len(open_ones)), ", ".join(steps),
            ])  # fmt: skip
    return lines


def _mean(values: Any, digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f}"


def main() -> None:
    parser = grid.parser(__doc__, "gates")
    every = [*GREEDY, *GATES]
    parser.add_argument("--ways", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    if not args.report:
        ways = [{"way": way} for way in GREEDY]
        ways += [{"way": way, "price": price} for way in GATES for price in GATES[way]]
        jobs = [
            {"network": network, "seed": seed} | way
            for network in NETWORKS
            for seed in SEEDS
            for way in ways
            if way["way"] in args.ways
        ]
        constants = {"epochs": EPOCHS, "gated": GATED, "images": COUNTS, "judged": JUDGED}
        grid.run(work, jobs, args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()

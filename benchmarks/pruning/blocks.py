"""Residual branches removed one by one, and together with channels.

A ResNet-20 of widths 8, 16, 32 learns 5,000 images of CIFAR-10 for ten epochs, by the default
`RLSOptimizer`. Then `remove_blocks` takes three of its nine branches, each by the validation loss
for the FLOPs or the time that it saves, in one way or another, and nothing is trained any more;
test accuracy, parameters, FLOPs and the least time of a forward on one core, by turns with the
whole network's, are read after each. At 30 and 50 % of the FLOPs removed, `RLSPruner` takes
channels alone, and channels and blocks, by how many validation images are labelled wrongly.

    python -m benchmarks.pruning.blocks --workers 2  # run, or go on after an interruption
    python -m benchmarks.pruning.blocks --report     # the tables of the results
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import rlscuda
from benchmarks.common import data, grid
from benchmarks.common.data import CLASSES, SHAPES, Split
from benchmarks.common.training import Run, accuracy
from benchmarks.learning.report import markdown
from rlscuda import zoo
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import BlockChange, RLSPruner, remove_blocks
from rlscuda.pruning.running.measure import count_flops, count_parameters

SEEDS, EPOCHS, MOST = (0, 1, 2), 10, 3
SHARES = (0.3, 0.5)  # of the FLOPs, removed
COUNTS = (5_000, 2_000, 5_000)  # training, validation and test images
CALIBRATED, JUDGED = 500, 1_000  # images of the maps, of the loss
TIMED, BATCH = 30, 64  # forwards timed, and images of each
WAYS = {  # what becomes of a branch, and by what it saves
    "deleted": ("delete", "flops"),
    "1x1 map": ("1x1", "flops"),
    "3x3 map": ("3x3", "flops"),
    "deleted, for the time it saves": ("delete", "latency"),
    "3x3 map, for the time it saves": ("3x3", "latency"),
}
MIXES: dict[str, Any] = {"channels": "channels", "channels and blocks": ("channels", "blocks")}
BLOCKS = "blocks"  # alone, in the cheapest way, until so many FLOPs are gone


def trained(seed: int, split: Split, folder: Path) -> nn.Module:
    """The network of a seed, kept on disk once it is trained."""
    torch.manual_seed(seed)
    model = zoo.resnet(SHAPES["cifar10"], CLASSES, (8, 16, 32), 3)
    path = folder / f"blocks-{seed}.pt"
    if path.is_file():
        with open(path, "rb") as stream:
            model.load_state_dict(load_archive(stream))
        return model
    optimizer = rlscuda.RLSOptimizer(model, seed=seed)
    run = Run(model, optimizer, EPOCHS, len(split.y), seed)
    for _ in range(EPOCHS):
        run.train_epoch(split)
    plain = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_archive, plain))
    return model


def read(model: nn.Module, whole: nn.Module, split: Split) -> dict[str, Any]:
    """What a network is worth and costs; with its time, per batch, the whole one's by turns."""
    x, times = split.x[:BATCH], {model: [], whole: []}
    with torch.no_grad():
        for _ in range(TIMED):
            for one in (model.eval(), whole.eval()):
                start = time.thread_time()
                one(x)
                times[one].append(time.thread_time() - start)
    ms = [round(1000 * min(times[one]), 3) for one in (model, whole)]
    size = {"parameters": count_parameters(model), "flops": count_flops(model, x[:1])}
    return {"test": accuracy(model, split), "ms": ms} | size


def work(job: tuple[int, str], args: argparse.Namespace) -> str:
    """All that one way makes of the network of one seed."""
    record = grid.finish({"seed": job[0], "way": job[1]}, args, _run)
    return f"{job} {[point['test'] for point in record['points']]}"


def _run(job: dict, args: argparse.Namespace) -> dict:
    splits = data.load("cifar10", args.data_dir, *COUNTS)
    model = trained(job["seed"], splits["train"], args.journal.parent)
    images, inputs = splits["train"].x[:CALIBRATED].split(125), splits["test"].x[:1]
    x, y = (part[:JUDGED] for part in (splits["validation"].x, splits["validation"].y))

    def loss(one: nn.Module) -> float:
        one.eval()
        with torch.no_grad():
            pairs = zip(x.split(500), y.split(500), strict=True)
            return (
                sum(float(F.cross_entropy(one(a), b, reduction="sum")) for a, b in pairs) / JUDGED
            )

    whole = copy.deepcopy(model)

    def wrong(one: nn.Module) -> float:
        return 100 - accuracy(one, splits["validation"])

    points = [read(model, whole, splits["test"]) | {"gone": []}]
    if job["way"] in WAYS:
        way, price = WAYS[job["way"]]
        for _ in range(MOST):
            report = remove_blocks(
                model, splits["test"].x[: BATCH if price == "latency" else 1], images, count=1,
                ways=(way,), evaluate=loss, price=price,
            )  # fmt: skip
            points.append(read(model, whole, splits["test"]) | {"gone": _gone(report.changes)})
        return job | {"points": points}
    for share in SHARES:
        model, target = copy.deepcopy(whole), 1 - share
        changes = []
        if job["way"] == BLOCKS:
            changes = remove_blocks(
                model, inputs, images, target_flops=target, evaluate=wrong
            ).changes
        else:
            pruner = RLSPruner(
                model, None, inputs, target_flops=target, scope="global", loader=images,
                evaluate=wrong, what=MIXES[job["way"]],
            )  # fmt: skip
            changes = pruner.step().blocks
        points.append(read(model, whole, splits["test"]) | {"gone": _gone(changes)})
    return job | {"points": points}


def _gone(changes: list[BlockChange]) -> list[dict]:
    return [{"block": c.name, "how": c.how, "explained": c.explained} for c in changes]


def report(results: Path) -> str:
    """Two tables: what is left by the number of blocks, and by the share of FLOPs removed."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    heads = [f"{k} gone" for k in range(MOST + 1)]
    shares = ["whole", *(f"{share:.0%} of the FLOPs removed" for share in SHARES)]
    tables = [
        _table("branch becomes", heads, WAYS, runs),
        _table("what goes", shares, (*MIXES, BLOCKS), runs),
    ]
    return "\n".join(table for table in tables if table)


def _table(title: str, heads: list[str], ways: Iterable[str], runs: list[dict]) -> str:
    """One line for each way that has runs; '' where none has."""
    lines = [[title, *heads]]
    for way in ways:
        own = [run["points"] for run in runs if run["way"] == way]
        whole = [points[0] for points in own]
        if own:
            cells = [_cell([points[k] for points in own], whole) for k in range(len(heads))]
            few = f", {len(own)} of {len(SEEDS)} seeds" if len(own) < len(SEEDS) else ""
            lines.append([way + few, *cells])
    return markdown(lines) if len(lines) > 1 else ""


def _cell(points: list[dict], whole: list[dict]) -> str:
    """Test accuracy, and the shares of parameters, FLOPs and time that are gone."""
    mean = statistics.fmean(point["test"] for point in points)
    shares = [
        1 - statistics.fmean(p[key] / w[key] for p, w in zip(points, whole, strict=True))
        for key in ("parameters", "flops")
    ]
    shares.append(1 - statistics.fmean(ms / ms_whole for ms, ms_whole in (p["ms"] for p in points)))
    rest = f" ({', '.join(f'{share:.0%}' for share in shares)})" if points != whole else ""
    return f"{mean:.1f} %{rest}"


def main() -> None:
    parser = grid.parser(__doc__, "blocks")
    every = [*WAYS, *MIXES, BLOCKS]
    parser.add_argument("--ways", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    if not args.report:
        jobs = [(seed, way) for way in args.ways for seed in SEEDS]
        constants = {"epochs": EPOCHS, "images": COUNTS, "calibrated": CALIBRATED, "judged": JUDGED}
        grid.run(work, jobs, args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()

"""Residual branches removed one by one: deleted, or replaced by a linear map in closed form.

A ResNet-20 of widths 8, 16, 32 learns 5,000 images of CIFAR-10 for ten epochs, by the default
`RLSOptimizer`. Then `remove_blocks` takes five of its nine branches, each by the validation loss,
and nothing is trained any more; test accuracy, parameters, FLOPs and the least time of a forward on
one core are read after each. Beside it, channels alone by `RLSPruner` at the same FLOPs.

    python -m benchmarks.pruning.blocks --workers 2  # run, or go on after an interruption
    python -m benchmarks.pruning.blocks --report     # the tables of the results
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

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
from rlscuda.pruning import RLSPruner, remove_blocks
from rlscuda.pruning.running.measure import count_flops, count_parameters

SEEDS, EPOCHS, MOST = (0, 1, 2), 10, 5
COUNTS = (5_000, 2_000, 5_000)  # training, validation and test images
CALIBRATED, JUDGED, TIMED = 500, 1_000, 30  # images of the maps, of the loss; forwards timed
WAYS = {
    "deleted": ("delete",),
    "1x1 map": ("1x1",),
    "3x3 map": ("3x3",),
    "cheapest of the three": ("delete", "1x1", "3x3"),
}
CHANNELS = "channels alone"


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


def read(model: nn.Module, split: Split) -> dict[str, float]:
    """What a network is worth and costs; the time is the thread's own, of a batch of 64."""
    x, times = split.x[:64], []
    model.eval()
    with torch.no_grad():
        for _ in range(TIMED):
            start = time.thread_time()
            model(x)
            times.append(time.thread_time() - start)
    size = {"parameters": count_parameters(model), "flops": count_flops(model, x[:1])}
    return {"test": accuracy(model, split), "ms": round(1000 * min(times), 3)} | size


def work(job: tuple[int, str], args: argparse.Namespace) -> str:
    """All that one way makes of the network of one seed."""
    record = grid.finish({"seed": job[0], "way": job[1]}, args, _run)
    return f"{job} {[point['test'] for point in record['points']]}"


def _run(job: dict, args: argparse.Namespace) -> dict:
    splits = data.load("cifar10", args.data_dir, *COUNTS)
    model = trained(job["seed"], splits["train"], args.journal.parent)
    images, inputs = splits["train"].x[:CALIBRATED].split(250), splits["test"].x[:1]
    x, y = (part[:JUDGED] for part in (splits["validation"].x, splits["validation"].y))

    def loss(one: nn.Module) -> float:
        one.eval()
        with torch.no_grad():
            pairs = zip(x.split(500), y.split(500), strict=True)
            return (
                sum(float(F.cross_entropy(one(a), b, reduction="sum")) for a, b in pairs) / JUDGED
            )

    points = [read(model, splits["test"]) | {"gone": None}]
    for count in range(MOST if job["way"] in WAYS else 0):
        report = remove_blocks(model, inputs, images, count=1, ways=WAYS[job["way"]], evaluate=loss)
        (change,) = report.changes
        gone = {"block": change.name, "how": change.how, "explained": change.explained}
        points.append(read(model, splits["test"]) | {"gone": gone, "count": count + 1})
    if job["way"] == CHANNELS:
        whole = points[0]["flops"]
        others = grid.finish({"seed": job["seed"], "way": "cheapest of the three"}, args, _run)
        for point in others["points"][1:]:
            target = max(1.0, point["flops"])
            RLSPruner(
                model, None, inputs, target_flops=target, scope="global", loader=images,
            ).step()  # fmt: skip
            points.append(read(model, splits["test"]) | {"gone": None, "share": target / whole})
    return job | {"points": points}


def report(results: Path) -> str:
    """Two tables: what is left by the number of blocks, and at equal FLOPs."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    whole = [run["points"][0] for run in runs if run["way"] == "deleted"]
    lines = [["branch becomes", *(f"{k} gone" for k in range(MOST + 1))]]
    for way in WAYS:
        own = [run["points"] for run in runs if run["way"] == way]
        lines.append([way, *(_cell([p[k] for p in own], whole) for k in range(MOST + 1))])
    equal = [["FLOPs removed", *(f"{k}" for k in range(1, MOST + 1))]]
    for way in ("cheapest of the three", CHANNELS):
        own = [run["points"] for run in runs if run["way"] == way]
        equal.append([way, *(_cell([p[k] for p in own], whole) for k in range(1, MOST + 1))])
    return markdown(lines) + "\n" + markdown(equal)


def _cell(points: list[dict], whole: list[dict]) -> str:
    """Test accuracy, and the shares of parameters, FLOPs and time that are gone."""
    mean = statistics.fmean(point["test"] for point in points)
    shares = [
        1 - statistics.fmean(p[key] / w[key] for p, w in zip(points, whole, strict=True))
        for key in ("parameters", "flops", "ms")
    ]
    return f"{mean:.1f} % ({', '.join(f'{share:.0%}' for share in shares)})"


def main() -> None:
    parser = grid.parser(__doc__, "blocks")
    args = parser.parse_args()
    if not args.report:
        jobs = [(seed, way) for way in (*WAYS, CHANNELS) for seed in SEEDS]
        constants = {"epochs": EPOCHS, "images": COUNTS, "calibrated": CALIBRATED, "judged": JUDGED}
        grid.run(work, jobs, args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()

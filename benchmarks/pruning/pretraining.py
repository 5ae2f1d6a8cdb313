"""Is a pre-trained network easier to prune? The study of `rlscuda study pretraining`, in numbers.

Three cells, as in `rlscuda.cli.study.cells`, of the images at hand: digits 0-4 before digits 5-9 of
MNIST, six classes of CIFAR-10 before the other four, ImageNet before CIFAR-10 at 64 pixels. Each
study keeps a journal of its own, so an interruption loses one arm at most.

    python -m benchmarks.pruning.pretraining --workers 1  # run, or go on after an interruption
    python -m benchmarks.pruning.pretraining --report     # the table of the results
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import data, grid
from rlscuda.cli.study.cells import CELLS, Cell, for_imagenet, of_classes
from rlscuda.cli.study.plot import plot_study
from rlscuda.studies import Protocol, Split, Study, Task, pretraining
from rlscuda.studies.report import ARMS, HEADS
from rlscuda.zoo import ImageShape

LOADED = {"mnist": (50_000, 10_000, 10_000), "cifar10": (30_000, 5_000, 10_000)}
SOURCES = ("source", "target", "calibration")
ENDS = ("epochs", "plateau", "accuracy")
JOBS = [
    {"cell": "mnist", "network": "lenet5", "seeds": [0, 1, 2], "ends": list(ENDS)},
    {"cell": "mnist", "network": "mlp", "seeds": [0, 1, 2], "ends": ["epochs", "accuracy"]},
    {"cell": "cifar10", "network": "vgg", "seeds": [0, 1, 2], "ends": ["epochs", "accuracy"]},
    {"cell": "efficientnet", "network": "efficientnet_lite0", "seeds": [0], "ends": ["epochs"]},
]
RULES = ("saliency+", "l1+", "saliency", "l1", "l2", "random")
SMALLER: dict[str, dict[str, dict]] = {  # than on the command line, to fit into minutes
    "mnist": {"cell": {}, "protocol": {"rules": RULES}},
    "cifar10": {
        "cell": {
            "source_images": 6000, "train_images": 1000, "test_images": 1000, "epochs": 12,
            "source_epochs": 5,
        },
        "protocol": {"rules": ("saliency+", "l1+", "l1", "random"), "rates": (0.05, 0.1),
                     "calibration": 200},
    },
    "efficientnet": {
        "cell": {"train_images": 2000, "val_images": 200, "test_images": 500, "epochs": 10},
        "protocol": {"rules": ("saliency+", "l1"), "rates": (1e-3,), "calibration": 200,
                     "ratios": (0.0, 0.1, 0.2, 0.3, 0.5, 0.7),
                     "batch_size": 32},  # whose norms follow by a hundredth a step
    },
}  # fmt: skip


def cell_of(job: dict) -> Cell:
    """The cell of a job, of the benchmark's size."""
    return replace(CELLS[job["cell"]], **SMALLER[job["cell"]]["cell"])


def tasks(job: dict, folder: Path) -> tuple[Task, Task | None, ImageShape]:
    """Target, source where it is trained here, and the shape of an image."""
    name, cell = "mnist" if job["cell"] == "mnist" else "cifar10", cell_of(job)
    splits = data.load(name, folder, *LOADED[name])
    shape = data.SHAPES[name]
    if cell.pixels is not None:
        shape = ImageShape(3, cell.pixels, cell.pixels)

    def task(classes: tuple[int, ...], train: int) -> Task:
        parts = []
        for part, count in zip(splits, (train, cell.val_images, cell.test_images)):
            x, y = of_classes(splits[part].x, splits[part].y, classes, count)
            if cell.pixels is not None:  # back into [0, 1], which each channel of them spans
                low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
                x = for_imagenet((x - low) / (high - low), cell.pixels)
            parts.append(Split(x, y))
        return Task(*parts, len(classes))

    source = task(cell.source, cell.source_images) if cell.source else None
    return task(cell.target, cell.train_images), source, shape


def measure(job: dict, args: argparse.Namespace) -> dict:
    """Run one study."""
    target, source, shape = tasks(job, args.data_dir)
    cell, network = cell_of(job), CELLS[job["cell"]].networks[job["network"]]
    optimizer = "adam" if job["cell"] == "efficientnet" else "rls"
    protocol = Protocol(
        seeds=tuple(job["seeds"]), fairness=tuple(job["ends"]), optimizer=optimizer,
        epochs=cell.epochs, source_epochs=cell.source_epochs,
        **{"rates": cell.step_sizes.get(optimizer, ())} | SMALLER[job["cell"]]["protocol"],
    )  # fmt: skip
    start = time.perf_counter()
    study = pretraining(
        lambda classes: network(shape, classes), target, source or cell.pretrained,
        args.journal.with_suffix("") / f"{job['cell']}-{job['network']}", protocol,
        lambda text: print(f"{job['network']}: {text}", flush=True),
    )  # fmt: skip
    return job | {"study": study.to_dict(), "seconds": round(time.perf_counter() - start, 1)}


SHOWN = ("saliency+", "l1+", "l1")  # rules in the tables; the results file has all


def run_job(job: dict, args: argparse.Namespace) -> str:
    """Run one study and say what came out."""
    record = grid.finish(job, args, measure)
    return f"{job['cell']} {job['network']}: {record['seconds']} s"


def report(path: Path) -> str:
    """The tables of a results file, in Markdown: the arms by some rules, and the sources of P."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    order = [(job["cell"], job["network"]) for job in JOBS]
    runs.sort(key=lambda run: order.index((run["cell"], run["network"])))
    arms = ["| cell, network | ended by | pairs | " + " | ".join(HEADS) + " |", "|" + "---|" * 9]
    sources = [
        "| cell, network | ended by | arm | " + " | ".join(f"P of {s}" for s in SOURCES)
        + " | mean R² of inputs |",
        "|" + "---|" * 7,
    ]  # fmt: skip
    failed = []
    for run in runs:
        study, name = Study.from_dict(run["study"]), f"{run['cell']}, {run['network']}"
        for row, cells in zip(study.rows, (c for _, rows in study.tables() for c in rows)):
            if row.rule in SHOWN and row.fairness != "plateau":
                arms.append("| " + " | ".join([name, row.fairness, str(row.pairs), *cells]) + " |")
        found = {(end, arm, source): area for end, arm, source, area in study.source_rows()}
        for end, arm in dict.fromkeys((end, arm) for end, arm, _ in found if end == "epochs"):
            areas = [found.get((end, arm, source)) for source in SOURCES]
            values = [pair[ARMS.index(arm)] for pair in study.redundancy(end).values()]
            cells = ["" if area is None else f"{area:.3f}" for area in areas]
            mean = f"{statistics.fmean(values):.3f}"
            sources.append("| " + " | ".join([name, end, arm, *cells, mean]) + " |")
        failed += [f"- {name}: {line}" for line in study.failures()]
    return "\n".join([*arms, "", *sources, "", *failed])


def draw(results: Path, path: Path) -> None:
    """Draw the curves of the first job."""
    first = JOBS[0]
    for run in json.loads(results.read_text(encoding="utf-8"))["runs"]:
        if first.items() <= run.items():
            title = f"{run['network']}, {run['cell']}"
            plot_study(path, title, Study.from_dict(run["study"]))


def main() -> None:
    """Run the benchmark, then draw its curves and print its tables."""
    parser = grid.parser(__doc__, "pretraining")
    parser.add_argument("--cell", choices=CELLS, action="append", help="all by default")
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(1)
        jobs = [job for job in JOBS if args.cell is None or job["cell"] in args.cell]
        grid.run(run_job, jobs, args, {"smaller": SMALLER})
    draw(args.results, args.plot)
    print(report(args.results))


if __name__ == "__main__":
    main()

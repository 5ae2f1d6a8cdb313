"""To a size: the same share of every layer, or what costs the network least for what it saves.

The networks of `benchmarks.pruning.compare`, calibrated by 500 training images, lose channels until
half, then a quarter, of their FLOPs or parameters is left; nothing is trained afterwards.

    python -m benchmarks.pruning.scopes --workers 2  # run, or go on after an interruption
    python -m benchmarks.pruning.scopes --report     # the table of the results
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

from benchmarks.common import data, grid
from benchmarks.common.training import accuracy
from benchmarks.learning.report import markdown
from benchmarks.pruning.networks import CASES, tracked
from rlscuda.pruning import RLSPruner

SEEDS, LEFT = (0, 1, 2), (0.5, 0.25)
TARGETS = {"target_flops": "FLOPs", "target_params": "parameters"}
SCOPES = ("layer", "global")
CALIBRATED, BATCH = 500, 125


def measure(job: dict, args: argparse.Namespace) -> dict:
    """Prune the network of a seed to every size, in either scope."""
    case, (name, seed) = CASES[job["network"]], (job["network"], job["seed"])
    splits = data.load(case.data, args.data_dir)
    model = tracked(name, seed, splits["train"], args.journal.parent / "pruning")[0].model
    loader, example = splits["train"].x[:CALIBRATED].split(BATCH), splits["train"].x[:1]
    cells = []
    for target in TARGETS:
        for left in LEFT:
            for scope in SCOPES:
                one, start = copy.deepcopy(model), time.process_time()
                RLSPruner(
                    one, None, example, scope=scope, loader=loader, **{target: left}
                ).step()  # fmt: skip
                seconds = round(time.process_time() - start, 1)
                cell = {"target": target, "left": left, "scope": scope, "seconds": seconds}
                cells.append(cell | {"test": accuracy(one, splits["test"])})
    return job | {"whole": accuracy(model, splits["test"]), "cells": cells}


def run_job(job: dict, args: argparse.Namespace) -> str:
    """Run one job and say what came out."""
    record = grid.finish(job, args, measure)
    found = ", ".join(f"{cell['test']:.2f}" for cell in record["cells"])
    return f"{job['network']} {job['seed']}: whole {record['whole']:.2f}; {found}"


def report(results: Path) -> str:
    """The table of a results file, in Markdown: test accuracy, the better of both scopes bold."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    heads = [f"{title}, {left:.0%} left" for title in TARGETS.values() for left in LEFT]
    lines = [["network (whole)", "scope", *heads, "seconds"]]
    for name, case in CASES.items():
        own = [run for run in runs if run["network"] == name]
        if not own:
            continue
        whole = statistics.fmean(run["whole"] for run in own)
        means = {scope: _means(own, scope) for scope in SCOPES}
        best = [max(values) for values in zip(*(tests for tests, _ in means.values()))]
        for scope, (tests, seconds) in means.items():
            cells = [f"**{t:.1f}**" if t == top else f"{t:.1f}" for t, top in zip(tests, best)]
            title = f"{case.title} ({whole:.1f})" if scope == SCOPES[0] else ""
            lines.append([title, f"`{scope}`", *cells, f"{seconds:.2g}"])
    return markdown(lines).rstrip()


def _means(runs: list[dict], scope: str) -> tuple[list[float], float]:
    """Test accuracy by size, and seconds, means over the seeds."""
    cells = [[cell for cell in run["cells"] if cell["scope"] == scope] for run in runs]
    tests = [statistics.fmean(cell["test"] for cell in column) for column in zip(*cells)]
    return tests, statistics.fmean(cell["seconds"] for own in cells for cell in own)


def main() -> None:
    """Run the benchmark, then print its table."""
    args = grid.parser(__doc__, "scopes").parse_args()
    if not args.report:
        jobs = [{"network": name, "seed": seed} for name in CASES for seed in SEEDS]
        constants = {"calibrated": CALIBRATED, "batch": BATCH, "left": LEFT}
        grid.run(run_job, jobs, args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()

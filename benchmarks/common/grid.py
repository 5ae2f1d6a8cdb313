"""A grid of many training runs: its journal, the processes that fill it, and its results file.

Each finished run is one line of the journal, so an interruption loses only the runs under way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from rlscuda.files.atomic import write_atomically
from rlscuda.files.journal import append_record, read_records, repair

RESULTS = environment.ROOT / "benchmarks" / "results"


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of every grid; its files are called `name`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add, root = parser.add_argument, environment.ROOT
    add("--data-dir", type=Path, default=root.parent / "shared" / "data")
    add("--journal", type=Path, default=root / "runs" / f"{name}.jsonl")
    add("--results", type=Path, default=RESULTS / f"{name}.json")
    add("--plot", type=Path, default=RESULTS / f"{name}.png")
    add("--workers", type=int, default=2, help="processes, one thread each")
    add("--report", action="store_true", help="only print the tables and draw the plot")
    return parser


def run(
    work: Callable[[Any, argparse.Namespace], str],
    jobs: Iterable[Any],
    args: argparse.Namespace,
    constants: dict[str, Any],
    versions: dict[str, str] | None = None,
) -> None:
    """Do in processes what the journal lacks, and write the results file.

    Args:
        work: Does one job and says what came out.
        jobs: In the order to start them.
        args: The options of the grid, see `parser`.
        constants: What more all runs have in common, for the results file.
        versions: Of libraries that only this grid uses.
    """
    args.journal.parent.mkdir(parents=True, exist_ok=True)
    repair(args.journal)
    conditions = _conditions() | (versions or {}) | {"workers": args.workers}
    append_record(args.journal, {"environment": conditions})
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            for done in [pool.submit(work, job, args) for job in jobs]:
                print(done.result(), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    environments, runs = _read(args.journal)
    head = {"environments": environments, "constants": constants}
    body = ",\n    ".join(json.dumps(record) for record in runs)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "runs": [\n    {body}\n  ]\n}}\n'
    args.results.write_text(text, encoding="utf-8")


def finish(
    job: dict, args: argparse.Namespace, work: Callable[[dict, argparse.Namespace], dict]
) -> dict:
    """The job's record from the journal, or of the work, which is appended there."""
    for record in _read(args.journal)[1]:
        if all(record.get(key) == value for key, value in job.items()):
            return record
    record = work(job, args)
    append_record(args.journal, record)
    return record


def forget(journal: Path, unwanted: Callable[[dict], bool]) -> None:
    """Drop runs from a journal, so that they are made anew."""
    environments, runs = _read(journal)
    kept = [r for r in runs if not unwanted(r)]
    if len(kept) < len(runs):
        lines = [{"environment": e} for e in environments] + kept
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(journal, lambda stream: stream.write(text.encode()))


def _read(journal: Path) -> tuple[list[dict], list[dict]]:
    """The environments and the runs of a journal."""
    records = read_records(journal)
    environments = [r["environment"] for r in records if "environment" in r]
    return environments, [r for r in records if "environment" not in r]


def _conditions() -> dict:
    """The machine and the versions that the next runs use."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    hashed = {"threads_per_run": 1, "source_hash": environment.built_hash(), "started": started}
    return environment.machine() | environment.versions() | hashed

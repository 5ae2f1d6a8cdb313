"""Real trainings of a small network by 1, 2 and 4 processes, held against what `layout` says.

What they call in their third step, and the bytes of that, must be the same one by one; and so must
the bytes of the state of every rank be.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed.counting import Call, collectives, held
from benchmarks.distributed.layout import SCHEMES, seen, step_of
from benchmarks.distributed.networks import Network, Small
from rlscuda import RLSOptimizer

SIZES = (1, 2, 4)
SMALL = Network("small", Small, (4, 3, 3, 3), "4 images")
OPTIONS: tuple[dict[str, Any], ...] = (  # three kinds of summaries and of steps; P in blocks
    {"max_fan_in": 128},
    {"max_fan_in": 128, "form": "adaptive", "summary": "sketch", "rank": 4},
    {"max_fan_in": 128, "form": "paper"},
)
LITTLE, MUCH = 8, 16 << 20  # bytes of all-reduces that are timed


def third_step(rank: int, size: int, scheme: str, options: dict) -> tuple[list[Call], int, int]:
    """The collectives of the third step, and the bytes of `P` and of the whole state."""
    torch.manual_seed(0)
    model = Small()
    if scheme == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = RLSOptimizer(model, shard_matrices=scheme == "shard_matrices", **options)
    wrapped = model if scheme == "fsdp2" else DistributedDataParallel(model)
    with collectives(really=True) as called:
        for step in range(3):
            torch.manual_seed(1 + rank + size * step)
            wrapped(torch.randn(SMALL.input)).square().mean().backward()
            called.clear()
            optimizer.step()
            optimizer.zero_grad()
    states = [dict(state) for state in optimizer.state.values()]
    return called, held([state["P"] for state in states if "P" in state]), held(states)


def all_reduce_seconds(rank: int, size: int) -> dict[int, float]:
    """The median time of an all-reduce of so many bytes."""
    seconds = {}
    for count, rounds in ((LITTLE, 200), (MUCH, 9)):
        x = torch.zeros(count // 4)
        times = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - start)
        seconds[count] = statistics.median(times)
    return seconds


def _process(rank: int, size: int, jobs: list[tuple[Callable, tuple]], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    results = [job(rank, size, *arguments) for job, arguments in jobs]
    torch.save(results, Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


def launch(size: int, jobs: list[tuple[Callable, tuple]]) -> list[list[Any]]:
    """For each job, a function of rank, size and more, what each process returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (size, jobs, folder), nprocs=size)
        ranks = [torch.load(Path(folder, str(r)), weights_only=False) for r in range(size)]
    return list(map(list, zip(*ranks)))


def check() -> tuple[list[dict], dict[int, dict[int, float]]]:
    """Trains by every scheme and option.

    Returns:
        A record of each training that was as said; and of each number of processes the seconds of
        an all-reduce by its bytes.

    Raises:
        AssertionError: Of another training.
    """
    cases = [(scheme, options) for scheme in SCHEMES for options in OPTIONS]
    given = [seen(SMALL, **options) for options in OPTIONS]
    records, seconds = [], {}
    for size in SIZES:
        jobs = [(third_step, case) for case in cases] + [(all_reduce_seconds, ())]
        *trained, timed = launch(size, jobs)
        seconds[size] = timed[0]
        for (scheme, options), ranks in zip(cases, trained):
            for rank, found in enumerate(ranks):
                step = step_of(given[OPTIONS.index(options)], scheme, size, rank)
                said = (step.calls, step.matrices, step.state)
                if said != found:
                    raise AssertionError(f"{scheme} {options}, rank {rank} of {size}: "
                                         f"said {said}, found {found}")  # fmt: skip
            records.append(
                {
                    "scheme": scheme, "options": options, "ranks": size,
                    "collectives": len(step.calls), "bytes": sum(c.bytes for c in step.calls),
                    "state_bytes": [state for *_, state in ranks],
                }
            )  # fmt: skip
    return records, seconds

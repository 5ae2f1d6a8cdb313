"""What one step costs from 1 to 1024 processes: `python -m benchmarks.distributed.scaling`.

Bytes, collectives and FLOP are those of the optimizer's own code, run on the meta device in a
process group of that size (`layout`), and for 1, 2 and 4 processes they are held against real
trainings (`checks`). Times are computed from them and from the speeds of this machine, measured in
the same run, or of another that the options give (`constants`). A step of ResNet-50 is timed, too.
Owners of matrices under FSDP2 (`owners`) are
not built.

    python -m benchmarks.distributed.scaling --flops 67e12 --training-flops 400e12 \
        --memory-bandwidth 4.8e12 --link-bandwidth 50e9 --latency 1e-5 --memory 141e9
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.distributed import checks, constants
from benchmarks.distributed.constants import Speeds
from benchmarks.distributed.counting import Call
from benchmarks.distributed.layout import SCHEMES, Seen, Step, busiest, owner_of_most, seen, step_of
from benchmarks.distributed.networks import Network, llama7b, resnet50
from benchmarks.distributed.owners import Matrix, matrices_of, owned_step
from rlscuda import RLSOptimizer

RESULT = Path(__file__).resolve().parents[1] / "results" / "scaling.json"
SIZES = [2**k for k in range(11)]
DEVICE = "cuda"  # as on which a step is divided into parts
MEMORY_SHARE, TIME_SHARE = 0.1, 0.05  # above which P, or its products, are too much


def steps_of(given: Seen, matrices: list[Matrix]) -> dict[str, dict[int, Step]]:
    """The step of the process that has most to do, by scheme and number of processes."""
    one, two = (step_of(given, "ddp", size, 0, DEVICE) for size in SIZES[:2])
    steps: dict[str, dict[int, Step]] = {name: {} for name in (*SCHEMES, "owners")}
    for size in SIZES:
        heavy, busy = owner_of_most(given, size)
        shared = step_of(given, "shard_matrices", size, heavy, DEVICE)
        if busy != heavy:
            other = step_of(given, "shard_matrices", size, busy, DEVICE)
            shared = replace(shared, work=shared.work.most(other.work))
        # the first has the most rows, others may multiply by more blocks of them, or exchange more
        ranks = dict.fromkeys((0, *busiest(given, size)))
        rows, *others = (step_of(given, "fsdp2", size, rank, DEVICE) for rank in ranks)
        for other in others:
            calls = max(rows.calls, other.calls, key=lambda calls: traffic(calls, size))
            rows = replace(rows, work=rows.work.most(other.work), calls=calls)
        steps["ddp"][size] = one if size == 1 else two  # which more processes do not change
        steps["shard_matrices"][size] = shared
        steps["fsdp2"][size] = rows
        steps["owners"][size] = owned_step(matrices, rows, size)
    return steps


def traffic(calls: list[Call], size: int) -> int:
    """Bytes that a process sends, or takes."""
    return round(sum(c.wire(size) for c in calls))


def record_of(step: Step, size: int, flops: int, machines: dict[str, Speeds]) -> dict[str, Any]:
    """What the results say of one step, bytes and seconds."""
    seconds = {}
    for name, speeds in machines.items():
        parts = speeds.seconds(step.work) | {"waiting": speeds.waiting(step.calls, size)}
        seconds[name] = parts | {"training": flops / speeds.training}
    return {
        "held": step.held, "matrices": step.matrices, "state": step.state,
        "collectives": len(step.calls), "traffic": traffic(step.calls, size),
        "exchanged": traffic([c for c in step.calls if c.kind != "all_reduce"], size),
        "exchanged_at_once": step.exchanged,
        "work": asdict(step.work), "seconds": seconds,
    }  # fmt: skip


def product_share(seconds: dict[str, float]) -> float:
    """The share of products with `P` in forward, backward and step, gradients' traffic apart."""
    return seconds["product"] / sum(seconds.values())


def first(rows: dict[int, dict], holds: Any) -> int | None:
    """The fewest processes of which something holds; None where it never does."""
    return next((size for size, row in rows.items() if holds(row)), None)


def ends_of(rows: dict[str, dict[int, dict]], largest: int, memory: float) -> dict[str, Any]:
    """Where each scheme ends.

    Args:
        rows: The records, by scheme and number of processes.
        largest: Bytes of the largest `P`.
        memory: Bytes of a device.
    """
    ddp, shared, fsdp2 = (rows[name] for name in SCHEMES)
    several, limit = ddp[SIZES[-1]], MEMORY_SHARE * memory
    weights = (several["held"] - several["state"]) // 2
    ends = {
        "weights": weights,
        "matrices": several["matrices"],
        "matrices_of_one_process": ddp[1]["matrices"],
        "largest_matrix": largest,
        "replicated_share_of_memory": several["matrices"] / memory,
        "replicated_above_share_from": first(ddp, lambda r: r["matrices"] > limit),
        "memory_of_which_it_is_the_share": several["matrices"] / MEMORY_SHARE,
        "replicated_half_of_held_from": first(fsdp2, lambda r: 2 * r["matrices"] > r["held"]),
        "owned_within_share_from": first(shared, lambda r: r["matrices"] <= limit),
        "largest_is_the_floor_from": first(shared, lambda r: r["matrices"] == largest),
        "owned_broadcast_at_once_most": max(r["exchanged_at_once"] for r in shared.values()),
        "exchange_over_gradient": several["traffic"] / (2 * weights),
        "rows_exchanged_from": first(fsdp2, lambda r: r["exchanged_at_once"]),
        "rows_exchanged_at_once_most": max(r["exchanged_at_once"] for r in fsdp2.values()),
        "rows_exchanged_most": max(r["exchanged"] for r in fsdp2.values()),
    }
    return ends | {name: time_ends(rows, name) for name in several["seconds"]}


def time_ends(rows: dict[str, dict[int, dict]], machine: str) -> dict[str, Any]:
    """Where the products with `P` take too much of the time of a machine."""
    several = rows["ddp"][SIZES[-1]]["seconds"][machine]
    rest = sum(several.values()) - several["training"]

    def within(row: dict) -> bool:
        return product_share(row["seconds"][machine]) <= TIME_SHARE

    return {
        "product_share_replicated": product_share(several),
        "minibatches_within_share": max(0.0, several["product"] / TIME_SHARE - rest)
        / several["training"],
        "by_rows_within_share_from": first(rows["fsdp2"], within),
        "by_owners_within_share_from": first(rows["shard_matrices"], within),
    }


def network_record(network: Network, machines: dict[str, Speeds], memory: float) -> dict[str, Any]:
    """All that the results say of a network."""
    given = seen(network)
    matrices = matrices_of(given)
    rows = {
        scheme: {size: record_of(step, size, given.flops, machines) for size, step in some.items()}
        for scheme, some in steps_of(given, matrices).items()
    }
    return {
        "network": network.name,
        "minibatch": network.minibatch,
        "parameters": sum(p.numel() for p in network.meta().parameters()),
        "layers": len(given.stages),
        "matrices": len(matrices),
        "ends": ends_of(rows, max(m.bytes for m in matrices), memory),
        "ranks": rows,
    }


def timed_step(speeds: Speeds) -> dict[str, float]:
    """A real step of ResNet-50 in the time of its thread, and what the speeds say of it."""
    torch.manual_seed(0)
    network = Network("ResNet-50", resnet50, (2, 3, 64, 64), "")
    model = resnet50()
    optimizer = RLSOptimizer(model, process_group=None)
    seconds = []
    for _ in range(3):
        model(torch.randn(network.input)).square().mean().backward()
        start = time.thread_time()
        optimizer.step()
        seconds.append(time.thread_time() - start)
        optimizer.zero_grad()
    said = sum(speeds.seconds(step_of(seen(network), "ddp", 1, 0).work).values())
    return {"measured": min(seconds[1:]), "computed": said}


def main() -> None:
    """Checks, measures, computes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    constants.add_options(parser)
    parser.add_argument("--memory", type=float, help="bytes of a device (assumed; this machine's)")
    parser.add_argument("--images", type=int, default=64, help="of a rank, for ResNet-50")
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank, for the transformer")
    args = parser.parse_args()
    assumed = constants.given(args)
    torch.set_num_threads(1)
    began = time.perf_counter()
    facts = environment.machine() | environment.versions()
    facts |= {"source_hash": environment.built_hash(),
              "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip
    trainings, seconds = checks.check()
    print(f"{len(trainings)} trainings call and hold what was said", flush=True)
    speeds, direction = constants.measured(seconds[2])
    machines = {"measured": speeds} | ({} if assumed is None else {"assumed": assumed})
    step = timed_step(speeds)
    print(f"a step of ResNet-50: {step['measured']:.2f} s, computed {step['computed']:.2f} s")
    memory = args.memory or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    networks = [
        Network("ResNet-50", resnet50, (args.images, 3, 224, 224), f"{args.images} images"),
        Network("Llama-like, 7 billion", llama7b, (1, args.tokens, 4096), f"{args.tokens} tokens"),
    ]
    document = {
        "environment": facts,
        "memory": {"bytes": memory, "assumed": args.memory is not None},
        "speeds": {name: asdict(speeds) for name, speeds in machines.items()},
        "all_reduce": {
            "bytes": checks.MUCH,
            "ranks": max(seconds),
            "measured": seconds[max(seconds)][checks.MUCH],
            "computed": speeds.waiting([Call("all_reduce", checks.MUCH)], max(seconds)),
        },
        "step": step | {"direction_measured_over_computed": direction},
        "trainings": trainings,
        "networks": [network_record(network, machines, memory) for network in networks],
    }
    document["seconds"] = round(time.perf_counter() - began, 1)
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{RESULT.name} in {document['seconds']} s")


if __name__ == "__main__":
    main()

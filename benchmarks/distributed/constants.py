"""The speeds from which times are computed: of this machine, measured now; or given, of another."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common.harness import Race, copy_lane
from benchmarks.distributed.checks import LITTLE, MUCH
from benchmarks.distributed.counting import Call, Counter, Work
from rlscuda import RLSOptimizer
from rlscuda.optim.moves import Move, prepare
from rlscuda.optim.state import ready
from rlscuda.optim.steps.matrices import update_matrices
from rlscuda.optim.steps.spectral import COEFFICIENTS, block_rows, write_directions
from rlscuda.optim.steps.whole import move_of

N = 2048  # of the layer [N, N] that is timed: its P is larger than caches near a core
COPIED = 256 << 20


@dataclass(frozen=True)
class Speeds:
    """Speeds of one process.

    Attributes:
        product: FLOP/s of products with `P`, in float32.
        direction: Of the other products of a step, of blocks of rows.
        update: Bytes/s that updates of `P` read and write.
        passes: Bytes/s of everything else.
        training: FLOP/s of forward and backward.
        link: Bytes/s that a process sends.
        latency: Seconds of a message.
    """

    product: float
    direction: float
    update: float
    passes: float
    training: float
    link: float
    latency: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Seconds of a step by part, without what it waits for others."""
        return {
            "product": work.product / self.product,
            "direction": work.direction / self.direction,
            "update": work.update / self.update,
            "passes": work.passes / self.passes,
        }

    def waiting(self, calls: list[Call], size: int) -> float:
        """Seconds of collectives, one after another."""
        if size == 1:
            return 0.0
        return sum(c.wire(size) / self.link + c.rounds(size) * self.latency for c in calls)


def link(seconds: dict[int, float]) -> dict[str, float]:
    """Bandwidth and latency, of the times of all-reduces by two processes.

    Args:
        seconds: By bytes, see `checks.all_reduce_seconds`.
    """
    little, much = (Call("all_reduce", count) for count in (LITTLE, MUCH))
    rate = much.wire(2) / (seconds[MUCH] - seconds[LITTLE])
    return {"link": rate, "latency": seconds[LITTLE] / little.rounds(2)}


def one_move(outputs: int, inputs: int) -> Move:
    """A linear layer about to move, with 16 rows seen of its input."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs, bias=False)
    optimizer = RLSOptimizer(model, process_group=None)
    model(torch.randn(64, inputs)).square().mean().backward()
    registry, states = optimizer._registry, optimizer.state
    (one,) = registry.covered.values()
    ready(states, registry, [one], optimizer._fallback, alone=True)
    return move_of(one, states, one.stage.summary)


def lanes_of(move: Move) -> dict[str, Any]:
    """What is timed, by the name of the speed that it gives."""
    prepare([move], {})
    group, c, n = move.group, move.outputs, move.layer.fan_in
    h = update_matrices([move], group, None)
    out, rows = torch.empty(c, n), torch.randn(c // block_rows(c), block_rows(c), n)
    made = torch.randn(rows.shape)

    one, power = h.new_ones(1), move.state["power"]
    numbers = [x for abc in COEFFICIENTS for x in abc]
    shape = [len(rows)], [len(rows[0])], [c], [n], numbers, 1e-8

    def direction() -> None:  # what of `write_directions` follows the products with P
        torch.ops.rlscuda.foreach_spectral_direction_(
            rows.view(-1), made.view(-1), [one[:0]], one, one, [power], *shape
        )

    return {
        "product": lambda: move.layer.multiply(move.grad, move.state["P"], out),
        "direction": direction,
        "update": lambda: update_matrices([move], group, None),
        "passes": copy_lane(COPIED),
        "whole": lambda: write_directions([move], [h[:0]], h, group, {}),
    }


def measured(seconds: dict[int, float], rounds: int = 5) -> tuple[Speeds, float]:
    """The speeds of this machine, one thread, in its own time, for others use it, too.

    Args:
        seconds: Of all-reduces by two processes.
        rounds: In which everything is timed in turn.

    Returns:
        The speeds; and the time of the directions of a layer over what they give for it.
    """
    move = one_move(N, N)
    with torch.no_grad():
        lanes = lanes_of(move)
        race = Race(lanes, clock=time.thread_time_ns)
        for _ in range(rounds):
            race.round()
        work = {}
        for name, run in lanes.items():
            with Counter().counting() as counter:
                run()
            work[name] = counter.work
    amounts = {
        "product": work["product"].product,
        "direction": work["direction"].direction,
        "update": work["update"].update,
        "passes": work["passes"].passes,
    }
    rates = {name: amount / race.seconds(name)["best"] for name, amount in amounts.items()}
    speeds = Speeds(**rates, training=rates["product"], **link(seconds))
    said = sum(speeds.seconds(work["whole"]).values())
    return speeds, race.seconds("whole")["best"] / said


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options by which speeds of another machine are given."""
    add = parser.add_argument
    add("--flops", type=float, help="assumed float32 FLOP/s of one device; needs the next three")
    add("--memory-bandwidth", type=float, help="assumed bytes/s of its memory")
    add("--link-bandwidth", type=float, help="assumed bytes/s that it sends")
    add("--latency", type=float, help="assumed seconds of a message")
    add("--training-flops", type=float, help="assumed FLOP/s of forward and backward (--flops)")


def given(args: argparse.Namespace) -> Speeds | None:
    """The speeds that the options give, None where there are none.

    Raises:
        ValueError: Some lack, or one is not above 0.
    """
    names = ("flops", "memory_bandwidth", "link_bandwidth", "latency")
    values = [getattr(args, name) for name in names]
    lacking = [f"--{n.replace('_', '-')}" for n, v in zip(names, values) if v is None]
    if len(lacking) == len(names):
        return None
    if lacking:
        raise ValueError(f"assumed speeds need {', '.join(lacking)}, too")
    training = args.flops if args.training_flops is None else args.training_flops
    if min(*values, training) <= 0:
        raise ValueError(f"assumed speeds must be > 0, got {[*values, training]}")
    flops, memory, sent, latency = values
    return Speeds(flops, flops, memory, memory, training, sent, latency)

"""One summary of what all processes have seen of each layer's input, the same on every rank.

The means weigh by their counts and the sketches by the roots of theirs. Of samples each row is that
of the least key. Where all processes have seen minibatches of the same sizes, their draws are those
of one process that sees rank after rank (see `place` of `Stage.observe`), and so is the result.
Where they have not, draws of different ranks may go by the same numbers: then sketches are summed
with random signs, and the rank of a sampled row is drawn anew, with a probability as its share.

For each device and dtype it takes one all-reduce, and one of few integers before it unless all
summaries are means. Every rank takes part with every layer, whatever it has seen. A GPU is waited
for where this rank has seen nothing of a layer, and when ranks first agree on what they exchange.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlscuda.optim.discovery import Covered
from rlscuda.optim.forms import rank_of
from rlscuda.optim.layers import Layer, state_dtype
from rlscuda.optim.ranks.processes import NEVER, NOT_IN_STEP, Processes
from rlscuda.optim.staging import Stage, Summary

_WEYL = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # as int64


@dataclass(frozen=True)
class Part:
    """What one layer has of the exchange.

    Attributes:
        layer: The layer.
        group: Its parameter group.
        stage: What this process has staged of it.
        step: Steps that it has taken.
        span: Steps that the update of its `P` stands for.
    """

    layer: Layer
    group: dict[str, Any]
    stage: Stage
    step: int
    span: int = 1

    @property
    def kind(self) -> str:
        """Of its summary: `mean`, `sketch` or `sample`."""
        return self.group["summary"]

    @property
    def rank(self) -> int:
        """Rows of its summary."""
        return rank_of(self.group, self.span, self.layer.fan_in)

    @property
    def dtype(self) -> torch.dtype:
        """Of its `P`, in which the exchange is."""
        return state_dtype(self.layer.weight, self.group["dtype"])

    def numbers(self, device: torch.device) -> Tensor:
        """One number [r] for each row of a sketch, the same on every rank."""
        first = (self.group["seed"] + _WEYL * (1 + self.layer.index + (self.step << 16))) % 2**62
        return torch.arange(first, first + self.rank, device=device)

    @property
    def layout(self) -> str:
        """What must be the same on all ranks."""
        layer, group = self.layer, self.group
        shape = [layer.groups, self.rank, layer.fan_in]
        return f"{layer.name} {self.kind} {shape} of seed {group['seed']}"


def staged(
    spans: Mapping[Covered, int],
    states: Mapping[Covered, Mapping[str, Any]],
    processes: Processes,
    joined: bool = False,
) -> dict[Covered, Summary | None]:
    """The summary of each layer's input, over all processes that train it together.

    Args:
        spans: Of all layers, the steps that the update of `P` stands for, 0 where it rests.
        states: Their states, where they have any.
        processes: The processes.
        joined: Whether this one makes no step of its own, see `reduce_summaries`.

    Raises:
        RuntimeError: The processes do not have the same layers, or are not at the same step.
    """
    due = [one for one, span in spans.items() if span and one.layer.weight.requires_grad]
    if processes.size == 1 or not spans:
        return {one: one.stage.summary for one in due}
    counts = {one: states.get(one, {}).get("step", 0) for one in spans}
    device = next(iter(spans)).layer.weight.device
    processes.begin(None if joined else sum(counts.values()), device)
    parts = [Part(one.layer, one.group, one.stage, counts[one], spans[one]) for one in due]
    return dict(zip(due, reduce_summaries(parts, processes, joined)))


def reduce_summaries(
    parts: Sequence[Part], processes: Processes, joined: bool = False
) -> list[Summary | None]:
    """The summaries over all processes, None for a layer of which none has seen an input.

    Args:
        parts: Every layer that may ever have one, in the same order on every rank.
        processes: Two or more.
        joined: Whether this one takes part for the others only, whose steps it does not make.

    Raises:
        RuntimeError: The processes do not have the same layers, or are not at the same step.
    """
    result: dict[int, Summary | None] = {}
    keyed = [(p.layer.weight.device, p.dtype, i) for i, p in enumerate(parts)]
    for (device, dtype), rows in itertools.groupby(
        sorted(keyed, key=lambda row: (str(row[0]), str(row[1]), row[2])), key=lambda row: row[:2]
    ):
        places = [i for *_, i in rows]
        batch = [parts[i] for i in places]
        processes.agree("; ".join(part.layout for part in batch), device)
        result.update(zip(places, _reduce(batch, processes, joined, device, dtype)))
    return [result[i] for i in range(len(parts))]


def _reduce(
    parts: list[Part],
    processes: Processes,
    joined: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Summary | None]:
    shapes = [(part.layer.groups, part.rank, part.layer.fan_in) for part in parts]
    sizes, ranks = [math.prod(shape) for shape in shapes], [part.rank for part in parts]
    flat = torch.zeros(sum(sizes) + sum(ranks), dtype=dtype, device=device)
    *views, tail = flat.split([*sizes, sum(ranks)])
    counts = tail.split(ranks)
    chosen = _agreed_draws(parts, processes, joined, device)
    for part, view, shape, count, choice in zip(parts, views, shapes, counts, chosen):
        summary = part.stage.summary
        if summary is not None:
            _put(summary, view.view(shape), count, choice)
    processes.total(flat)
    return [
        _taken(part, view.view(shape), count)
        for part, view, shape, count in zip(parts, views, shapes, counts)
    ]


def _put(summary: Summary, rows: Tensor, count: Tensor, choice: Tensor) -> None:
    """Writes this process' share of the sum, and of what it is to be divided by.

    Args:
        summary: What it has staged.
        rows: Zeros [groups, r, n].
        count: Zeros [r].
        choice: [r], see `_agreed_draws`.
    """
    own = summary.rows.to(rows)  # a sharded weight may wait on the CPU for its forwards
    if summary.kind == "sample":
        rows.copy_(torch.where(choice[:, None] > 0, own, 0))  # a product would pass NaN on
        count.copy_(choice)
        return
    start = 0
    for seen, alike in itertools.groupby(summary.count):  # numbers, which a captured step keeps
        stop = start + len(list(alike))
        count[start:stop].fill_(seen)
        start = stop
    share = count if summary.kind == "mean" else count.sqrt() * choice
    torch.mul(own, share[:, None], out=rows)


def _taken(part: Part, rows: Tensor, count: Tensor) -> Summary | None:
    """The summary of all processes, of the sums of their shares."""
    own = part.stage.summary
    if own is None and not count.any():  # only then anybody waits for a device
        return None
    divisor = count.sqrt() if part.kind == "sketch" else count
    seen = [0] * part.rank if own is None else own.count
    return Summary(part.kind, rows / divisor.clamp(min=1)[:, None], seen)


def _agreed_draws(
    parts: list[Part], processes: Processes, joined: bool, device: torch.device
) -> list[Tensor]:
    """Of each row of this process what it counts in the sum: of a sample 0 or 1, else 1 or -1.

    Raises:
        RuntimeError: The processes are not at the same step, which a CPU alone checks.
    """
    choice = {id(part): torch.ones(part.rank, device=device) for part in parts}
    drawn = [part for part in parts if part.kind != "mean"]
    if drawn:
        ranks = [part.rank for part in drawn]
        keys = torch.full((sum(ranks),), NEVER, device=device)
        shares = torch.zeros(sum(ranks), dtype=torch.float64, device=device)
        for part, own, share in zip(drawn, keys.split(ranks), shares.split(ranks)):
            summary = part.stage.summary
            if summary is not None:
                own.copy_(part.numbers(device) if summary.keys is None else summary.keys)
                share.fill_(part.stage.taken)
        random = _random(keys, processes.rank)
        uniform = random.bitwise_and(2**53 - 1).double() * 2.0**-53
        race = -torch.log1p(-uniform) / shares
        fresh = race.view(torch.int64)  # floats >= 0 are in the order of their bits
        orders = torch.stack([torch.full((), part.stage.order, device=device) for part in drawn])
        steps = torch.full((2,), sum(part.step for part in parts), device=device)
        steps[1].neg_()
        own = torch.cat((keys, fresh, orders, -orders, steps.fill_(NEVER) if joined else steps))
        agreed = own.clone()
        processes.least(agreed)
        same = own == agreed
        of_key, of_race, *even, at_step = same.split([len(keys)] * 2 + [len(drawn)] * 2 + [2])
        if device.type == "cpu" and not (joined or at_step.all()):
            raise RuntimeError(NOT_IN_STEP)
        rows = zip(drawn, *(x.split(ranks) for x in (of_key, of_race, random)), *even)
        for part, first, won, bits, even_up, even_down in rows:
            other = won if part.kind == "sample" else bits.sign()
            usual = first if part.kind == "sample" else torch.ones_like(bits)
            choice[id(part)] = torch.where(even_up & even_down, usual, other)
    return list(choice.values())


def _random(keys: Tensor, rank: int) -> Tensor:
    """64 random bits for each of some keys, others on each rank: the hash of `counter_rng.h`."""
    z = keys + (_WEYL * (rank + 1) + 2**63) % 2**64 - 2**63
    for shift, factor in zip((30, 27), _MIX):
        z = (z ^ z.bitwise_right_shift(shift).bitwise_and(2 ** (64 - shift) - 1)) * factor
    return z ^ z.bitwise_right_shift(31).bitwise_and(2**33 - 1)

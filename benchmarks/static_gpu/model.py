"""How long a launch takes, predicted from its machine code and shape. Nothing here is measured.

A launch runs in waves of as many blocks as the SMs hold at once; what is left over is the tail. Of
a wave of B blocks, on min(B, SMs) SMs, the longest of these is its time:

    memory   bytes that the algorithm moves / (share of the bandwidth)
    latency  bytes that the main loop loads / (bytes in flight / latency): Little's law, with the
             bytes that a thread asks for before it uses the first, times the threads
    issue    warp instructions / (4 a clock and SM, and of one warp one in two clocks)

Round trips to the L2 cache that depend on one another and are no part of a loop over data (`chain`)
are added. No launch is shorter than an empty one.

What is left out: that data may be in the L2 cache already (then it is faster than predicted), bank
conflicts, uncoalesced accesses, and the instructions before and after the loops that are counted.

Constants: SHARE, of the bandwidth of the data sheet, is what copies commonly reach; LAUNCH, of an
empty kernel in a stream, is 2 to 3 microseconds; latencies are of `devices`. Issue: four warp
schedulers an SM, an instruction a clock each; dependent arithmetic takes four clocks, and of an
instruction's neighbours about every second one is taken to depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.static_gpu.devices import WARP, Device

SHARE = 0.9
LAUNCH = 2.5e-6  # s
SCHEDULERS = 4
OF_A_WARP = 0.5  # instructions a clock


@dataclass(frozen=True)
class Demand:
    """What a launch asks of a GPU.

    Attributes:
        blocks: Of the grid.
        threads: Of a block.
        blocks_per_sm: That fit.
        moved: Bytes between memory and the chip, by the algorithm.
        loaded: Bytes that the main loops load, from memory or cache.
        in_flight: Bytes that a thread has asked for at once.
        instructions: That all warps issue.
        chain: Dependent round trips to the L2 cache besides, of one block.
        cached: Whether it is the L2 cache that answers the loads.
    """

    blocks: int
    threads: int
    blocks_per_sm: int
    moved: float
    loaded: float
    in_flight: float
    instructions: float
    chain: float = 0
    cached: bool = False


@dataclass(frozen=True)
class Prediction:
    """Seconds of a launch, what bounds it, its waves, and how full the last one is."""

    seconds: float
    bound: str
    waves: float
    tail: float


def predict(demand: Demand, device: Device) -> Prediction:
    """The time of one launch."""
    at_once = demand.blocks_per_sm * device.sms
    waves = demand.blocks / at_once
    full, rest = divmod(demand.blocks, at_once)
    parts = dict.fromkeys(("memory", "latency", "issue"), 0.0)
    seconds = 0.0
    for count, blocks in ((full, at_once), (1, rest)):
        if count and blocks:
            wave = _wave(demand, device, blocks)
            bound = max(wave, key=lambda name: wave[name])
            parts[bound] += count * wave[bound]
            seconds += count * wave[bound]
    chain = demand.chain * device.cache_latency * math.ceil(waves)
    parts["latency"] += chain
    seconds += chain
    bound = max(parts, key=lambda name: parts[name])
    if seconds <= LAUNCH:
        bound = "launch"
    return Prediction(max(seconds, LAUNCH), bound, waves, (rest or at_once) / at_once)


def _wave(demand: Demand, device: Device, blocks: int) -> dict[str, float]:
    """Seconds of a wave of so many blocks, by what may bound it."""
    share = blocks / demand.blocks
    warps = blocks * math.ceil(demand.threads / WARP)
    flying = demand.in_flight * demand.threads * blocks
    issued = device.clock * min(SCHEDULERS * min(blocks, device.sms), OF_A_WARP * warps)
    trip = device.cache_latency if demand.cached else device.latency
    turns = max(1.0, demand.loaded * share / flying) if flying else 0.0
    return {
        "memory": demand.moved * share / (SHARE * device.bandwidth),
        "latency": turns * trip,
        "issue": demand.instructions * share / issued,
    }

"""Timing on a shared, noisy machine: candidates race in alternating rounds, and ratios are kept.

A ratio of two times taken minutes apart says as much about the neighbours as about the code. Here
every round times every lane once, in rotating order, so that each round yields one ratio under
nearly the same conditions. Reported are the median of these per-round ratios and the ratio of the
best times; on a quiet machine the two agree.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Lane = Callable[[], object]


class Race:
    """Times of several callables, taken in alternating rounds.

    Args:
        lanes: What to time, by name; each callable must leave its inputs fit for another call.
        sample_seconds: A lane that takes less is repeated until one sample lasts that long.
        every: Lanes too slow for every round: name -> the number of rounds between two samples.
        work: Lanes whose call is not the work once: name -> how often, as .5 of a half of it or 4.
        finish: Called at the end of each sample: waits for a device that works on its own.
        clock: In nanoseconds: of the wall, or of the thread alone on a machine that others use.
    """

    def __init__(
        self,
        lanes: dict[str, Lane],
        sample_seconds: float = 2e-3,
        every: dict[str, int] | None = None,
        work: dict[str, float] | None = None,
        finish: Lane = lambda: None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ):
        self.lanes = lanes
        self.sample = functools.partial(_sample, finish=finish, clock=clock)
        self.every = every or {}
        self.work = work or {}
        self.rounds = 0
        self.samples: dict[str, dict[int, float]] = {name: {} for name in lanes}
        self.repeats = {
            name: _repeats(run, sample_seconds, self.sample) for name, run in lanes.items()
        }

    def round(self) -> None:
        """Times every lane once."""
        names = list(self.lanes)
        first = self.rounds % len(names)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                if self.rounds % self.every.get(name, 1) == 0:
                    seconds = self.sample(self.lanes[name], self.repeats[name])
                    self.samples[name][self.rounds] = seconds / self.work.get(name, 1)
        finally:
            if collecting:
                gc.enable()
        self.rounds += 1

    def seconds(self, name: str) -> dict[str, float]:
        """The best and the median time in which a lane does the work."""
        times = self.samples[name].values()
        return {"best": min(times), "median": statistics.median(times)}

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """Time of a lane / time of another: median of the rounds' ratios, ratio of best times."""
        ours, theirs = self.samples[name], self.samples[baseline]
        common = [ours[k] / theirs[k] for k in ours if k in theirs]
        best = self.seconds(name)["best"] / self.seconds(baseline)["best"]
        return {"median": statistics.median(common), "best": best}


def _sample(run: Lane, repeats: int, finish: Lane, clock: Callable[[], int]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    finish()
    return (clock() - start) / repeats * 1e-9


def _repeats(run: Lane, sample_seconds: float, sample: Callable[[Lane, int], float]) -> int:
    """Calls that fill one sample, after a call to warm up; 1 for what is slow anyhow."""
    if sample(run, 1) > 100 * sample_seconds:
        return 1
    repeats = 1
    while (one := sample(run, repeats)) * repeats < sample_seconds / 2 and repeats < 4096:
        repeats *= 2
    return max(1, min(4096, round(sample_seconds / one)))


def waiting(device: str) -> Lane:
    """What waits until a device has done its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def copy_lane(traffic: float, device: str = "cpu") -> Lane:
    """A copy that reads and writes `traffic` bytes together: the floor of a memory-bound kernel."""
    source = torch.ones(max(1, int(traffic) // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def ceilings(device: str = "cpu") -> dict[str, float]:
    """What a device reaches now: copy bandwidth in GB/s and float32 GEMM rate in GFLOP/s."""
    traffic, n = (256 << 20, 1024) if device == "cpu" else (4 << 30, 8192)
    a, b, c = (torch.ones(n, n, device=device) for _ in range(3))
    lanes = {"copy": copy_lane(traffic, device), "gemm": lambda: torch.mm(a, b, out=c)}
    race = Race(lanes, finish=waiting(device))
    for _ in range(6):
        race.round()
    return {
        "copy_gb_s": traffic / race.seconds("copy")["best"] / 1e9,
        "gemm_gflop_s": 2 * n**3 / race.seconds("gemm")["best"] / 1e9,
    }


def tensor_bytes(run: Lane) -> int:
    """Bytes that torch's allocators hand out during one call, freed or not."""
    run()
    return sum(change for change in _allocations(run) if change > 0)


def live_bytes(run: Lane) -> int:
    """The most by which what torch's allocators have handed out grows during one call."""
    return max(itertools.accumulate(_allocations(run), initial=0))


def _allocations(run: Lane) -> list[int]:
    """Bytes handed out in one call, or given back where negative, in order."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [e.nbytes() for e in memory]


def peak_bytes(run: Lane) -> int | None:
    """Growth of the process' peak resident memory in a second call; None off Linux."""
    run()
    return growth(run)


def growth(run: Lane) -> int | None:
    """Growth of the process' peak resident memory in one call, by the page; None off Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
    except OSError:
        run()
        return None

    def field(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    before = field("VmRSS")
    run()
    return max(0, field("VmHWM") - before)

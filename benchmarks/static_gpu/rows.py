"""One row a kernel and case: what the code says, how the launch fills a GPU, what that takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.static_gpu.devices import DEVICES, H200, Device
from benchmarks.static_gpu.launches import Call, Launch, recorded
from benchmarks.static_gpu.machine_code.loops import Main
from benchmarks.static_gpu.machine_code.streams import STREAMS, main_of
from benchmarks.static_gpu.machine_code.tools import Kernel, kernels
from benchmarks.static_gpu.model import Demand, predict
from benchmarks.static_gpu.work import work_of

VECTOR = 16  # bytes that a thread can load at once
STEP = "step "  # what cases that are whole steps begin with


class Analysis:
    """The machine code for one GPU, and the loops found in it."""

    def __init__(self, device: Device, found: dict[str, Kernel]):
        self.device = device
        self.kernels = {name.partition(": ")[2]: kernel for name, kernel in found.items()}
        self._mains: dict[tuple[str, str], Main] = {}

    def main(self, stream: str, kernel: str) -> Main:
        """The main loop of a stream."""
        if (stream, kernel) not in self._mains:
            self._mains[stream, kernel] = main_of(STREAMS[stream], self.kernels[kernel])
        return self._mains[stream, kernel]

    def row(self, case: str, call: Call, launch: Launch) -> dict[str, Any]:
        """The figures of one launch."""
        work, kernel = work_of(call, launch), self.kernels[launch.kernel]
        shared = kernel.shared + launch.dynamic
        fit = self.device.blocks_per_sm(launch.threads, kernel.registers, shared)
        instructions, loaded, main = 0.0, 0.0, None
        for stream, amount in work.loaded.items():
            loop = self.main(stream, launch.kernel)
            main = main or loop
            products = STREAMS[stream].products
            turns = amount / (len(loop.loads) if products else loop.bytes)
            instructions += turns * len(loop.instructions) / 32
            loaded += 0 if products else amount
        demand = Demand(
            launch.blocks, launch.threads, fit, work.moved, loaded,
            main.in_flight if main else 0, instructions, work.chain, work.cached,
        )  # fmt: skip
        predicted = predict(demand, self.device)
        stream = next(iter(work.loaded), "counters")
        row = {
            "case": case, "kernel": launch.kernel, "stream": stream, "device": self.device.name,
            "bytes": round(work.moved), "blocks": launch.blocks, "threads": launch.threads,
            "registers": kernel.registers, "shared": shared, "blocks_per_sm": fit,
            "waves": round(predicted.waves, 2), "tail": round(predicted.tail, 2),
            "microseconds": _round(predicted.seconds * 1e6), "bound": predicted.bound,
        }  # fmt: skip
        if main:
            row |= {
                "load": main.load_width, "store": main.store_width,
                "per_byte": _round(len(main.instructions) / main.bytes),
                "in_flight": main.in_flight * launch.threads * fit,
            }  # fmt: skip
        return row | {"findings": findings(row, self.device)}


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def findings(row: dict[str, Any], device: Device) -> list[str]:
    """What is worth a look: `narrow` loads, `shallow` (few bytes in flight), bound by `issue`."""
    found = []
    if row.get("load", VECTOR) < VECTOR:
        found.append("narrow")
    if row.get("in_flight", device.bytes_in_flight) < device.bytes_in_flight:
        found.append("shallow")
    if row["bound"] == "issue":
        found.append("issue")
    return found


def all_rows() -> Iterator[dict[str, Any]]:
    """The rows of every case on every GPU; of a whole step, its launches."""
    cases = recorded()
    for device in DEVICES:
        analysis = Analysis(device, kernels(device.arch))
        for case, calls in cases.items():
            if case.startswith(STEP) and device is not H200:
                continue
            for call in calls:
                for launch in call.launches:
                    yield analysis.row(case, call, launch)

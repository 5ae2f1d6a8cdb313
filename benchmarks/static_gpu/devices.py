"""What an SM holds and how fast a GPU is, by its maker's data sheets.

Limits of an SM: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
H200 SXM: 132 SMs, 4.8 TB/s (NVIDIA H200 data sheet), 1.98 GHz (boost clock of the H100 SXM, whose
chip it has). A100 SXM 80 GB: 108 SMs, 2.039 TB/s, 1.41 GHz (NVIDIA A100 data sheet).
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: For tables.
        arch: Its architecture, as the compiler names it.
        sms: Streaming multiprocessors.
        bandwidth: Of its memory, bytes/s.
        clock: Boost clock, Hz.
        shared: Bytes of shared memory of an SM, all blocks together.
        shared_of_block: Most that one block may have.
    """

    name: str
    arch: str
    sms: int
    bandwidth: float
    clock: float
    shared: int
    shared_of_block: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    latency: float = 700e-9  # s, of a load from memory under load
    cache_latency: float = 300e-9  # s, of one that the L2 cache answers
    reserved_shared: int = 1024  # bytes, of each block, by the system

    @property
    def bytes_in_flight(self) -> float:
        """That an SM must have asked for at any time to use its share of the bandwidth."""
        return self.bandwidth * self.latency / self.sms

    def blocks_per_sm(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that are on an SM at once; shared: bytes, static and dynamic.

        Raises:
            ValueError: Not one fits.
        """
        warps = _up(threads, WARP) // WARP
        of_warp = _up(registers * WARP, 256)
        # each of the four schedulers has a quarter of the registers
        warps_by_registers = self.registers // 4 // of_warp * 4
        most = {
            "threads": self.threads // (warps * WARP),
            "registers": warps_by_registers // warps,
            "shared memory": self.shared // _up(shared + self.reserved_shared, 128),
            "blocks": self.blocks,
        }
        if shared > self.shared_of_block:
            most["shared memory"] = 0
        least = min(most, key=lambda name: most[name])
        if most[least] < 1:
            raise ValueError(
                f"a block of {threads} threads, {registers} registers each, with {shared} bytes of "
                f"shared memory does not fit on {self.arch}: {least}"
            )
        return most[least]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


H200 = Device("H200", "sm_90", 132, 4.8e12, 1.98e9, 228 << 10, 227 << 10)
A100 = Device("A100", "sm_80", 108, 2.039e12, 1.41e9, 164 << 10, 163 << 10)
DEVICES = (H200, A100)

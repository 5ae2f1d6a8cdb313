"""What a result depends on: the machine, the versions, the kernel sources."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch

import rlscuda
from benchmarks.common.sources import ROOT, cpu_hash, tree_hash


def alike(of: str, name: str = "") -> set[str]:
    """The hashes of kernel sources whose results hold for those of this tree.

    `results/alike.json` names them for one state of the CPU's sources: times hold where nothing has
    changed that the benchmark runs, as in csrc/cuda; what was learnt holds where
    `tests/identical/run.py` has shown that networks train and are pruned to the same bits, or to
    rounding errors, and runs made again have ended within the spread of their seeds.

    Args:
        of: `times` on a CPU; what was learnt, `trains`; or `all` that is in the sources.
        name: Of the result, for its times.
    """
    shown = json.loads((ROOT / "benchmarks" / "results" / "alike.json").read_text())
    if shown["cpu"] != cpu_hash():
        return {tree_hash()}
    times = {kernels for kernels, names in shown["times"].items() if name in names}
    return {tree_hash(), *{"times": times, "trains": shown["trains"]}.get(of, ())}


def built_hash() -> str:
    """The hash of the kernel sources that the loaded extension was built from."""
    return rlscuda.build_info()["source_hash"]


def machine() -> dict:
    """CPU, cores, threads, SIMD level of the kernels, GPU, and how busy the machine is."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": rlscuda.build_info()["simd"],
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict:
    """Python and the libraries that are timed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rlscuda": rlscuda.__version__,
    }

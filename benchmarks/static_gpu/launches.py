"""The launches of every case: the host code's own, recorded by the build of tests/cuda_on_cpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.common.environment import ROOT
from benchmarks.static_gpu.machine_code.tools import short_names

sys.path.append(str(ROOT / "tests" / "cuda_on_cpu"))
from as_cpp import build, environment  # noqa: E402
from run import TARGET  # noqa: E402


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: Its name without the file, `patch_mean_sums_kernel<float, 4>`.
        blocks: Of the grid.
        threads: Of a block.
        dynamic: Bytes of dynamic shared memory.
        integers: Those of its arguments that are integers.
    """

    kernel: str
    blocks: int
    threads: int
    dynamic: int
    integers: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of an operator: the sizes of its tensors by argument, and what it launches."""

    op: str
    sizes: dict[str, Any]
    launches: tuple[Launch, ...]


def recorded() -> dict[str, list[Call]]:
    """The calls of every case of `calls`, by its name.

    Raises:
        RuntimeError: The build or the calls failed.
    """
    build(ROOT, TARGET)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        variables = environment(TARGET, "max_malloc_fill_size=0")
        variables["CUDA_ON_CPU_LAUNCHES"] = str(path)
        variables["PYTHONPATH"] = os.pathsep.join([str(TARGET), str(ROOT)])
        script = Path(__file__).with_name("calls.py")
        command = [sys.executable, str(script), str(path)]
        result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=TARGET)
    if result.returncode:
        raise RuntimeError(f"{script.name} failed:\n{result.stdout}{result.stderr}")
    names = _kernels()
    return {
        case["case"]: [
            Call(call["op"], call["sizes"], tuple(_launch(x, names) for x in call["launches"]))
            for call in case["calls"]
        ]
        for case in json.loads(result.stdout.splitlines()[-1])
    }


def _kernels() -> dict[int, str]:
    """Kernels by their offset in the library."""
    (library,) = (TARGET / "rlscuda").glob("_C.*.so")
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split() for line in listed.stdout.splitlines() if "_kernel" in line]
    symbols = [s for s in symbols if len(s) == 3 and s[1] in "tTwW"]
    names = short_names([name for _, _, name in symbols])
    return {int(offset, 16): name for (offset, _, _), name in zip(symbols, names)}


def _launch(line: str, names: dict[int, str]) -> Launch:
    offset, *rest = line.split()
    numbers = [int(x) for x in rest]
    return Launch(
        names[int(offset, 16)],
        prod(numbers[:3]),
        prod(numbers[3:6]),
        numbers[6],
        tuple(numbers[7:]),
    )

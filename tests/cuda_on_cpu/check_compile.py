"""Compiles every CUDA kernel for every architecture and compares what each takes with the budget.

    python tests/cuda_on_cpu/check_compile.py [--update]

Warnings are errors. budget.json has, for each kernel, the most registers, bytes of static shared
memory and bytes of spills over the architectures: more than that is an error, less asks for
`--update`. The architectures are those of TORCH_CUDA_ARCH_LIST, or the default of setup.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("budget.json")
ARCHS = re.search(r'"TORCH_CUDA_ARCH_LIST", "(.*?)"', (ROOT / "setup.py").read_text())[1]
FLAGS = "-std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v -c"


def usage(source: Path) -> dict[str, dict[str, int]]:
    """The most that each kernel of a file takes on any architecture."""
    command = ["nvcc", *FLAGS.split(), "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "cuda")]
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHS).replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    with tempfile.TemporaryDirectory() as directory:
        command += ["--threads", "0", str(source), "-o", f"{directory}/kernel.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    kernels: dict[str, dict[str, int]] = {}
    blocks = re.split(r"Compiling entry function '(\w+)'", result.stderr)
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(blocks[1::2]), capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name, block in zip(names, blocks[2::2]):
        short = name.replace("rlscuda::", "").replace("(anonymous namespace)::", "")
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", block))
        taken = {
            "registers": registers,
            "shared": int(shared[1]) if shared else 0,
            "spills": spills,
        }
        most = kernels.setdefault(f"{source.stem}: {short}", taken)
        kernels[f"{source.stem}: {short}"] = {k: max(v, most[k]) for k, v in taken.items()}
    return kernels


def main(update: bool) -> int:
    """Prints the table; 1 where a kernel takes more than its budget, or spills."""
    kernels = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        start = time.perf_counter()
        kernels |= usage(source)
        print(f"{time.perf_counter() - start:6.1f} s  {source.name}", flush=True)
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if update:
        BUDGET.write_text(json.dumps(kernels, indent=1) + "\n")
        budget = kernels
    bad = []
    for name, taken in kernels.items():
        allowed = budget.get(name, {"registers": 0, "shared": 0, "spills": 0})
        over = [k for k, v in taken.items() if v > allowed[k]]
        print(" ".join(f"{k} {v:5}" for k, v in taken.items()), name, "OVER BUDGET" if over else "")
        bad += [name] if over or taken["spills"] else []
    gone = budget.keys() - kernels.keys()
    if gone:
        print("in the budget, but no more:", *gone, sep="\n  ")
    return int(bool(bad or gone))


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv))

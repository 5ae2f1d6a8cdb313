"""Compiles every CUDA kernel for every architecture and compares what each takes with the budget.

    python tests/cuda_on_cpu/check_compile.py [--update]

Warnings are errors. budget.json has, for each kernel, the most registers, bytes of static shared
memory and bytes of spills over the architectures: more than that is an error, less asks for
`--update`. The architectures are those of TORCH_CUDA_ARCH_LIST, or the default of setup.py.
What is compiled stays in build/cuda_objects until a source or the compiler changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("budget.json")
OBJECTS = ROOT / "build" / "cuda_objects"
ARCHS = re.search(r'"TORCH_CUDA_ARCH_LIST", "(.*?)"', (ROOT / "setup.py").read_text())[1]
FLAGS = "-std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v -c"
FLAGS += " -lineinfo"  # for those who read the machine code; it stays the same


def compiled(source: Path) -> Path:
    """The object of a file, compiled now unless it is there; beside it, as .log, ptxas' report."""
    command = ["nvcc", *FLAGS.split(), "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "cuda")]
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHS).replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    made = OBJECTS / f"{source.stem}.o"
    command += ["--threads", "0", str(source), "-o", str(made)]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    parts = [p.read_bytes() for p in (source, *sorted(headers))]
    stamp = hashlib.sha256(b"".join([version, str(command).encode(), *parts])).hexdigest()
    made_of = made.with_suffix(".stamp")
    if not (made.exists() and made_of.exists() and made_of.read_text() == stamp):
        OBJECTS.mkdir(parents=True, exist_ok=True)
        made_of.unlink(missing_ok=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stdout + result.stderr)
        made.with_suffix(".log").write_text(result.stderr)
        made_of.write_text(stamp)
    return made


def short_names(mangled: list[str]) -> list[str]:
    """Names of kernels as the budget has them: `patch_mean_sums_kernel<float, 4>`."""
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [
        name.replace("rlscuda::", "").replace("(anonymous namespace)::", "")
        for name in names.stdout.splitlines()
    ]


def usage(source: Path) -> dict[str, dict[str, int]]:
    """The most that each kernel of a file takes on any architecture."""
    report = compiled(source).with_suffix(".log").read_text()
    kernels: dict[str, dict[str, int]] = {}
    blocks = re.split(r"Compiling entry function '(\w+)'", report)
    for name, block in zip(short_names(blocks[1::2]), blocks[2::2]):
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", block))
        taken = {
            "registers": registers,
            "shared": int(shared[1]) if shared else 0,
            "spills": spills,
        }
        most = kernels.setdefault(f"{source.stem}: {name}", taken)
        kernels[f"{source.stem}: {name}"] = {k: max(v, most[k]) for k, v in taken.items()}
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
        lines = (f" {json.dumps(name)}: {json.dumps(taken)}" for name, taken in kernels.items())
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
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

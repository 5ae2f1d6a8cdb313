"""Builds the CPU's half of the extension under sanitizers and fuzzes it; see README.md.

python tests/fuzz/run.py [calls [seed]]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "build" / "fuzz"
sys.path.insert(0, str(ROOT / "tests" / "cuda_on_cpu"))

from as_cpp import build, environment  # noqa: E402

CALLS, PROCESSES = 20_000, 2
# what does not fit is refused by malloc, as it would be on a machine without that much memory
ASAN = "allocator_may_return_null=1:max_allocation_size_mb=2048"


def main(calls: int = CALLS, seed: int = 0) -> int:
    """Makes `calls` calls, shared among processes; 0 where none was amiss."""
    build(ROOT, TARGET, cuda=False)
    variables = environment(TARGET, ASAN)
    variables["PYTHONPATH"] = f"{TARGET}:{TARGET / 'tests'}"
    script = str(TARGET / "tests" / "fuzz" / "fuzz.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, str(calls // PROCESSES), str(seed + part)],
            cwd=TARGET, env=variables,
        )
        for part in range(PROCESSES)
    ]  # fmt: skip
    codes = [process.wait() for process in running]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""Executes the CUDA kernels on the CPU under the repository's own tests; see README.md.

    python tests/cuda_on_cpu/run.py [pytest arguments]

Without arguments: all shapes and dtypes with threads in ascending order, and a choice of memory
layouts and operators in the other orders, which a fiber at a time allows in a few minutes. It is a
step of .ci/run rather than a test of its own, since it compiles the library a second time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from as_cpp import build, environment

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "build" / "cuda_on_cpu"
PATCHES, WEIGHTS = "tests/ops/patches/test_patch_ops.py", "tests/ops/steps/test_weight_step.py"
NONFINITE = "tests/ops/steps/test_nonfinite.py"
UPDATES, LAYERS = "tests/ops/test_rls_update.py", "tests/ops/test_foreach_ops.py"
HELD, RIDGES = "tests/ops/test_rls_held.py", "tests/ops/ridges/test_rls_ridge.py"
AHEAD, MOVES = "tests/ops/steps/test_nesterov.py", "tests/ops/steps/test_many_layers.py"
ROOTS = "tests/ops/steps/test_spectral_root.py"
BANK = "tests/ops/filters/test_rls_bank.py"
REAL = "not opcheck and not compiles and not threads and not complex and not conjugated"
RUNS = [  # order of threads and blocks, pytest arguments
    ("ascending", [PATCHES, "-k", "equals or rows_of_a_linear or unbatched"]),
    ("descending", [PATCHES, "-k", "any_memory and (stride_uneven or one_image or circular_same)"]),
    ("shuffled", [PATCHES, "-k", "equals and (3x3_valid or groups or pixel_batch or wide)"]),
    (
        "ascending",
        [UPDATES, WEIGHTS, NONFINITE, "-k", REAL],
    ),
    ("ascending", [AHEAD]),
    ("ascending", [MOVES, "-k", "not threads"]),
    ("shuffled", [AHEAD, "-k", "equals or launch"]),
    ("ascending", [ROOTS, "-k", "not opcheck and not threads and not 370"]),
    ("shuffled", [ROOTS, "-k", "equals and (17 or 33) or singular and 5 or shapes_layers"]),
    ("descending", [ROOTS, "-k", "equals and (3 or 16) or finite_stays"]),
    ("ascending", [HELD, "-k", "not opcheck and not compiles and not follows"]),
    ("ascending", [BANK, "-k", "not opcheck and not threads and not wrong"]),
    ("shuffled", [BANK, "-k", "equals and forget and float64 or named or twice"]),
    ("descending", [BANK, "-k", "equals and ridges or fault or resets"]),
    ("shuffled", [HELD, "-k", "equals and shrinkage or reset_in or refused and None"]),
    ("descending", [LAYERS, MOVES, "-k", "not float64 and not threads"]),
    ("descending", [HELD, "-k", "float32_follows or holds"]),
    ("shuffled", [RIDGES, "-k", "not dead and not 130 and not 200"]),
    ("shuffled", [LAYERS, "-k", "mixed_layers and not float16 or high_ranks or follows"]),
    ("shuffled", [MOVES, "-k", "measured and 1 and not float16 or within"]),
]


def run(target: Path, arguments: list[str], order: str, stdout=None) -> int:
    """Runs pytest in the built `target` and returns its exit status."""
    variables = environment(target, "max_malloc_fill_size=1000000000:malloc_fill_byte=255")
    variables["CUDA_ON_CPU_ORDER"] = order
    plugins = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
    ]  # whose handler hides that of ASan
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]
    return subprocess.run(
        command, cwd=target, env=variables, stdout=stdout, stderr=stdout
    ).returncode


def _run_quietly(order: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of a run that others go beside."""
    with tempfile.TemporaryFile("w+") as log:
        status = run(TARGET, arguments, order, stdout=log)
        log.seek(0)
        return status, log.read()


def main(arguments: list[str]) -> int:
    """Builds, then runs the tests asked for, a run a core; 0 where all pass."""
    build(ROOT, TARGET)
    if arguments:
        return run(TARGET, arguments, os.environ.get("CUDA_ON_CPU_ORDER", "ascending"))
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for status, output in pool.map(_run_quietly, *zip(*RUNS)):
            print(output, flush=True)
            failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

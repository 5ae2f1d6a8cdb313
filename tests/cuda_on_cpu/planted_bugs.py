"""Plants bugs in copies of the kernels and demands that executing them on the CPU finds each.

    python tests/cuda_on_cpu/planted_bugs.py [part of a name]

A bug is one replacement in one source file, and the tests that must fail of it. The sources are
built beside the good ones of run.py, so only the file with the bug is compiled.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from as_cpp import build
from run import ROOT, TARGET, run

MEAN = ["tests/ops/patches/test_patch_ops.py", "-k", "equals and many_images"]
LINE = ["tests/ops/patches/test_patch_ops.py", "-k", "equals and 3x3_valid"]
NONFINITE = ["tests/ops/steps/test_nonfinite.py", "-k", "nonfinite_finds"]
LAYERS = [
    "tests/ops/test_foreach_ops.py",
    "-k",
    "update_of and True-forgetting and float32 or follows",
]
HELD = ["tests/ops/test_rls_held.py", "-k", "equals and shrinkage or holds"]
BANK = ["tests/ops/filters/test_rls_bank.py", "-k", "equals and 33 and ridges or resets"]
MOVES = "tests/ops/steps/test_many_layers.py"
ROWS = [MOVES, "-k", "step_of_mixed and True and not float16 and not float64"]
NORMS = [MOVES, "-k", "measured and 1 and not float16 and not float64"]
ROOTS = ["tests/ops/steps/test_spectral_root.py", "-k", "equals and (17 or 33)"]
AHEAD = ["tests/ops/steps/test_nesterov.py", "-k", "equals_the_reference_with_biases"]


class Bug(NamedTuple):
    """One replacement in a kernel's source."""

    name: str
    path: str
    good: str
    bad: str
    tests: list[str]
    order: str = "ascending"


BUGS = [
    Bug("off by one: an image too many", "csrc/cuda/patch_mean.cu",
        "for (; b < end; b += step) {", "for (; b <= end; b += step) {", MEAN),
    Bug("off by one: the last element of a tensor", "csrc/cuda/nonfinite.cu",
        "if (tail + threadIdx.x < count)", "if (tail + threadIdx.x + 1 < count)", NONFINITE),
    Bug("a missing barrier after shared memory is filled", "csrc/cuda/patch_mean.cu",
        "  __syncthreads();\n  if (plan.side_by_side > 1) {",
        "  if (plan.side_by_side > 1) {", LINE),
    Bug("a missing barrier before shared memory is filled again", "csrc/cuda/patch_sketch.cu",
        "      partial[((part * draw.rank + tile.k) * g.channels + channel) * taps + tile.tap + t]"
        " = sum;\n    __syncthreads();",
        "      partial[((part * draw.rank + tile.k) * g.channels + channel) * taps + tile.tap + t]"
        " = sum;", LINE),
    Bug("a barrier that some threads skip", "csrc/cuda/patch_sketch.cu",
        "    __syncthreads();\n    if (!works) continue;",
        "    if (!works) continue;\n    __syncthreads();", LINE),
    Bug("a shuffle that some lanes skip", "csrc/cuda/patch_sample.cu",
        "  Choice best{INT64_MAX, 0};",
        "  if (threadIdx.x >= images) return {INT64_MAX, 0};\n  Choice best{INT64_MAX, 0};", LINE),
    Bug("an aligned load of what is not aligned", "csrc/cuda/patch_mean.cu",
        "reinterpret_cast<uintptr_t>(x) % 16 == 0 &&", "true &&",
        ["tests/ops/patches/test_patch_ops.py", "-k", "any_memory and 1x1_stride"]),
    Bug("a workspace that is too small", "csrc/cuda/patch_sketch.cu",
        "return (plan.parts() * g.channels * g.taps() + plan.chunks) * draw.rank;",
        "return plan.parts() * g.channels * g.taps() * draw.rank;",
        ["tests/ops/patches/test_patch_ops.py", "-k", "equals and 3x3_valid and float32"]),
    Bug("an asymmetric store", "csrc/cuda/rls_tiles.h",
        "P[(j0 + r) * n + i0 + c] = shared.mirror[c][r];",
        "P[(j0 + r) * n + i0 + c] = shared.mirror[c][r] * T(1.0000002);", LAYERS),
    Bug("an asymmetric product", "csrc/cuda/rls_tiles.h", "acc[r][q] -= rows[r] * columns[q];",
        "acc[r][q] -= rows[r] * T(1.0000001) * columns[q] / T(1.0000001);", LAYERS),
    Bug("a missing barrier before the mirror image is read", "csrc/cuda/rls_tiles.h",
        "  __syncthreads();\n  const int warp", "  const int warp", LAYERS),
    Bug("a missing barrier in the elimination", "csrc/cuda/rls_solve.h",
        "    }\n    __syncthreads();\n  }\n  return true;", "    }\n  }\n  return true;", LAYERS),
    Bug("a missing barrier of a warp", "csrc/cuda/rls_solve.h",
        "      __syncwarp();\n", "", LAYERS),
    Bug("off by one: the last row of a split", "csrc/cuda/rls_project.h", "j < j1 ? left : 0",
        "j < j1 - 1 ? left : 0", LAYERS),
    Bug("a column beyond the matrix", "csrc/cuda/rls_project.h", "if (c < left) v",
        "if (c <= left) v", LAYERS),
    Bug("off by one: the last row that is held", "csrc/cuda/rls_held.cu",
        "t < held; ++t) taken += T(C", "t + 1 < held; ++t) taken += T(C", HELD),
    Bug("an update that is applied one too late", "csrc/cuda/rls_held.cu",
        "must_apply(next, call.hold) ?", "must_apply(next, call.hold + 1) ?", HELD),
    Bug("a missing barrier before a column is subtracted", "csrc/cuda/rls_bank.cu",
        "    __syncthreads();\n    subtract<THREADS>(P, v, T(1), n);",
        "    subtract<THREADS>(P, v, T(1), n);", BANK),
    Bug("off by one: the last part of a column", "csrc/cuda/rls_bank.cu",
        "r < place.rows; ++r) sum", "r + 1 < place.rows; ++r) sum", BANK),
    Bug("a missing barrier in the sum of a row", "csrc/cuda/rows.h",
        "parts[threadIdx.x / 32] = x;\n  __syncthreads();", "parts[threadIdx.x / 32] = x;", ROWS),
    Bug("off by one: a column of a product too many", "csrc/cuda/complete_products.cu",
        "if (j >= columns) continue;", "if (j > columns) continue;", NORMS),
    Bug("the rows of a matrix beyond the first 32", "csrc/cuda/complete_products.cu",
        "i < rows; i += 32) total", "i < min(rows, 32u); i += 32) total", NORMS),
    Bug("a missing barrier before the largest of a row is written", "csrc/cuda/rows.h",
        "  __syncthreads();\n  if (threadIdx.x % 32 == 0) parts",
        "  if (threadIdx.x % 32 == 0) parts", AHEAD, "descending"),
    Bug("a row that is divided by the largest of the matrix before", "csrc/cuda/nesterov.cu",
        "if (q / a.padded != group) {", "if (group == UINT32_MAX) {", AHEAD),
    Bug("off by one: a column too many", "csrc/cuda/nesterov.cu",
        "if (j >= a.n) continue;\n      const T g", "if (j > a.n) continue;\n      const T g",
        AHEAD),
    Bug("a missing barrier before a product overwrites its factor", "csrc/cuda/spectral_root.cu",
        "  __syncthreads();  // until all have read what this overwrites\n", "", ROOTS),
    Bug("a column of a tile too few in its mirror image", "csrc/cuda/spectral_root.cu",
        "for (int q = r + 1; q < kTile; ++q) sums[r][q] = sums[q][r];",
        "for (int q = r + 1; q + 1 < kTile; ++q) sums[r][q] = sums[q][r];", ROOTS),
]  # fmt: skip


def main(part: str = "") -> int:
    """Builds and runs each bug, one a core; the number of those that no test found."""
    build(ROOT, TARGET)
    missed = 0
    bugs = [bug for bug in BUGS if part in bug.name]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, (found, why) in zip(bugs, pool.map(_is_found, bugs)):
            print(f"{'FOUND ' if found else 'MISSED'} {bug.name}\n       {why}", flush=True)
            missed += not found
    return missed


def _is_found(bug: Bug) -> tuple[bool, str]:
    """Whether a test turns red of a bug, and what it says."""
    with tempfile.TemporaryDirectory() as directory:
        root, target = Path(directory) / "sources", Path(directory) / "build"
        for name in ("csrc", "rlscuda", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so"))
        shutil.copy(ROOT / "pyproject.toml", root)
        shutil.copytree(TARGET, target, copy_function=shutil.copy2)
        text = (root / bug.path).read_text()
        if text.count(bug.good) != 1:
            raise SystemExit(f"{bug.name}: {bug.path} must have once: {bug.good}")
        (root / bug.path).write_text(text.replace(bug.good, bug.bad))
        build(root, target)
        output = Path(directory) / "output"
        with output.open("w") as log:
            status = run(target, [*bug.tests, "-x", "-s", "--tb=line"], bug.order, stdout=log)
        lines = output.read_text().splitlines()
    why = [line[:160] for line in lines if "error: " in line.lower()] or lines[-1:]
    return status == 1 or status < 0, why[0] if why else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

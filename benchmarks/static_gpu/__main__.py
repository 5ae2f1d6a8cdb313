"""Reads the machine code of the kernels and predicts what every case takes, without a GPU.

    python -m benchmarks.static_gpu            # writes results/static_gpu.json, prints the tables
    python -m benchmarks.static_gpu --check    # compares with expected.json; 1 where it is worse
    python -m benchmarks.static_gpu --update   # writes expected.json, too

Needs nvcc, c++filt, cuobjdump and nvdisasm (the extra `sass`), and g++ for the launches.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import environment
from benchmarks.static_gpu import expectation, rows
from benchmarks.static_gpu.report import report

RESULTS = Path(__file__).resolve().parents[1] / "results" / "static_gpu.json"


def _compiler() -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", version.stdout)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, predicts, and compares or writes; 1 where something is worse than expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with expected.json")
    what.add_argument("--update", action="store_true", help="write expected.json anew")
    args = parser.parse_args(argv)
    compiler, found = _compiler(), list(rows.all_rows())
    if args.check:
        expected = expectation.read()
        bad = expectation.complaints(expected, found)
        if expected["compiler"] != compiler:
            print(f"expected figures are of {expected['compiler']}, those found of {compiler}")
        print(*bad, sep="\n")
        print(f"{len(found)} launches, {len(bad)} figures worse than expected")
        return int(bool(bad))
    document = {
        "compiler": compiler,
        "source_hash": environment.tree_hash(),
        "rows": found,
    }
    RESULTS.write_text(expectation.as_lines(document, 2), encoding="utf-8")
    if args.update:
        expectation.write(found, compiler)
    print(report(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`rlscuda bench`: the benchmarks live in the source checkout, this finds and runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rlscuda.cli.common.errors import UserError
from rlscuda.optional import optional


def find_checkout() -> Path:
    """The nearest folder, from the current one upwards, then around the package, with benchmarks.

    Raises:
        UserError: There is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if any((folder / "benchmarks").rglob("bench_*.py")) and (folder / "rlscuda").is_dir():
            return folder
    raise UserError(
        "rlscuda bench needs a source checkout: expected a folder with rlscuda/ and "
        f"benchmarks/**/bench_*.py at or above {here}, found none"
    )


def run_benchmarks(names: list[str]) -> None:
    """Runs benchmarks under pytest, then prints the tables of their results.

    Args:
        names: Stems such as `rls_update` for `bench_rls_update.py`; empty for all.

    Raises:
        UserError: No checkout, no such benchmark, or a benchmark failed.
    """
    checkout = find_checkout()
    available = {
        path.stem.removeprefix("bench_"): path
        for path in sorted((checkout / "benchmarks").rglob("bench_*.py"))
    }
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(f"no benchmark {unknown[0]!r}: expected one of {', '.join(available)}")
    optional("pytest", "bench")
    chosen = names or list(available)
    files = [str(available[name].relative_to(checkout)) for name in chosen]
    _run([sys.executable, "-m", "pytest", *files], checkout)
    _run([sys.executable, "-m", "benchmarks.tables", *chosen], checkout)


def _run(command: list[str], folder: Path) -> None:
    status = subprocess.run(command, cwd=folder, check=False).returncode
    if status != 0:
        raise UserError(f"{' '.join(command[1:])} failed with exit status {status}", exit_code=2)

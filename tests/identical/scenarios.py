"""Runs the scenarios in the tree that is first in PYTHONPATH; run.py does so in two trees."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from pathlib import Path

import commands  # noqa: F401  (scenarios register themselves)
import pruning  # noqa: F401
import streams  # noqa: F401
import torch
import training  # noqa: F401
from networks import write_archive
from recording import SCENARIOS, write

import rlscuda


def run(name: str, out: Path, begun: Path) -> bool:
    """Runs one scenario in a folder of its own; whether it ended well."""
    folder = out / name
    folder.mkdir()
    os.chdir(folder)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            SCENARIOS[name].run(*(begun / before for before in SCENARIOS[name].after))
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            return False
    write("warnings.json", [f"{type(one.message).__name__}: {one.message}" for one in said])
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="in which rlscuda must lie")
    parser.add_argument("out", type=Path, help="where each writes to a folder of its own")
    parser.add_argument("--begun", type=Path, help="go on from the files there, and do no more")
    parser.add_argument("names", nargs="*", help="of scenarios; all by default")
    given = parser.parse_args()
    loaded = Path(rlscuda.__file__).resolve()
    if given.tree.resolve() not in loaded.parents:
        parser.error(f"rlscuda must lie in {given.tree}, got {loaded}")
    if unknown := set(given.names) - SCENARIOS.keys():
        parser.error(f"scenarios must be of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    wanted = set(given.names or SCENARIOS)
    wanted |= {before for name in wanted for before in SCENARIOS[name].after}
    if given.begun:
        wanted = {name for name in wanted if SCENARIOS[name].after}
    write_archive(given.out / "data.npz")
    ended = [run(name, given.out, given.begun or given.out) for name in SCENARIOS if name in wanted]
    return int(not all(ended))


if __name__ == "__main__":
    sys.exit(main())

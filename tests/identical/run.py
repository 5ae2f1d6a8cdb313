"""Checks that seeded runs of this tree and of another revision are the same; see README.md.

    python tests/identical/run.py --base REV [--cross] [--out FOLDER] [SCENARIO ...]
    python tests/identical/run.py --base FOLDER ...  # a checkout with an extension of its own

Exits with 0 where they are the same, and only there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compare import differences

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHOWN = 5  # differences of a scenario
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


@contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The files of a revision, for a while, with the extension that is built here."""
    changed = git("diff", "--name-only", revision, "--", "csrc", ":!*.md")
    changed += git("ls-files", "--others", "--exclude-standard", "--", "csrc", ":!*.md")
    if changed:
        sys.exit(f"csrc/ must be that of {revision}, since both trees share one compiled "
                 f"extension, got changes of\n{changed}")  # fmt: skip
    compiled = list((ROOT / "rlscuda").glob("_C*.so"))
    if not compiled:
        sys.exit("rlscuda/_C*.so must be built first, by make test")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            for library in compiled:
                shutil.copy2(library, tree / "rlscuda")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def run(tree: Path, out: Path, *arguments: str) -> bool:
    """Runs the scenarios of this folder in a tree; whether all of them ended well."""
    out.mkdir(parents=True)
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, str(HERE / "scenarios.py"), str(tree), str(out), *arguments],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
    )
    print(f"{out.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if child.returncode not in (0, 1):  # it never came to the scenarios, or was killed
        sys.exit(child.returncode)
    return child.returncode == 0


def report(base: Path, here: Path) -> bool:
    """Prints what was compared; whether each scenario in `here` gave what it gave in `base`."""
    good = True
    for folder in sorted(path for path in here.iterdir() if path.is_dir()):
        counts, found = differences(base / folder.name, folder)
        for suffix, count in sorted(counts.items()):
            name = f"{here.name}/{folder.name}"
            tensors = f"{count['tensors']:6,} tensors of {count['numbers']:,} numbers"
            print(f"{name:<26}{suffix:<13}{count['files']:>3} files{count['values']:>7,} values"
                  f"{tensors if count['tensors'] else ''}")  # fmt: skip
        for text in found[:SHOWN]:
            print(f"    DIFFERENT {text}")
        if len(found) > SHOWN:
            print(f"    and {len(found) - SHOWN:,} more")
        good &= not found
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base", required=True, metavar="REV", help="a revision, or a checkout that is built"
    )
    parser.add_argument("--cross", action="store_true", help="also go on from the base's files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new one, for what is written")
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="all by default")
    given = parser.parse_args()
    if given.out and given.out.exists():
        parser.error(f"--out must be a new folder, got {given.out}")
    with tempfile.TemporaryDirectory() as temporary:
        out = (given.out or Path(temporary)).resolve()
        if (own := Path(given.base)).is_dir():
            good = run(own.resolve(), out / "base", *given.names)
        else:
            with tree_of(git("rev-parse", "--verify", f"{given.base}^{{commit}}")) as tree:
                good = run(tree, out / "base", *given.names)
        good &= run(ROOT, out / "tree", *given.names)
        if given.cross:
            good &= run(ROOT, out / "cross", *given.names, "--begun", str(out / "base"))
            good &= report(out / "base", out / "cross")
        good &= report(out / "base", out / "tree")
    print("the same" if good else "NOT THE SAME")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

"""Kills commands before every one of their file operations, and goes on.

    python tests/attack/kills.py [--every N] [--seed S] [--only NAME]

After each kill the old or the new result must be whole, and the next command must lead to what an
uninterrupted one gives, to the bit. Prints totals; the exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from children import command, content, count_operations, make_work, visible

from rlscuda.cli.common.swap import is_pending

TRAIN = (
    *("train", "--model", "killable:net", "--data", "data.npz", "--threads", 1, "--out", "run"),
    *("--batch-size", 27, "--checkpoint-every", 2),
)
FIRST = (*TRAIN, "--optimizer", "rls,sgd", "--epochs", 2)
ROUNDS = ("--prune-schedule", "linear:0.5:1,tolerance=1000%")
SECOND = (*TRAIN, "--optimizer", "rls", "--epochs", 3, *ROUNDS)
RESUME = ("train", "--resume", "--out", "run", "--threads", 1)
PRUNE = ("prune", "--run", "run", "--threads", 1)
LARGE = (*PRUNE, "--ratio", 0.3, "--recover", 1)
SMALL = (*PRUNE, "--ratio", 0.6)


class Failure(Exception):
    """What was lost."""


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise Failure(text)


def run(work: Path, *argv: object) -> str:
    """The output of a command that must succeed."""
    ended = command(work, *argv).wait()
    expect(ended.status == 0, f"{argv[0]} {argv[1]} ended with {ended.status}: {ended.error}")
    return ended.out


def copy(folder: Path) -> Path:
    """A new folder of the same content."""
    return Path(shutil.copytree(folder, tempfile.mkdtemp(), dirs_exist_ok=True)).resolve()


class Scenario(ABC):
    """A command to be killed, and what must come of it.

    Args:
        name: in the output.
        before: the folder with what is there before.
        argv: the command.
        folder: what it writes.
    """

    def __init__(self, name: str, before: Path, argv: tuple, folder: str):
        self.name, self.before, self.argv, self.folder = name, before, argv, folder
        work = copy(before)
        self.old = content(work / folder)
        self.operations = count_operations(work, *argv)
        self.new = content(work / folder)
        shutil.rmtree(work)

    def attack(self, kills: list[int]) -> None:
        """Kill the command, then those that go on, and go on to the end."""
        work = copy(self.before)
        try:
            argv = self.argv
            for number in kills:
                command(work, *argv, kill_at=number).wait()
                argv = self.following(work)
            run(work, *argv)
            found = content(work / self.folder)
            expect(found.keys() == self.new.keys(), f"files {sorted(found)}")
            differing = [name for name in found if found[name] != self.new[name]]
            expect(not differing, f"other than uninterrupted: {differing}")
        finally:
            shutil.rmtree(work)

    @abstractmethod
    def following(self, work: Path) -> tuple:
        """Check what is there after a kill; the command that goes on from it."""


class Training(Scenario):
    def following(self, work: Path) -> tuple:
        begun = is_pending(work / "run") or (work / "run" / "config.json").is_file()
        if not begun:
            resumed = command(work, *RESUME).wait()
            expect(resumed.refused and "nothing to resume" in resumed.error, resumed.error)
            return self.argv
        if self.old and visible(content(work / "run")) == self.old:
            if is_pending(work / "run"):
                return RESUME
            expect("is finished" in run(work, *RESUME), "the old run is not finished")
            return self.argv
        pruning = command(work, *SMALL, "--out", "other").wait()
        expect(pruning.refused or pruning.status == 0, f"prune of it: {pruning.error}")
        shutil.rmtree(work / "other", ignore_errors=True)
        return RESUME


class Pruning(Scenario):
    def following(self, work: Path) -> tuple:
        pending = is_pending(work / self.folder)
        if not pending and visible(content(work / self.folder)) == self.old:
            return self.argv
        twice = command(work, *LARGE).wait()
        expect(twice.refused and "already holds a pruning" in twice.error, twice.error)
        whole = content(work / self.folder)
        expect(whole == self.new, f"not the new pruning: {sorted(whole)}")
        return (*SMALL, "--overwrite") if "--overwrite" in self.argv else (*LARGE, "--overwrite")


def scenarios(only: str | None) -> Iterator[Scenario]:
    """The scenarios of that name, or all of them."""
    empty = make_work()
    trained = copy(empty)
    run(trained, *FIRST)
    pruned = copy(trained)
    run(pruned, *LARGE)
    (pruned / "run-pruned" / "notes.txt").write_text("mine")
    made = {
        "train": (Training, empty, FIRST, "run"),
        "train --overwrite": (Training, trained, (*SECOND, "--overwrite"), "run"),
        "prune": (Pruning, trained, LARGE, "run-pruned"),
        "prune --overwrite": (Pruning, pruned, (*SMALL, "--overwrite"), "run-pruned"),
    }
    for name, (kind, *arguments) in made.items():
        if only in (None, name):
            yield kind(name, *arguments)
    for folder in (empty, trained, pruned):
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="kill before every N-th operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="train, train --overwrite, prune or prune --overwrite")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    total = lost = 0
    for scenario in scenarios(arguments.only):
        first = draw.randrange(arguments.every) + 1
        points = range(first, scenario.operations + 1, arguments.every)
        for point in points:
            kills = [point] if draw.random() < 0.7 else [point, draw.randrange(1, 40)]
            total += len(kills)
            try:
                scenario.attack(kills)
            except Failure as failure:
                lost += 1
                print(f"{scenario.name}, killed before {kills}: {failure}", flush=True)
        print(f"{scenario.name}: {len(points)} of {scenario.operations} operations", flush=True)
    print(f"{total} kills, {lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

"""Starts several commands on one folder at once, and writers and readers on one file.

    python tests/attack/races.py [--rounds N]

One command must do its work, to the bit, and every other be refused with one line or find it done;
no reader may see a torn file. Prints totals; the exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from children import Ended, command, content, make_work, start
from kills import FIRST, LARGE, PRUNE, RESUME, SMALL, Failure, expect, run

from rlscuda.files.atomic import write_atomically
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned

WRITERS, FILES, SIZE = 4, 40, 300_000
HELD = ("is being written by another process", "was changed by another process while it was read")


def together(work: Path, *commands: tuple) -> list[Ended]:
    """Start commands at once; how they ended."""
    return [child.wait() for child in [command(work, *argv) for argv in commands]]


def expect_one_line(ended: list[Ended], *reasons: str) -> int:
    """How many succeeded; every other was refused for one of the reasons."""
    for one in ended:
        told = one.refused and any(reason in one.error for reason in reasons)
        expect(one.status == 0 or told, f"status {one.status}: {one.error}")
    return sum(one.status == 0 for one in ended)


def expect_content(folder: Path, *allowed: dict[str, object]) -> None:
    found = content(folder)
    expect(any(found == one for one in allowed), f"neither result: {sorted(found)}")


def train_and_train(work: Path) -> None:
    """Into one new folder."""
    run(work, *FIRST)
    reference = content(work / "run")
    shutil.rmtree(work / "run")
    ended = together(work, *[FIRST] * 3, RESUME)
    done = expect_one_line(ended, HELD[0], "already holds a run", "nothing to resume")
    expect(done >= 1, "no training succeeded")
    expect_content(work / "run", reference)


def prune_and_prune(work: Path) -> None:
    """Of one run into one folder, with other results."""
    run(work, *FIRST)
    references = []
    for argv in (LARGE, (*SMALL, "--overwrite")):
        run(work, *argv)
        references.append(content(work / "run-pruned"))
    commands = [(*argv, "--overwrite") for argv in (LARGE, SMALL)] * 2
    expect(expect_one_line(together(work, *commands), HELD[0]) >= 1, "no pruning succeeded")
    expect_content(work / "run-pruned", *references)


def prune_and_prune_apart(work: Path) -> None:
    """Of one run into folders of their own: neither is in the other's way."""
    run(work, *FIRST)
    ended = together(work, *[(*SMALL, "--out", f"small{i}") for i in range(3)])
    expect(all(one.status == 0 for one in ended), str(ended))
    expect_content(work / "small1", content(work / "small0"))
    expect_content(work / "small2", content(work / "small0"))


def train_and_prune(work: Path) -> None:
    """A run that is replaced while it is pruned: the old or the new one is pruned, or none."""
    references = []
    other = ("--lr", "rls=0.05,sgd=0.01", "--overwrite")
    for argv in (FIRST, (*FIRST, *other)):
        run(work, *argv)
        run(work, *SMALL, "--overwrite")
        references.append(content(work / "run-pruned"))
    shutil.rmtree(work / "run-pruned")
    one, *prunings = together(work, (*FIRST, "--overwrite"), *[
        (*PRUNE, "--ratio", 0.6, "--out", f"small{i}") for i in range(3)
    ])  # fmt: skip
    expect(one.status == 0, one.error)
    expect_one_line(prunings, *HELD, "is not finished")
    for i, pruning in enumerate(prunings):
        if pruning.status == 0:
            expect_content(work / f"small{i}", *references)


def write_and_read(work: Path) -> None:
    """Several write one file, of other content each, while others read it."""
    path = work / "file"

    def write(letter: int) -> None:
        for size in range(SIZE, SIZE + FILES):
            write_atomically(path, lambda stream, size=size: stream.write(bytes([letter]) * size))

    def read() -> None:
        for _ in range(5 * FILES):
            data = path.read_bytes()
            expect(len(data) >= SIZE and len(set(data)) == 1, "a torn file")

    write(0)
    children = [start(work, lambda i=i: write(i)) for i in range(WRITERS)]
    children += [start(work, read) for _ in range(2)]
    for child in children:
        expect((ended := child.wait()).status == 0, ended.error)
    expect([one.name for one in work.iterdir() if one.name.startswith(".")] == [], "leftovers")


def save_and_load(work: Path) -> None:
    """Several save networks with optimizers to one file, while others load it."""
    path = work / "network.safetensors"

    def factory() -> torch.nn.Module:
        return torch.nn.Linear(50, 50)

    def save(value: int) -> None:
        model = factory()
        torch.nn.init.constant_(model.weight, value)
        optimizer = torch.optim.SGD(model.parameters(), lr=1 + value)
        for _ in range(FILES):
            save_pruned(model, path, optimizer=optimizer)

    def load() -> None:
        for _ in range(FILES):
            model = load_pruned(factory, path)
            expect(len(model.weight.unique()) == 1, "a torn network")
            load_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), path)

    save(0)
    children = [start(work, lambda i=i: save(i)) for i in range(WRITERS)]
    children += [start(work, load) for _ in range(2)]
    for child in children:
        expect((ended := child.wait()).status == 0, ended.error)


RACES: list[Callable[[Path], None]] = [
    train_and_train, prune_and_prune, prune_and_prune_apart, train_and_prune, write_and_read,
    save_and_load,
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=[race.__name__ for race in RACES])
    arguments = parser.parse_args()
    total = lost = 0
    for race in RACES:
        if arguments.only not in (None, race.__name__):
            continue
        for _ in range(arguments.rounds):
            work = make_work()
            total += 1
            try:
                race(work)
            except Failure as failure:
                lost += 1
                print(f"{race.__name__}: {failure}", flush=True)
            finally:
                shutil.rmtree(work)
        print(f"{race.__name__}: {arguments.rounds} rounds", flush=True)
    print(f"{total} races, {lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

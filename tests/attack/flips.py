"""Flips single bits all over the files of a run, and wipes sectors: refused, or the same result.

    python tests/attack/flips.py [--every N] [--seed S]

Prints totals; the exit status is 1 if a damaged file was used, or ended in another error than the
one it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from children import _frozen, make_work
from kills import LARGE, SECOND, run

from rlscuda import RLSOptimizer
from rlscuda.cli.common.errors import UserError
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.train.checkpoint import load_checkpoint
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.trainer import Trainer
from rlscuda.pruning.files.saving import load_optimizer, load_pruned

SECTOR = 512
Read = Callable[[], object]


def damages(data: bytes, every: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Copies of the file with one bit flipped, or one sector wiped, or cut short."""
    for place in range(draw.randrange(every), 8 * len(data), every):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place // 8}", bytes(flipped)
    for start in range(0, len(data), SECTOR * max(1, every // 256)):
        wiped = data[:start] + bytes(min(SECTOR, len(data) - start)) + data[start + SECTOR :]
        yield f"sector at {start}", wiped
        yield f"cut at {start}", data[:start]


def attack(path: Path, read: Read, every: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Read damaged copies of a file; how they ended, and how many as they should not."""
    data, whole = path.read_bytes(), read()
    ends: Counter[str] = Counter()
    lost = 0
    for what, damaged in damages(data, every, draw):
        path.write_bytes(damaged)
        try:
            if read() != whole:
                lost += 1
                print(f"{path.name}, {what}: used", flush=True)
            ends["the same"] += 1
        except (UserError, ValueError) as error:
            ends["refused"] += 1
            if "\n" in str(error) or str(path) not in str(error):
                lost += 1
                print(f"{path.name}, {what}: {error}", flush=True)
        except Exception as error:
            lost += 1
            print(f"{path.name}, {what}: {type(error).__name__}: {error}", flush=True)
    path.write_bytes(data)
    assert read() == whole
    return ends, lost


def targets(work: Path) -> dict[Path, Read]:
    """The files of a run and of its prunings, and how each is read."""
    run(work, *SECOND)
    run(work, *LARGE)
    os.chdir(work)
    config = RunConfig.resumed(json.loads(Path("run/config.json").read_text())["options"], {})
    data = load_dataset(config.data, config.val_fraction)
    fingerprint = config.fingerprint(data.fingerprint)
    checkpoint = Path("run/checkpoints/rls.pt")
    factory = Trainer(config, "rls", data, None, fingerprint).whole_model

    def read_checkpoint() -> object:
        return _frozen(load_checkpoint(checkpoint, fingerprint, "rls"))

    def read_network(path: Path) -> Read:
        def read() -> object:
            model = load_pruned(factory, path)
            optimizer = RLSOptimizer(model)
            load_optimizer(optimizer, path)
            return _frozen([model.state_dict(), optimizer.state_dict()])

        return read

    networks = [Path("run/pruning/pruned.safetensors"), Path("run-pruned/recovered.safetensors")]
    return {checkpoint: read_checkpoint, **{path: read_network(path) for path in networks}}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=509, help="flip every N-th bit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = make_work()
    sys.path.insert(0, str(work))
    draw = random.Random(arguments.seed)
    lost = 0
    totals: Counter[str] = Counter()
    try:
        for path, read in targets(work).items():
            ends, bad = attack(path, read, arguments.every, draw)
            print(f"{path}: {path.stat().st_size} bytes, {dict(ends)}, {bad} lost", flush=True)
            totals += ends
            lost += bad
    finally:
        os.chdir("/")
        shutil.rmtree(work)
    print(f"{totals.total()} damaged files: {dict(totals)}, {lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

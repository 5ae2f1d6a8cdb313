"""A folder with everything that a command can read, whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from rlscuda.cli import main
from rlscuda.cli.train.trainer import Trainer

DATA = "data.npz"
TRAIN = ("train", "--model", "mlp", "--data", DATA, "--epochs", "2", "--batch-size", "27",
         "--optimizer", "rls,sgd,adam", "--checkpoint-every", "2")  # fmt: skip
NEW = ("train", "--model", "mlp", "--epochs", "1", "--optimizer", "sgd", "--batch-size", "5",
       "--out", "new", "--data")  # fmt: skip
ROUNDS = ("train", "--model", "mlp", "--data", DATA, "--epochs", "3", "--batch-size", "27",
          "--optimizer", "rls", "--prune-schedule", "linear:0.4:2,budget=2,tolerance=1000%",
          "--checkpoint-every", "1")  # fmt: skip


def command(*argv: str) -> int:
    """Run a command in this process; its exit status."""
    try:
        main(argv)
    except SystemExit as ended:
        return int(ended.code or 0)


def make_workspace(folder: Path) -> None:
    """Fill ``folder``, which becomes the current one."""
    os.chdir(folder)
    make_data()
    assert command(*TRAIN, "--out", "run") == 0
    stop_after(11, *TRAIN, "--out", "part")  # in the second epoch of the second optimizer
    stop_after(5, *ROUNDS, "--out", "rounds")  # while a round recovers
    assert command("prune", "--run", "run", "--ratio", "0.3", "--out", "pruned") == 0


def stop_after(steps: int, *argv: str) -> None:
    """Run a command and interrupt it after so many steps of training."""
    step, left = Trainer._train_step, steps

    def counted(self, rows):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return step(self, rows)

    Trainer._train_step = counted
    try:
        assert command(*argv) == 130
    finally:
        Trainer._train_step = step


def make_data() -> None:
    """An archive and a folder of images of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 100, (count, 8, 8), dtype=np.uint8)
        for number, (image, label) in enumerate(zip(images, labels)):
            image[:, 2 * label : 2 * label + 3] += 120
            path = Path("images", split, "abc"[label], f"{number // 3}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    np.savez(DATA, **arrays)

"""Small data sets and a way to call the command line, shared by its tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rlscuda
from rlscuda.cli import main

TIMES = {"seconds", "epoch_seconds", "latency_seconds"}
ROOT = Path(rlscuda.__file__).resolve().parents[1]


def make_images(count: int, side: int = 8, classes: int = 3, seed: int = 0):
    """Images [count, side, side] uint8, a bright block by class on noise, and labels [count]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, side, side), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * side // classes : (label + 1) * side // classes] += 100
    return images, labels.astype(np.uint8)


def write_npz(path: Path, count: int = 90, test: int = 30, **arrays) -> Path:
    """An archive of `count` training and `test` test images; keyword arrays replace keys."""
    x_train, y_train = make_images(count)
    keys = {"x_train": x_train, "y_train": y_train}
    if test:
        keys["x_test"], keys["y_test"] = make_images(test, seed=1)
    np.savez(path, **{**keys, **arrays})
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; exit status, stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def subprocess_environment(**extra: str) -> dict[str, str]:
    """The environment for a child process that imports the package under test."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **extra}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(one, other, where: str = "") -> int:
    """Both hold the same values to the bit; how many tensors were compared."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
        return 1
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return sum(assert_same(one[k], other[k], f"{where}/{k}") for k in one if k not in TIMES)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return sum(assert_same(a, b, f"{where}/{i}") for i, (a, b) in enumerate(pairs))
    assert one == other, where
    return 0


def run_in(folder: Path, *commands: tuple) -> Path:
    """The folder, after commands on an archive `data.npz` in it that must all succeed."""
    write_npz(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for argv in commands:
            with pytest.raises(SystemExit) as stopped:
                main([str(word) for word in argv])
            assert not stopped.value.code, argv
    return folder


@contextmanager
def working_copy(original: Path, copy: Path) -> Iterator[Path]:
    """A copy of a folder, current for a while; the number of threads stays."""
    shutil.copytree(original, copy, dirs_exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        yield copy
    torch.set_num_threads(threads)

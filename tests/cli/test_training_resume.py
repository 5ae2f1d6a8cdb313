"""A run that is killed and resumed ends as the uninterrupted one does, to the bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cli import assert_same, call, snapshot, subprocess_environment, write_npz

from rlscuda.cli import main
from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.rng import capture_rng, restore_rng, seed_everything
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.train import command as train_module
from rlscuda.cli.train.checkpoint import load_checkpoint, save_checkpoint
from rlscuda.cli.train.options import OPTIMIZERS, RunConfig
from rlscuda.cli.train.trainer import Trainer
from rlscuda.files import atomic as _atomic

# Convolution, batch norm, dropout and NumPy's stream: everything a step can depend on. With
# KILL_AT in the environment, the process is killed in the middle of that training step.
MODEL = """
import os, signal
import numpy as np
from torch import nn

class Net(nn.Module):
    steps = 0
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(4 * 36, num_classes))
    def forward(self, x):
        if self.training:
            Net.steps += 1
            if Net.steps == int(os.environ.get("KILL_AT", 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            x = x + 0.01 * np.random.rand()
        return self.body(x)

def net(num_classes):
    return Net(num_classes)
"""
EPOCHS, BATCH, STEPS = 3, 9, 9  # 81 training images: 9 steps an epoch


def enter(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Put a data set and a model into `folder` and make it the current one."""
    (folder / "killable.py").write_text(MODEL)
    write_npz(folder / "data.npz")
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "killable", raising=False)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch)


def arguments(out: str, optimizers: str = "rls,sgd,adam", every: int = 2) -> list[str]:
    return [
        *("train", "--model", "killable:net", "--data", "data.npz", "--optimizer", optimizers),
        *("--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--threads", "1"),
        *("--checkpoint-every", str(every), "--out", out),
    ]


def spawn(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlscuda.cli", *argv],
        env=subprocess_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def read(out: str, name: str) -> dict:
    path = Path(out) / "checkpoints" / f"{name}.pt"
    return torch.load(path, weights_only=True)["training"]


# The whole program


def test_killed_in_mid_epoch_and_resumed_is_the_uninterrupted_run(folder, capsys):
    # 27 steps an optimizer: killed in step 6 of the second epoch of the second one.
    optimizers = "sgd,rls,adam"
    killed = spawn(*arguments("killed", optimizers), KILL_AT=str(27 + STEPS + 6))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    position = read("killed", "rls")
    assert (position["epoch"], position["step"]) == (1, 5)  # 14 steps done, and 14 % 2 == 0
    assert not (folder / "killed" / "checkpoints" / "adam.pt").exists()
    assert not (folder / "killed" / "summary.json").exists()

    resumed = spawn(*arguments("killed", optimizers), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "sgd: lr 0.05, weight decay 0.0005: already trained" in resumed.stdout
    assert "resumed in epoch 2 after 5 of 9 steps (14 of 27 in all)" in resumed.stdout

    status, _, error = call(capsys, *arguments("whole", optimizers))
    assert status == 0, error
    for name in OPTIMIZERS:
        whole, again = read("whole", name), read("killed", name)
        assert whole["epoch"] == EPOCHS
        assert assert_same(whole, again, name) > 10
    matrices = [
        [state["P"] for state in run["optimizer"]["state"].values() if "P" in state]
        for run in (position, read("killed", "rls"), read("whole", "rls"))
    ]
    assert len(matrices[0]) == 2  # the convolution's and the linear layer's
    for early, again, whole in zip(*matrices, strict=True):
        assert torch.equal(again, whole) and not torch.equal(early, whole)


def test_killed_before_the_first_checkpoint_starts_again(folder, capsys):
    killed = spawn(*arguments("killed", "sgd", every=0), KILL_AT="4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((folder / "killed").rglob("*.pt"))
    assert call(capsys, *arguments("killed", "sgd"), "--resume")[0] == 0
    assert call(capsys, *arguments("whole", "sgd"))[0] == 0
    assert assert_same(read("whole", "sgd"), read("killed", "sgd")) > 10


# One trainer, stopped at several steps


class StopHereError(Exception):
    pass


def trainer(name: str, path: Path, every: int = 0) -> Trainer:
    config = RunConfig("killable:net", "data.npz", name, epochs=2, batch_size=BATCH)
    return Trainer(config, name, load_dataset("data.npz", 0.1), path, "run", every)


def run_to_end(one: Trainer) -> dict:
    for _ in one.epochs():
        pass
    return one.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_from_within_and_between_epochs(folder, name):
    whole = run_to_end(trainer(name, folder / "whole.pt"))
    for stop in (1, STEPS - 1, STEPS, STEPS + 4):

        def stop_here(one, loss, stop=stop):
            if one.steps_done == stop + 1:
                raise StopHereError

        path = folder / f"{stop}.pt"
        with pytest.raises(StopHereError):
            for _ in trainer(name, path, every=stop).epochs(stop_here):
                pass
        seed_everything(999)  # what the streams were must not matter
        second = trainer(name, path)
        second.load_state_dict(load_checkpoint(path, "run", name))
        assert second.steps_done == stop
        assert assert_same(whole, run_to_end(second), f"{name} stopped at {stop}") > 10


def test_all_optimizers_start_from_the_same_weights_and_see_the_same_order(folder):
    trainers = [trainer(name, folder / f"{name}.pt") for name in OPTIMIZERS]
    weights = [one.model.state_dict() for one in trainers]
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])
    orders = []
    for one in trainers:
        one._finish_epoch(None)
        orders.append(one.order)
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.arange(81))
    trainers[0]._finish_epoch(None)


def test_every_random_stream_is_captured():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random()  # noqa: NPY002

    seed_everything(5)
    draw()
    state = capture_rng(torch.device("cpu"))
    expected = draw()
    seed_everything(6)
    assert draw() != expected
    restore_rng(state, torch.device("cpu"))
    assert draw() == expected


# Checkpoints that cannot be used


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A run of SGD and Adam, trained but interrupted before its test, made once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = enter(tmp_path_factory.mktemp("trained"), patch)
        patch.setattr(train_module, "plot_run", interrupt)
        with pytest.raises(SystemExit) as stopped:
            main(arguments("run", "sgd,adam", every=0))
        assert stopped.value.code == 130
    return folder / "run"


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(folder, trained_run):
    """That run, copied to `run`."""
    return Path(shutil.copytree(trained_run, folder / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_text(path: Path) -> None:
    path.write_text("not a checkpoint")


def make_foreign(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def make_pickle(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def make_other_version(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "version": 99}, path)


def make_other_optimizer(path: Path) -> None:
    path.write_bytes(path.with_name("sgd.pt").read_bytes())


def make_other_run(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "run": "0" * 64}, path)


def make_other_model(path: Path) -> None:
    document = torch.load(path, weights_only=True)
    document["training"]["model"].popitem()
    torch.save(document, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read as a checkpoint: it is truncated, damaged or was not written"),
        (make_empty, "cannot be read as a checkpoint"),
        (make_text, "cannot be read as a checkpoint"),
        (make_pickle, "cannot be read as a checkpoint"),
        (make_foreign, "is not an rlscuda checkpoint"),
        (make_other_version, "format version 99, expected 1"),
        (make_other_optimizer, "the optimizer sgd, expected adam"),
        (make_other_run, "belongs to another run"),
        (make_other_model, "does not fit the model killable:net as it is now"),
    ],
)
def test_an_unusable_checkpoint_is_an_error_and_overwrites_nothing(
    stopped, capsys, damage, message
):
    damage(stopped / "checkpoints" / "adam.pt")
    before = snapshot(stopped)
    status, _, error = call(capsys, "train", "--resume", "--out", "run")
    assert status == 1
    assert error.startswith("error: ") and message in error and "nothing was overwritten" in error
    assert snapshot(stopped) == before


def test_changed_data_are_an_error_and_overwrite_nothing(stopped, capsys):
    write_npz(stopped.parent / "other.npz", count=99)
    before = snapshot(stopped)
    status, _, error = call(capsys, "train", "--resume", "--out", "run", "--data", "other.npz")
    assert status == 1 and "does not hold the images this run was started with" in error
    assert snapshot(stopped) == before


def test_moved_data_are_accepted(stopped, capsys):
    (stopped.parent / "data.npz").rename(stopped.parent / "moved.npz")
    argv = ("train", "--resume", "--out", "run", "--data", "moved.npz")
    assert call(capsys, *argv)[0] == 0


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "sgd.pt"
    save_checkpoint(path, "run", "sgd", {"epoch": 1})

    def fail(document, stream):
        stream.write(b"half a checkp")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(path, "run", "sgd", {"epoch": 2})
    assert load_checkpoint(path, "run", "sgd") == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["sgd.pt"]


def test_a_checkpoint_reaches_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(_atomic.os, name)

        def spy(*args, name=name, real=real):
            events.append(name)
            return real(*args)

        monkeypatch.setattr(_atomic.os, name, spy)
    save_checkpoint(tmp_path / "sgd.pt", "run", "sgd", {})
    assert events == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_a_checkpoint_of_another_run_is_refused_by_its_fingerprint(tmp_path):
    save_checkpoint(tmp_path / "sgd.pt", "a" * 64, "sgd", {})
    with pytest.raises(UserError, match="fingerprint aaaaaaaaaaaa"):
        load_checkpoint(tmp_path / "sgd.pt", "b" * 64, "sgd")

"""`rlscuda train` under torchrun: the run of one process up to rounding, also where resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cli import call, subprocess_environment, write_npz

from rlscuda.cli.train import processes

MODEL = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    steps = 0
    def forward(self, x):
        Net.steps += self.training
        if os.environ["RANK"] == "0" and Net.steps == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def net(num_classes, layer=nn.ReLU):
    return Net(nn.Conv2d(1, 4, 3), layer(), nn.Flatten(), nn.Linear(144, num_classes))

def normed(num_classes):
    return net(num_classes, lambda: nn.BatchNorm2d(4))

def dropped(num_classes):
    return net(num_classes, nn.Dropout)
"""
EPOCHS, STEPS = 2, 8  # 81 training images, 10 a step


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "shared_net.py").write_text(MODEL)
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shared_net", raising=False)
    monkeypatch.setenv("RANK", "1")  # in this process, where nothing is killed
    return tmp_path


def arguments(out, *more, optimizers="sgd,rls"):
    return [
        *("train", "--model", "shared_net:net", "--data", "data.npz", "--optimizer", optimizers),
        *("--epochs", str(EPOCHS), "--batch-size", "10", "--threads", "1", "--out", out, *more),
    ]


def launch(folder, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "rlscuda.cli", *argv],
        env=subprocess_environment(PYTHONWARNINGS="ignore", **environment), cwd=folder,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def training(out, name):
    return torch.load(Path(out, "checkpoints", f"{name}.pt"))["training"]


def test_two_processes_are_one_and_resume(folder, capsys):
    every = ("--checkpoint-every", "3")
    killed = launch(folder, *arguments("two", *every), KILL_AT=str(EPOCHS * STEPS + STEPS + 6))
    assert killed.returncode and "process 1 ends, as another one has" in killed.stderr
    assert (training("two", "rls")["epoch"], training("two", "rls")["step"]) == (1, 4)

    resumed = launch(folder, *arguments("two", *every, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("cpu, 2 processes") == 1  # the first alone prints
    assert "resumed in epoch 2 after 4 of 8 steps" in resumed.stdout
    assert json.loads(Path("two/config.json").read_text())["machine"]["processes"] == 2

    status, _, error = call(capsys, *arguments("one"))
    assert status == 0, error
    for name in ("sgd", "rls"):
        one, two = training("one", name), training("two", name)
        for row, other in zip(one["history"], two["history"], strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
            assert row["val_accuracy"] == other["val_accuracy"]
        for key, weight in one["model"].items():
            torch.testing.assert_close(two["model"][key], weight, rtol=1e-4, atol=1e-5)
        matrices = [
            [state["P"] for state in run["optimizer"]["state"].values() if "P" in state]
            for run in (one, two)
        ]
        assert [len(found) for found in matrices] == [2 * (name == "rls")] * 2
        torch.testing.assert_close(*matrices, rtol=1e-4, atol=1e-5)


REFUSED = {
    "--batch-size must be a multiple of the 3 processes, got 10": (),
    "--gates needs one process, torchrun has started 3": ("--gates", "0.03"),
    "its BatchNorm2d 1 would not make of the shares of 3": ("--model", "shared_net:normed"),
    "its Dropout 1 would not make of the shares of 3": ("--model", "shared_net:dropped"),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_refused(capsys, monkeypatch, expected):
    monkeypatch.setattr(processes, "size", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    size = () if "multiple" in expected else ("--batch-size", "9")
    status, _, error = call(capsys, *arguments("new", *size, *REFUSED[expected], optimizers="rls"))
    assert status == 1 and expected in error
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "argv", [("prune", "--run", "one"), ("study", "pretraining", "--out", "study")]
)
def test_other_commands_are_for_one_process(capsys, monkeypatch, argv):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = call(capsys, *argv)
    expected = f"error: rlscuda {argv[0]} needs one process, torchrun has started 2\n"
    assert (status, error) == (1, expected)

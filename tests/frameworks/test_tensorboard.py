"""`rlscuda train --tensorboard`: every epoch is in the event files once, however often resumed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.cli import call, run_in, snapshot, working_copy

from rlscuda.cli.train.tensorboard import Board
from rlscuda.cli.train.trainer import Trainer

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
EPOCHS, STEPS = 3, 4  # 81 training images, 20 a step


def arguments(out, *extra, optimizer="rls"):
    return [
        *("train", "--model", "mlp", "--data", "data.npz", "--optimizer", optimizer, "--out", out),
        *("--epochs", EPOCHS, "--batch-size", 20, "--threads", "1", *extra),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, `whole`, and of its data."""
    run = arguments("whole", "--tensorboard", optimizer="rls,sgd")
    return run_in(tmp_path_factory.mktemp("finished"), run)


@pytest.fixture(autouse=True)
def folder(finished, tmp_path):
    with working_copy(finished, tmp_path):
        yield


def train(capsys, out, *extra):
    return call(capsys, *arguments(out, *extra))


def read(out, optimizer="rls"):
    """Tag -> [(step, value)] of a training's event files, but for the seconds."""
    events = accumulator.EventAccumulator(str(Path(out) / "tensorboard" / optimizer)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"] if tag != "seconds"
    }  # fmt: skip


def test_the_files_hold_the_metrics_and_the_health(capsys):
    assert (
        "whole/tensorboard/rls/events.out.tfevents."
        in call(capsys, "train", "--resume", "--out", "whole")[1]
    )
    rows = json.loads(Path("whole/metrics.json").read_text())
    for optimizer in ("rls", "sgd"):
        values = read("whole", optimizer)
        of = [row for row in rows if row["optimizer"] == optimizer]
        for column in ("train_loss", "val_loss", "val_accuracy", "lr"):
            assert values[column] == [(row["steps"], np.float32(row[column])) for row in of]
        health = [tag for tag in values if tag.startswith("rls/")]
        assert len(health) == (3 * 7 if optimizer == "rls" else 0)
    updates = next(values for tag, values in read("whole").items() if tag.endswith("/updates"))
    assert updates == [(STEPS * k, STEPS * k) for k in range(1, EPOCHS + 1)]


@pytest.mark.parametrize("where", ["in a step", "before an epoch is written", "without the option"])
def test_resumed(capsys, monkeypatch, where):
    whole = read("whole")
    options = ["--tensorboard", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        if where == "before an epoch is written":
            add = Board.add_epoch

            def stop(board, trainer):
                if trainer.epoch == 2:
                    raise KeyboardInterrupt
                add(board, trainer)

            patch.setattr(Board, "add_epoch", stop)
        else:
            step = Trainer._train_step

            def stop(trainer, rows):
                if trainer.steps_done == 2 * STEPS + 1:
                    raise KeyboardInterrupt
                return step(trainer, rows)

            patch.setattr(Trainer, "_train_step", stop)
        told = options[1:] if where == "without the option" else options
        assert train(capsys, "again", *told)[0] == 130
    assert train(capsys, "again", *options, "--resume")[0] == 0
    values = read("again")
    if where == "without the option":  # what the matrices were then is not known any more
        for tag, points in values.items():
            assert points == (whole[tag][2:] if tag.startswith("rls/") else whole[tag])
    else:
        assert values == whole


def test_a_new_run_leaves_no_old_files(capsys):
    before = set(snapshot(Path("whole/tensorboard")))
    assert train(capsys, "whole", "--tensorboard", "--overwrite")[0] == 0
    after = set(snapshot(Path("whole/tensorboard")))
    assert len(before) == 2 and len(after) == 1 and not before & after
    assert train(capsys, "whole", "--overwrite")[0] == 0
    assert not snapshot(Path("whole/tensorboard"))


def test_without_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    status, _, error = train(capsys, "new", "--tensorboard")
    assert status == 1 and error.endswith(
        "needs the package tensorboard, which is not installed: pip install 'rlscuda[cli]'\n"
    )
    assert not Path("new").exists()

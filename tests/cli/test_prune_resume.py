"""`train --prune-schedule`: its rounds, its files, and that a killed run ends as a whole one."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from support.cli import assert_same, call, snapshot, write_npz

from rlscuda import RLSOptimizer
from rlscuda.cli.common.rng import seed_everything
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.train.checkpoint import load_checkpoint
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.trainer import Trainer
from rlscuda.pruning.files.saving import load_pruned

# Everything that surgery, the optimizer and a resume must agree on: convolutions, batch norm, a
# residual sum, dropout.
MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(12, num_classes))
    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.body(x))

def net(num_classes):
    return Net(num_classes)

def fixed(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
EPOCHS, BATCH, STEPS = 5, 27, 3  # 81 training images: 3 steps an epoch
RECOVERING = "linear:0.6:2,tolerance=1000%"
FAILING = "one_shot:0.8:1,warmup=2,budget=2"
NEVER = f"one_shot:0.5:1,warmup={EPOCHS}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "prunable.py").write_text(MODEL)
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "prunable", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def trainer(schedule: str, path: Path | None, every: int = 0) -> Trainer:
    config = RunConfig(
        "prunable:net", "data.npz", epochs=EPOCHS, batch_size=BATCH, prune_schedule=schedule
    )
    return Trainer(config, "rls", load_dataset("data.npz", 0.1), path, "run", every)


def fail_to_recover(one: Trainer) -> None:
    """Raise every validation loss after the second epoch, as if nothing recovered."""
    validate = one.validate

    def worse() -> tuple[float, float]:
        loss, accuracy = validate()
        return (loss if one.epoch < 1 else loss + one.epoch), accuracy

    one.validate = worse  # type: ignore[method-assign]


def run_to_end(one: Trainer) -> dict:
    for _ in one.epochs():
        pass
    return one.state_dict()


def outcomes(one: Trainer) -> list[str]:
    return [row["pruning"] for row in one.history]


def test_rounds_follow_when_the_loss_is_back(folder):
    one = trainer(RECOVERING, None)
    state = run_to_end(one)
    assert outcomes(one) == ["pruned", "pruned", "finished", "", ""]
    sizes = [row["parameters"] for row in one.history]
    assert (
        sizes[0] > sizes[1] > sizes[2] == sizes[4] == sum(p.numel() for p in one.model.parameters())
    )
    assert [stage.kind for stage in one.pruning.stages] == [
        "whole", "pruned", "recovered", "pruned", "recovered"
    ]  # fmt: skip
    assert one.model.stem[0].out_channels == 4 and one.model.head[1].out_features == 5
    assert state["pruning"]["pruner"]["original"]["head.1"] == 12


def test_what_is_trained_on_is_not_pruned_by_the_schedule(folder):
    one = trainer("linear:0.6:9,tolerance=1000%", None)
    run_to_end(one)
    size = sum(p.numel() for p in one.model.parameters())
    assert not one.pruning.schedule.finished
    one.prolong(2)
    run_to_end(one)
    assert sum(p.numel() for p in one.model.parameters()) == size and one.epoch == EPOCHS + 2


def test_a_round_that_does_not_recover_is_rolled_back(folder):
    one = trainer(FAILING, None)
    fail_to_recover(one)
    run_to_end(one)
    assert outcomes(one) == ["warming up", "pruned", "recovering", "rolled back", ""]
    assert one.model.stem[0].out_channels == 8 and one.model.head[1].out_features == 12
    sizes = [row["parameters"] for row in one.history]
    assert sizes[0] == sizes[1] == sizes[4] > sizes[2] == sizes[3]
    assert isinstance(one.optimizer, RLSOptimizer) and one.scheduler.optimizer is one.optimizer
    whole = one.optimizer.inverse_autocorrelation(one.model.head[1])
    assert whole.shape == (8 * 36 + 1,) * 2


@pytest.mark.parametrize("schedule", [RECOVERING, FAILING])
def test_a_resumed_run_is_the_uninterrupted_one(folder, schedule):
    class StopHereError(Exception):
        pass

    def prepared(path: Path, every: int = 0) -> Trainer:
        one = trainer(schedule, path, every)
        if schedule == FAILING:
            fail_to_recover(one)
        return one

    whole = run_to_end(prepared(folder / "whole.pt"))
    for stop in range(1, EPOCHS * STEPS):  # from within and between the epochs of every round

        def stop_here(one, loss, stop=stop):
            if one.steps_done == stop + 1:
                raise StopHereError

        path = folder / f"{stop}.pt"
        with pytest.raises(StopHereError):
            for _ in prepared(path, every=stop).epochs(stop_here):
                pass
        seed_everything(999)
        second = prepared(path)
        second.load_state_dict(load_checkpoint(path, "run", "rls"))
        assert second.steps_done == stop
        assert assert_same(whole, run_to_end(second), f"stopped at {stop}") > 10


def test_nothing_is_pruned_after_the_last_epoch(folder):
    one = trainer(NEVER, None)
    run_to_end(one)
    assert outcomes(one) == ["warming up"] * (EPOCHS - 1) + [""] and one.pruning.stages == []


def train(capsys, *extra: object, optimizer: str = "rls", model: str = "prunable:net"):
    return call(
        capsys,
        *("train", "--model", model, "--data", "data.npz", "--optimizer", optimizer),
        *("--epochs", EPOCHS, "--batch-size", BATCH, "--out", "run", *extra),
    )


def test_a_scheduled_run_writes_its_report_and_its_network(folder, capsys):
    arguments = ("--prune-schedule", RECOVERING)
    status, out, error = train(capsys, *arguments, optimizer="rls,sgd")
    assert (status, error) == (0, "")
    written = snapshot(folder / "run")
    names = {f"pruning/{name}" for name in ("report.html", "report.json")}
    assert names | {"pruning/pruned.safetensors"} <= set(written)
    assert all(f"run/{name}" in out for name in names)
    assert "pruned, round 1 of 2" in out and "recovered, round 2" in out and "final" in out

    rows = json.loads(written["metrics.json"])
    rls = [row for row in rows if row["optimizer"] == "rls"]
    assert [row["pruning"] for row in rls] == ["pruned", "pruned", "finished", "", ""]
    assert rls[0]["flops"] > rls[1]["flops"] > rls[2]["flops"] == rls[4]["flops"]
    assert 0 <= rls[0]["changed_val_accuracy"] <= 1
    assert not any("pruning" in row for row in rows if row["optimizer"] == "sgd")
    lines = list(csv.DictReader(written["metrics.csv"].decode().splitlines()))
    assert [line["pruning"] for line in lines] == ["pruned", "pruned", "finished"] + [""] * 7
    assert lines[-1]["parameters"] == ""

    report = json.loads(written["pruning/report.json"])
    summary = json.loads(written["summary.json"])["results"]["rls"]
    assert report["stages"][-1]["test_accuracy"] == summary["test_accuracy"]
    assert [done["outcome"] for done in report["rounds"]] == ["recovered", "recovered"]
    assert report["gains"]["after"]["parameters"] == rls[4]["parameters"]
    config = RunConfig("prunable:net", "data.npz")
    one = Trainer(config, "rls", load_dataset("data.npz", 0.1), None, "run")
    network = load_pruned(one.whole_model, folder / "run" / "pruning" / "pruned.safetensors")
    assert network.head[1].out_features == 5

    assert train(capsys, "--overwrite", optimizer="sgd")[0] == 0
    assert not (folder / "run" / "pruning").exists()


def test_killed_after_a_round_and_resumed_by_the_command(folder, capsys, monkeypatch):
    step, steps = Trainer._train_step, 0

    def interrupted(self, rows):
        nonlocal steps
        steps += 1
        if steps == 2 * STEPS + 2:  # in the third epoch: two rounds are done
            raise KeyboardInterrupt
        return step(self, rows)

    arguments = ("--prune-schedule", RECOVERING)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert train(capsys, *arguments)[0] == 130
    assert train(capsys, "--resume")[0] == 0
    resumed = snapshot(folder / "run")
    assert train(capsys, *arguments, "--overwrite")[0] == 0
    whole = snapshot(folder / "run")
    assert resumed.keys() == whole.keys()
    networks = [load(files["pruning/pruned.safetensors"]) for files in (resumed, whole)]
    assert assert_same(*networks) > 10
    for name in ("metrics.json", "pruning/report.json"):
        one, other = (without_times(json.loads(files[name])) for files in (resumed, whole))
        assert_same(one, other, name)


def without_times(document):
    """The document without what the clock decides."""
    if isinstance(document, dict):
        return {k: without_times(v) for k, v in document.items() if not k.endswith("seconds")}
    return [without_times(v) for v in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (RECOVERING, {"model": "prunable:fixed"}, "prunable:fixed has no channels that can be"),
        (RECOVERING, {"optimizer": "sgd"}, "prunes while rls trains; --optimizer is sgd"),
        (NEVER, {}, "prunes after epoch 5 and trains on: --epochs must be at least 6, got 5"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    folder, capsys, schedule, arguments, message
):
    before = snapshot(folder)
    status, _, error = train(capsys, "--prune-schedule", schedule, **arguments)
    assert status == 1 and message in error and error.count("\n") == 1
    assert {k: v for k, v in snapshot(folder).items() if "pycache" not in k} == before


def test_resume_refuses_another_schedule(folder, capsys):
    assert train(capsys)[0] == 0
    status, _, error = train(capsys, "--resume", "--prune-schedule", RECOVERING)
    assert status == 1 and "--prune-schedule was None, got linear:0.6:2" in error


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_run_that_diverges_after_its_first_round_ends_with_its_report(
    folder, capsys, monkeypatch, rounds
):
    step = Trainer._train_step

    def diverging(self, rows):
        loss = step(self, rows)
        if self.epoch == 1:
            self.loss_sum += torch.nan
        return loss

    monkeypatch.setattr(Trainer, "_train_step", diverging)
    status, out, error = train(capsys, "--prune-schedule", f"linear:0.6:{rounds},tolerance=1000%")
    assert (status, error) == (0, "")
    assert "rls stopped: its training loss is not finite any more" in out
    rows = json.loads((folder / "run" / "metrics.json").read_text())
    assert [row["pruning"] for row in rows] == ["pruned", ""]
    assert rows[0]["parameters"] > rows[1]["parameters"]
    report = json.loads((folder / "run" / "pruning" / "report.json").read_text())
    assert [stage["kind"] for stage in report["stages"]] == ["whole", "pruned", "final"]
    assert (folder / "run" / "summary.json").is_file()


def test_an_older_run_whose_schedule_never_prunes_is_resumed(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "check_new", lambda self: None)
        assert train(capsys, "--prune-schedule", NEVER)[0] == 0
    (folder / "run" / "summary.json").unlink()
    assert train(capsys, "--resume")[0] == 0
    assert (folder / "run" / "summary.json").is_file()


def test_the_report_says_how_many_of_the_rounds_there_was_time_for(folder, capsys):
    arguments = ("--prune-schedule", "cubic:0.7:9,tolerance=1000%")
    status, out, _ = train(capsys, *arguments)
    assert status == 0 and "4 of 9 rounds, chosen by" in out
    report = json.loads((folder / "run" / "pruning" / "report.json").read_text())
    assert (len(report["rounds"]), report["planned"]) == (4, 9)
    assert "4 of 9 rounds, chosen by" in (folder / "run" / "pruning" / "report.html").read_text()

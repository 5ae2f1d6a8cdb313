"""`rlscuda prune`: what it makes of a finished run, and that a mistake writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli import call, snapshot, write_npz

from rlscuda import RLSOptimizer
from rlscuda.cli import main
from rlscuda.cli.data.dataset import Dataset, load_dataset
from rlscuda.cli.prune import command as prune_module
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.trainer import Trainer, evaluate
from rlscuda.pruning.files.saving import load_optimizer, load_pruned

REPORT = {"report.html", "report.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of RLS and SGD, trained once for all tests."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = ["train", "--model", "mlp", "--data", str(write_npz(folder / "data.npz"))]
    arguments += ["--optimizer", "rls,sgd", "--epochs", "4", "--batch-size", "20"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(folder / "run")])
    assert not stopped.value.code
    return folder


@pytest.fixture
def folder(tmp_path, finished, monkeypatch):
    """A folder with the run and its data, which is the current one."""
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def prune(capsys, *arguments: object):
    return call(capsys, "prune", "--run", "run", *arguments)


def read_report(folder, out: str = "run-pruned") -> dict:
    return json.loads((folder / out / "report.json").read_text())


def trainer(finished, name: str) -> Trainer:
    config = RunConfig("mlp", str(finished / "data.npz"), "rls,sgd", epochs=4, batch_size=20)
    return Trainer(config, name, load_dataset(config.data, 0.1), None, "run")


def test_a_pruning_writes_and_names_its_files(folder, finished, capsys):
    run = snapshot(folder / "run")
    status, out, error = prune(capsys, "--ratio", 0.7, "--recover", 1)
    assert (status, error) == (0, "")
    assert snapshot(folder / "run") == run, "the run must stay as it is"
    names = REPORT | {"pruned.safetensors", "recovered.safetensors"}
    assert set(snapshot(folder / "run-pruned")) == names
    assert all(f"run-pruned/{name}" in out for name in names)
    assert sorted(path.name for path in folder.iterdir()) == ["run", "run-pruned"]
    for text in (
        "70.0 % of its channels removed",
        "latency, 20 images",
        "peak memory",
        "recovered",
    ):
        assert text in out

    report = read_report(folder)
    summary = json.loads((folder / "run" / "summary.json").read_text())["results"]["rls"]
    whole, pruned, recovered = report["stages"]
    assert whole["test_accuracy"] == summary["test_accuracy"]
    assert whole["val_accuracy"] == summary["val_accuracy"]
    assert (
        pruned["parameters"] == recovered["parameters"] == 64 * 90 + 90 + 90 * 30 + 30 + 30 * 3 + 3
    )
    assert pruned["flops"] == 2 * (64 * 90 + 90 * 30 + 30 * 3)
    assert report["gains"]["after"]["batch_size"] == 20
    change = report["rounds"][0]["report"]
    assert change["source"] == "own" and set(change["disagreement"]) == {"fc1", "fc2", "fc3"}
    assert [c["after"] for c in change["couplings"]] == [90, 30]
    assert report["options"]["ratio"] == "0.7" and report["options"]["optimizer"] == "rls"


def test_the_saved_network_and_optimizer_go_on(folder, finished, capsys):
    assert prune(capsys, "--ratio", "fc1=0.5", "--recover", 2, "--recover-lr", 0.05)[0] == 0
    one, path = trainer(finished, "rls"), folder / "run-pruned" / "recovered.safetensors"
    network = load_pruned(one.whole_model, path)
    assert (network.fc1.out_features, network.fc2.out_features) == (150, 100)
    optimizer = RLSOptimizer(network)
    load_optimizer(optimizer, path)
    assert optimizer.inverse_autocorrelation(network.fc2).shape == (151, 151)
    recovered = read_report(folder)["stages"][2]
    assert evaluate(network, one.data, one.data.val)[1] == recovered["val_accuracy"]
    assert evaluate(network, one.data, one.data.load_test())[1] == recovered["test_accuracy"]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    images = one.data.normalise(one.data.train.images[:20])
    torch.nn.functional.cross_entropy(network(images), one.data.train.labels[:20]).backward()
    optimizer.param_groups[0]["lr"] = 0.1  # the cosine had ended at 0
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "peak"),
    [(("--recover-lr", 0.02), 0.02), ((), 0.015),
     (("--optimizer", "sgd", "--source", "calibration"), 0.01)],
)  # fmt: skip
def test_recovery_trains_at_its_rates(folder, capsys, monkeypatch, arguments, peak):
    rates, moments, step = [], [], Trainer._train_step

    def watched(self, rows):
        rates.append(self.optimizer.param_groups[0]["lr"])
        moments.append(
            [s["momentum_buffer"].any() for s in self.optimizer.state.values() if "P" in s]
        )
        return step(self, rows)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    assert prune(capsys, "--ratio", 0.5, "--recover", 1, *arguments)[0] == 0
    assert rates == pytest.approx([peak * 0.5 * (1 + np.cos(np.pi * i / 4)) for i in range(4)])
    assert not any(moments[0])  # those of a finished schedule are of other weights


def test_sgd_is_pruned_by_a_calibration_and_exported(folder, capsys):
    arguments = ("--optimizer", "sgd", "--target-params", "25%", "--export", "onnx,pt2")
    status, out, error = prune(capsys, *arguments, "--measure-batch", 3, "--out", "small")
    assert (status, error) == (0, "")
    assert set(snapshot(folder / "small")) == REPORT | {
        "pruned.safetensors", "model.onnx", "model.pt2"
    }  # fmt: skip
    report = read_report(folder, "small")
    assert report["rounds"][0]["report"]["source"] == "calibration"
    gains = report["gains"]
    assert 0.2 < gains["after"]["parameters"] / gains["before"]["parameters"] <= 0.25
    assert gains["after"]["batch_size"] == 3
    assert "calibration on the training images" in out


@pytest.mark.parametrize(
    ("arguments", "checked"),
    [
        (["--target-flops", "20k"], lambda r: 15_000 < r["stages"][1]["flops"] <= 20_000),
        (["--target-flops", "0.5x"], lambda r: r["stages"][1]["flops"] <= 0.5 * 2 * 49_500),
        (["--max-loss", "10%"],
         lambda r: r["stages"][1]["val_loss"] <= 1.1 * r["stages"][0]["val_loss"]),
        (["--ratio", "50%", "--round-to", 8],
         lambda r: all(c["after"] % 8 == 0 for c in r["rounds"][0]["report"]["couplings"])),
        (["--target-flops", "0.5x", "--what", "channels,blocks"],
         lambda r: r["rounds"][0]["report"]["source"] == "calibration"
         and r["rounds"][0]["report"]["blocks"] == []),  # for the network has none
        (["--ratio", "0.5", "--scope", "global"], lambda r: abs(r["ratio"] - 0.5) < 0.01),
        (["--ratio", "0.5", "--importance", "l2", "--no-compensate"],
         lambda r: r["rounds"][0]["report"]["source"] == "none" and r["compensate"] is False),
        (["--ratio", "0.5", "--importance", "taylor"],
         lambda r: r["rounds"][0]["report"]["selection"] == "one-shot"),
        (["--ratio", "0.5", "--selection", "one-shot", "--source", "calibration"],
         lambda r: r["rounds"][0]["report"]["selection"] == "one-shot"),
    ],
)  # fmt: skip
def test_targets_and_choices_reach_the_pruner(folder, capsys, arguments, checked):
    status, _, error = prune(capsys, *arguments)
    assert (status, error) == (0, "")
    assert checked(read_report(folder))


def test_the_test_images_are_read_once_at_the_end(folder, capsys, monkeypatch):
    events, real_to, step = [], Dataset.to, Trainer._train_step

    def to(self, device):
        moved = real_to(self, device)
        load = moved.load_test

        def load_test():
            events.append("test")
            return load()

        object.__setattr__(moved, "load_test", load_test)
        return moved

    def watched(self, rows):
        events.append("step")
        return step(self, rows)

    monkeypatch.setattr(Dataset, "to", to)
    monkeypatch.setattr(Trainer, "_train_step", watched)
    assert prune(capsys, "--ratio", 0.5, "--recover", 1)[0] == 0
    assert events == ["step"] * 4 + ["test"]


def test_an_earlier_pruning_is_kept_unless_overwrite_is_said(folder, capsys):
    assert prune(capsys, "--ratio", 0.5, "--recover", 1)[0] == 0
    (folder / "run-pruned" / "notes.txt").write_text("mine")
    before = snapshot(folder / "run-pruned")
    status, _, error = prune(capsys, "--ratio", 0.3)
    assert status == 1 and "already holds a pruning: --overwrite replaces it" in error
    assert snapshot(folder / "run-pruned") == before
    assert prune(capsys, "--ratio", 0.3, "--overwrite")[0] == 0
    assert set(snapshot(folder / "run-pruned")) == REPORT | {"pruned.safetensors", "notes.txt"}


@pytest.mark.parametrize("step", ["evaluate", "write_report", "save_pruned"])
def test_a_failure_on_the_way_changes_no_file(folder, capsys, monkeypatch, step):
    assert prune(capsys, "--ratio", 0.5)[0] == 0
    before = snapshot(folder)

    def fail(*arguments, **keywords):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(prune_module, step, fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["prune", "--run", "run", "--ratio", "0.3", "--overwrite"])
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["prune", "--run", "run", "--ratio", "0.3", "--out", "other"])
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say how much to remove, by one of --ratio, --target-flops, --target-params"),
        (["--ratio", 1], "--ratio must lie in [0, 1), such as 0.7 or 70%, got '1'"),
        (["--ratio", 0.5, "--run", "nowhere"], "--run nowhere holds no run of rlscuda"),
        (["--ratio", 0.5, "--optimizer", "adam"],
         "--optimizer must be one of this run's, rls, sgd; got 'adam'"),
        (["--ratio", 0.5, "--optimizer", "sgd", "--source", "own"],
         "--source own reads the matrices of rls, the run of sgd has none: --source calibration"),
        (["--ratio", 0.5, "--what", "channels,blocks"],
         "--what channels,blocks takes --target-flops or --target-params"),
        (["--target-params", "0.5x", "--what", "channels,blocks", "--source", "own"],
         "--what channels,blocks takes --source calibration"),
        (["--target-params", "0.5x", "--what", "blocks"], "--what must be one of"),
        (["--ratio", "conv9=0.5"], "matches no coupling"),
        (["--target-params", 1], "out of reach"),
        (["--target-params", "1M"], "nothing was removed: the target is reached already"),
        (["--ratio", 0], "nothing was removed"),
        (["--ratio", 0.5, "--importance", "bn_scale"], "nothing was removed"),
        (["--ratio", 0.5, "--out", "run"], "--out run lies in --run run, which stays as it is"),
        (["--ratio", 0.5, "--out", "run/pruning", "--overwrite"], "run/pruning lies in --run run"),
        (["--ratio", 0.5, "--out", "."], "--out . is not empty and holds no pruning of rlscuda"),
        (["--ratio", 0.5, "--out", "notes.txt"], "--out notes.txt is a file, expected a folder"),
        (["--ratio", 0.5, "--out", "notes.txt/a/b"],
         "--out notes.txt/a/b: notes.txt is a file, expected a folder"),
        (["--ratio", 0.5, "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["--ratio", 0.5, "--threads", 0], "--threads must be at least 1, got 0"),
        (["--ratio", 0.5, "--recover", 1, "--recover-lr", 1e30], "training on diverged"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_clear_error_and_writes_nothing(folder, capsys, arguments, message):
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    status, _, error = prune(capsys, *arguments)
    assert status == 1
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert snapshot(folder) == before


@pytest.mark.parametrize("run", [".", "", "checkpoints/.."])
def test_the_default_folder_is_named_after_the_run_whatever_its_path(
    folder, capsys, monkeypatch, run
):
    monkeypatch.chdir(folder / "run")
    assert call(capsys, "prune", "--run", run, "--ratio", 0.5)[0] == 0
    assert (folder / "run-pruned" / "report.json").is_file()


def test_the_current_folder_takes_the_result(folder, capsys, monkeypatch):
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    assert call(capsys, "prune", "--run", "../run", "--ratio", 0.5, "--out", ".")[0] == 0
    assert set(snapshot(folder / "empty")) == REPORT | {"pruned.safetensors"}
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "run"]


@pytest.mark.parametrize(("out", "locked"), [("new", "."), ("old", "old")])
def test_a_folder_that_cannot_be_written_is_refused(folder, capsys, monkeypatch, out, locked):
    (folder / "old").mkdir()
    access, place = os.access, (folder / locked).resolve()

    def without_writing(path, mode):
        locked = mode & os.W_OK and Path(path).resolve() == place
        return not locked and access(path, mode)

    monkeypatch.setattr(os, "access", without_writing)
    status, _, error = prune(capsys, "--ratio", 0.5, "--out", out)
    assert status == 1 and "must be a folder that can be written" in error
    assert error.count("\n") == 1 and snapshot(folder / "old") == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("checkpoints/rls.pt", None, "lacks the network of rls: run/checkpoints/rls.pt does not"),
        ("summary.json", "{}", "run/summary.json: the summary must"),
        ("summary.json", '{"results": {"rls": {"test_accuracy": null}}}', "json: the summary must"),
        ("summary.json", "[]", "run/summary.json: the summary must"),
    ],
)
def test_a_damaged_run_is_one_clear_error_before_any_work(
    folder, capsys, monkeypatch, name, content, message
):
    path = folder / "run" / name
    path.unlink() if content is None else path.write_text(content)
    monkeypatch.setattr(prune_module, "Run", None)  # would read the data
    before = snapshot(folder)
    status, _, error = prune(capsys, "--ratio", 0.5)
    assert status == 1 and message in error and error.count("\n") == 1
    assert snapshot(folder) == before


def test_interrupted_by_the_keyboard(folder, capsys, monkeypatch):
    def interrupt(self, rows):
        raise KeyboardInterrupt

    before = snapshot(folder)
    monkeypatch.setattr(Trainer, "_train_step", interrupt)
    status, _, error = prune(capsys, "--ratio", 0.5, "--recover", 1)
    assert (status, error) == (130, "error: interrupted; no file is half-written\n")
    assert snapshot(folder) == before


def test_an_unfinished_run_is_named_as_such(folder, capsys):
    (folder / "run" / "summary.json").unlink()
    status, _, error = prune(capsys, "--ratio", 0.5)
    assert status == 1 and "is not finished: rlscuda train --resume --out run continues" in error


def test_other_data_are_refused(folder, finished, capsys):
    config = json.loads((folder / "run" / "config.json").read_text())
    config["options"]["data"] = str(write_npz(folder / "other.npz", count=60))
    (folder / "run" / "config.json").write_text(json.dumps(config))
    status, _, error = prune(capsys, "--ratio", 0.5)
    assert status == 1 and "does not hold the images this run was started with" in error


@pytest.mark.parametrize(
    ("package", "extra"), [("safetensors", "pruning"), ("onnxruntime", "export")]
)  # fmt: skip
def test_a_missing_extra_is_named(folder, capsys, monkeypatch, package, extra):
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    status, _, error = prune(capsys, "--ratio", 0.5, "--export", "onnx")
    assert status == 1
    assert f"needs the package {package}" in error and f"pip install 'rlscuda[{extra}]'" in error
    assert not (folder / "run-pruned").exists()


NORMED = """
from torch import nn
def make(in_channels, image_size, num_classes):
    inputs = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Linear(8, 8), nn.BatchNorm1d(8),
                         nn.ReLU(), nn.Linear(8, num_classes))
"""


def test_norms_that_few_images_adapt_are_warned_of(tmp_path, capsys, monkeypatch):
    (tmp_path / "normed_net.py").write_text(NORMED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_npz(tmp_path / "data.npz")
    train = ["--model", "normed_net:make", "--data", data, "--optimizer", "sgd", "--epochs", 1]
    assert call(capsys, "train", *train, "--out", "run")[0] == 0
    warned = "warning: batch norms adapt to the cut by 5 samples of loader"
    for out, options in (("few", []), ("left", ["--no-adapt-norms"])):
        options += ["--ratio", 0.5, "--calibration-images", 5, "--out", out]
        status, text, error = prune(capsys, *options)
        assert (status, error) == (0, "") and (warned in text) == (out == "few")

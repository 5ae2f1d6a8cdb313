"""`train --prune-adaptive`: its files, its options, and that a killed run ends as a whole one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support.cli import assert_same, call, write_npz

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.rng import seed_everything
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.train.checkpoint import load_checkpoint
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.pruning.specs import AdaptiveSpec
from rlscuda.cli.train.trainer import Trainer
from rlscuda.pruning import load_pruned

MODEL = """
from torch import nn
from rlscuda import zoo

def net(num_classes):
    return zoo.resnet(zoo.ImageShape(1, 8, 8), num_classes, (4, 6), 1)
"""
EPOCHS, BATCH, STEPS = 4, 27, 3  # 81 training images: 3 steps an epoch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "adaptable.py").write_text(MODEL)
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "adaptable", raising=False)
    return tmp_path


def trainer(text, path=None, every=0):
    config = RunConfig(
        "adaptable:net", "data.npz", epochs=EPOCHS, batch_size=BATCH, prune_adaptive=text
    )
    return Trainer(config, "rls", load_dataset("data.npz", 0.1), path, "run", every)


def run_to_end(one):
    for _ in one.epochs():
        pass
    return one.state_dict()


@pytest.mark.parametrize("penalty", ["output", "scale"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, penalty):
    class StopHereError(Exception):
        pass

    text = f"0.6,penalty={penalty},epochs=2"
    one = trainer(text)
    whole = run_to_end(one)
    size = sum(p.numel() for p in one.model.parameters())
    assert size <= 0.6 * sum(p.numel() for p in one.whole_model().parameters())
    assert "pruned" in [row["pruning"] for row in one.history]
    for stop in (2, 6, 7):

        def stop_here(one, loss, stop=stop):
            if one.steps_done == stop + 1:
                raise StopHereError

        path = folder / f"{stop}.pt"
        with pytest.raises(StopHereError):
            for _ in trainer(text, path, every=stop).epochs(stop_here):
                pass
        seed_everything(999)
        second = trainer(text, path)
        second.load_state_dict(load_checkpoint(path, "run", "rls"))
        assert second.steps_done == stop
        assert assert_same(whole, run_to_end(second), f"stopped at {stop}") > 10


def test_a_run_writes_its_report_and_its_network(folder, capsys):
    code, out, _ = call(
        capsys,
        *("train", "--model", "adaptable:net", "--data", "data.npz", "--epochs", EPOCHS),
        *("--batch-size", BATCH, "--out", "run", "--prune-adaptive", "60%,epochs=2"),
    )
    assert code == 0 and "chosen by the output penalty (adaptive)" in out
    report = json.loads((folder / "run/pruning/report.json").read_text())
    assert report["options"] == {"prune_adaptive": "60%,epochs=2"}
    assert [stage["kind"] for stage in report["stages"]][::2][:1] == ["whole"]
    from adaptable import net

    model = load_pruned(lambda: net(3), folder / "run/pruning/pruned.safetensors")
    size = sum(p.numel() for p in model.parameters())
    assert size == report["gains"]["after"]["parameters"] == report["stages"][-1]["parameters"]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_its_options_are_read():
    assert AdaptiveSpec.read("0.5") == AdaptiveSpec(0.5, "output", ("channels", "blocks"), None, 3)
    assert [AdaptiveSpec(0.5).start(epochs) for epochs in (3, 5, 6, 12)] == [1, 1, 2, 6]
    text = "20k, penalty=scale, what=channels, warmup=3, epochs=5"
    assert AdaptiveSpec.read(text) == AdaptiveSpec(20000, "scale", ("channels",), 3, 5)
    assert AdaptiveSpec.read(text).start(90) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none", "--prune-adaptive"),
        ("0.5,penalty=l1", "must be one of output, scale, got 'l1'"),
        ("0.5,what=heads", "must be one of channels, blocks, got 'heads'"),
        ("0.5,epochs=0", "epochs must be a whole number >= 1, got '0'"),
        ("0.5,rho=1", "must be one of penalty, what, warmup, epochs, got 'rho'"),
        ("0.5,epochs=1,epochs=2", "names epochs twice"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises(UserError) as caught:
        RunConfig(prune_adaptive=text)
    assert message in str(caught.value)


def test_what_it_cannot_go_with():
    with pytest.raises(UserError, match="exclude each other"):
        RunConfig(prune_adaptive="0.5", prune_schedule="cubic:0.7:4")
    with pytest.raises(UserError, match="--prune-adaptive prunes while rls trains"):
        RunConfig(optimizer="sgd", prune_adaptive="0.5")
    with pytest.raises(UserError, match="--epochs must be at least 5, got 4"):
        RunConfig(prune_adaptive="0.5", epochs=4).check_new()


def test_a_target_out_of_reach_is_said(folder):
    with pytest.raises(UserError, match="out of reach"):
        run_to_end(trainer("1,epochs=2"))

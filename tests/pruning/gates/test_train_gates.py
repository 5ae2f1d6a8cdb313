"""`train --gates`: its files, its options, and that a killed run ends as a whole one."""

from __future__ import annotations

import copy
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
from rlscuda.cli.train.pruning.specs import GateSpec
from rlscuda.cli.train.trainer import Trainer
from rlscuda.pruning import LayerGates, load_pruned

MODEL = """
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 12)

    def forward(self, x):
        return torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))

def net(num_classes):
    branches = [Residual() for _ in range(3)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *branches, nn.Linear(12, num_classes))

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
EPOCHS, BATCH, STEPS = 7, 4, 20  # 81 training images: 20 steps an epoch
TEXT = "2,epochs=6"  # more than any branch is worth: one goes for sure within 120 steps
STOPS = 40, 117, 131  # nothing is gone yet, one branch is, and the gates are at their end


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "gateable.py").write_text(MODEL)
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gateable", raising=False)
    return tmp_path


def trainer(path=None, every=0, **options):
    config = {"epochs": EPOCHS, "batch_size": BATCH, "gates": TEXT} | options
    config = RunConfig("gateable:net", "data.npz", **config)
    return Trainer(config, "rls", load_dataset("data.npz", 0.1), path, "run", every)


def run_to_end(one):
    for _ in one.epochs():
        pass
    return one.state_dict()


def stopped(path, stop):
    """What a run has written that was killed one step after its checkpoint."""

    class StopHereError(Exception):
        pass

    def stop_here(one, loss):
        if one.steps_done == stop + 1:
            raise StopHereError

    with pytest.raises(StopHereError):
        for _ in trainer(path, every=stop).epochs(stop_here):
            pass
    return load_checkpoint(path, "run", "rls")


def test_a_resumed_run_is_the_uninterrupted_one(folder):
    one = trainer()
    whole = run_to_end(one)
    words = [row["pruning"] for row in one.history]
    assert words == ["gates"] * 5 + ["finished", ""]
    size = sum(p.numel() for p in one.model.parameters())
    before = sum(p.numel() for p in one.whole_model().parameters())
    assert size == one.history[-1]["parameters"] < before == one.history[0]["parameters"]
    assert [stage.kind for stage in one.pruning.stages] == ["whole", "pruned"]
    assert one.pruning.stages[0].parameters == before
    for stop in STOPS:
        path = folder / f"{stop}.pt"
        saved = stopped(path, stop)
        gates = saved["pruning"]["gates"]
        assert (gates is None) == (stop == STOPS[-1])
        assert gates is None or bool(gates["gone"]) == (stop == STOPS[1])
        seed_everything(999)
        second = trainer(path)
        second.load_state_dict(saved)
        assert second.steps_done == stop
        assert assert_same(whole, run_to_end(second), f"stopped at {stop}") > 10


def damages(gates):
    """Of a state in which one branch is gone: where, what, and what is said of it."""
    name, gone = next(iter(gates["gates"])), next(iter(gates["gone"]))
    yield ("gates", name, "theta"), 1.5, "must lie in"
    yield ("gates", name, "theta"), "1", "must be of the type float"
    yield ("gates", name, "open"), 1, "must be of the type bool"
    yield ("gates", name, "below"), 1000, "must lie in"
    yield ("gates", name), {}, "is missing"
    yield ("gone", gone, "stand_in"), {"kind": "Passed"}, "what stands in for"
    a_map = {"kind": "Mapped", "outputs": 0, "kernel": 0, "inputs": 2**30, "width": 2**30}
    yield ("gone", gone, "stand_in"), a_map, "what stands in for"
    yield ("gone", gone, "stand_in"), {"kind": "Linear"}, "a stand-in must be"
    yield ("gone",), {}, "must be of gates on"
    yield ("steps",), -1, "steps must be"
    yield ("generator",), torch.zeros(3), "must be the state of one"
    yield ("generator",), None, "must be of the type Tensor"


def test_a_damaged_state_is_refused_and_changes_nothing(folder):
    path = folder / "one.pt"
    saved = stopped(path, STOPS[1])
    gates = saved["pruning"]["gates"]
    for place, value, message in damages(gates):
        state = copy.deepcopy(saved)
        inner = state["pruning"]["gates"]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        one = trainer(path)
        before = copy.deepcopy([one.pruning.gates.state_dict(), one.model.state_dict()])
        with pytest.raises(UserError, match="does not fit the model gateable:net") as caught:
            one.load_state_dict(state)
        assert message in str(caught.value), place
        assert_same(before, [one.pruning.gates.state_dict(), one.model.state_dict()])
    end = stopped(folder / "end.pt", STOPS[2])
    for key, value, message in (
        ("network", None, "must have gates, or a network and a report"),
        ("gates", gates, "must have gates, or a network and a report"),
        ("report", None, "must have gates, or a network and a report"),
        ("report", {**end["pruning"]["report"], "gates": []}, "must be of gates on"),
        ("stages", [], "the stages must be"),
    ):
        one = trainer(path)
        with pytest.raises(UserError, match=message):
            one.load_state_dict({**end, "pruning": {**end["pruning"], key: value}})


def test_a_run_writes_its_report_and_its_network(folder, capsys):
    options = ("--data", "data.npz", "--epochs", 3, "--batch-size", BATCH, "--gates", "5,by=flops")
    code, out, _ = call(capsys, "train", "--model", "gateable:net", "--out", "run", *options)
    assert code == 0 and "of 3 branches on" in out and "chosen by gates (price 5, by FLOPs)" in out
    report = json.loads((folder / "run/pruning/report.json").read_text())
    assert report["options"] == {"gates": "5,by=flops"}
    assert [stage["kind"] for stage in report["stages"]] == ["whole", "pruned", "final"]
    done = report["rounds"][0]["report"]
    gone = {gate["name"] for gate in done["gates"] if gate["state"] != "on"}
    assert gone == {block["name"] for block in done["blocks"]} != set()
    page = (folder / "run/pruning/report.html").read_text()
    assert all(f'<th scope="row">{gate["name"]}</th>' in page for gate in done["gates"])
    assert "channels" not in page.split("<h1>")[1].split("</h1>")[0]
    from gateable import net

    model = load_pruned(lambda: net(3), folder / "run/pruning/pruned.safetensors")
    size = sum(p.numel() for p in model.parameters())
    assert size == report["gains"]["after"]["parameters"] == report["stages"][-1]["parameters"]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_its_options_are_read():
    assert GateSpec.read("0.03") == GateSpec(0.03, "equal", None)
    assert GateSpec.read("1e-3, by=flops, epochs=5") == GateSpec(0.001, "flops", 5)
    assert [GateSpec(1.0).learning(epochs) for epochs in (1, 2, 5, 9, 10)] == [1, 1, 4, 7, 8]
    assert GateSpec(1.0, epochs=3).learning(10) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none", "--gates must be a price such as 0.03, got 'none'"),
        ("0", "--gates: the price must be a positive number"),
        ("nan", "--gates: the price must be a positive number"),
        ("inf", "--gates: the price must be a positive number"),
        ("0.03,by=bytes", "must be one of equal, params, flops, got 'bytes'"),
        ("0.03,epochs=0", "epochs must be a whole number >= 1, got '0'"),
        ("0.03,maps=1", "must be one of by, epochs, got 'maps'"),
        ("0.03,by=flops,by=params", "names by twice"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises(UserError) as caught:
        RunConfig(gates=text)
    assert message in str(caught.value)


@pytest.mark.parametrize("other", [{"prune_schedule": "cubic:0.7:4"}, {"prune_adaptive": "0.5"}])
def test_what_it_cannot_go_with(other):
    with pytest.raises(UserError, match="and --gates exclude each other"):
        RunConfig(gates="0.03", **other)
    with pytest.raises(UserError, match="--gates prunes while rls trains"):
        RunConfig(optimizer="sgd", gates="0.03")
    with pytest.raises(UserError, match="--epochs must be at least 6, got 5"):
        RunConfig(gates="0.03,epochs=5", epochs=5).check_new()
    with pytest.raises(UserError, match="--epochs must be at least 2, got 1"):
        RunConfig(gates="0.03", epochs=1).check_new()


def test_a_network_without_branches_is_named(folder, capsys):
    options = ("--data", "data.npz", "--out", "run", "--gates", "0.03")
    code, _, error = call(capsys, "train", "--model", "gateable:plain", *options)
    assert code == 1 and error.count("\n") == 1
    assert "--gates: gateable:plain: no branch of the model can have a gate" in error
    assert not (folder / "run").exists()


def test_a_report_after_the_end_knows_what_went_and_what_stayed(folder):
    from gateable import net

    model = net(3)
    gates = LayerGates(model, torch.randn(2, 1, 8, 8), total_steps=10)
    for gate, theta in zip(gates._alive, (0.2, 0.9, 0.9), strict=True):
        gate.theta, gate.worth = theta, theta / 10
    gates.finish()
    found = [(gate.state, gate.worth) for gate in gates.report().gates]
    assert found == [("gone", pytest.approx(0.02)), *[("on", pytest.approx(0.09))] * 2]

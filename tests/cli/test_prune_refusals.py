"""`rlscuda prune` and `train --prune-schedule` say why nothing of a network can be removed."""

from __future__ import annotations

import sys

import pytest
from support.cli import call, snapshot, write_npz

FACTORIES = """
from torch import nn

def mixed(in_channels, image_size, num_classes):
    pixels = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 8), nn.Softmax(1), nn.Linear(8, num_classes)
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a network none of whose channels may go."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "refused_factories.py").write_text(FACTORIES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def train(capsys, folder, out, *arguments):
    data = write_npz(folder / "data.npz")
    common = ("--data", data, "--epochs", 2, "--batch-size", 20, "--out", folder / out)
    return call(capsys, "train", "--model", "refused_factories:mixed", *common, *arguments)


def test_the_reasons_are_printed_where_nothing_may_go(trained, capsys, monkeypatch):
    assert train(capsys, trained, "run")[0] == 0
    monkeypatch.chdir(trained)
    before = snapshot(trained)
    status, output, error = call(capsys, "prune", "--run", "run", "--ratio", 0.5)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert "nothing was removed: no channels may go, for the reasons above" in error
    assert "not pruned: 1: without its channels the model computes something else" in output
    assert snapshot(trained) == before


@pytest.mark.parametrize("kind", [RecursionError, IndexError, RuntimeError])
def test_a_failure_of_tracing_is_one_line(trained, capsys, monkeypatch, kind):
    def trace(*_):
        raise kind("first line\nsecond line")

    if not (trained / "run").exists():
        train(capsys, trained, "run")
    monkeypatch.chdir(trained)
    monkeypatch.setattr("rlscuda.pruning.pruner.trace", trace)
    status, _, error = call(capsys, "prune", "--run", "run", "--ratio", 0.5)
    assert status == 1 and error.count("\n") == 1
    assert f"mixed was not pruned: the model cannot be traced: {kind.__name__}: first line" in error
    monkeypatch.setattr("rlscuda.cli.train.pruning.rounds.trace", trace)
    options = ("--prune-schedule", "linear:0.5:1", "--optimizer", "rls")
    status, _, error = train(capsys, trained, f"other-{kind.__name__}", *options)
    assert status == 1 and "the model cannot be traced" in error


def test_a_schedule_says_why_nothing_may_go(trained, capsys):
    options = ("--prune-schedule", "linear:0.5:1", "--optimizer", "rls")
    status, _, error = train(capsys, trained, "scheduled", *options)
    assert status == 1 and error.count("\n") == 1
    assert "has no channels that can be removed; 1: without its channels the model" in error

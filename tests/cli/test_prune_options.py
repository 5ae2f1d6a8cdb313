"""The options of pruning: what they mean, one clear error for each mistake, why nothing goes."""

from __future__ import annotations

import sys

import pytest
from support.cli import call, snapshot, write_npz

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.options import read_amount, read_ratio, read_rise
from rlscuda.cli.prune.options import PruneOptions
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.pruning.specs import ScheduleSpec


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("250000", 250_000), ("250k", 250_000), ("1.5M", 1_500_000), ("2G", 2e9), ("1T", 1e12),
        ("0.5x", 0.5), ("50%", 0.5), ("0.5", 0.5), (".25", 0.25), ("12.5 %", 0.125), ("1", 1),
    ],
)  # fmt: skip
def test_amounts(text, value):
    assert read_amount("--target-flops", text) == value


@pytest.mark.parametrize("text", ["", "x", "-3", "0", "1x", "2x", "100%", "0%", "5m", "1e6", "nan"])
def test_wrong_amounts(text):
    with pytest.raises(UserError, match=r"--target-flops must be a number such as 250000 or 1.5M"):
        read_amount("--target-flops", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.7", 0.7), ("70%", 0.7), ("0", 0), ("conv*=0.5, fc1=80%", {"conv*": 0.5, "fc1": 0.8})],
)
def test_ratios(text, value):
    assert read_ratio(text) == value


@pytest.mark.parametrize("text", ["1", "100%", "-0.1", "most", "nan", "conv1=1", "conv1="])
def test_wrong_ratios(text):
    with pytest.raises(UserError, match=r"--ratio must lie in \[0, 1\), such as 0.7 or 70%, got"):
        read_ratio(text)


def test_rises():
    assert read_rise("--max-loss", "10%") == 0.1
    assert read_rise("--max-loss", "0.25") == 0.25
    assert read_rise("--max-loss", "150%") == 1.5
    with pytest.raises(UserError, match="--max-loss must be a rise such as 0.1 or 10%, got '-1'"):
        read_rise("--max-loss", "-1")


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({"ratio": "0.7"}, {"ratio": 0.7}),
        ({"target_flops": "0.5x"}, {"target_flops": 0.5}),
        ({"target_params": "10k"}, {"target_params": 10_000}),
        ({"max_loss": "5%"}, {"max_loss": 0.05}),
    ],
)
def test_targets(given, target):
    assert PruneOptions(**given).target == target


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--ratio, --target-flops, --target-params and --max-loss; got none"),
        ({"ratio": "0.5", "max_loss": "1%"}, "got --ratio and --max-loss"),
        ({"ratio": "a=0.5,a=0.6"}, "--ratio names a twice"),
        ({"ratio": "a=0.5", "scope": "global"}, "--ratio must be one number with --scope global"),
        ({"ratio": "0.5", "importance": "size"}, "--importance must be one of saliency, "),
        ({"ratio": "0.5", "selection": "slow"}, "--selection must be one of greedy, one-shot"),
        ({"ratio": "0.5", "selection": "greedy", "importance": "l1"},
         "--selection greedy is for --importance saliency, got l1"),
        ({"ratio": "0.5", "scope": "net"}, "--scope must be one of layer, global, got 'net'"),
        ({"ratio": "0.5", "source": "sketch"}, "--source must be one of own, calibration"),
        ({"ratio": "0.5", "round_to": 0}, "--round-to must be at least 1, got 0"),
        ({"ratio": "0.5", "recover": -1}, "--recover must be at least 0, got -1"),
        ({"ratio": "0.5", "calibration_images": 0}, "--calibration-images must be at least 1"),
        ({"ratio": "0.5", "measure_batch": 0}, "--measure-batch must be at least 1, got 0"),
        ({"ratio": "0.5", "recover": 1, "recover_lr": 0.0}, "--recover-lr must be a positive"),
        ({"ratio": "0.5", "recover_lr": 0.1}, "--recover-lr is the step size of --recover"),
        ({"ratio": "0.5", "export": "tflite"}, "--export must be one of onnx, pt2, got 'tflite'"),
        ({"ratio": "0.5", "export": "pt2,pt2"}, "--export names one format twice: pt2,pt2"),
    ],
)  # fmt: skip
def test_wrong_options(given, message):
    with pytest.raises(UserError) as caught:
        PruneOptions(**given)
    assert message in str(caught.value)


def test_schedules():
    assert ScheduleSpec.read("cubic:0.7:4") == ScheduleSpec("cubic", 0.7, 4, 1, 0.0, 5)
    text = "linear:50%:3, warmup=2, tolerance=5%, budget=4"
    assert ScheduleSpec.read(text) == ScheduleSpec("linear", 0.5, 3, 2, 0.05, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cubic", "--prune-schedule must be CURVE:RATIO:ROUNDS, such as cubic:0.7:4, got 'cubic'"),
        ("square:0.7:4", "--prune-schedule must be one of one_shot, linear, "),
        ("cubic:1:4", "--prune-schedule must lie in [0, 1), such as 0.7 or 70%, got '1'"),
        ("cubic:0:4", "the ratio must lie between 0 and 1, got '0'"),
        ("cubic:0.7:0", "rounds must be a whole number >= 1, got '0'"),
        ("cubic:0.7:4,budget=0", "budget must be a whole number >= 1, got '0'"),
        ("cubic:0.7:4,warmup=x", "warmup must be a whole number >= 1, got 'x'"),
        ("cubic:0.7:4,warmup=1,warmup=2", "--prune-schedule names warmup twice"),
        ("cubic:0.7:4,patience=2", "must be one of warmup, tolerance, budget, got 'patience'"),
        ("cubic:0.7:4,tolerance=-1", "tolerance must be a rise such as 0.1 or 10%, got '-1'"),
    ],
)
def test_wrong_schedules(text, message):
    with pytest.raises(UserError) as caught:
        RunConfig(prune_schedule=text)
    assert message in str(caught.value)


def test_a_schedule_needs_rls():
    with pytest.raises(UserError, match="prunes while rls trains; --optimizer is sgd,adam"):
        RunConfig(optimizer="sgd,adam", prune_schedule="cubic:0.7:4")


# -- networks of which nothing can be removed ------------------------------------------------------

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

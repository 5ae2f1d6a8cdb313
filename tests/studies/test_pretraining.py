"""The study of pre-training: pairs see the same, whole networks are whole, kills cost nothing."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

from rlscuda.pruning import load_matrices
from rlscuda.studies import Protocol, Split, Study, Task, pretraining, replace_head
from rlscuda.studies.runner import _Runner
from rlscuda.studies.training import Training, evaluate, train_to_accuracy

RATIOS = (0.0, 0.5, 0.8)
SMALL = Protocol(
    seeds=(0, 1), ratios=RATIOS, rules=("saliency+", "l1"), fairness=("epochs", "accuracy"),
    rates=(0.05,), epochs=4, source_epochs=3, batch_size=10, calibration=60,
)  # fmt: skip


def split(classes, count, seed):
    """Images of a class are noise around a pattern of its own."""
    patterns = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % len(classes)
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return Split(patterns[torch.tensor(classes)[y]] + 0.5 * noise, y)


def task(classes):
    return Task(split(classes, 120, 1), split(classes, 60, 2), split(classes, 60, 3), len(classes))


SOURCE, TARGET = task((0, 1, 2)), task((3, 4, 5, 6))


def network(classes):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12),
        nn.ReLU(), nn.Linear(12, classes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    return pretraining(network, TARGET, SOURCE, folder, SMALL), folder


def by_arm(study, fairness, seed=0):
    return {a["arm"]: a for a in study.arms if (a["fairness"], a["seed"]) == (fairness, seed)}


def test_whole_networks_are_whole(done):
    for arm in done[0].arms:
        for curve in arm["curves"]:
            assert curve["accuracy"][0] == arm["test"]
            assert curve["parameters"] == sorted(curve["parameters"], reverse=True)
        assert all(accuracies[0] == arm["test"] for accuracies in arm["sources"].values())


def test_both_arms_see_the_same_batches(done):
    for seed in SMALL.seeds:
        pair = by_arm(done[0], "epochs", seed)
        orders = [arm["order"] for arm in pair.values()]
        assert orders[0] == orders[1] and len(set(orders[0])) == SMALL.epochs
        short = by_arm(done[0], "accuracy", seed)["pretrained"]["order"]
        assert short == orders[0][: len(short)]
    first, second = (by_arm(done[0], "epochs", seed)["scratch"] for seed in SMALL.seeds)
    assert first["order"] != second["order"]


def test_heads_start_equal_and_trunks_do_not(done):
    runner = _Runner(network, TARGET, SOURCE, done[1], SMALL, print)
    (pretrained, head), (scratch, none) = (runner._start(a, 1) for a in ("pretrained", "scratch"))
    assert head is pretrained[6] and none is None
    assert torch.equal(pretrained[6].weight, scratch[6].weight)
    assert torch.equal(pretrained[6].bias, scratch[6].bias)
    assert not torch.equal(pretrained[0].weight, scratch[0].weight)
    assert torch.equal(runner._start("scratch", 1)[0][0].weight, scratch[0].weight)


def test_the_matched_arm_stops_at_the_accuracy_of_the_other(done):
    for seed in SMALL.seeds:
        pair, whole = by_arm(done[0], "accuracy", seed), by_arm(done[0], "epochs", seed)
        assert pair["scratch"]["curves"] == whole["scratch"]["curves"]
        found = pair["pretrained"]
        assert found["reached"] == (found["validation"] >= pair["scratch"]["validation"])
        assert found["steps"] <= whole["pretrained"]["steps"]


def test_a_training_ends_at_an_accuracy_or_with_its_epochs():
    for goal, reached in ((0.4, True), (2.0, False)):
        torch.manual_seed(0)
        model = network(4)
        done = train_to_accuracy(Training(model, TARGET, SMALL, 0, 0.05, SMALL.epochs), goal)
        assert done.reached is reached and (done.accuracy >= goal) is reached
        assert (done.steps < 48) is reached and len(done.order) == done.steps // 12
        assert evaluate(done.model, TARGET.val)[1] == done.accuracy


def test_sources_and_redundancy(done):
    study, folder = done
    pair = by_arm(study, "epochs")
    assert set(pair["pretrained"]["sources"]) == {"calibration", "target", "source"}
    assert set(pair["scratch"]["sources"]) == {"calibration", "target"}
    assert set(pair["scratch"]["redundancy"]) == {"4", "6"}  # an image has one channel
    assert all(0 <= r < 1 for arm in study.arms for r in arm["redundancy"].values())
    model = network(4)
    carried = load_matrices(model, folder / "networks" / "source-0.matrices.safetensors")
    assert set(carried.matrices()) == {"0", "4", "6"}


class Killed(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("after", [2])
def test_a_killed_study_resumes_to_the_same_table(done, tmp_path, after):
    said = []

    def stop(text):
        said.append(text)
        if len(said) == after:
            raise Killed

    with pytest.raises(Killed):
        pretraining(network, TARGET, SOURCE, tmp_path, SMALL, stop)
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "arm", "seed": 1, "fai')
    torch.manual_seed(1234)
    resumed = pretraining(network, TARGET, SOURCE, tmp_path, SMALL)
    assert resumed.to_dict() == done[0].to_dict()
    assert resumed.markdown() == done[0].markdown()
    before = (tmp_path / "journal.jsonl").read_bytes()
    pretraining(network, TARGET, SOURCE, tmp_path, SMALL, pytest.fail)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_another_study_is_refused(done):
    _, folder = done
    before = (folder / "journal.jsonl").read_bytes()
    others = (
        (network, TARGET, SOURCE, Protocol(seeds=(0,))),
        (network, task((3, 4, 5)), SOURCE, SMALL),
        (lambda c: nn.Sequential(nn.Flatten(), nn.Linear(36, c)), TARGET, SOURCE, SMALL),
    )
    for make, target, source, protocol in others:
        with pytest.raises(ValueError, match="is of a study with other data, networks or options"):
            pretraining(make, target, source, folder, protocol)
    assert (folder / "journal.jsonl").read_bytes() == before


def test_a_study_comes_back_from_json_and_leaves_failures_out(done):
    study = done[0]
    document = json.loads(json.dumps(study.to_dict()))
    assert Study.from_dict(document).markdown() == study.markdown()
    failed = copy.deepcopy(document)
    failed["arms"][0]["test"] = 0.29  # chance is .25
    left = Study.from_dict(failed)
    assert len(left.failed) == 1 and [row.pairs for row in left.rows] == [1, 1, 2, 2]
    assert "not learned, and in no average: scratch of seed 0 by epochs, 29.0 %" in left.markdown()
    alone = (
        r"- alone, and in no average: pretrained of seed 0 by epochs, .* %; saliency\+ ρ 0\..*l1 ρ"
    )
    assert re.search(alone, left.markdown())


def test_a_given_network_plateaus_recovery_weights_and_adam(tmp_path):
    torch.manual_seed(5)
    given = network(7)
    state = copy.deepcopy(given.state_dict())
    protocol = Protocol(
        seeds=(3,), ratios=(0.0, 0.5), rules=("l1+",), fairness=("plateau",), rates=(0.01, 0.001),
        recovery=(0, 1), most_epochs=4, patience=1, batch_size=20, optimizer="adam",
        granularity="weights", epochs=2, calibration=60,
    )  # fmt: skip
    study = pretraining(network, TARGET, lambda: given, tmp_path, protocol)
    assert all(torch.equal(v, state[n]) for n, v in given.state_dict().items())
    assert [row.recovery for row in study.rows] == [0, 1]
    for arm in study.arms:
        assert arm["steps"] <= 24 and arm["sources"] == {}
        whole, half = arm["curves"][1]["parameters"]
        assert 0.4 * whole < half < 0.7 * whole


def test_arms_that_diverge_are_reported(tmp_path):
    protocol = Protocol(
        seeds=(0,), rules=("l1",), fairness=("epochs",), rates=(1e30,), optimizer="adam", epochs=2
    )
    study = pretraining(network, TARGET, lambda: network(2), tmp_path, protocol)
    assert len(study.failed) == 2 and study.rows == [] and study.source_rows() == []
    assert study.markdown().count("not learned") == 2


def test_frozen_epochs_move_the_head_alone(tmp_path):
    runner = _Runner(network, TARGET, lambda: network(2), tmp_path, SMALL, print)
    model, head = runner._start("pretrained", 0)
    before = copy.deepcopy(model.state_dict())
    training = Training(model, TARGET, SMALL, 0, 0.05, 3, head)
    list(training.epoch())
    assert training.trained(0).matrices.keys() == {"6"}  # of frozen layers nothing is staged
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"6.weight", "6.bias"}
    assert all(p.requires_grad for p in model.parameters())
    list(training.epoch())
    assert len(training.trained(0).matrices) == 3


def test_heads():
    model = network(3)
    state = torch.get_rng_state()
    assert replace_head(model, 5, seed=1) == "6" and model(TARGET.val.x).shape == (60, 5)
    assert torch.equal(state, torch.get_rng_state())
    for wrong, match in ((nn.Linear(3, 2), "Linear inside"), (nn.Flatten(), "Linear inside")):
        with pytest.raises(ValueError, match=match):
            replace_head(wrong, 2)
    with pytest.raises(ValueError, match="classes must be an integer >= 1, got 0"):
        replace_head(model, 0)


def test_options_are_checked():
    for options, match in (
        ({"rules": ("l1", "l1")}, "rules must be one or more, none twice"),
        ({"rules": ("best",)}, r"rules must be of saliency\+, saliency, .*got 'best'"),
        ({"fairness": ("none",)}, "fairness must be of epochs, plateau, accuracy"),
        ({"granularity": "rows"}, "granularity must be channels | weights"),
        ({"ratios": (0.1, 0.5)}, "ratios must ascend from 0"),
        ({"ratios": (0.0, 1.0)}, "below 1"),
        ({"optimizer": "sgd"}, "optimizer must be rls | adam"),
        ({"frozen_epochs": 10}, "frozen_epochs must be less than the 10 epochs"),
        ({"rates": (0.0,)}, "rates must be positive"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Protocol(**options)
    with pytest.raises(ValueError, match=r"labels of val must lie in \[0, 1\], got \[0, 3\]"):
        Task(split((0, 1), 9, 1), split((0, 1, 2, 3), 9, 1), split((0, 1), 9, 1), 2)


def test_a_rule_that_removes_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"rule 'bn_scale' removes nothing of this network"):
        pretraining(
            lambda c: nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, c)),
            TARGET, SOURCE, tmp_path, Protocol(seeds=(0,), rules=("bn_scale",), rates=(0.05,)),
        )  # fmt: skip


def test_the_benchmarks_table_has_every_row(done, tmp_path):
    benchmark = pytest.importorskip("benchmarks.pruning.pretraining", reason="needs the sources")
    run = {"cell": "mnist", "network": "lenet5", "study": done[0].to_dict()}
    (tmp_path / "results.json").write_text(json.dumps({"runs": [run]}))
    text = benchmark.report(tmp_path / "results.json")
    rows = [line for line in text.splitlines() if line.startswith("| mnist, lenet5 |")]
    pairs = sum(bool(done[0].pairs(fairness)) for fairness in SMALL.fairness)
    sources = 2 * bool(done[0].pairs("epochs"))  # of P, for either arm
    assert pairs and len(rows) == pairs * len(SMALL.rules) + sources
    assert {line.count("|") for line in rows} == {10, 8}

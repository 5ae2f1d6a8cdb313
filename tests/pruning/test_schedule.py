"""Rounds of pruning with recovery, and the snapshots that undo them."""

import copy
import gc
import weakref

import pytest
import torch
from support.pruning_nets import mlp, rows, trained, widths
from torch.nn.utils import prune

from rlscuda import RLSOptimizer
from rlscuda.pruning import PruneSchedule, RLSPruner, SketchTracker, ratio_after


def schedule_of(*sizes, **options):
    model, optimizer = trained(*sizes)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.0)
    return model, optimizer, PruneSchedule(pruner, **{"ratio": 0.75, "rounds": 3, **options})


def test_each_round_waits_for_the_loss_to_be_back():
    model, _, schedule = schedule_of(6, 16, 3, warmup=2, curve="linear")
    assert schedule.after_epoch(5.0) == "warming up"
    assert schedule.after_epoch(1.0) == "pruned" and widths(model) == [12, 3]
    assert schedule.after_epoch(1.2) == "recovering"
    assert schedule.after_epoch(1.01) == "recovering" and widths(model) == [12, 3]
    assert schedule.after_epoch(1.0) == "pruned" and widths(model) == [8, 3]
    assert schedule.after_epoch(0.5) == "pruned" and widths(model) == [4, 3]
    assert not schedule.finished
    assert schedule.after_epoch(0.9) == "finished" and schedule.finished
    assert schedule.after_epoch(0.1) == "finished" and widths(model) == [4, 3]
    assert [r.outcome for r in schedule.rounds] == ["recovered"] * 3
    assert [r.losses for r in schedule.rounds] == [[1.2, 1.01, 1.0], [0.5], [0.9]]
    assert schedule.reference == 1.0


@pytest.mark.parametrize("curve", ["one_shot", "iterative", "cubic"])
def test_rounds_follow_the_curve(curve):
    model, _, schedule = schedule_of(6, 16, 3, curve=curve)
    for done in (1, 2, 3):
        schedule.after_epoch(1.0)
        assert widths(model)[0] == 16 - int(16 * ratio_after(curve, 0.75, done, 3) + 1e-9)


def test_tolerance():
    model, _, schedule = schedule_of(6, 16, 3, tolerance=0.1)
    schedule.after_epoch(1.0)
    assert schedule.after_epoch(1.11) == "recovering"
    assert schedule.after_epoch(1.09) == "pruned"


def test_a_round_that_does_not_recover_is_rolled_back():
    seen = []
    model, optimizer, schedule = schedule_of(6, 16, 3, budget=2, on_change=seen.append)
    schedule.after_epoch(1.0)
    width = widths(model)
    assert schedule.after_epoch(1.0) == "pruned"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for loss in (2.0, 1.5):
        assert widths(model) != width
        optimizer.zero_grad()
        model(rows()).square().mean().backward()
        optimizer.step()
        outcome = schedule.after_epoch(loss)
    assert outcome == "rolled back" and schedule.finished
    assert widths(model) == width and [len(before), len(seen)] == [4, 3]
    assert [r.outcome for r in schedule.rounds] == ["recovered", "rolled back"]
    optimizer.zero_grad()
    weight = model[0].weight.detach().clone()
    model(rows()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, model[0].weight)


def test_nan_never_counts_as_recovered():
    model, _, schedule = schedule_of(6, 16, 3, budget=1)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        schedule.after_epoch(float("nan"))
    schedule.after_epoch(1.0)
    assert schedule.after_epoch(float("nan")) == "rolled back" and widths(model) == [16, 3]


def test_a_recovering_round_needs_the_point_to_roll_back_to():
    _, _, schedule = schedule_of(6, 16, 3)
    schedule.after_epoch(1.0)
    _, _, other = schedule_of(6, 16, 3)
    with pytest.raises(ValueError, match="before must be the point to roll back to"):
        other.load_state_dict(schedule.state_dict(), None)
    assert not other.rounds


def test_without_a_budget_it_waits():
    _, _, schedule = schedule_of(6, 16, 3, budget=None)
    schedule.after_epoch(1.0)
    assert {schedule.after_epoch(2.0) for _ in range(20)} == {"recovering"}


def test_training_through_a_schedule():
    model, optimizer, schedule = schedule_of(6, 16, 3, tolerance=0.5, budget=10, rounds=2)
    target = rows(64, 3, seed=5)
    losses = []
    for _ in range(40):
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(rows()) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
        schedule.after_epoch(losses[-1])
        if schedule.finished:
            break
    assert schedule.finished and schedule.rounds[-1].outcome in ("recovered", "rolled back")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
        ({"ratio": 0}, r"ratio must be in \(0, 1\), got 0"),
        ({"ratio": "a"}, "ratio must be a finite number, got 'a'"),
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"rounds": 2.5}, "rounds must be an integer >= 1, got 2.5"),
        ({"curve": "steep"}, "curve must be one_shot"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"tolerance": -0.1}, "tolerance must be >= 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0, got nan"),
        ({"budget": 0}, "budget must be >= 1 epoch or None, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(6, 8, 3, **options)


def test_snapshots_bring_everything_back():
    model, optimizer = trained(6, 8, 8, 3)
    tracker = SketchTracker(model)
    model(rows()).sum().backward()
    optimizer.zero_grad()
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5, tracker=tracker)
    parameters = list(model.parameters())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    P = {k: v.clone() for k, v in tracker.matrices().items()}
    own = optimizer.inverse_autocorrelation("2").clone()
    snapshot = pruner.snapshot()
    for _ in range(2):
        pruner.step()
        pruner.step(ratio=0.75)
        optimizer.zero_grad()
        model(rows()).square().mean().backward()
        optimizer.step()
        snapshot.restore()
        assert all(a is b for a, b in zip(model.parameters(), parameters))
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, P[k]) for k, v in tracker.matrices().items())
        assert torch.equal(optimizer.inverse_autocorrelation("2"), own)
    model(rows()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, values["0.weight"])


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
    "rls": RLSOptimizer,
    "two": lambda model: [RLSOptimizer(model[:2]), torch.optim.Adam(model[2:].parameters())],
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_snapshot_brings_optimizers_back_as_often_as_asked(kind):
    model = mlp(6, 8, 3)
    given = OPTIMIZERS[kind](model)
    optimizers = given if isinstance(given, list) else [given]

    def step():
        model(rows()).square().mean().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()

    def states():
        return [dict(one.state_dict()["state"]) for one in optimizers]

    step()
    pruner = RLSPruner(model, given, rows(2), ratio=0.5, loader=[rows()])
    snapshot, expected = pruner.snapshot(), copy.deepcopy(states())
    for cut in (True, False, False):
        if cut:
            pruner.step()
        step()
        snapshot.restore()
        torch.testing.assert_close(states(), expected, rtol=0, atol=0)
    step()


def test_a_snapshot_of_a_model_without_a_mask():
    model, optimizer = trained(6, 8, 3)
    snapshot = RLSPruner(model, optimizer, rows(2), ratio=0.5).snapshot()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune.identity(model[0], "weight")
    model[0].weight_orig.data.add_(1)
    with pytest.raises(ValueError, match="got a change of .*'0.weight_mask', '0.weight_orig'"):
        snapshot.restore()
    assert torch.equal(model[0].weight_orig, before["0.weight"] + 1)
    prune.remove(model[0], "weight")
    snapshot.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_was_cut_is_freed():
    model, optimizer = trained(6, 8, 3)
    old = weakref.ref(model[0].weight)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5)
    snapshot = pruner.snapshot()
    pruner.step()
    gc.collect()
    assert old() is not None
    del snapshot
    gc.collect()
    assert old() is None

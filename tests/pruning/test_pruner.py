"""`RLSPruner` from end to end: what it cuts, keeps, reports and refuses."""

import json
from collections import UserDict

import pytest
import torch
from support.pruning_models import ZOO, inputs
from support.pruning_nets import mlp, rows, trained, widths
from support.pruning_surgery import changed, everything, training
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, SketchTracker, calibrate
from rlscuda.pruning.choice.ranking import IMPORTANCES
from rlscuda.pruning.structure.trace import trace


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_every_remaining_weight_moves_after_pruning(case):
    model = case.model()
    optimizer = RLSOptimizer(model)
    training(model, optimizer, 3)
    before = sum(p.numel() for p in model.parameters())
    report = RLSPruner(model, optimizer, inputs(), ratio=0.5).step()
    assert sum(p.numel() for p in model.parameters()) < before
    assert report.gains.after.parameters == sum(p.numel() for p in model.parameters())
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    training(model, optimizer, 2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, values[name]), name
            assert torch.isfinite(parameter).all()


def test_the_output_stays_where_the_rest_can_stand_in():
    """Half of the inputs of the last layer are copies of the other half."""
    model, optimizer = trained(6, 8, 3, form="paper", gain=1.0, initial_scale=1e8, lr=1e-9)
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p[4:] = p[:4]
    expected = model(rows())
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, source="calibration",
                       loader=[rows(500, seed=9)], damping=1e-10).step()  # fmt: skip
    assert widths(model) == [4, 3]
    assert len({unit % 4 for unit in report.couplings[0].removed}) == 4
    torch.testing.assert_close(model(rows()), expected, rtol=0, atol=1e-6)


def test_compensation_is_the_least_squares_refit():
    model, optimizer = trained(6, 8, 3)
    data = rows(400, seed=9)
    hidden, target = model[:2](data).detach(), model(data).detach()
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, source="calibration",
                       loader=[data], damping=0.0).step()  # fmt: skip
    kept = [i for i in range(8) if i not in report.couplings[0].removed]
    design = torch.cat([hidden[:, kept], torch.ones(400, 1).double()], 1)
    solution = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(model[2].weight, solution[:-1].T, rtol=0, atol=1e-9)
    torch.testing.assert_close(model[2].bias, solution[-1], rtol=0, atol=1e-9)


def test_cost_is_the_share_of_the_output_that_is_lost():
    model, optimizer = trained(6, 8, 3)
    data = rows(400, seed=9)
    target = model(data).detach()
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, source="calibration",
                       loader=[data], damping=0.0).step()  # fmt: skip
    lost = (model(data) - target).square().mean(0).sum()
    variance = (target - target.mean(0)).square().mean(0).sum()
    change = report.couplings[0]
    assert sum(change.cost[: len(change.removed)]) == pytest.approx(
        float((lost / variance).detach()), rel=1e-6
    )


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_prunes(importance):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    )
    optimizer = RLSOptimizer(model)
    images = torch.randn(8, 2, 8, 8)
    nn.init.uniform_(model[1].weight)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    report = RLSPruner(model, optimizer, images[:1], ratio=0.5, importance=importance).step()
    assert model[0].out_channels == 3 and report.importance == importance
    assert model(images).shape == (8, 3)


def test_magnitude_takes_the_smallest_filters():
    model, optimizer = trained(6, 8, 3)
    norms = model[0].weight.norm(dim=1)
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, importance="l2").step()
    assert sorted(report.couplings[0].removed) == sorted(norms.argsort()[:4].tolist())


def test_importances_without_a_matrix_need_none():
    model = mlp(6, 8, 3)
    report = RLSPruner(model, None, rows(2), ratio=0.5, importance="l1", compensate=False).step()
    assert widths(model) == [4, 3] and report.source == "none" and not report.uncompensated


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_any_optimizer_with_a_calibration(rule):
    model = mlp(6, 8, 3)
    optimizer = rule(model.parameters(), lr=0.1)
    model(rows()).square().mean().backward()
    optimizer.step()
    RLSPruner(model, optimizer, rows(2), ratio=0.5, loader=[rows(200, seed=9)]).step()
    before = model[0].weight.detach().clone()
    model(rows()).square().mean().backward()
    optimizer.step()
    assert widths(model) == [4, 3] and not torch.equal(before, model[0].weight)


def test_a_tracker_follows():
    model = mlp(6, 8, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tracker = SketchTracker(model)
    model(rows()).square().mean().backward()
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5, tracker=tracker)
    assert pruner.step().source == "sketch"
    shapes = {name: tuple(P.shape) for name, P in tracker.matrices().items()}
    assert shapes == {"0": (1, 7, 7), "2": (1, 5, 5), "4": (1, 5, 5)}
    model(rows()).square().mean().backward()


def test_targets_of_size():
    for target, measured in (("target_params", "parameters"), ("target_flops", "flops")):
        for scope in ("layer", "global"):
            model, optimizer = trained(6, 40, 30, 3)
            whole = RLSPruner(model, optimizer, rows(2), ratio=0.0).step()
            limit = getattr(whole.gains.after, measured) * 0.4
            share = RLSPruner(model, optimizer, rows(2), scope=scope, **{target: 0.4})
            report = share.step()
            size = getattr(report.gains.after, measured)
            assert size <= limit and size > 0.8 * limit
            again = RLSPruner(model, optimizer, rows(2), scope=scope, **{target: int(limit)}).step()
            assert not any(change.removed for change in again.couplings)


def test_target_out_of_reach_changes_nothing():
    model, optimizer = trained(6, 8, 3)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="out of reach"):
        RLSPruner(model, optimizer, rows(2), target_params=3).step()
    assert not changed(before, everything(model, optimizer))


def test_the_largest_cut_within_a_loss():
    data = rows(200, seed=9)

    def loss(m):
        return float((m(data) - target).detach().square().mean()) + 1.0

    model, optimizer = trained(6, 30, 3)
    target = model(data).detach()
    pruner = RLSPruner(model, optimizer, rows(2), max_loss=0.001, evaluate=loss,
                       source="calibration", loader=[data])  # fmt: skip
    report = pruner.step()
    assert 0 < len(report.couplings[0].removed) < 29
    assert loss(model) <= 1.001
    more, more_optimizer = trained(6, 30, 3)
    RLSPruner(more, more_optimizer, rows(2), source="calibration", loader=[data],
              ratio=(len(report.couplings[0].removed) + 1) / 30).step()  # fmt: skip
    assert loss(more) > 1.001


def test_ratios_are_of_what_there_was_at_first():
    model, optimizer = trained(6, 8, 8, 3)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.25)
    pruner.step()
    assert widths(model) == [6, 6, 3]
    assert not any(change.removed for change in pruner.step().couplings)
    pruner.step(ratio=0.75)
    assert widths(model) == [2, 2, 3]


def test_ratios_by_layer_rounding_and_ignored():
    model, optimizer = trained(6, 16, 16, 3)
    RLSPruner(model, optimizer, rows(2), ratio={"0": 0.4, "*": 0.7}, round_to=4).step()
    assert widths(model) == [12, 8, 3]
    model, optimizer = trained(6, 16, 16, 3)
    RLSPruner(model, optimizer, rows(2), ratio=0.5, ignored=["0"]).step()
    assert widths(model) == [16, 8, 3]


def test_raw_inputs():
    model, optimizer = trained(6, 8, 3)
    x = rows(200, seed=9)
    x[:, 2] = x[:, 0]
    pruner = RLSPruner(model, optimizer, x[:2], ratio={"input*": 0.2}, include_inputs=True,
                       source="calibration", loader=[x], damping=1e-9)  # fmt: skip
    expected = model(x)
    report = pruner.step()
    kept = report.kept_inputs["0"]
    assert len(kept) == 5 and {0, 2} - set(kept)
    torch.testing.assert_close(model(x[:, kept]), expected, rtol=0, atol=1e-5)
    pruner.step(ratio={"input*": 0.5})
    assert model[0].in_features == 3


def test_batch_norm_statistics_follow_the_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data = torch.randn(300, 6)
    before = model[:2](data).detach()
    model[2].running_mean, model[2].running_var = before.mean(0), before.var(0)
    RLSPruner(model, None, data[:2], ratio={"0": 0.5}, loader=[(data, 0)]).step()
    features = model[:2](data)
    moved = (features.var(0) - before.var(0)).abs().max()
    assert moved > 0.005 and (features.var(0) - model[2].running_var).abs().max() < 0.05 * moved
    torch.testing.assert_close(model[2].running_mean, features.mean(0))
    assert model[2].momentum == 0.1 and model.training


def test_disagreement_with_a_calibration_is_reported():
    model, optimizer = trained(6, 8, 3)
    report = RLSPruner(
        model, optimizer, rows(2), ratio=0.5, loader=[rows(300)], source="own"
    ).step()
    assert report.disagreement.keys() == {"0", "2"}
    assert all(value > 0 for value in report.disagreement.values())
    assert "largest disagreement" in str(report)


def no_decay(model):
    return RLSOptimizer(
        [{"params": [p for p in model.parameters() if p.dim() > 1]},
         {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}],
        model=model,
    )  # fmt: skip


def frozen_bias(model):
    model[2].bias.requires_grad_(False)
    return RLSOptimizer(model)


@pytest.mark.parametrize("make", [no_decay, frozen_bias])
def test_disagreement_where_a_bias_is_not_in_the_optimizer_s_matrix(make):
    model = mlp(6, 8, 3)
    optimizer = make(model)
    for seed in range(3):
        model(rows(seed=seed)).square().mean().backward()
        optimizer.step()
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, loader=[rows(300)]).step()
    assert report.source == "own" and report.disagreement.keys() == {"0", "2"}


def test_several_optimizers():
    model = mlp(6, 8, 8, 3)
    first = torch.optim.Adam(model[:2].parameters())
    optimizers = [first, RLSOptimizer(model[2:4]), RLSOptimizer(model[4:])]

    def step():
        before = [p.detach().clone() for p in model.parameters()]
        model(rows()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))

    step()
    report = RLSPruner(model, optimizers, rows(2), ratio=0.5).step()
    assert report.source == "own" and widths(model) == [4, 4, 3] and not report.uncompensated
    step()


def test_named_example_inputs_of_any_mapping():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(6, 8, 3)

        def forward(self, x):
            return self.inner(x)

    model = Named()
    RLSPruner(model, None, UserDict(x=rows(2)), ratio=0.5, loader=[UserDict(x=rows())]).step()
    assert widths(model.inner) == [4, 3]


def test_report_says_everything_in_json():
    model, optimizer = trained(6, 8, 3)
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5).step()
    document = json.loads(json.dumps(report.to_dict()))
    assert document["couplings"][0]["before"] == 8 and document["couplings"][0]["after"] == 4
    assert document["ratio"] == 0.5
    assert document["ratios"]["parameters"] > 1
    text = str(report)
    assert "coupling" in text and "parameters" in text and "saliency (greedy)" in text


def test_layers_without_a_matrix_are_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = RLSOptimizer(model, exclude=["2"])
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    pruner = RLSPruner(model, optimizer, torch.randn(2, 6), ratio=0.5)
    assert "no layer that takes its channels" in pruner.step().refused["0"]
    report = RLSPruner(model, optimizer, torch.randn(2, 6), ratio=0.5, importance="l2").step()
    assert report.uncompensated == {"2": "its inverse autocorrelation matrix is not known"}
    assert model[0].out_features == 4


def test_a_failing_tracker_leaves_everything():
    model, optimizer = trained(6, 8, 3)
    tracker = SketchTracker(model)
    model(rows()).sum().backward()
    before = everything(model, optimizer)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5, tracker=tracker)

    def follow(columns):
        raise RuntimeError("planted")

    tracker.follow = follow
    with pytest.raises(RuntimeError, match="planted"):
        pruner.step()
    assert not changed(before, everything(model, optimizer))


def test_a_failing_loader_leaves_everything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(50, 6)
    calls = []

    class Loader:
        def __iter__(self):
            calls.append(1)
            yield data
            if len(calls) == 2:
                raise OSError("planted")

    before = everything(model, optimizer)
    with pytest.raises(OSError, match="planted"):
        RLSPruner(model, optimizer, data[:2], ratio=0.5, loader=Loader()).step()
    assert not changed(before, everything(model, optimizer))


def test_the_random_state_is_left():
    model, optimizer = trained(6, 8, 3)
    state = torch.get_rng_state()
    RLSPruner(model, optimizer, rows(2), ratio=0.5, loader=[rows(100)], importance="random").step()
    assert torch.equal(state, torch.get_rng_state())


def test_own_matrices_near_calibration():
    """On stationary input the adaptive form's own matrix ranks and compensates as the exact one."""
    torch.manual_seed(0)
    mixing = torch.randn(6, 6).double()
    model = mlp(6, 12, 3)
    optimizer = RLSOptimizer(model, lr=1e-6)
    for seed in range(400):
        optimizer.zero_grad()
        model(rows(64, seed=seed) @ mixing).square().mean().backward()
        optimizer.step()
    data = rows(2000, seed=999) @ mixing
    target = model(data).detach()
    errors = {}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for source in ("own", "calibration"):
        fresh = mlp(6, 12, 3)
        copy = RLSOptimizer(fresh, lr=1e-6)
        copy.load_state_dict(optimizer.state_dict())
        fresh.load_state_dict(state)
        RLSPruner(fresh, copy, rows(2), ratio=0.5, source=source, loader=[data]).step()
        errors[source] = float((fresh(data) - target).detach().square().mean())
    assert errors["own"] < 1.5 * errors["calibration"]


def test_calibration_of_a_traced_structure_names_the_same_layers():
    model = mlp(6, 8, 3)
    structure = trace(model, rows(2))
    consumers = {m.name for c in structure.couplings for m in c.members if m.kind == "in"}
    assert consumers <= calibrate(model, [rows()]).keys()

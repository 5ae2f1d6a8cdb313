"""A cut that is taken back after steps: groups that came meanwhile, and interrupts."""

import pytest
import torch
from support.pruning_nets import mlp, rows
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, own_matrices
from rlscuda.pruning.surgery import snapshot as snapshots


def step(model, optimizer, features=6):
    optimizer.zero_grad()
    model(rows(features=features)).square().mean().backward()
    optimizer.step()


def test_a_layer_bound_after_the_cut_is_covered_after_its_return():
    model = mlp(6, 8, 5, 3)
    optimizer = RLSOptimizer(model[:3].parameters(), model=model)
    step(model, optimizer)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5)
    point = pruner.snapshot()
    pruner.step()
    head = model[4]
    optimizer.add_param_group({"params": list(head.parameters())})
    point.restore()
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": list(model[4].parameters())})
    step(model, optimizer)
    assert {row.name: row.status for row in optimizer.coverage()}["4"] == "exact"
    assert "P" in optimizer.state[model[4].weight]


def test_a_later_group_of_what_goes_is_refused():
    model = mlp(6, 8, 5, 3)
    optimizer = RLSOptimizer(model[:3].parameters(), model=model)
    step(model, optimizer)
    data = {"loader": [rows()], "source": "calibration"}
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5, **data)
    point = pruner.snapshot()
    pruner.step()
    assert model[4].in_features == 3
    optimizer.add_param_group({"params": list(model[4].parameters())})
    with pytest.raises(ValueError, match="came since the snapshot holds pruned parameters"):
        point.restore()
    assert model[4].in_features == 3
    step(model, optimizer)
    optimizer.param_groups.pop()
    point.restore()
    assert model[4].in_features == 5


def test_a_return_that_is_cut_short_is_made_again(monkeypatch):
    model = mlp(6, 8, 5, 3)
    optimizer = RLSOptimizer(model)
    step(model, optimizer)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5)
    point, before = pruner.snapshot(), [p.clone() for p in model.parameters()]
    pruner.step()
    revert = snapshots.revert

    def interrupted(done):
        revert(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshots, "revert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        point.restore()
    monkeypatch.setattr(snapshots, "revert", revert)
    point.restore()
    assert all(map(torch.equal, model.parameters(), before))
    step(model, optimizer)


def test_own_matrices_are_those_asked_for_by_the_names_asked_for():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    optimizer = RLSOptimizer(model)
    step(model, optimizer)
    assert own_matrices(optimizer, ["2"]).keys() == {"2"}
    model = mlp(6, 8, 3)
    optimizer = RLSOptimizer(model)
    step(model, optimizer)
    optimizer.state[model[0].weight]["P"].fill_(torch.nan)
    assert own_matrices(optimizer, ["2"]).keys() == {"2"}
    with pytest.raises(ValueError, match="finite"):
        own_matrices(optimizer)


def test_a_weight_that_is_no_tensor_is_nobodys():
    model = mlp(6, 8, 3)
    model.add_module("criterion", nn.Identity())
    model.criterion.weight = [1.0, 2.0]
    optimizer = RLSOptimizer(model)
    step(model, optimizer)
    RLSPruner(model, optimizer, rows(2), ratio=0.5).step()
    assert model[0].out_features == 4

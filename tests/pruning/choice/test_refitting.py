"""Layers fitted in turn: each has the least squares of what the pruned ones before it give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.choice import refitting

ROWS = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)).double()


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3, bias=False)
    ).double()


def pruned(model, data, compensate, **options):
    """The model after a step, and how far its output is from the whole one's."""
    whole = model.eval()(data).detach()
    loader = [data[:25], data[25:]]
    options = {"ratio": 0.5, "loader": loader, "source": "calibration"} | options
    report = RLSPruner(model, None, data[:2], compensate=compensate, **options).step()
    return report, float((model.eval()(data).detach() - whole).square().mean())


def test_each_layer_is_the_ridge_regression_of_the_whole_outputs():
    whole, model, greedy = mlp(), mlp(), mlp()
    report, _ = pruned(model, ROWS, "in turn")
    pruned(greedy, ROWS, True)
    gone = {change.name: change.removed for change in report.couplings}
    kept = {
        name: [i for i in range(n) if i not in gone[name]] for name, n in (("0", 12), ("2", 10))
    }
    assert torch.equal(model[0].weight, whole[0].weight[kept["0"]])
    inputs = whole[:4](ROWS)
    for place, outputs, x in ((2, kept["2"], whole[:2](ROWS)), (4, [0, 1, 2], inputs)):
        target = whole[place](x)[:, outputs].detach()
        X, own = model[:place](ROWS).detach(), greedy[place]
        start = own.weight.detach()
        if own.bias is not None:
            X = torch.cat([X, torch.ones(len(X), 1)], 1)
            start = torch.cat([start, own.bias.detach()[:, None]], 1)
        A = X.mT @ X / len(X)
        A += 1e-3 * A.diagonal().mean() * torch.eye(len(A))
        start = start + torch.linalg.solve(A, X.mT @ (target - X @ start.mT) / len(X)).mT
        torch.testing.assert_close(model[place].weight, start[:, : model[place].in_features])
        if own.bias is not None:
            torch.testing.assert_close(model[place].bias, start[:, -1])


class Residual(nn.Module):
    """Strides, groups, a norm, a transposed convolution and a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.last, self.head = nn.Conv1d(8, 4, 3), nn.Linear(4 * 34, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.grouped(x).relu()
        x = x + self.up(self.down(x).relu())
        return self.head(self.last(x.flatten(2)).tanh().flatten(1))


def test_errors_of_every_kind_of_layer_add_up_less():
    data = torch.randn(200, 3, 6, 6).double()
    errors = {}
    for compensate in (True, "in turn"):
        torch.manual_seed(1)
        report, errors[compensate] = pruned(Residual().double(), data, compensate)
        assert not report.refused and not report.uncompensated
        assert [change.after for change in report.couplings] == [2, 4, 2]
    assert errors["in turn"] < 0.7 * errors[True]


def test_layers_before_the_cut_and_beside_the_forward_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = mlp(), nn.Linear(2, 2)

        def forward(self, x):
            return self.body(x)

    model = Model()
    before = copy.deepcopy(model.state_dict())
    pruned(model, ROWS, "in turn", ratio={"body.2": 0.5})
    same = {name for name, value in model.state_dict().items()
            if value.shape == before[name].shape and torch.equal(value, before[name])}  # fmt: skip
    assert same == {"body.0.weight", "body.0.bias", "unused.weight", "unused.bias"}


def test_shared_wide_and_nothing_lost(monkeypatch):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    pruned(model, ROWS, "in turn", ratio=0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(refitting, "_WIDEST", 1)
    other = mlp()
    pruned(model, ROWS, "in turn"), pruned(other, ROWS, True)
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())


def test_copies_inputs_and_shuffled_batches():
    model = mlp()
    loader = torch.utils.data.DataLoader(ROWS, batch_size=20, shuffle=True)
    pruner = RLSPruner(model, None, ROWS[:2], ratio=0.5, loader=loader, compensate="in turn")
    (copied,) = pruner.copies([0.5])
    pruner.step()
    torch.testing.assert_close(copied(ROWS), model(ROWS))
    model = mlp()
    options = {"ratio": 0.2, "loader": loader, "source": "calibration", "include_inputs": True}
    report = RLSPruner(model, None, ROWS[:2], compensate="in turn", **options).step()
    assert model(ROWS[:, report.kept_inputs["0"]]).shape == (60, 3)


def test_options():
    for loader, match in ((None, "needs loader="), ([ROWS], "True, False or 'in turn', got 'all'")):
        with pytest.raises(ValueError, match=match):
            RLSPruner(mlp(), None, ROWS[:2], ratio=0.5, loader=loader,
                      compensate="all" if loader else "in turn")  # fmt: skip


def test_an_error_leaves_the_model_as_it_was():
    model, calls = mlp(), []

    class Loader:
        def __iter__(self):
            calls.append(1)
            yield ROWS if len(calls) < 3 else ROWS / 0

    before = copy.deepcopy(model.state_dict())
    pruner = RLSPruner(model, None, ROWS[:2], ratio=0.5, loader=Loader(), compensate="in turn")
    with pytest.raises(ValueError, match="must be finite"):
        pruner.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

"""The Conv1D of transformers, a Linear with its weight transposed: trains as the Linear does."""

import copy
import io
import math
import sys
import types

import pytest
import torch
from support.compare import differing, snapshot
from support.training import make
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.optim.kept import Kept, KeptLayer
from rlscuda.pruning import own_matrices
from rlscuda.pruning.matrices.calibration import pruning_layers


class Conv1D(nn.Module):
    """As that of GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Doubled(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def transformers(monkeypatch):
    """As if it were loaded, with nothing else than that class."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


def twins(inputs=7, hidden=12):
    torch.manual_seed(0)
    one = nn.Sequential(Conv1D(hidden, inputs), nn.GELU(), Conv1D(3, hidden)).double()
    other = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 3)).double()
    for mine, theirs in zip(one, other):
        if isinstance(mine, Conv1D):
            theirs.load_state_dict({"weight": mine.weight.detach().t(), "bias": mine.bias})
    return one, other


def fit(model, optimizer, shape=(4, 5, 7), steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape).to(next(model.parameters()).dtype)
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def assert_same(one, other, optimizers):
    for p, q in zip(one.parameters(), other.parameters()):
        mine, theirs = (o.state[x] for o, x in zip(optimizers, (p, q)))
        torch.testing.assert_close(p.t() if p.dim() == 2 else p, q, rtol=1e-9, atol=1e-11)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("options", [
    {"form": "paper", "trust_ratio": math.inf, "momentum": 0.5}, {"form": "paper"},
    {"form": "natural", "summary": "sketch"}, {"form": "adaptive"},
    {"form": "adaptive", "max_fan_in": 5}, {"form": "natural", "max_fan_in": 5, "momentum": 0.5},
])  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, {"inputs": 60, "hidden": 70}])
def test_same_as_a_linear(transformers, options, sizes):
    """Of few rows and many outputs, by its factors."""
    models = twins(**sizes)
    optimizers = [make(m, **options) for m in models]
    for model, optimizer in zip(models, optimizers):
        fit(model, optimizer, (2, 1, 60) if sizes else (4, 5, 7))
        assert [row.status for row in optimizer.coverage()] == ["exact", "exact"]
        assert optimizer.coverage()[0].fan_in == sizes.get("inputs", 7) + 1
    assert_same(*models, optimizers)


def test_state_goes_round(transformers):
    model, _ = twins()
    optimizer = RLSOptimizer(model)
    fit(model, optimizer)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    other = RLSOptimizer(twin)
    for one, state in zip((twin, other), torch.load(buffer, weights_only=True)):
        one.load_state_dict(state)
    for m, o in ((model, optimizer), (twin, other)):
        fit(m, o)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    model[2].weight.data = model[2].weight.data[:-1].clone()
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    with pytest.raises(ValueError, match=r"must be \[3, 13\] with its bias, got \[3, 12\]"):
        optimizer.step()


def test_only_where_transformers_is_loaded_and_its_forward_is_kept(transformers, monkeypatch):
    model = nn.Sequential(Conv1D(3, 4), Doubled(3, 3), nn.Linear(3, 2))
    rows = RLSOptimizer(model).coverage()
    assert [row.why for row in rows] == ["", "Doubled has a forward of its own", ""]
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert RLSOptimizer(model).coverage()[0].why == "no RLS rule for Conv1D"


def test_weight_of_a_linear_too_is_left_to_the_fallback(transformers):
    model = nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    rows = RLSOptimizer(model).coverage()
    assert [row.why for row in rows] == [
        "its weight is also that of '1', transposed", "its weight is also that of '0', transposed",
        "",
    ]  # fmt: skip


def test_pruning(transformers):
    """Its matrix is there; what cuts or masks it says that there is no rule."""
    model, _ = twins()
    optimizer = RLSOptimizer(model)
    fit(model, optimizer)
    assert own_matrices(optimizer)["0"].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="must have a Linear or convolution layer"):
        pruning_layers(model, None)
    with pytest.raises(ValueError, match="can have no matrix: Conv1D cannot be pruned"):
        pruning_layers(nn.Sequential(model, nn.Linear(3, 2)), ["0.2"])
    layer = optimizer._registry.layers[model[0].weight]
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    cut = KeptLayer.of(layer, Kept.along((7, 12), {0: columns, 1: rows}))
    assert torch.equal(cut.rows, rows) and cut.columns.tolist() == [[1, 3, 7]]
    assert cut.entries(optimizer.state[model[0].weight], {})["momentum_buffer"].shape == (3, 3)

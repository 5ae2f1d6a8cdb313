"""Matrices that forget have a ridge: bounded where inputs are dead, exact through all else."""

import copy
import io
import math

import pytest
import torch
from support.compare import assert_exact, differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.functional.ridges import share_of_power
from rlscuda.optim.forms import NORMALISED
from rlscuda.pruning import RLSPruner, own_matrices

FORMS = ("paper", "natural", "adaptive", "spectral")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6),
        nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def train(model, optimizer, steps, seed=0, dead=True):
    torch.manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 2, 4, 4)
        if dead:
            x[:, 1] = 0  # nothing ever enters the second matrix of the convolution but its bias
            x[:, :, 2:] = 0
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("forgetting, ridge", [(0.9, None), (0.7, 0.3), (0.99, 1.0)])
def test_dead_inputs_wind_nothing_up(form, forgetting, ridge):
    model = network()
    model[0].bias = None
    optimizer = RLSOptimizer(model, 0.01, form=form, forgetting=forgetting, ridge=ridge, drift=0.0)
    train(model, optimizer, 130)
    for layer in (model[0], model[3], model[5]):
        state = optimizer.state[layer.weight]
        P = state["P"].double()
        for place, one in enumerate(P if P.dim() == 3 else P[None]):
            rho = ridge
            if ridge is None:
                power = state["power" if form in NORMALISED else "ridge_power"][place].double()
                share = share_of_power(forgetting, len(one), torch.float32)
                known = share * optimizer.param_groups[0]["gain"]
                rho = known * (1.0 if form in NORMALISED else power) if power > 0 else 1.0
            eigenvalues = torch.linalg.eigvalsh(one)
            assert eigenvalues[0] > 0 and eigenvalues[-1] <= 1.5 / rho  # the power varies
    health = optimizer.health()
    assert all(row.resets == row.refused == 0 for row in health.values())
    updates = 100 + 30 // 4 if form in NORMALISED else 130
    assert health["0"].updates == 2 * updates and health["3"].updates == updates


@pytest.mark.parametrize("ridge", [None, 0.3])
@pytest.mark.parametrize("forgetting", [0.97, 0.985, 0.999])
def test_coordinates_take_turns(forgetting, ridge):
    """Against explicit R: one step in 16 raises those that are due, each once a cycle."""
    n, cycle = 7, int(-1 / math.log2(forgetting)) // 16
    layer = nn.Linear(n, 3, bias=False).double()
    optimizer = RLSOptimizer(layer, 0.01, form="paper", forgetting=forgetting, ridge=ridge)
    R, power = torch.eye(n).double(), 0.0
    for t in range(1, 100):
        x = torch.randn(5, n).double()
        optimizer.zero_grad()
        layer(x).sum().backward()
        if t == 40:
            layer.weight.grad[0, 0] = torch.inf  # void, but for the count of steps
        else:
            s = x.mean(0)
            R = forgetting * R + 0.1 * torch.outer(s, s)
            power += (s.square().mean().item() - power) / (t - (t > 40))
        optimizer.step()
        turn = (t - (t >= 40)) // 16 % cycle
        rho = ridge or 0.1 * share_of_power(forgetting, n, torch.float64) * power
        if t % 16 == 0:
            for j in range(turn * n // cycle, (turn + 1) * n // cycle):
                R[j, j] += rho * (forgetting ** (-16 * cycle) - 1)
    assert_exact(optimizer.inverse_autocorrelation(""), torch.linalg.inv(R), 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_ridge_they_do(form):
    model = network()
    optimizer = RLSOptimizer(model, 0.0, form=form, forgetting=0.6, ridge=0, drift=0.0)
    train(model, optimizer, 150)
    assert optimizer.health()["0"].resets > 0 or optimizer.health()["0"].trace > 1e15


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_goes_on_to_the_same_bits(form):
    model = network()
    optimizer = RLSOptimizer(model, 0.01, form=form, forgetting=0.9)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    resumed = RLSOptimizer(other, form=form, forgetting=0.9)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), (twin, copied)):
        train(m, o, 20, seed=1)
    kept = "power" if form in NORMALISED else "ridge_power"
    assert kept in optimizer.state[model[0].weight]
    first = snapshot(model, optimizer)
    assert not differing(first, snapshot(other, resumed))
    assert not differing(first, snapshot(twin, copied))


@pytest.mark.parametrize("form", FORMS)
def test_a_void_step_leaves_everything_as_it_was(form):
    model = network()
    optimizer = RLSOptimizer(model, 0.01, form=form, forgetting=0.8)
    train(model, optimizer, 4, dead=False)
    names = ("P", "power", "ridge_power")
    weights = [model[i].weight for i in (0, 3, 5)]

    def kept():
        states = [optimizer.state[w] for w in weights]
        return [state[name].clone() for state in states for name in names if name in state]

    before = kept()
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(8, 2, 4, 4)).sum() * torch.nan).backward()
        optimizer.step()
    x = torch.randn(8, 2, 4, 4)
    x[:, :, 0, 0] = torch.inf
    for _ in range(5):
        optimizer.zero_grad()
        model(x).sum().backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(kept()[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(kept()[: len(before) // 3], before))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_without_an_input_raises_nothing(form):
    model = nn.Linear(4, 3)
    optimizer = RLSOptimizer(model, 0.01, form=form, forgetting=0.8)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    P = optimizer.inverse_autocorrelation("").clone()
    for _ in range(5):
        optimizer.zero_grad()
        model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.ones(3)
        optimizer.step()
    assert torch.equal(optimizer.inverse_autocorrelation(""), P)
    assert optimizer.health()[""].missing == 5


@pytest.mark.parametrize("form", FORMS)
def test_nothing_changes_where_nothing_is_forgotten(form):
    runs = []
    for ridge in (None, 0, 5.0):
        model = network()
        optimizer = RLSOptimizer(model, 0.01, form=form, ridge=ridge)
        train(model, optimizer, 4)
        runs.append(snapshot(model, optimizer))
    assert not differing(runs[0], runs[1]) and not differing(runs[0], runs[2])
    assert "ridge_power" not in optimizer.state[model[0].weight]


def test_forgetting_may_begin_and_end_on_the_way():
    model = network()
    optimizer = RLSOptimizer(model, 0.01, form="paper")
    for forgetting in (1.0, 0.9, 1.0, 0.8):
        optimizer.param_groups[0]["forgetting"] = forgetting
        train(model, optimizer, 30)
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(row.resets == 0 and row.trace < 1e7 for row in optimizer.health().values())


@pytest.mark.parametrize("form", ["paper", "natural"])
def test_pruning_follows(form):
    model = network()
    optimizer = RLSOptimizer(model, 0.01, form=form, forgetting=0.95)
    train(model, optimizer, 30, dead=False)
    for name, P in own_matrices(optimizer).items():  # no shrinkage to turn back: P itself
        assert torch.equal(P.view_as(optimizer.inverse_autocorrelation(name)),
                           optimizer.inverse_autocorrelation(name))  # fmt: skip
    RLSPruner(model, optimizer, torch.randn(2, 2, 4, 4), ratio=0.5).step()
    train(model, optimizer, 5, dead=False)
    for i in (0, 3, 5):
        state = optimizer.state[model[i].weight]
        assert len(state["ridge_power"]) == getattr(model[i], "groups", 1)
        assert torch.isfinite(model[i].weight).all()


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_a_state_of_before_there_were_ridges_goes_on_without(forgetting):
    options = {"form": "paper", "forgetting": forgetting}
    model = network()
    optimizer = RLSOptimizer(model, 0.01, shrinkage=0.1, ridge=0, **options)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["ridge"]
    other = copy.deepcopy(model)
    resumed = RLSOptimizer(other, **options)
    resumed.load_state_dict(saved)
    assert "ridge" not in saved["param_groups"][0] and resumed.param_groups[0]["ridge"] == 0
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 8)
    assert not differing(snapshot(model, optimizer), snapshot(other, resumed))


def test_a_state_with_a_power_of_another_shape_is_refused():
    model = network()
    optimizer = RLSOptimizer(model, form="paper", forgetting=0.9)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    saved["state"][0]["ridge_power"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"ridge_power of '0' in state_dict must be \[2\]"):
        optimizer.load_state_dict(saved)

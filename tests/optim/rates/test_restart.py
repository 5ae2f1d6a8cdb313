"""`RLSOptimizer.restart`: moments that start anew, without a new optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from torch import nn

from rlscuda import _C, RLSOptimizer, reference
from rlscuda.optim.steps.spectral import COEFFICIENTS

FORMS = ("adaptive", "paper", "natural", "spectral")
MEAN = {"summary": "mean", "rank": 1}  # a summary that a test can form by itself


def network() -> nn.Module:
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return x


def trained(steps=150, **options):
    model = network()
    optimizer = RLSOptimizer(model, **options)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("form", ["spectral", "adaptive"])
@pytest.mark.parametrize("memory", [0, 7, 30, 99, 1000])
def test_the_next_step_is_that_of_a_young_optimizer(form, memory):
    model, optimizer = trained(151, form=form, lr=0.1, weight_decay=0.05, drift=0.3, **MEAN)
    optimizer.restart(memory)
    before = copy.deepcopy((model, optimizer.state[model[3].weight]))
    x = train(model, optimizer, 1, seed=1)
    old, state = before[0][3], before[1]
    with torch.no_grad():
        row = before[0][:3](x).mean(0)
    warm = max(0.01, 1 / (memory + 1)) if memory < 151 else 0.01
    kappa = warm if memory < 151 else 1 - 0.99**4  # for four steps
    s = torch.cat([row, row.new_ones(1)])
    power = (1 - kappa) * state["power"] + kappa * s.square().mean()
    P, _, _ = reference.rls_update(
        state["P"], (s / power.sqrt())[None], 1.0, kappa, 1 - 0.3 * kappa, kappa
    )
    assert_close(optimizer.inverse_autocorrelation("3"), P)
    G = torch.cat([model[3].weight.grad, model[3].bias.grad[:, None]], 1)
    W = torch.cat([old.weight, old.bias[:, None]], 1)
    lr, zeros = 0.1 * 0.01 / warm, torch.zeros_like(W)
    if form == "spectral":
        step = reference.SpectralStep(lr, 0.9, 0.05, 1e-8, len(W), COEFFICIENTS)
        expected, _ = reference.spectral_weight_step(W, G, P, zeros, power.item(), step)
    else:
        step = reference.AdaptiveStep(lr, 0.9, 0.99, 0.05, 1e-8)
        expected, _, _ = reference.adaptive_weight_step(W, G @ P, G, zeros, zeros[:, 0], 1, step)
    assert_close(torch.cat([model[3].weight, model[3].bias[:, None]], 1), expected)


FALLBACKS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "callable": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_fallback_starts_anew(name):
    model, optimizer = trained(fallback=FALLBACKS[name] if name == "callable" else name)
    optimizer.restart()
    norm = copy.deepcopy(model[1])
    train(model, optimizer, 1)
    norm.weight.grad, norm.bias.grad = model[1].weight.grad, model[1].bias.grad
    FALLBACKS[name](norm.parameters()).step()
    assert_close(model[1].weight, norm.weight)
    assert_close(model[1].bias, norm.bias)


@pytest.mark.parametrize("name", FALLBACKS)
def test_no_parameter_loses_its_state(name):  # which distributed checkpoints ask for
    _, optimizer = trained(3, fallback=FALLBACKS[name] if name == "callable" else name)
    before = {key: set(entries) for key, entries in optimizer.state_dict()["state"].items()}
    optimizer.restart()
    after = {key: set(entries) for key, entries in optimizer.state_dict()["state"].items()}
    if name == "callable":  # what an unknown rule keeps, of the norm, is dropped
        before = {key: before[key] for key in (0, 1, 4, 5)}
    assert after == before


@pytest.mark.parametrize("first", [0.1, torch.tensor([0.1])])
def test_a_rate_that_is_a_tensor_is_set_in_place(first):
    lr = torch.tensor([0.0])
    optimizer = RLSOptimizer(network(), lr=lr)
    optimizer.param_groups[0]["initial_lr"] = first  # some schedules keep a number, some a tensor
    optimizer.restart()
    assert optimizer.param_groups[0]["lr"] is lr and lr.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])])
def test_another_schedule_starts_where_the_first_did(lr):
    model = network()
    optimizer = RLSOptimizer(model, lr=lr)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    rates = []
    for _ in range(2):
        optimizer.restart()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for _ in range(4):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            train(model, optimizer, 1)
            schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0, 0]
    assert rates[:4] == rates[4:] and rates[0] == pytest.approx([0.1, 0.5])
    if isinstance(lr, torch.Tensor):
        assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_matrices_stay(form):
    model, optimizer = trained(form=form, momentum=0.5)
    before = copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict(),
                            optimizer.health()))  # fmt: skip
    optimizer.restart()
    assert optimizer.health() == before[2]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[0][name])
    for layer, place in (("0", 0), ("3", 4)):
        assert torch.equal(optimizer.inverse_autocorrelation(layer), before[1]["state"][place]["P"])
    moments = [v for s in optimizer.state.values() for k, v in s.items() if "mom" in k]
    assert moments and all(not m.any() for m in moments)


@pytest.mark.parametrize("form", ["paper", "natural"])
def test_a_constant_gain_stays(form):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = RLSOptimizer(model, form=form)
    train(model, optimizer, 20)
    twin, twins = copy.deepcopy((model, optimizer))
    optimizer.restart(0)
    train(model, optimizer, 3)
    train(twin, twins, 3)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_it_can_be_repeated_saved_and_resumed():
    model, optimizer = trained()
    optimizer.restart(20)
    train(model, optimizer, 5)
    optimizer.restart(10)
    twin = copy.deepcopy(model)
    twins = RLSOptimizer(twin)
    twins.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, twins)):
        train(m, o, 3)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_before_the_first_step():
    model, twin = network(), None
    twin = copy.deepcopy(model)
    optimizer, twins = RLSOptimizer(model), RLSOptimizer(twin)
    optimizer.restart()
    train(model, optimizer, 2)
    train(twin, twins, 2)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_steps_without_a_summary_count_too():
    model, optimizer = trained(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # without a forward: no summary
    optimizer.restart(2)
    assert all(row.missing == 1 for row in optimizer.health().values())
    counters = optimizer.state[model[3].weight]["health"]
    read = dict(zip(_C.health_slots, counters.tolist()))
    assert (read["earlier"], read["steps"]) == (2, 0)
    train(model, optimizer, 1)
    read = dict(zip(_C.health_slots, counters.tolist()))
    assert (read["missing"], read["steps"]) == (1, 1)


@pytest.mark.parametrize("memory", [-1, 2.0, True, None, "3"])
def test_wrong_memory(memory):
    model, optimizer = trained(2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"memory must be an integer >= 0, got {memory!r}"):
        optimizer.restart(memory)
    for key, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert value is before[key][name] or torch.equal(
                torch.as_tensor(value), torch.as_tensor(before[key][name])
            )

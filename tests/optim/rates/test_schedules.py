"""Schedulers, closures, and what users do to gradients between backward and step."""

import copy
import math

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.optim import lr_scheduler as schedules

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]

SCHEDULERS = {
    "lambda": lambda opt: schedules.LambdaLR(opt, lambda t: min(1, t / 3)),  # starts at 0
    "one_cycle": lambda opt: schedules.OneCycleLR(opt, max_lr=0.05, total_steps=8),
    "one_cycle_lr_only": lambda opt: schedules.OneCycleLR(
        opt, max_lr=0.05, total_steps=8, cycle_momentum=False
    ),
    "cosine": lambda opt: schedules.CosineAnnealingLR(opt, 8),
    "plateau": lambda opt: schedules.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
}


def advance(scheduler, loss):
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def scheduled(model, optimizer, scheduler, steps, seed=1):
    """The rate and momentum of each step."""
    seen = []
    for step in range(steps):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["momentum"]))
        (loss,) = train(model, optimizer, 1, seed + step)
        advance(scheduler, loss)
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_is_that_of_any_optimizer(name, form):
    """Rates and momenta of SGD under the same scheduler, and a run with those set by hand."""
    model, twin = cnn(torch.float64), cnn(torch.float64)
    optimizer, manual = (RLSOptimizer(m, form=form, lr=0.05, momentum=0.5) for m in (model, twin))
    scheduler = SCHEDULERS[name](optimizer)
    seen = scheduled(model, optimizer, scheduler, 6)

    plain = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05, momentum=0.5)
    oracle = SCHEDULERS[name](plain)
    for step, (lr, momentum) in enumerate(seen):
        assert (lr, momentum) == (plain.param_groups[0]["lr"], plain.param_groups[0]["momentum"])
        plain.step()
        advance(oracle, 1.0)
        manual.param_groups[0].update(lr=lr, momentum=momentum)
        train(twin, manual, 1, 1 + step)
    assert len({lr for lr, _ in seen}) > 2
    assert (len({momentum for _, momentum in seen}) > 2) == (name == "one_cycle")
    assert not differing(snapshot(model, optimizer), snapshot(twin, manual))


@pytest.mark.parametrize("fallback, rule", [
    ("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    ("adamw", lambda groups: torch.optim.AdamW(groups, weight_decay=0, fused=True)),
])  # fmt: skip
@pytest.mark.parametrize("name", SCHEDULERS)
def test_fallback_rate_follows_the_schedule(name, fallback, rule):
    """A batch norm trained at fallback_lr times the share of the rate of the moment in its peak."""
    model = mlp()
    norm, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    optimizer = RLSOptimizer(nn.Sequential(norm, model), lr=0.05, fallback_lr=0.02,
                             fallback=fallback)  # fmt: skip
    scheduler = SCHEDULERS[name](optimizer)
    oracle = rule([{"params": twin.parameters(), "lr": 0.02}])
    for _ in range(6):
        oracle.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * (0.02 / 0.05)
        for p, q in zip(norm.parameters(), twin.parameters()):
            p.grad = q.grad = torch.randn_like(p)
        optimizer.step()
        oracle.step()
        advance(scheduler, 1.0)
    assert all(map(torch.equal, norm.parameters(), twin.parameters()))
    assert not torch.equal(norm.weight, torch.ones(4))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_in_mid_schedule_is_bitwise_the_same(name):
    model = cnn()
    optimizer = RLSOptimizer(model, lr=0.05)
    scheduler = SCHEDULERS[name](optimizer)
    scheduled(model, optimizer, scheduler, 3)
    parts = (model, optimizer, scheduler)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    expected = scheduled(model, optimizer, scheduler, 4, seed=20)

    twin = cnn(seed=5)
    other = RLSOptimizer(twin, lr=0.3)
    resumed = SCHEDULERS[name](other)
    for part, state in zip((twin, other, resumed), states):
        part.load_state_dict(state)
    assert scheduled(twin, other, resumed, 4, seed=20) == expected
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_rate_of_zero_holds_the_weights_but_not_the_matrix():
    """A warm-up from 0 already gathers statistics, for the fallback too."""
    model = cnn()
    optimizer = RLSOptimizer(model, weight_decay=0.1)
    scheduler = schedules.LambdaLR(optimizer, lambda t: float(t > 1))
    before = snapshot(model, optimizer)
    scheduled(model, optimizer, scheduler, 2)
    assert not any(k.startswith("param") for k in before.keys() & differing(
        before, snapshot(model, optimizer)))  # fmt: skip
    assert optimizer.health()["0"].updates == 2
    scheduled(model, optimizer, scheduler, 1)
    assert {f"param.{i}" for i in range(7)} <= differing(before, snapshot(model, optimizer))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("evaluations", [1, 3])
def test_closure_is_evaluated_in_place_of_a_backward(form, evaluations):
    """However often it runs the model, each time clearing the gradients, the last one counts."""
    model, twin = cnn(torch.float64), cnn(torch.float64)
    optimizer, other = (make(m, form=form) for m in (model, twin))
    calls = []
    for step in range(3):

        def closure(step=step):
            assert torch.is_grad_enabled()
            for _ in range(evaluations):
                optimizer.zero_grad()
                loss = model(batch(model, seed=step + 1)).square().mean()
                loss.backward()
            calls.append(loss)
            return loss

        assert optimizer.step(closure) is calls[-1]
    train(twin, other, 3)
    assert len(calls) == 3
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_closure_without_a_gradient_changes_nothing():
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert optimizer.step(lambda: None) is None
    assert not differing(before, snapshot(model, optimizer))


@pytest.mark.parametrize("closure", [0, "loss", torch.ones(1)])
def test_what_is_no_closure_is_refused_with_the_step(closure):
    model = mlp()
    optimizer = make(model)
    model(batch(model)).sum().backward()
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match=f"closure must be callable, got {type(closure).__name__}"):
        optimizer.step(closure)
    assert not differing(before, snapshot(model, optimizer))
    optimizer.step()
    assert optimizer.health()["0"].updates == 1  # what was staged is still there


def test_error_inside_the_closure_passes_through():
    model = mlp()
    optimizer = make(model)
    before = snapshot(model, optimizer)

    def closure():
        model(batch(model)).sum().backward()
        raise KeyError("the data has ended")

    with pytest.raises(KeyError, match="the data has ended"):
        optimizer.step(closure)
    assert not differing(before, snapshot(model, optimizer))


def wide(seed=0):
    """N << c for a batch of 3, where the product takes the factors of the gradient."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 50)).double()


@pytest.mark.parametrize("form", ["paper", "natural"])
@pytest.mark.parametrize("size", [3, 80])
@pytest.mark.parametrize("change", ["clipped", "penalty", "scaled", "noise", "detached"])
def test_step_follows_the_gradient_as_it_is_at_the_step(change, size, form):
    """With P = I at its first step and no gain to speak of: W - lr G, whatever G has become."""
    model = wide()
    optimizer = RLSOptimizer(model, form=form, lr=0.5, gain=1e-13, trust_ratio=math.inf)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(torch.randn(size, 40).double()).square().sum()
    if change == "penalty":
        loss = loss + sum(p.square().sum() + p.sum() for p in model.parameters())
    loss.backward()
    if change == "clipped":
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 1
    for p in model.parameters():
        if change == "scaled":
            p.grad *= 3
        elif change == "noise":
            p.grad += torch.randn_like(p)
        elif change == "detached":
            p.grad = torch.randn_like(p)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, old, grad in zip(model.parameters(), before, grads):
        torch.testing.assert_close(p, old - 0.5 * grad, rtol=1e-8, atol=1e-10)
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("build", [mlp, cnn, wide])
@pytest.mark.parametrize("form", ["paper", "natural"])
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"forgetting": 1 - 1e-13},
    {"summary": "sketch", "rank": 2}, {"initial_scale": 2.0},
], ids=str)  # fmt: skip
def test_without_gain_it_is_sgd(build, form, options):
    """P stays at its start, a multiple of I, which is a factor of the rate."""
    model, twin = (build().double() for _ in range(2))
    optimizer = RLSOptimizer(model, form=form, lr=0.02, gain=1e-13, trust_ratio=math.inf,
                             fallback="sgd", fallback_lr=0.0, **options)  # fmt: skip
    scale = options.get("initial_scale", 1.0)
    covered = [p for m in twin for p in m.parameters() if not isinstance(m, nn.BatchNorm2d)]
    sgd = torch.optim.SGD(covered, lr=0.02 * scale, momentum=options.get("momentum", 0.0),
                          weight_decay=options.get("weight_decay", 0.0) / scale)  # fmt: skip
    for step in range(4):
        x = torch.randn(3, 40).double() if build is wide else batch(model, seed=step)
        for m, o in ((model, optimizer), (twin, sgd)):
            m.zero_grad()
            m(x).square().mean().backward()
            o.step()
    for ours, its in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, its, rtol=1e-8, atol=1e-9)


def test_batch_of_one_at_a_large_rate_is_warned_of():
    model = mlp()
    optimizer = RLSOptimizer(model, form="paper", lr=0.5, gain=0.1)
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match="lr above twice the gain"):
        train(model, optimizer, 1, size=1)

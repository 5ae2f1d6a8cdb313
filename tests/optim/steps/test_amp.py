"""Half precision, automatic mixed precision, and gradients or inputs that are not finite."""

import math

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, mlp, train
from torch import nn

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]
MODELS = {"mlp": mlp, "cnn": cnn}


def matrices(optimizer):
    return {k: v["P"] for k, v in optimizer.state.items() if "P" in v}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, expected", [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64),
])  # fmt: skip
def test_dtype_of_state_follows_the_parameters(form, dtype, expected):
    model = mlp(dtype)
    optimizer = RLSOptimizer(model, form=form, momentum=0.5, lr=0.02)
    losses = train(model, optimizer, 8)
    assert all(math.isfinite(loss) for loss in losses)
    for state in (optimizer.state[layer.weight] for layer in (model[0], model[2])):
        assert state["P"].dtype == expected
        assert state["health"].dtype == torch.float64
        for name in {"momentum_buffer", "first_moment", "second_moment", "power"} & state.keys():
            assert state[name].dtype == expected
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(h.updates == 8 and h.symmetry_error == 0 for h in optimizer.health().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float64_matrix_on_request(dtype):
    model = mlp(dtype)
    optimizer = RLSOptimizer(model, dtype=torch.float64)
    train(model, optimizer)
    assert {P.dtype for P in matrices(optimizer).values()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMS)
def test_float32_follows_float64(form):
    models = [mlp(torch.float32), mlp(torch.float64)]
    for model in models:
        train(model, RLSOptimizer(model, form=form, lr=0.02, summary="mean", rank=2), 5)
    for single, double in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def autocast_step(model, optimizer, x, scaler=None, scale_loss=1.0):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    loss = out.float().square().mean() * scale_loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_autocast(name, form):
    model = MODELS[name]()
    optimizer = RLSOptimizer(model, form=form, lr=0.02)
    for step in range(5):
        autocast_step(model, optimizer, batch(model, seed=step))
    assert {P.dtype for P in matrices(optimizer).values()} == {torch.float32}
    for health in optimizer.health().values():
        assert (health.missing, health.refused, health.resets) == (0, 0, 0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_step_inside_autocast_is_the_same(form):
    results = []
    for inside in (False, True):
        model = mlp()
        optimizer = RLSOptimizer(model, form=form, lr=0.02)
        for step in range(3):
            model(batch(model, 2, step)).square().mean().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model, optimizer))
    assert not differing(*results)


def test_scaled_steps_are_the_unscaled_ones():
    results = []
    for scaled in (False, True):
        model = mlp(torch.float64)
        optimizer = RLSOptimizer(model, form="natural")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for step in range(4):
            loss = model(batch(model, seed=step)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(snapshot(model, optimizer))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_found_inf_step_changes_nothing_now_or_later(summary, unscale, clear):
    """Two runs, one with an overflowing batch in between: the same to the bit."""
    results = []
    for overflow in (False, True):
        model = cnn()
        optimizer = RLSOptimizer(model, summary=summary, rank=2, form="natural")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        model[1].eval()  # the running statistics of a batch norm are not the optimizer's

        def step(x, factor, model=model, optimizer=optimizer, scaler=scaler):
            scaler.scale(model(x).square().mean() * factor).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(optimizer)
            scaler.update(4.0)
            (optimizer if clear == "optimizer" else model).zero_grad()

        for k in range(4):
            if overflow and k == 2:
                before = snapshot(model, optimizer)
                step(batch(model, seed=99), math.inf)
                assert not differing(before, snapshot(model, optimizer))
            step(batch(model, seed=k), 1.0)
        results.append(snapshot(model, optimizer))
    assert not differing(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_nonfinite_gradient_voids_the_step(form, bad, which):
    model = mlp()
    optimizer = RLSOptimizer(model, form=form, momentum=0.5, lr=0.02)
    train(model, optimizer)
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    model(batch(model)).sum().backward()
    getattr(model[0], which).grad.view(-1)[1] = bad
    optimizer.step()
    changed = differing(before, snapshot(model, optimizer))
    assert changed == {f"state.{i}.{name}" for i in (0, 2) for name in ("step", "health")}
    assert [h.refused for h in optimizer.health().values()] == [1, 1]
    losses = train(model, optimizer)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_nonfinite_input_is_refused(form, summary):
    model = mlp()
    optimizer = RLSOptimizer(model, form=form, summary=summary, rank=2, lr=0.02)
    train(model, optimizer)
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    x = torch.full_like(batch(model), math.nan)
    model(x).sum().backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed = differing(before, snapshot(model, optimizer))
    assert not any(name.endswith(".P") or name.startswith("param") for name in changed)
    assert optimizer.health()["0"].refused == 1
    optimizer.zero_grad()
    assert all(math.isfinite(loss) for loss in train(model, optimizer))


def test_one_group_of_a_convolution_may_be_refused_alone():
    model = nn.Conv2d(4, 4, 3, groups=2)
    optimizer = RLSOptimizer(model, form="natural")
    x = torch.randn(3, 4, 5, 5)
    x[:, 2:] = math.nan
    model(x)[:, :2].sum().backward()
    model.weight.grad.nan_to_num_()
    before = model.weight.detach().clone()
    optimizer.step()
    P = optimizer.inverse_autocorrelation(model)
    assert not torch.equal(P[0], torch.eye(P.shape[-1]))
    assert torch.equal(P[1], torch.eye(P.shape[-1]))
    assert not torch.equal(before[:2], model.weight[:2])
    assert torch.equal(before[2:], model.weight[2:])
    health = optimizer.health()[""]
    assert (health.updates, health.refused) == (1, 1)


def test_indefinite_matrix_is_reset_and_reported():
    model = mlp()
    optimizer = RLSOptimizer(model, form="natural", initial_scale=2.0)
    train(model, optimizer)
    P = optimizer.inverse_autocorrelation("0")
    P.copy_(-100 * torch.eye(5))
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(P, 2 * torch.eye(5))
    assert torch.equal(before, model[0].weight)
    assert optimizer.health()["0"].resets == 1
    train(model, optimizer, 1)
    assert not torch.equal(before, model[0].weight)

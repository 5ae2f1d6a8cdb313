"""Layers that step while their input is not seen, and modes in which it must be: nothing silent."""

import copy
import warnings

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]


def regression(model, optimizer, forward=None, steps=150):
    """Trains the model towards a fixed network and returns its last loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = mlp(seed=3)(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (forward or plain)(model, x, y)
        optimizer.step()
    return loss


def plain(model, x, y):
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.item()


def functional(model, x, y):
    """Gradients by a transform, whose forwards are none of the modules' own."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(values):
        return (functional_call(model, values, (x,)) - y).square().mean()

    for name, gradient in grad(loss_of)(values).items():
        model.get_parameter(name).grad = gradient
    return loss_of(values).item()


def per_sample(model, x, y):
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(values, x, y):
        return (functional_call(model, values, (x,)) - y).square().mean()

    for name, gradient in vmap(grad(loss_of), (None, 0, 0))(values, x, y).items():
        model.get_parameter(name).grad = gradient.mean(0)
    return (functional_call(model, values, (x,)) - y).square().mean().item()


def cleared(model, x, y):
    for module in model:
        module._forward_hooks.clear()
    return plain(model, x, y)


UNSEEN = {"functional": functional, "per_sample": per_sample, "cleared": cleared}


@pytest.mark.parametrize("form", FORMS)
def test_eval_mode_trains_to_the_bit_as_training_mode(form):
    model = mlp()
    twin = copy.deepcopy(model).eval()
    optimizer, other = RLSOptimizer(model, form=form), RLSOptimizer(twin, form=form)
    assert train(model, optimizer, 5) == train(twin, other, 5)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert {row.missing for row in other.health().values()} == {0}


def test_batch_norms_in_eval_mode_do_not_stop_the_matrices():
    model = cnn().eval()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 3)
    assert all(row.missing == 0 for row in optimizer.health().values())


@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_a_validation_with_gradients_changes_no_draw(summary):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model, summary), make(twin, summary)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            if m is model:  # a forward of which nobody asks for a gradient
                m.eval()(batch(m, size=5, seed=50))
            m.train()(batch(m, seed=step)).square().mean().backward()
            o.step()
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_micro_batches_in_eval_mode_are_one_batch(summary):
    rows = []
    for parts in (1, 2):
        model = mlp(torch.float64).eval()
        optimizer = make(model, summary)
        for part in batch(model).chunk(parts):
            (model(part).square().sum()).backward()
        rows.append(optimizer._registry.stages[model[0].weight].summary.rows)
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("name", UNSEEN)
def test_layers_that_are_never_seen_still_train_and_are_named(name):
    model = mlp()
    optimizer = RLSOptimizer(model)
    with pytest.warns(UserWarning) as caught:
        loss = regression(model, optimizer, UNSEEN[name])
    said = [w for w in caught if "no input was seen" in str(w.message)]
    assert len(said) == 1 and "'0', '2'" in str(said[0].message)
    assert said[0].filename == __file__
    assert loss < 0.02  # 0.25 at the hundredth of the rate that the first step has
    rows = {row.name: row for row in optimizer.coverage()}
    assert all(rows[n].why == "no input is seen: it steps without P" for n in ("0", "2"))


def test_a_warning_names_the_line_of_the_user_through_a_scheduler_and_a_scaler():
    model = mlp()
    optimizer = RLSOptimizer(model)
    CosineAnnealingLR(optimizer, 10)  # wraps step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.warns(UserWarning, match="no input was seen") as caught:
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            scaler.step(optimizer)
            scaler.update()
    assert {warning.filename for warning in caught} == {__file__}


def test_sparse_input_is_named():
    model = nn.Sequential(nn.Linear(30, 4), nn.Linear(4, 2))
    optimizer = RLSOptimizer(model)
    x = torch.eye(30)[:6].to_sparse_csr()
    with pytest.warns(UserWarning, match="no input was seen in the last 3 steps of '0': they"):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()


def test_one_step_without_an_input_is_no_alarm():
    """A checkpointer steps once with zero gradients to see the state."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(model, optimizer, 1)
            optimizer.step()
            optimizer.step()
    assert not any(row.why for row in optimizer.coverage())


def test_a_warm_up_that_saw_nothing_has_ended_for_the_matrix_too():
    """Whoever shows a layer its input after 203 blind steps finds the rate and the gain of then."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    with pytest.warns(UserWarning, match="no input was seen"):
        regression(model, optimizer, functional, steps=203)
    before = optimizer.inverse_autocorrelation("0").clone()
    train(model, optimizer, 1)
    drift, gain = 0.3, 1 - 0.99**4  # P keeps 1 - gain * drift of itself, less what it has seen
    moved = (optimizer.inverse_autocorrelation("0") - before).abs().max()
    assert 0 < moved < 3 * gain + drift * gain

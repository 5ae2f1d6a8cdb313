"""Steps that are to change nothing, or not everything: no gradient, eval mode, unused, frozen."""

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp
from torch import nn

MODELS = {"mlp": mlp, "cnn": cnn}


def unused(model, optimizer):
    model(batch(model)).sum()


def undifferentiated(model, optimizer):
    with torch.no_grad():
        model(batch(model))


def frozen(model, optimizer):
    model.requires_grad_(False)
    x = batch(model).requires_grad_()
    model(x).sum().backward()


def inference(model, optimizer):
    with torch.inference_mode():
        model(batch(model))


def zeroed(model, optimizer):
    model(batch(model)).sum().backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("skip", [unused, undifferentiated, frozen, inference, zeroed])
def test_skipped_step_changes_nothing(name, skip):
    model = MODELS[name]()
    optimizer = make(model)
    model(batch(model)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    skip(model, optimizer)
    optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def test_second_step_without_a_new_backward_is_reported():
    model = mlp()
    optimizer = make(model)
    model(batch(model)).sum().backward()
    optimizer.step()
    P = optimizer.inverse_autocorrelation("0").clone()
    optimizer.step()
    assert torch.equal(P, optimizer.inverse_autocorrelation("0"))
    assert optimizer.health()["0"].missing == 1


def test_unused_branch_is_left_alone():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(5, 4)
        model[1](x)
        model[0](x).sum().backward()
        optimizer.step()
    assert optimizer.health().keys() == {"0"}
    assert model[1].weight not in optimizer.state


def test_layer_frozen_later_and_thawed():
    model = mlp()
    optimizer = make(model)
    for frozen_step in (False, True, False):
        optimizer.zero_grad()
        model[0].requires_grad_(not frozen_step)
        before = snapshot(model, optimizer)
        model(batch(model)).sum().backward()
        optimizer.step()
        moved = differing(before, snapshot(model, optimizer))
        assert ("param.0" in moved) != frozen_step
        assert ("state.0.P" in moved) != frozen_step
        assert "param.2" in moved

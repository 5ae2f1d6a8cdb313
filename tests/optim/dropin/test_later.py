"""Parameters that come, go or are replaced once the optimizer is made: followed, or said."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from support.training import cnn, mlp, train
from torch import nn

from rlscuda import RLSOptimizer

IDLE = "no parameter of the optimizer had a gradient in the last 3 steps"
REPLACED = "parameters of no module that is known have replaced those of '0', '2' in the groups"
NO_MODULE = "no module that holds the parameters was found"


def statuses(optimizer):
    return {row.name: row.status for row in optimizer.coverage()}


def replaced(model):
    """Puts other parameters in the place of all of a model; old -> new."""
    new = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            new[p] = nn.Parameter(p.detach().clone())
            setattr(module, name, new[p])
    return new


# -- groups added later -----------------------------------------------------------------------


def test_a_group_of_the_module_that_was_found_is_not_looked_for(monkeypatch):
    model = mlp()
    optimizer = RLSOptimizer([model[0].weight, model[2].weight])
    monkeypatch.setattr(gc, "get_objects", None)
    optimizer.add_param_group({"params": [model[0].bias, model[2].bias]})
    assert set(statuses(optimizer)) == {"0", "2"}


def test_an_unfrozen_part_joins_under_the_names_of_the_whole():
    """As when fine-tuning starts with the head alone."""
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(3, 2)})
    optimizer = RLSOptimizer(model["head"].parameters(), lr=0.02)
    x = torch.randn(8, 4)
    for step in range(4):
        if step == 2:
            assert set(optimizer.health()) == {""}
            optimizer.add_param_group({"params": model["body"].parameters()})
        optimizer.zero_grad()
        model["head"](model["body"](x)).square().mean().backward()
        optimizer.step()
    assert statuses(optimizer) == {"body.0": "exact", "body.2": "exact", "head": "exact"}
    updates = {name: h.updates for name, h in optimizer.health().items()}
    assert updates == {"head": 4, "body.0": 2, "body.2": 2}
    indices = [layer.index for layer in optimizer._registry.layers.values()]
    assert len(set(indices)) == 3


def test_a_module_that_comes_later_joins():
    first, second = mlp(), nn.Linear(3, 2)
    optimizer = RLSOptimizer(first.parameters())
    optimizer.add_param_group({"params": second.parameters()})
    assert statuses(optimizer) == {"0.0": "exact", "0.2": "exact", "1": "exact"}
    with pytest.warns(UserWarning, match=NO_MODULE):
        plain = RLSOptimizer([nn.Parameter(torch.ones(2))])
    plain.add_param_group({"params": first.parameters()})
    assert statuses(plain) == {"0": "exact", "2": "exact", "(parameters)": "fallback"}


def test_with_a_model_given_no_other_is_looked_for(monkeypatch):
    model, other = mlp(), mlp()
    monkeypatch.setattr(gc, "get_objects", None)
    optimizer = RLSOptimizer(model)
    optimizer.add_param_group({"params": other.parameters()})
    assert statuses(optimizer) == {"0": "exact", "2": "exact", "(parameters)": "fallback"}


# -- parameters replaced ----------------------------------------------------------------------


def test_replaced_in_the_model_and_the_groups():
    """As when a framework shards the model: placeholders first, then what the model has now."""
    model = cnn()
    optimizer = RLSOptimizer(model.parameters())
    usual = statuses(optimizer)
    (group,) = optimizer.param_groups
    old = list(group["params"])
    for i in range(len(old)):
        group["params"][i] = torch.empty(1)
    new = replaced(model)
    group["params"] = [new[p] for p in old]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 4)
    assert statuses(optimizer) == usual
    assert optimizer.health()["0"].updates == 3  # the hooks came with the first step
    assert not any(map(torch.equal, old, new.values()))


def test_replaced_by_those_of_another_model_that_lives():
    model = mlp()
    optimizer = RLSOptimizer(model.parameters())
    copied = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(copied.parameters())
    train(copied, optimizer, 3)
    assert statuses(optimizer) == {"0": "exact", "2": "exact"}
    assert optimizer.health()["2"].updates == 2  # the hooks came with the first step


@pytest.mark.parametrize("given", ["model", "parameters"])
def test_replaced_by_those_of_no_module(given):
    model = mlp()
    optimizer = RLSOptimizer(model if given == "model" else model.parameters())
    train(model, optimizer, 2)
    loose = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = loose
    for first in (True, False):  # said once
        for p in loose:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in loose]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert not any(map(torch.equal, before, loose))
        assert [REPLACED in str(w.message) for w in caught] == [True] * first
    assert statuses(optimizer) == {"0": "refused", "2": "refused", "(parameters)": "fallback"}


@pytest.mark.parametrize("given", ["model", "parameters"])
def test_replaced_in_the_model_alone(given):
    """Nothing that the optimizer has is used any more."""
    model = mlp()
    optimizer = RLSOptimizer(model if given == "model" else model.parameters())
    train(model, optimizer, 1)
    optimizer.zero_grad()
    replaced(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    with pytest.warns(UserWarning, match=IDLE):
        train(model, optimizer, 1)
    assert set(statuses(optimizer).values()) == {"refused", "fallback"}
    optimizer.param_groups[0]["params"] = list(model.parameters())  # the way out
    train(model, optimizer, 1)
    assert statuses(optimizer) == {"0": "exact", "2": "exact"}


def test_steps_without_a_gradient_now_and_then_are_nothing_to_warn_of():
    model = mlp()
    optimizer = RLSOptimizer(model.parameters())
    for _ in range(4):
        train(model, optimizer, 1)
        optimizer.zero_grad()
        optimizer.step()
        optimizer.step()


def test_copies_follow_nothing_but_their_groups():
    model = mlp()
    model, optimizer = pickle.loads(pickle.dumps((model, RLSOptimizer(model.parameters()))))
    train(model, optimizer, 2)
    assert optimizer.health()["0"].updates == 2
    other = nn.Linear(3, 2)
    optimizer.add_param_group({"params": other.parameters()})
    assert statuses(optimizer) == {"0": "exact", "2": "exact", "(parameters)": "fallback"}

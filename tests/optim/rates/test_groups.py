"""Parameter groups: each with options of its own, with and without covered layers."""

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]


def same_layer(model, optimizer, twin, other, index):
    """Weights, P and moments of one layer are the same in two runs."""
    for p, q in zip(model[index].parameters(), twin[index].parameters()):
        assert torch.equal(p, q)
    mine, its = optimizer.state[model[index].weight], other.state[twin[index].weight]
    assert mine.keys() == its.keys()
    assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(its[k])) for k in mine)


def lockstep(models, optimizers, steps=3):
    """Steps on the first model's data and output gradients, which all models share by layer."""
    for step in range(steps):
        x = batch(models[0], seed=step)
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            hidden = model[0](x)  # each layer by itself: its input and gradient do not depend
            model[2](torch.tanh(x @ torch.ones(4, 6))).square().sum().backward()  # on the other
            hidden.square().sum().backward()
            optimizer.step()


OPTIONS = [
    {"lr": 0.05, "form": "paper", "gain": 0.3, "momentum": 0.5},
    {"lr": 0.02, "form": "natural", "gain": 0.2, "rank": 3, "forgetting": 0.95},
    {"lr": 0.01, "form": "adaptive", "weight_decay": 0.3, "initial_scale": 0.5, "drift": 0.1},
    {"form": "natural", "summary": "mean", "dtype": torch.float64},
    {"form": "paper"},
    {"seed": 5},
]


@pytest.mark.parametrize("second", range(len(OPTIONS)))
@pytest.mark.parametrize("first", range(len(OPTIONS)))
def test_each_group_is_as_if_alone(first, second):
    model = mlp()
    optimizer = RLSOptimizer(
        [{"params": model[0].parameters(), **OPTIONS[first]},
         {"params": model[2].parameters(), **OPTIONS[second]}], model=model,
    )  # fmt: skip
    twins = [copy.deepcopy(model) for _ in range(2)]
    alone = [
        RLSOptimizer(twin[index].parameters(), model=twin, **OPTIONS[chosen])
        for twin, index, chosen in zip(twins, (0, 2), (first, second))
    ]
    lockstep([model, *twins], [optimizer, *alone])
    same_layer(model, optimizer, twins[0], alone[0], 0)
    same_layer(model, optimizer, twins[1], alone[1], 2)


@pytest.mark.parametrize("form", FORMS)
def test_group_added_later_joins_from_then_on(form):
    model = cnn()
    optimizer = make(model[0].parameters(), form=form, model=model)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.add_param_group({"params": [*model[3].parameters(), *model[5].parameters()],
                               "lr": 0.03})  # fmt: skip
    assert [r.status for r in optimizer.coverage()] == ["exact", "fallback", "exact", "exact"]
    train(model, optimizer, 2)
    assert {f"param.{i}" for i in range(7)} <= differing(before, snapshot(model, optimizer))
    updates = {name: h.updates for name, h in optimizer.health().items()}
    assert updates == {"0": 4, "3": 4, "5": 2}  # two groups of the convolution, two steps
    twin = copy.deepcopy(model)
    groups = [{"params": list(twin.parameters())[a:b]} for a, b in ((0, 2), (2, 4), (4, 7))]
    other = make(groups, form=form, model=twin)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[2]["lr"] == 0.03
    train(model, optimizer, 2, seed=8)
    train(twin, other, 2, seed=8)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("group, error, message", [
    ({"lr": -1.0}, ValueError, "lr must be >= 0 and finite, got -1.0"),
    ({"forgetting": 2.0}, ValueError, "forgetting must be in (0, 1], got 2.0"),
    ({"form": "papers"}, ValueError,
     "form must be spectral | adaptive | paper | natural, got 'papers'"),
    ({"params": "taken"}, ValueError, "some parameters appear in more than one parameter group"),
    ({"params": [1.0]}, TypeError, "optimizer can only optimize Tensors"),
    ({"params": {1, 2}}, TypeError, "ordered collections"),
    (None, TypeError, "param_group must be a dict, got list"),
])  # fmt: skip
def test_wrong_group_is_not_added(group, error, message):
    model = mlp()
    optimizer = make(model[0].parameters(), model=model)
    train(model, optimizer, 1)
    before, state = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict())
    added = [] if group is None else {"params": list(model[2].parameters()), **group}
    if group and group.get("params") == "taken":
        added["params"] = [*model[2].parameters(), model[0].bias]
    with pytest.raises(error) as caught:
        optimizer.add_param_group(added)
    assert message in str(caught.value)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert [r.status for r in optimizer.coverage()] == ["exact", "refused"]
    assert not differing(before, snapshot(model, optimizer))
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, 1)
    assert optimizer.health()["2"].updates == 1


def test_callers_groups_are_not_written_to():
    model = mlp()
    groups = [{"params": list(model[0].parameters()), "lr": 0.05}, {"params": [model[2].weight]}]
    kept = [dict(group) for group in groups]
    make(groups, model=model).add_param_group(added := {"params": [model[2].bias]})
    assert groups == kept and added.keys() == {"params"}


def test_bias_in_another_group_follows_the_fallback():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    weight, bias = model.parameters()
    optimizer = RLSOptimizer([{"params": [weight]}, {"params": [bias], "lr": 0.02}], model=model,
                             fallback="sgd")  # fmt: skip
    (row,) = optimizer.coverage()
    assert (row.status, row.fan_in) == ("exact", 4) and "another group" in row.why
    before = bias.detach().clone()
    model(torch.randn(5, 4).double()).sum().backward()
    optimizer.step()
    torch.testing.assert_close(bias, before - 0.02 * 5)
    assert optimizer.health()["0"].updates == 1

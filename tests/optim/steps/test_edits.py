"""Groups, parameters, layers and state that others change: read where they are."""

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]


def replaced_list(optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


def replaced_entries(optimizer):
    optimizer.param_groups[:] = [copy.copy(group) for group in optimizer.param_groups]


def replaced_parameters(optimizer):
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", [replaced_list, replaced_entries, replaced_parameters])
def test_groups_that_are_new_objects_are_followed(edit, form):
    model, twin = cnn(), cnn()
    optimizer, other = RLSOptimizer(model, form=form), RLSOptimizer(twin, form=form)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
    edit(optimizer)
    for o in (optimizer, other):
        o.param_groups[0].update(lr=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2, seed=7)
    if form == "adaptive":
        assert all(map(torch.equal, before, model.parameters()))
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("edit", [replaced_list, replaced_parameters])
def test_summaries_follow_new_groups_at_once(edit):
    model = mlp()
    optimizer = make(model, rank=3)
    edit(optimizer)
    optimizer.param_groups[0]["rank"] = 2
    model(batch(model)).sum().backward()
    assert optimizer._registry.stages[model[0].weight].summary.rows.shape == (1, 2, 5)


def test_a_parameter_taken_out_is_left_alone_and_put_back_goes_on():
    model = cnn()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    group = optimizer.param_groups[0]
    taken = {id(model[0].weight), id(model[0].bias), id(model[1].bias)}
    everything, group["params"] = (
        group["params"],
        [p for p in group["params"] if id(p) not in taken],
    )
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert moved == [id(p) not in taken for p in model.parameters()]
    group["params"] = everything
    train(model, optimizer, 1)
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("rows", [4, 200], ids=["factored", "whole"])
def test_a_bias_taken_out_of_the_groups_stays_as_a_frozen_one_does(rows):
    models = [nn.Sequential(nn.Linear(48, 64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [RLSOptimizer(m, lr=0.01) for m in models]
    x = torch.randn(rows, 48)
    for step in range(2):
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            model.zero_grad()
            model(x).square().mean().backward()
            if step and i:
                model[0].bias.grad = None
            elif step:
                optimizer.param_groups[0]["params"] = [model[0].weight]
            before = model[0].bias.detach().clone()
            optimizer.step()
    assert torch.equal(before, models[0][0].bias) and torch.equal(before, models[1][0].bias)
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def replaced_head():
    """A head of the same shape in the module and in the group, and nothing of it seen yet."""
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 2)
    model[2] = nn.Linear(6, 3)
    optimizer.param_groups[0]["params"][2:] = model[2].parameters()
    return model, optimizer


def test_what_users_look_at_is_of_the_groups_as_they_are():
    model, optimizer = replaced_head()
    assert set(optimizer.health()) == {"0"}  # the old head is in no group
    fresh = torch.eye(7)
    assert torch.equal(optimizer.inverse_autocorrelation("2"), fresh)
    model, optimizer = replaced_head()
    assert torch.equal(optimizer.inverse_autocorrelation(model[2]), fresh)


def test_a_state_is_loaded_into_the_groups_as_they_are():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 3)
    twin, other = replaced_head()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2, seed=7)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_a_look_that_was_cut_short_starts_anew(monkeypatch):
    model, optimizer = replaced_head()
    search = optimizer._registry.search

    def interrupted(parameters):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer._registry, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.setattr(optimizer._registry, "search", search)
    train(model, optimizer, 1)
    assert "P" in optimizer.state[model[2].weight]


def test_a_parameter_put_in_its_place_is_trained():
    """As after `resize_token_embeddings`: another tensor in the module and in the group."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = RLSOptimizer(model)
    x = torch.tensor([0, 3, 1])
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model[0].weight = nn.Parameter(torch.randn(9, 4))
    model[1].weight = nn.Parameter(torch.randn(3, 4))
    optimizer.param_groups[0]["params"][:2] = [model[0].weight, model[1].weight]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([8, 1])).sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert [row.status for row in optimizer.coverage()] == ["fallback", "exact", "exact"]
    assert optimizer.state[model[1].weight]["P"].shape == (5, 5)


# -- layers that come later ---------------------------------------------------------------------


def test_layers_added_later_are_covered_with_their_group():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 2)
    model.append(nn.Linear(3, 3))
    model.append(nn.LayerNorm(3))
    rows = {row.name: (row.status, row.why) for row in optimizer.coverage()}
    assert rows["3"] == rows["4"] == ("refused", "in no parameter group")
    optimizer.add_param_group({"params": [*model[3].parameters(), *model[4].parameters()]})
    rows = {row.name: row.status for row in optimizer.coverage()}
    assert rows == {"0": "exact", "2": "exact", "3": "exact", "4": "fallback"}
    train(model, optimizer, 2)
    assert {name: row.updates for name, row in optimizer.health().items()} == {
        "0": 4, "2": 4, "3": 2}  # fmt: skip
    indices = [layer.index for layer in optimizer._registry.layers.values()]
    assert len(set(indices)) == 3  # of which each draws at random on its own


def test_a_replaced_head_is_reported_as_it_is():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    model[2] = nn.Linear(6, 5)
    rows = {row.name: (row.status, row.why) for row in optimizer.coverage()}
    assert rows == {
        "0": ("exact", ""),
        "2": ("refused", "in no parameter group"),
        "(parameters)": ("fallback", "2 parameters of no module of the model"),
    }
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, 1)
    assert optimizer.inverse_autocorrelation(model[2]).shape == (7, 7)
    assert optimizer.inverse_autocorrelation("2") is optimizer.inverse_autocorrelation(model[2])


def test_parameters_that_the_model_lost_are_reported():
    model = mlp()
    optimizer = RLSOptimizer(model)
    model.load_state_dict(mlp(seed=5).state_dict(), assign=True)
    rows = {row.name: (row.status, row.why) for row in optimizer.coverage()}
    assert rows["0"] == rows["2"] == ("refused", "in no parameter group")
    assert rows["(parameters)"][1] == "4 parameters of no module of the model"


def test_selection_holds_for_layers_that_come_later():
    model = nn.ModuleDict({"body": mlp(), "tail": nn.Linear(3, 3)})
    optimizer = RLSOptimizer(model, include=["body", "tail"], exclude=(n for n in ["*[19]"]))
    del model["tail"]  # a name that is no longer there is no error
    model["body"].add_module("9", nn.Linear(3, 3))
    model["body"].add_module("10", nn.Linear(3, 3))
    model["head"] = nn.Linear(3, 2)
    for module in (model["body"][-1], model["body"][-2], model["head"]):
        optimizer.add_param_group({"params": module.parameters()})
    rows = {row.name: (row.status, row.why) for row in optimizer.coverage()}
    assert rows["body.10"] == ("exact", "")
    assert rows["body.9"] == ("fallback", "excluded")
    assert rows["head"] == ("fallback", "not in include")


def test_an_optimizer_made_anew_goes_on_with_layers_added_later_to_the_bit():
    """Its random draws are those of the layer's place in the model."""

    def body():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.LayerNorm(3))

    model = body()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[4].parameters()})
    train(model, optimizer, 1)
    twin = body().append(nn.Linear(3, 3))
    twin.load_state_dict(model.state_dict())
    groups = [{"params": twin[:4].parameters()}, {"params": twin[4].parameters()}]
    other = RLSOptimizer(groups, model=twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2, seed=7)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


# -- state of others -----------------------------------------------------------------------------


class SharpnessAware(torch.optim.Optimizer):
    """Foret et al. 2021 as users wrap it: shared groups and, if asked for, one shared state."""

    def __init__(self, params, base, shared_state=False, **options):
        super().__init__(params, {"rho": 0.05, "adaptive": False})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        if shared_state:
            self.state = self.base_optimizer.state

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        members = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in members]).norm()
        for p in members:
            self.state[p]["old_p"] = p.detach().clone()
            p.data.add_(p.grad, alpha=0.05 / float(norm))
        with torch.enable_grad():
            closure()
        for p in members:
            p.data.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def sharpness_aware(model, shared_state):
    wrapped = SharpnessAware(model.parameters(), RLSOptimizer, shared_state, model=model)
    losses = []
    for _ in range(6):

        def closure():
            wrapped.base_optimizer.zero_grad()
            loss = model(batch(model)).square().mean()
            loss.backward()
            return loss

        losses.append(wrapped.step(closure).item())
    return wrapped, losses


@pytest.mark.parametrize("build", [mlp, cnn])
def test_entries_of_others_in_the_state_change_nothing(build):
    models = build(), build()
    (ours, losses), (theirs, expected) = (
        sharpness_aware(model, shared) for model, shared in zip(models, (True, False))
    )
    assert losses == expected and losses[-1] < losses[0]
    for p, q in zip(*(m.parameters() for m in models)):
        assert torch.equal(p, q)
    base = ours.base_optimizer
    saved = copy.deepcopy(base.state_dict())
    twin = build()
    twin.load_state_dict(models[0].state_dict())
    fresh = RLSOptimizer(twin)
    fresh.load_state_dict(saved)  # with the entries of others
    assert all("old_p" in fresh.state[p] for p in twin.parameters())
    base.restart()
    assert all(base.state[p]["old_p"].any() for p in models[0].parameters() if p.dim() > 1)


def test_entries_of_others_may_come_before_the_first_step():
    """As of a wrapper that notes the weights from which it starts."""
    model, twin = cnn(), cnn()
    optimizer, other = RLSOptimizer(model), RLSOptimizer(twin)
    for p in model.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    assert not optimizer.health()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_a_rate_set_after_a_resume_is_followed():
    model = mlp()
    wrapped, _ = sharpness_aware(model, False)
    wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    for group in wrapped.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        wrapped.base_optimizer.zero_grad()
        loss = model(batch(model)).square().mean()
        loss.backward()
        return loss

    wrapped.step(closure)
    assert all(map(torch.equal, before, model.parameters()))


def test_state_of_another_rule_is_still_refused():
    model = cnn()
    optimizer = RLSOptimizer(model, fallback="sgd")
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="fallback entries"):
        RLSOptimizer(cnn()).load_state_dict(saved)

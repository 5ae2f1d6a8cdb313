"""`interval`: `P` updated in one step of several, once its gain has come down."""

import copy
import dataclasses
import io
import re
from unittest import mock

import pytest
import torch
from support.compare import assert_close, differing, snapshot
from support.training import cnn, mlp, train
from torch import nn

from rlscuda import RLSOptimizer, reference
from rlscuda.optim.layers import Layer
from rlscuda.optim.staging import Stage

FORMS = ("spectral", "adaptive")
GAIN, INTERVAL = 0.25, 3  # four steps with an update each, then the sixth, the ninth and so on
TURNS = [1, 2, 3, 4, 6, 9, 12, 15, 18]


def make(params, form="spectral", **options):
    rule = {"gain": GAIN, "interval": INTERVAL, "lr": 0.01, **options}
    return RLSOptimizer(params, form=form, **rule)


def matrices(optimizer):
    return [s["P"].clone() for s in optimizer.state.values() if "P" in s]


def turns(model, optimizer, steps):
    """In which steps every matrix moved; in the others none did. All weights always did."""
    seen = []
    for step in range(1, steps + 1):
        before, weights = matrices(optimizer), [p.clone() for p in model.parameters()]
        train(model, optimizer, 1, seed=step)
        assert not any(map(torch.equal, weights, model.parameters()))
        same = {torch.equal(P, Q) for P, Q in zip(before, matrices(optimizer), strict=False)}
        assert len(same) < 2
        if same != {True}:
            seen.append(step)
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_model", [mlp, cnn])
def test_the_first_steps_then_one_of_each_interval(form, make_model):
    model = make_model()
    optimizer = make(model, form)
    assert turns(model, optimizer, 18) == TURNS
    slots = optimizer.state[model[0].weight]["health"]
    assert slots[5] == 18 and slots[4] == 0  # each counts as a step, none as one without an input
    for row in optimizer.health().values():
        assert row.updates in (len(TURNS), 2 * len(TURNS)) and row.missing == row.refused == 0


@pytest.mark.parametrize("form, interval", [("spectral", 4), ("paper", 1), ("natural", 1)])
def test_defaults(form, interval):
    optimizer = RLSOptimizer(mlp(), form=form)
    assert optimizer.param_groups[0]["interval"] == interval


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("forgetting, shrinkage", [(1.0, 0.0), (0.9, 0.0), (1.0, 0.1), (0.8, 0.2)])
def test_an_update_does_what_those_of_every_step_would(form, forgetting, shrinkage):
    """Its constants are those of three updates one after another, of the same rows."""
    model = mlp(torch.float64)
    options = {"summary": "mean", "rank": 1, "drift": 0.3, "ridge": 0.0}
    optimizer = make(model, form, forgetting=forgetting, shrinkage=shrinkage, **options)
    train(model, optimizer, 5)
    before = copy.deepcopy(optimizer.state[model[0].weight])
    x = torch.randn(8, 4, dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    kappa, share = 1 - (1 - GAIN) ** 3, 1 - (1 - shrinkage) ** 3
    row = torch.cat([x.mean(0), x.new_ones(1)])
    power = (1 - kappa) * before["power"] + kappa * row.square().mean()
    keep = 1 - 0.3 * kappa
    P, _, _ = reference.rls_update(
        before["P"], (row / power.sqrt())[None], forgetting**3, kappa, (1 - share) * keep,
        share * keep + kappa,
    )  # fmt: skip
    assert_close(optimizer.state[model[0].weight]["P"], P)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary, rows", [("sample", 6), ("sketch", 6), ("mean", 2)])
def test_an_update_has_the_rows_of_all_its_steps(form, summary, rows):
    model = mlp()
    optimizer = make(model, form, summary=summary, rank=2)
    for step, expected in enumerate([2, 2, 2, 2, None, rows, None, None, rows]):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        staged = [stage.summary for stage in optimizer._registry.stages.values()]
        assert [s and s.rows.shape[1] for s in staged] == [expected] * 2, step
        optimizer.step()


@pytest.mark.parametrize("fan_in, rank, rows", [(4, 4, 8), (60, 40, 64), (60, 16, 48), (2, 16, 16)])
def test_but_no_more_rows_than_a_matrix_needs(fan_in, rank, rows):
    model = nn.Linear(fan_in, 2, bias=False)
    optimizer = make(model, rank=rank)
    for expected in [rank, rank, rank, rank, 0, rows]:
        optimizer.zero_grad()
        model(torch.randn(8, fan_in)).square().mean().backward()
        summary = optimizer._registry.stages[model.weight].summary
        assert (summary.rows.shape[1] if summary else 0) == expected
        optimizer.step()


def test_nothing_is_seen_of_an_input_that_does_not_matter():
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 6)
    with mock.patch.object(Stage, "observe", side_effect=AssertionError):
        train(model, optimizer, 2)
        with pytest.raises(AssertionError):
            train(model, optimizer, 1)


def test_the_adaptive_form_keeps_the_factors_of_its_gradient():
    """Each step is that of G P, whether or not `P` rests and its product goes by the factors."""
    torch.manual_seed(0)
    layer = nn.Linear(60, 50).double()
    optimizer = make(layer, "adaptive", weight_decay=0.0)
    for step in range(1, 10):
        x, y = torch.randn(2, 60).double(), torch.randn(2, 50).double()
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        assert optimizer._registry.stages[layer.weight].factors is not None
        G = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        state = copy.deepcopy(optimizer.state.get(layer.weight, {}))
        with mock.patch.object(Layer, "multiply", side_effect=AssertionError):  # by G itself
            optimizer.step()
        if step > 1:
            rate = 0.01 * GAIN * min(step, 1 / GAIN)
            rule = reference.AdaptiveStep(rate, 0.9, 0.99, 0.0, 1e-8)
            D = G @ optimizer.state[layer.weight]["P"]
            moments = state["first_moment"], state["second_moment"]
            expected, _, _ = reference.adaptive_weight_step(W, D, G, *moments, step, rule)
            assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", range(5, 9))
def test_a_resumed_run_goes_on_to_the_same_bits(form, at):
    model = cnn()
    optimizer = make(model, form)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = cnn(seed=1)
    resumed = make(other, form)
    train(other, resumed, 2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    twins = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), twins):
        train(m, o, 5, seed=20)
    assert not differing(snapshot(model, optimizer), snapshot(other, resumed))
    assert not differing(snapshot(model, optimizer), snapshot(*twins))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interval", [1, INTERVAL])
def test_a_gradient_that_is_not_finite_voids_a_step_with_or_without_an_update(form, interval):
    model = cnn()
    optimizer = make(model, form, interval=interval)
    train(model, optimizer, 6)
    before, counts = snapshot(model, optimizer), copy.deepcopy(optimizer.health())
    optimizer.zero_grad()
    model(torch.randn(8, 2, 6, 6)).square().mean().backward()
    model[0].weight.grad[0, 0] = torch.nan
    batch_norm = {f"param.{i}" for i in (2, 3)} | {f"state.{i}.{k}" for i in (2, 3)
                  for k in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    optimizer.step()
    changed = differing(before, snapshot(model, optimizer)) - batch_norm
    assert {name.split(".")[-1] for name in changed} == {"step", "health"}
    for name, row in optimizer.health().items():
        P = optimizer.state[dict(model.named_modules())[name].weight]["P"]
        matrices = len(P) if P.dim() == 3 else 1
        assert row == dataclasses.replace(counts[name], refused=matrices)


@pytest.mark.parametrize("form", FORMS)
def test_a_restart_has_updates_in_each_step_again(form):
    model = mlp()
    optimizer = make(model, form)
    train(model, optimizer, 7)
    optimizer.restart(1)
    assert turns(model, optimizer, 9) == [1, 2, 3, 5, 8]  # of ages 1 to 9


def test_a_captured_graph_has_an_update_in_each_step():
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 6)
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        assert turns(model, optimizer, 4) == [1, 2, 3, 4]
    assert turns(model, optimizer, 4) == [2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("added", [False, True])
def test_a_layer_that_comes_later_has_steps_of_its_own(form, added):
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = make(model[0].parameters() if added else model, form, model=model)
    train(model, optimizer, 7)
    model[2].requires_grad_(True)
    if added:
        optimizer.add_param_group({"params": list(model[2].parameters())})
    for step, updates in enumerate([(5, 1), (6, 2), (6, 3), (6, 4), (7, 4), (7, 5), (7, 5)]):
        train(model, optimizer, 1, seed=step)
        assert tuple(row.updates for row in optimizer.health().values()) == updates, step
    assert all(row.missing == 0 for row in optimizer.health().values())


def test_an_interval_can_be_set_between_two_steps():
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 6)
    optimizer.param_groups[0]["interval"] = 1
    assert turns(model, optimizer, 3) == [2, 3]  # the next forward is not looked at any more
    optimizer.param_groups[0]["interval"] = 5
    assert turns(model, optimizer, 6) == [1, 6]  # the tenth and the fifteenth


def test_a_state_of_before_there_were_intervals():
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 6)
    state = optimizer.state_dict()
    del state["param_groups"][0]["interval"]
    for entries in state["state"].values():
        entries.pop("since", None)
    optimizer.load_state_dict(state)
    assert turns(model, optimizer, 5) == [1, 2, 3, 4, 5]
    optimizer.restart()
    train(model, optimizer, 1)


@pytest.mark.parametrize("since", [-1, 7, 0.5, None])
def test_a_damaged_count_is_refused(since):
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 6)
    before, state = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict())
    state["state"][0]["since"] = since
    expected = "since of '0' in state_dict must be an int in [0, 6], got"
    with pytest.raises(ValueError, match=re.escape(expected)):
        optimizer.load_state_dict(state)
    assert not differing(before, snapshot(model, optimizer))


def test_layers_of_one_input_share_it_on():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    model = Twins()
    optimizer = make(model)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        first, second = (optimizer.state[layer.weight] for layer in (model.a, model.b))
        assert first["P"] is second["P"] and first["health"] is second["health"]
    assert first["health"][5] == 12


@pytest.mark.parametrize("change", [{"rank": 2}, {"interval": 1}, {"gain": 0.1}])
def test_options_set_between_two_forwards_of_one_step(change):
    """The summaries of both are not of one size: the later one holds."""
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 5)
    for options in ({}, change):
        optimizer.param_groups[0].update(options)
        model(torch.randn(8, 4)).square().mean().backward()
    expected = change.get("rank", 16) * (3 if "rank" in change else 1)
    for stage in optimizer._registry.stages.values():
        assert stage.summary.rows.shape[1] == expected and stage.calls == 2
    optimizer.step()
    assert all(row.updates == 5 and not row.missing for row in optimizer.health().values())


def test_what_was_staged_before_a_load_is_forgotten():
    model = mlp()
    optimizer = make(model)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.load_state_dict(state)
    assert all(stage.summary is None for stage in optimizer._registry.stages.values())

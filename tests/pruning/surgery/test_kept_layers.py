"""`RLSOptimizer` follows a surgery: matrices, moments, what is staged, and its copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.pruning_models import ConvNeXt, inputs, lenet, resnet, vgg
from support.pruning_surgery import operate, prune, training
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.closed_form.formulas import downdate
from rlscuda.optim.kept import Kept
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan

# -- RLSOptimizer ---------------------------------------------------------------------------------


def by_hand() -> nn.Module:
    """Plain, grouped and depthwise convolutions, then a linear layer over four pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["adaptive", "paper", "natural", "spectral"])
def test_every_entry_by_hand(form):
    model = by_hand().double()
    optimizer = RLSOptimizer(model, form=form, momentum=0.5, rank=3, summary="sketch")
    training(model, optimizer, 3)
    old = {i: dict(optimizer.state[model[i].weight]) for i in (0, 2, 4, 8)}
    norm = dict(optimizer.state[model[3].weight])
    structure = trace(model, inputs(torch.float64))
    # the coupling of 0: one channel of each half; of 2: one of each group and its depthwise one
    assert structure.coupling("0").member("0", "out").indices.tolist() == [[0, 3], [1, 4], [2, 5]]
    depthwise = structure.coupling("2").member("4", "both").indices.tolist()
    assert depthwise == [[0, 4], [1, 5], [2, 6], [3, 7]]
    surgery = plan(structure, {"0": [1], "2": [0, 3]})
    operate(model, [optimizer], surgery, {}, inputs(torch.float64))
    new = {i: optimizer.state[model[i].weight] for i in (0, 2, 4, 8)}

    rows = {0: [0, 2, 3, 5], 2: [1, 2, 5, 6], 4: [1, 2, 5, 6], 8: list(range(5))}
    second = [*range(9), *range(18, 27)]  # of three channels a group, the middle one goes
    last = [c for channel in (1, 2, 5, 6) for c in range(4 * channel, 4 * channel + 4)]
    columns = {0: list(range(28)), 2: second, 4: list(range(10)), 8: [*last, 32]}
    assert new[0]["P"] is old[0]["P"]
    gone = torch.tensor(range(9, 18))
    assert torch.equal(new[2]["P"], torch.stack([downdate(P, gone) for P in old[2]["P"]]))
    assert torch.equal(new[4]["P"], old[4]["P"][[1, 2, 5, 6]])
    gone = torch.tensor([c for c in range(32) if c not in last])
    assert torch.equal(new[8]["P"], downdate(old[8]["P"], gone))
    direct = torch.linalg.inv(torch.linalg.inv(old[8]["P"])[[*last, 32]][:, [*last, 32]])
    torch.testing.assert_close(new[8]["P"], direct, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(new[8]["P"], old[8]["P"][[*last, 32]][:, [*last, 32]])
    first = "first_moment" if form == "adaptive" else "momentum_buffer"
    for i in new:
        assert new[i].keys() == old[i].keys() and new[i]["step"] == 3
        assert torch.equal(new[i]["health"], old[i]["health"])
        assert torch.equal(new[i][first], old[i][first][rows[i]][:, columns[i]])
        if form == "adaptive":
            assert torch.equal(new[i]["second_moment"], old[i]["second_moment"][rows[i]])
            groups = [1, 2, 5, 6] if i == 4 else slice(None)
            assert torch.equal(new[i]["power"], old[i]["power"][groups])
        layer = optimizer._registry.layers[model[i].weight]
        assert layer.weight is model[i].weight and layer.bias_parameter is model[i].bias
        assert layer.groups == getattr(model[i], "groups", 1)
        assert layer.fan_in == len(columns[i]) and layer.matrix_shape == new[i]["P"].shape
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model[3].weight][key], norm[key][[1, 2, 5, 6]])
    assert optimizer.inverse_autocorrelation("4") is new[4]["P"]
    training(model, optimizer)


def staged(model, optimizer, summary: str):
    optimizer.zero_grad()
    model(inputs(next(model.parameters()).dtype, seed=7)).square().mean().backward()
    return {
        m.name: optimizer._registry.stages[m.layer.weight]
        for m in optimizer._registry.matches
        if m.layer
    }


@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_staged_summary_by_hand(summary):
    model = by_hand()
    optimizer = RLSOptimizer(model, summary=summary, rank=3, form="natural")
    training(model, optimizer)
    before = staged(model, optimizer, summary)
    gradient = model[2].weight.grad
    rows = {name: stage.summary.rows for name, stage in before.items()}
    x = inputs()
    operate(model, [optimizer], plan(trace(model, x), {"0": [1], "2": [0, 3]}), {}, x)
    after = {
        m.name: optimizer._registry.stages[m.layer.weight]
        for m in optimizer._registry.matches
        if m.layer
    }
    last = [c for channel in (1, 2, 5, 6) for c in range(4 * channel, 4 * channel + 4)] + [32]
    assert torch.equal(after["0"].summary.rows, rows["0"])
    assert torch.equal(after["2"].summary.rows, rows["2"][..., [*range(9), *range(18, 27)]])
    assert torch.equal(after["4"].summary.rows, rows["4"][[1, 2, 5, 6]])
    assert torch.equal(after["8"].summary.rows, rows["8"][..., last])
    kept = Kept.along((8, 3, 3, 3), {0: torch.tensor([1, 2, 5, 6]), 1: torch.tensor([0, 2])})
    assert torch.equal(model[2].weight.grad, kept.take(gradient))
    for name in before:
        assert after[name].summary.count == before[name].summary.count
        assert after[name].calls == 1 and after[name] is not before[name]
    optimizer.step()
    assert all(health.missing == 0 for health in optimizer.health().values())
    assert all(health.updates == 3 * groups for health, groups in
               zip(optimizer.health().values(), (1, 2, 1, 1)) if groups > 1)  # fmt: skip


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 5))  # fmt: skip


def test_factors_of_a_wide_layer_follow():
    results = []
    for factors in (True, False):
        torch.manual_seed(0)
        model = wide().double()
        optimizer = RLSOptimizer(model, form="natural")
        training(model, optimizer)
        stages = staged(model, optimizer, "mean")
        assert stages["3"].factors is not None
        for stage in stages.values() if not factors else ():
            stage.factors = None
        prune(model, optimizer)
        assert (optimizer._registry.stages[model[3].weight].factors is not None) == factors
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_backward_of_an_older_forward_stages_nothing():
    model = lenet()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    optimizer.zero_grad()
    loss = model(inputs()).square().mean()
    prune(model, optimizer)
    loss.backward()  # reaches the old weights only
    assert all(stage.summary is None for stage in optimizer._registry.stages.values())
    assert all(weight.grad is None for weight in optimizer._registry.layers)
    training(model, optimizer)


def pruned_pair(make, **options):
    """A model pruned in training with its optimizer, and the surgery."""
    torch.manual_seed(0)
    model = make()
    optimizer = RLSOptimizer(model, **options)
    training(model, optimizer)
    return model, optimizer, prune(model, optimizer)


@pytest.mark.parametrize("make", [lenet, by_hand, resnet, ConvNeXt])
def test_state_dict_of_a_pruned_model(make):
    model, optimizer, surgery = pruned_pair(make)
    training(model, optimizer, 2)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = make()
    operate(twin, [], surgery, {}, inputs())
    twins = RLSOptimizer(twin)
    twin.load_state_dict(weights)
    twins.load_state_dict(state)
    assert training(model, optimizer, 3, seed=5) == training(twin, twins, 3, seed=5)


def test_deepcopy_of_a_pruned_model():
    model, optimizer, _ = pruned_pair(resnet)
    twin, twins = copy.deepcopy((model, optimizer))
    assert training(model, optimizer, 3) == training(twin, twins, 3)


def test_fallback_rule_alone_is_cut():
    model = vgg()
    optimizer = RLSOptimizer(model, include=["14"])
    training(model, optimizer)
    operate(model, [optimizer], plan(trace(model, inputs()), {"0": [0]}), {}, inputs())
    before = [p.clone() for p in model.parameters()]
    training(model, optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_before_the_first_step():
    model = lenet()
    optimizer = RLSOptimizer(model)
    prune(model, optimizer)
    training(model, optimizer)
    assert optimizer.inverse_autocorrelation("3").shape[-1] == 4 * 2 + 1

"""What an optimizer keeps follows its parameters, whichever optimizer it is."""

from __future__ import annotations

import copy

import pytest
import torch
from support.pruning_models import ConvNeXt, inputs, lenet, resnet, vgg
from support.pruning_surgery import every_other, gathered, operate, prune, training
from torch import Tensor, nn
from torch.optim import lr_scheduler

from rlscuda import RLSOptimizer
from rlscuda.optim.kept import Kept
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.record import PruningRecord
from rlscuda.pruning.surgery.transaction import transfer_state

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, foreach=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
}


def expected_state(optimizer, surgery, names: dict[Tensor, str]) -> dict[str, dict]:
    """What every entry must be after a surgery, by name of its parameter."""
    found: dict[str, dict] = {}
    for parameter, entries in optimizer.state.items():
        kept = surgery.tensors.get(names[parameter])
        found[names[parameter]] = {
            key: gathered(value, kept.index, kept.shape)
            if kept is not None and isinstance(value, Tensor) and value.shape == kept.of
            else copy.deepcopy(value)
            for key, value in entries.items()
        }
    return found


def assert_state(optimizer, expected: dict[str, dict], model: nn.Module) -> None:
    actual = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    assert actual.keys() == expected.keys() and len(actual) == len(optimizer.state)
    for name, entries in expected.items():
        assert actual[name].keys() == entries.keys()
        for key, value in entries.items():
            same = torch.equal(actual[name][key], value) if isinstance(value, Tensor) else (
                actual[name][key] == value
            )  # fmt: skip
            assert same, (name, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name):
    model = resnet()
    optimizer = OPTIMIZERS[name](model.parameters())
    training(model, optimizer)
    structure = trace(model, inputs())
    surgery = plan(structure, every_other(structure))
    expected = expected_state(optimizer, surgery, {p: n for n, p in model.named_parameters()})
    twin = copy.deepcopy(model)
    operate(model, [optimizer], surgery, {}, inputs())
    assert_state(optimizer, expected, model)
    # a model pruned without an optimizer, and a new optimizer that is given the state
    operate(twin, [], surgery, {}, inputs())
    twins = OPTIMIZERS[name](twin.parameters())
    for key, parameter in twin.named_parameters():
        if key in expected:
            twins.state[parameter] = copy.deepcopy(expected[key])
    assert training(model, optimizer, 3, seed=9) == training(twin, twins, 3, seed=9)


def test_factored_moments_follow():
    model = lenet()
    optimizer = torch.optim.Adafactor(model.parameters())
    training(model, optimizer)
    state = {k: v.clone() for k, v in optimizer.state[model[3].weight].items()}
    operate(model, [optimizer], plan(trace(model, inputs()), {"0": [1], "3": [0]}), {}, inputs())
    new = optimizer.state[model[3].weight]
    for key in ("row_var", "col_var"):
        assert torch.equal(new[key], state[key][1:][:, [0, 2, 3]])
    flat = optimizer.state[model[6].weight]  # [8, 24] without the first channel's four
    assert flat["row_var"].shape == (8, 1) and flat["col_var"].shape == (1, 20)
    training(model, optimizer)


def test_state_of_other_shapes_stays_where_nothing_is_cut():
    model = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    factors = {"left": torch.eye(8), "rows": torch.ones(24), "table": torch.ones(256)}
    optimizer.state[model[0].weight] = dict(factors)
    prune(model, optimizer, ignored="0")
    assert optimizer.state[model[0].weight] == factors


def stepped_lbfgs(model, parameters):
    optimizer = torch.optim.LBFGS(parameters, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("ignored", [(), "0"])
def test_optimizer_that_cannot_follow(ignored):
    """Also where the parameter whose state it is, the first one, is not cut."""
    model = lenet()
    optimizer = stepped_lbfgs(model, model.parameters())
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"LBFGS keeps 'd' of shape \[.*which cannot follow them"):
        prune(model, optimizer, ignored=ignored)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_optimizer_of_what_is_not_cut():
    model = lenet()
    optimizer = stepped_lbfgs(model, model[8].parameters())
    state = dict(optimizer.state[model[8].weight])
    prune(model, optimizer, ignored="6")
    assert dict(optimizer.state[model[8].weight]) == state


def test_several_optimizers():
    model = lenet()
    first = torch.optim.Adam([*model[0].parameters(), *model[3].parameters()])
    second = RLSOptimizer([*model[6].parameters(), *model[8].parameters()], model=model)

    class Both:
        def zero_grad(self):
            model.zero_grad()

        def step(self):
            first.step()
            second.step()

    training(model, Both())
    prune(model, [first, second])
    before = [p.clone() for p in model.parameters()]
    training(model, Both())
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize("schedule", ["onecycle", "plateau", "cosine", "lambda"])
@pytest.mark.parametrize("kind", ["rls", "sgd"])
def test_schedulers_go_on(schedule, kind):
    def run(pruned: bool) -> list:
        model = vgg()
        groups = [{"params": part.parameters()} for part in (model[:8], model[8:])]
        groups[0]["lr"] = 0.02
        make = {"rls": lambda: RLSOptimizer(groups, model=model, lr=0.05),
                "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9)}[kind]  # fmt: skip
        optimizer = make()
        scheduler = {
            "onecycle": lambda: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=9),
            "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 9),
            "lambda": lambda: lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t] * 2),
        }[schedule]()
        rates = []
        for step in range(6):
            training(model, optimizer, 1, seed=step)
            scheduler.step(*([1.0] if schedule == "plateau" else []))
            rates.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
            if pruned and step == 2:
                prune(model, optimizer)
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
        return rates

    assert run(True) == run(False)


def test_groups_keep_their_options():
    model = lenet()
    groups = [{"params": [model[0].weight], "lr": 0.02, "gain": 0.5, "weight_decay": 0.0},
              {"params": [p for p in model.parameters() if p is not model[0].weight]}]  # fmt: skip
    optimizer = RLSOptimizer(groups, model=model)
    training(model, optimizer)

    def options():
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    before = options()
    lists = [group["params"] for group in optimizer.param_groups]
    prune(model, optimizer)
    assert options() == before
    assert all(a is g["params"] for a, g in zip(lists, optimizer.param_groups))
    covered = optimizer._registry.covered[model[0].weight]
    assert covered.group is optimizer.param_groups[0]
    assert covered.stage is optimizer._registry.stages[model[0].weight]
    assert lists[0] == [model[0].weight]


@pytest.mark.parametrize("between", ["scale and unscale", "unscale and step"])
def test_grad_scaler_goes_on(between):
    model = vgg()
    optimizer = RLSOptimizer(model, fallback="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(inputs(seed=step)).square().mean()).backward()
        if step == 1 and between == "scale and unscale":
            prune(model, optimizer)
        scaler.unscale_(optimizer)
        if step == 1 and between == "unscale and step":
            prune(model, optimizer)
        before = [p.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert all(health.missing == 0 for health in optimizer.health().values())


# -- for users of torch-pruning -------------------------------------------------------------------


def torch_pruning_step(model, x, ratio=0.5):
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(model, x, tp.importance.MagnitudeImportance(),
                                  pruning_ratio=ratio, ignored_layers=[last])  # fmt: skip
    pruner.step()
    return pruner.pruning_history()


@pytest.mark.parametrize("kind", ["adam", "rls"])
@pytest.mark.parametrize("make", [lenet, vgg, resnet, ConvNeXt])
def test_after_torch_pruning(make, kind):
    model = make()
    optimizer = {"adam": lambda: torch.optim.Adam(model.parameters()),
                 "rls": lambda: RLSOptimizer(model)}[kind]()  # fmt: skip
    for _ in range(2):  # and again
        training(model, optimizer)
        old = dict(model.named_parameters())
        values = {n: (p.detach().clone(), dict(optimizer.state[p])) for n, p in old.items()}
        record = PruningRecord(model, inputs())
        replaced = record.replaced(torch_pruning_step(model, inputs(), 0.3))
        transfer_state(optimizer, replaced)
        new = dict(model.named_parameters())
        assert {old[name] for name in old if old[name] is not new[name]} == set(replaced)
        for name, parameter in model.named_parameters():
            if old[name] not in replaced:
                continue
            kept = replaced[old[name]][1]
            assert replaced[old[name]][0] is parameter
            assert torch.equal(parameter, gathered(values[name][0], kept.index, kept.shape))
            if kind == "adam":
                moment = values[name][1]["exp_avg"]
                expected = gathered(moment, kept.index, kept.shape)
                assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    before = [p.clone() for p in model.parameters()]
    training(model, optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_history_of_something_else():
    model = lenet()
    record = PruningRecord(model, inputs())
    history = torch_pruning_step(model, inputs())
    with pytest.raises(ValueError, match="by the history, got"):
        record.replaced(history[:1])


def test_kept_of_another_shape():
    model = lenet()
    optimizer = torch.optim.Adam(model.parameters())
    kept = Kept.along((4, 3, 3, 3), {0: torch.tensor([0, 1])})
    new = nn.Parameter(torch.zeros(3, 3, 3, 3))
    with pytest.raises(ValueError, match=r"what was kept is \[2, 3, 3, 3\] of \[4, 3, 3, 3\]"):
        transfer_state(optimizer, {model[0].weight: (new, kept)})

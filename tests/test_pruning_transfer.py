"""What an optimizer keeps follows its parameters, whichever optimizer it is."""

from __future__ import annotations

import copy
import doctest
import io

import pytest
import torch
from pruning_models import ConvNeXt, inputs, lenet, resnet, vgg
from pruning_surgery_common import every_other, gathered, prune, training
from torch import Tensor, nn
from torch.optim import lr_scheduler

from rlscuda import RLSOptimizer
from rlscuda.pruning import transfer
from rlscuda.pruning.algebra import downdate
from rlscuda.pruning.graph import trace
from rlscuda.pruning.kept import Kept
from rlscuda.pruning.surgery import operate, plan
from rlscuda.pruning.transfer import PruningRecord, transfer_state

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
    operate(model, optimizer, surgery, {}, {}, inputs())
    assert_state(optimizer, expected, model)
    # a model pruned without an optimizer, and a new optimizer that is given the state
    operate(twin, [], surgery, {}, {}, inputs())
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
    operate(model, optimizer, plan(trace(model, inputs()), {"0": [1], "3": [0]}), {}, {}, inputs())
    new = optimizer.state[model[3].weight]
    for key in ("row_var", "col_var"):
        assert torch.equal(new[key], state[key][1:][:, [0, 2, 3]])
    flat = optimizer.state[model[6].weight]  # [8, 24] without the first channel's four
    assert flat["row_var"].shape == (8, 1) and flat["col_var"].shape == (1, 20)
    training(model, optimizer)


def test_optimizer_that_cannot_follow():
    model = lenet()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"LBFGS keeps 'd' of shape \[.*which cannot follow it"):
        prune(model, optimizer)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


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
    assert optimizer._group_of[model[0].weight] is optimizer.param_groups[0]
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


# -- RLSOptimizer ---------------------------------------------------------------------------------


def by_hand() -> nn.Module:
    """Plain, grouped and depthwise convolutions, then a linear layer over four pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["adaptive", "paper", "natural"])
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
    operate(model, optimizer, surgery, {}, {}, inputs(torch.float64))
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
        layer = optimizer._layers[model[i].weight]
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
    return {m.name: optimizer._stages[m.layer.weight] for m in optimizer._matches if m.layer}


@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_staged_summary_by_hand(summary):
    model = by_hand()
    optimizer = RLSOptimizer(model, summary=summary, rank=3, form="natural")
    training(model, optimizer)
    before = staged(model, optimizer, summary)
    gradient = model[2].weight.grad
    rows = {name: stage.summary.rows for name, stage in before.items()}
    x = inputs()
    operate(model, optimizer, plan(trace(model, x), {"0": [1], "2": [0, 3]}), {}, {}, x)
    after = {m.name: optimizer._stages[m.layer.weight] for m in optimizer._matches if m.layer}
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
        assert (optimizer._stages[model[3].weight].factors is not None) == factors
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
    assert all(stage.summary is None for stage in optimizer._stages.values())
    assert all(weight.grad is None for weight in optimizer._layers)
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
    operate(twin, [], surgery, {}, {}, inputs())
    twins = RLSOptimizer(twin)
    twin.load_state_dict(weights)
    twins.load_state_dict(state)
    assert training(model, optimizer, 3, seed=5) == training(twin, twins, 3, seed=5)


def test_deepcopy_of_a_pruned_model():
    model, optimizer, _ = pruned_pair(resnet)
    twin, twins = copy.deepcopy((model, optimizer))
    assert training(model, optimizer, 3) == training(twin, twins, 3)


def test_given_matrices_are_taken():
    model = by_hand().double()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    P = torch.randn(18 * 2, 18, 18).double()
    matrices = {"2": P[:2], "8": torch.eye(17).double()}
    x = inputs(torch.float64)
    operate(model, optimizer, plan(trace(model, x), {"0": [1], "2": [0, 3]}), {}, matrices, x)
    assert torch.equal(optimizer.inverse_autocorrelation("2"), (P[:2] + P[:2].mT) / 2)
    assert torch.equal(optimizer.inverse_autocorrelation("8"), torch.eye(17).double())


def test_before_the_first_step():
    model = lenet()
    optimizer = RLSOptimizer(model)
    prune(model, optimizer)
    training(model, optimizer)
    assert optimizer.inverse_autocorrelation("3").shape[-1] == 4 * 2 + 1


# -- for users of torch-pruning -------------------------------------------------------------------


def torch_pruning_step(model, x, ratio=0.5):
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(model, x, tp.importance.MagnitudeImportance(),
                                  pruning_ratio=ratio, ignored_layers=[last])  # fmt: skip
    pruner.step()
    return pruner.pruning_history()


def test_the_documented_example():
    finder = doctest.DocTestFinder(recurse=False)
    [example] = finder.find(transfer.transfer_state, globs=vars(transfer) | {"torch": torch})
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


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

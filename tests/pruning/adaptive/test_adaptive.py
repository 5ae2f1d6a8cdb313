"""The target is met, zeros stay, resumes are exact, faults are undone, and there is one list."""

import copy
import io
from unittest import mock

import pytest
import torch
from support.blocks import copies, resnet
from support.blocks.adaptive import LABELS, LOADER, ROWS, SMALL, X, epochs, mlp, started, steps
from support.pruning_surgery import changed, everything
from torch import nn

from rlscuda.pruning import (
    AdaptivePruner,
    RLSPruner,
    SketchTracker,
    load_optimizer,
    load_pruned,
    save_pruned,
)
from rlscuda.pruning.adaptive import cutting
from rlscuda.pruning.running.measure import count_flops, count_parameters

BOTH = ("channels", "blocks")
CASES = [
    ("output", "rls", BOTH), ("output", "adamw", "channels"), ("scale", "sgd", "blocks"),
    ("scale", "rls", "channels"),
]  # fmt: skip


# -- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "optimizer", "what"), CASES)
def test_a_deadline_is_met_and_training_goes_on(penalty, optimizer, what):
    model, trained_by, pruner = started(optimizer=optimizer, penalty=penalty, what=what)
    whole = count_parameters(model)
    outcomes = epochs(model, trained_by, pruner, 5)
    assert outcomes[0] == "kept" and outcomes[-1] == "finished" and "pruned" in outcomes
    assert pruner.finished and pruner.rho == 0
    report = pruner.report()
    assert report.after == count_parameters(model) <= 0.5 * whole and report.before == whole
    held = {p for group in trained_by.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    gone = {fate.kind for fate in report.fates if fate.after < fate.before}
    assert gone <= ({"channels", "block"} if what != "channels" else {"channels"})
    assert all(fate.after >= 1 or "block" in fate.why for fate in report.fates
               if fate.kind == "channels")  # fmt: skip
    before = copies(model)
    steps(model, trained_by, pruner, 2)
    after = copies(model)
    weights = [name for name in before if name.endswith("weight")]
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert "left" in str(report) and report.to_dict()["penalty"] == penalty


def test_flops_are_a_target_too():
    model, optimizer, pruner = started(target_flops=0.6, price_by="params")
    whole = count_flops(model, X[:2])
    epochs(model, optimizer, pruner, 4)
    assert count_flops(model, X[:2]) <= 0.6 * whole
    assert pruner.report().counted == "flops"


def test_a_controlled_price_stops_within_one_unit_of_the_target():
    """Half of the hidden units are read by nothing but the price."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6)
    )  # fmt: skip
    with torch.no_grad():
        model[3].weight[:, 6:] = 0
    model[3].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    pruner = AdaptivePruner(
        model, optimizer, ROWS[:2], penalty="scale", what="channels", rho=1e-2, patience=5,
        target_params=0.7, loader=list(ROWS.split(32)), warmup=0,
    )  # fmt: skip
    whole, unit = count_parameters(model), 6 + 1 + 2 + 6
    prices = []
    for number in range(60):
        steps(model, optimizer, pruner, x=ROWS, y=LABELS, seed=number)
        prices.append(pruner.rho)
        pruner.after_epoch()
        if pruner.finished:
            break
    limit = 0.7 * whole
    assert limit - unit < count_parameters(model) <= limit
    assert prices == sorted(prices) and pruner.rho == 0
    assert not pruner._plan._ledger["0"]["dead"].any()  # what is left may grow again


def test_a_price_waits_for_the_loss():
    model, optimizer, pruner = started(tolerance=0.1, what="channels")
    losses, found = (1.0, 9.0, 1.05, 1.0), []
    for number, loss in enumerate(losses):
        steps(model, optimizer, pruner, seed=number)
        found.append(pruner.after_epoch(loss))
    assert found == ["kept", "paused", "pruned", "pruned"]
    assert [row["loss"] for row in pruner.report().history] == list(losses)


# -- zeros ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["scale", "output"])
def test_dead_stays_dead_across_a_resume_and_no_layer_is_empty(penalty):
    options = {"penalty": penalty, "what": "channels", "rho": 5.0, "epochs": None,
               "target_params": 0.12, "warmup": 0, "source": "calibration"}  # fmt: skip
    model, optimizer, pruner = started(optimizer="sgd", **options)
    if penalty == "output":
        pruner.after_epoch()  # which measures
        pruner._price.rho = 5.0
    steps(model, optimizer, pruner, 10)
    dead = {n: e["dead"].clone() for n, e in pruner._plan._ledger.entries.items()}
    assert any(bool(one.any()) for one in dead.values())
    assert not any(bool(one.all()) for one in dead.values())
    state = copy.deepcopy(pruner.state_dict())
    again = AdaptivePruner(
        model, optimizer, X[:2], loader=LOADER, every=2, patience=4, **options
    )  # fmt: skip
    again.load_state_dict(state)
    again._price.rho = 0.0
    steps(model, optimizer, again, 6)
    for name, was in dead.items():
        now = again._plan._ledger[name]["dead"]
        assert bool(now[was].all())
        assert bool((again._plan.penalty.measures()[name][was] == 0).all())
    again.after_epoch()
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(min(m.weight.shape[:2]) >= 1 for m in modules)
    assert count_parameters(model) == pruner._price.whole or again.report().after < 1e9


@pytest.mark.parametrize("round_to", [2, 4])
def test_what_stays_is_a_multiple(round_to):
    model, optimizer, pruner = started(
        lambda: resnet((8, 12), 1), what="channels", target_params=0.4, round_to=round_to
    )
    epochs(model, optimizer, pruner, 4)
    assert pruner.finished
    assert all(fate.after % round_to == 0 for fate in pruner.report().fates)


def test_the_weights_of_norms_are_moved_by_nothing_but_their_own_steps():
    model, optimizer, pruner = started(optimizer="adamw", penalty="scale", warmup=9, lr=0.5)
    norm = model.block11.bn1
    before, velocity = norm.weight.detach().clone(), torch.zeros(4)
    model.train()
    optimizer.zero_grad()
    model(X[:32]).square().mean().backward()
    gradient = norm.weight.grad.clone()
    pruner.after_backward()
    assert norm.weight.grad is None
    optimizer.step()
    pruner.after_step()
    moved = before - 0.5 * gradient + 0.9 * (0.9 * velocity - 0.5 * gradient)
    torch.testing.assert_close(norm.weight.detach(), moved)
    assert norm.weight not in optimizer.state and norm.bias in optimizer.state


def test_a_gradient_that_is_not_finite_moves_no_scale():
    model, optimizer, pruner = started(optimizer="sgd", penalty="scale", what="channels")
    model(X[:8]).sum().backward()
    model.bn.weight.grad[0] = float("inf")
    before = {n: p.clone() for n, p in model.named_parameters() if "bn" in n}
    pruner.after_backward()
    assert all(torch.equal(before[n], model.get_parameter(n)) for n in before)


def test_with_a_deadline_branches_do_not_pay_by_their_output():
    model, optimizer, pruner = started(optimizer="sgd", target_params=0.9)
    epochs(model, optimizer, pruner, 1)
    plan = pruner._plan
    before = plan.penalty.measures()
    assert pruner.rho > 0 and any(name.startswith("block ") for name in before)
    plan.penalty.sweep(pruner.rho)
    after = plan.penalty.measures()
    for name, own in before.items():
        paid = not name.startswith("block ")
        assert bool((after[name] < own).any()) == paid == plan.penalty.is_paid_by(name)


# -- one list -------------------------------------------------------------------------------------


def test_channels_alone_are_those_of_the_global_pruner():
    """Units of either hidden layer save as much, so cost over gain is cost."""
    pairs = []
    for number in range(2):
        model, optimizer, pruner = started(
            mlp, x=ROWS, what="channels", epochs=1, warmup=0, source="calibration", rho=0.0,
            target_params=0.5,
        )  # fmt: skip
        steps(model, optimizer, pruner, x=ROWS, y=LABELS)
        if number:
            RLSPruner(
                model, optimizer, ROWS[:2], target_params=0.5, scope="global",
                source="calibration", loader=list(ROWS.split(32)),
            ).step()  # fmt: skip
        else:
            assert pruner.after_epoch() == "pruned" and pruner.finished
        pairs.append(model.state_dict())
    assert {n: t.shape for n, t in pairs[0].items()} == {n: t.shape for n, t in pairs[1].items()}
    for name, tensor in pairs[0].items():
        torch.testing.assert_close(tensor, pairs[1][name])


def test_a_block_that_costs_nothing_goes_first():
    model, optimizer, pruner = started(resnet, epochs=1, warmup=0, target_params=0.95)
    steps(model, optimizer, pruner)
    with torch.no_grad():
        model.block12.bn2.weight.zero_()
        model.block12.bn2.bias.zero_()
    model.eval()
    before = model(X)
    pruner.after_epoch()
    fates = {fate.name: fate for fate in pruner.report().fates}
    assert fates["block12"].after == 0 and fates["block12.conv1"].after == 0
    assert all(f.after == f.before for n, f in fates.items() if not n.startswith("block12"))
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)


def test_rescaling_a_channel_changes_nothing_for_the_output_penalty():
    found = {}
    for penalty in ("output", "scale"):
        for factor in (1.0, 8.0):
            model, optimizer, pruner = started(
                lambda: nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(),
                                      nn.Linear(12, 6)),
                x=ROWS, penalty=penalty, what="channels", epochs=1, warmup=0, optimizer="sgd",
                source="calibration", damping=1e-9,
            )  # fmt: skip
            with torch.no_grad():
                torch.manual_seed(5)
                model[1].weight.copy_(torch.rand(12) + 0.5)
                for parameter in (model[1].weight, model[1].bias):
                    parameter[:6] *= factor
                model[3].weight[:, :6] /= factor
            pruner.after_epoch()
            model.eval()
            found[penalty, factor] = model(ROWS)
    torch.testing.assert_close(found["output", 1.0], found["output", 8.0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found["scale", 1.0], found["scale", 8.0], rtol=1e-2, atol=1e-2)


# -- what is taken out ----------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["output", "scale"])
def test_a_block_or_channel_at_zero_changes_no_output(penalty):
    model, optimizer, pruner = started(
        resnet, "sgd", penalty=penalty, epochs=None, warmup=0, source="calibration"
    )
    steps(model, optimizer, pruner)
    with torch.no_grad():
        for norm, channel in ((model.block11.bn1, 2), (model.block21.bn1, 0)):
            norm.weight[channel], norm.bias[channel] = 0, 0
            if penalty == "output":
                following = model.block11 if norm is model.block11.bn1 else model.block21
                following.conv2.weight[:, channel] = 0
        for parameter in (model.block22.bn2.weight, model.block22.bn2.bias):
            parameter.zero_()
    ledger = pruner._plan._ledger
    ledger.kill("block11.conv1", 2)
    ledger.kill("block21.conv1", 0)
    ledger.kill("block block22", 0)
    model.eval()
    before = model(X)
    assert pruner.after_epoch() == "pruned"
    model.eval()
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=2e-6)
    assert model.block11.conv1.out_channels == 3 and model.block21.conv1.out_channels == 5
    assert not list(model.block22.conv1.parameters())
    report = pruner.report()
    assert report.after == sum(p.numel() for p in copy.deepcopy(model).parameters())


# -- transactions ---------------------------------------------------------------------------------


FAULTS = [  # the penalty, what goes, where, in which call
    ("output", BOTH, "replace_modules", 1), ("output", BOTH, "settle", 2),
    ("output", BOTH, "commit", 1), ("output", BOTH, "survey", 2),
    ("scale", "channels", "commit", 1),
]  # fmt: skip


@pytest.mark.parametrize(("penalty", "what", "at", "call"), FAULTS)
def test_an_error_in_the_surgery_changes_nothing(penalty, what, at, call):
    model, optimizer, pruner = started(
        resnet, penalty=penalty, what=what, epochs=1, target_params=0.3
    )
    epochs(model, optimizer, pruner, 1)
    steps(model, optimizer, pruner, seed=1)
    before, state = everything(model, optimizer), copy.deepcopy(pruner.state_dict())
    owner = cutting if at != "survey" else type(pruner._plan)
    real, count = getattr(owner, at), []

    def faulty(*args, **kwargs):
        count.append(1)
        result = real(*args, **kwargs)
        if len(count) >= call:
            raise RuntimeError("planted")
        return result

    with mock.patch.object(owner, at, faulty), pytest.raises(RuntimeError, match="planted"):
        pruner.after_epoch()
    assert not changed(before, everything(model, optimizer))
    assert _equal(state, pruner.state_dict())
    assert pruner.after_epoch() == "pruned" and pruner.finished


def _equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second or first != first


# -- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "done"), [("output", 2), ("scale", 1), ("scale", 2)])
def test_a_resumed_run_is_the_same_to_the_bit(penalty, done, tmp_path):
    options = {"penalty": penalty, "rho": 1e-2, "lr": 0.1}
    model, optimizer, pruner = started(**options)
    epochs(model, optimizer, pruner, done)
    steps(model, optimizer, pruner, 3, seed=50)
    save_pruned(model, tmp_path / "model.safetensors", optimizer=optimizer)
    stream = io.BytesIO()
    torch.save(pruner.state_dict(), stream)

    def go_on(model, optimizer, pruner):
        steps(model, optimizer, pruner, 5, seed=51)
        pruner.after_epoch()
        epochs(model, optimizer, pruner, 2, first=60)
        return copies(model), pruner

    there, first = go_on(model, optimizer, pruner)
    again = load_pruned(SMALL, tmp_path / "model.safetensors")
    trained_by = type(optimizer)(again, seed=1)
    load_optimizer(trained_by, tmp_path / "model.safetensors")
    resumed = AdaptivePruner(
        again, trained_by, X[:2], loader=LOADER, every=2, patience=4, epochs=3, **options
    )  # fmt: skip
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    here, second = go_on(again, trained_by, resumed)
    assert there.keys() == here.keys() and all(torch.equal(there[n], here[n]) for n in there)
    assert first.report().history == second.report().history
    assert _equal(first.report().to_dict(), second.report().to_dict()) or str(
        first.report()
    ) == str(second.report())


def test_a_state_of_another_model_is_refused():
    _, _, first = started(what="channels")
    _, _, second = started(lambda: resnet((4, 8), 1), what="channels")
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="units"):
        second.load_state_dict(first.state_dict())
    assert _equal(before, second.state_dict())


def test_a_copy_of_model_optimizer_and_pruner_goes_on_alone():
    parts = started(penalty="scale", optimizer="adamw")
    epochs(*parts, 1)
    other = copy.deepcopy(parts)
    epochs(*parts, 3, first=1)
    epochs(*other, 3, first=1)
    first, second = copies(parts[0]), copies(other[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tracker_follows_the_channels():
    torch.manual_seed(0)
    model = SMALL()
    tracker, optimizer = SketchTracker(model), torch.optim.SGD(model.parameters(), 0.05)
    pruner = AdaptivePruner(
        model, optimizer, X[:2], what="channels", tracker=tracker, every=2, epochs=2
    )  # fmt: skip
    epochs(model, optimizer, pruner, 4)
    assert pruner.finished and pruner.options.source == "sketch"
    sizes = {name: P.shape[-1] for name, P in tracker.matrices().items()}
    assert sizes["block11.conv2"] == model.block11.conv2.weight[0].numel()

"""Two rates behind one schedule: what the fallback rule gets under everything users do to `lr`."""

import copy
import warnings

import pytest
import torch
from support.training import mlp
from torch import nn
from torch.optim import lr_scheduler as schedules

from rlscuda import RLSOptimizer
from rlscuda.optim.fallback import rate


def norm_and_layer():
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))


def rates(optimizer, steps, before=lambda t: None, after=lambda: None):
    """The fallback's rate of every group at each step, as its inner optimizer used it."""
    seen = []
    for t in range(steps):
        before(t)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append([float(g["lr"]) for g in optimizer._fallback._inner.param_groups])
        after()
    return seen


def set_all(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


WARM_UPS = {  # how a peak of .1 is reached from what rate the optimizer was made at
    "one_cycle": (1e-3, lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=12)),
    "one_cycle_from_default": (None, lambda o: schedules.OneCycleLR(o, 0.1, total_steps=12)),
    "cyclic": (0.01, lambda o: schedules.CyclicLR(o, 0.01, 0.1, 5, cycle_momentum=False)),
    "linear": (0.1, lambda o: schedules.LinearLR(o, 0.1, total_iters=6)),
    "sequential": (0.1, lambda o: schedules.SequentialLR(o, [
        schedules.LinearLR(o, 1e-3, total_iters=4), schedules.CosineAnnealingLR(o, 6)], [4])),
    "by_hand": (1e-6, None),
    "range_test": (1e-7, None),
}  # fmt: skip


def by_hand(optimizer, t):
    set_all(optimizer, 0.1 * min(1, (t + 1) / 6) if t < 9 else 0.02)


def range_test(optimizer, t):
    set_all(optimizer, 1e-7 * 10 ** (t / 2))


@pytest.mark.parametrize("given", [None, 2e-3])
@pytest.mark.parametrize("name", WARM_UPS)
def test_no_schedule_multiplies_the_fallback(name, given):
    """It follows the shape of lr and never exceeds its own rate, whatever sets lr."""
    lr, make = WARM_UPS[name]
    optimizer = RLSOptimizer(norm_and_layer(), lr=lr, fallback_lr=given)
    scheduler = make(optimizer) if make else None
    by = {"by_hand": by_hand, "range_test": range_test}.get(name, lambda optimizer, t: None)
    used = []

    def before(t):
        by(optimizer, t)
        used.append(optimizer.param_groups[0]["lr"])

    seen = [r for (r,) in rates(optimizer, 12, before, scheduler.step if scheduler else lambda: 0)]
    own = 1e-2 if given is None else given
    peak = max(used + [optimizer.param_groups[0].get("max_lr", 0)])
    assert min(seen) >= 0 and max(seen) <= own * (1 + 1e-9)
    after = used.index(max(used))
    assert seen[after:] == pytest.approx([own * lr / peak for lr in used[after:]])


def test_rate_of_its_own_rises_with_a_one_cycle():
    optimizer = RLSOptimizer(norm_and_layer(), lr=1e-3, fallback_lr=2e-3)
    scheduler = schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    first, *_ = rates(optimizer, 5, after=scheduler.step)
    assert first == pytest.approx([2e-3 / 25])  # the scheduler starts at a 25th of the peak


@pytest.mark.parametrize("given", [None, 2e-3])
def test_layerwise_decay_reaches_the_fallback(given):
    model = nn.Sequential(*(norm_and_layer() for _ in range(3)))
    groups = [
        {"params": m.parameters(), "lr": 0.1 * 0.5**depth, "lr_scale": 0.5**depth, "name": str(m)}
        for depth, m in enumerate(model)
    ]
    optimizer = RLSOptimizer(groups, lr=0.1, model=model, fallback_lr=given)
    ((first, second, third),) = rates(optimizer, 1)
    top = 1e-2 if given is None else given
    assert (first, second, third) == pytest.approx((top, top / 2, top / 4))


def test_a_group_may_have_a_fallback_rate_of_its_own():
    model = nn.Sequential(norm_and_layer(), norm_and_layer())
    groups = [{"params": model[0].parameters()},
              {"params": model[1].parameters(), "lr": 0.02, "fallback_lr": 3e-4}]  # fmt: skip
    optimizer = RLSOptimizer(groups, lr=0.1, model=model, fallback_lr=2e-3)
    assert rates(optimizer, 1) == [pytest.approx([2e-3, 3e-4])]
    set_all(optimizer, 0.01)
    assert rates(optimizer, 1) == [pytest.approx([2e-4, 1.5e-4])]


def test_the_rate_of_the_layers_on_a_group_without_any_is_said():
    """As scripts do that write one lr into every group, that of norms and biases too."""

    def groups(lr):
        return [{"params": model[1].parameters(), "lr": lr},
                {"params": model[0].parameters(), "lr": lr, "weight_decay": 0.0}]  # fmt: skip

    model = norm_and_layer()
    with pytest.warns(UserWarning, match="without a covered layer has lr=0.3, which there is"):
        RLSOptimizer(groups(0.3), model=model)
    optimizer = RLSOptimizer(groups(0.3)[:1], model=model)
    with pytest.warns(UserWarning, match="leave it out for 0.01 at the peak, or set"):
        optimizer.add_param_group(groups(0.3)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RLSOptimizer(groups(0.01), model=model)
        del (other := groups(0.1))[1]["lr"]
        RLSOptimizer(other, model=model)
        (other := groups(0.1))[1]["fallback_lr"] = 2e-3
        assert rates(RLSOptimizer(other, model=model), 1)[0][1] == 2e-3


def test_rates_resume_in_mid_schedule():
    optimizers = [RLSOptimizer(norm_and_layer(), lr=1e-6, fallback_lr=2e-3) for _ in range(2)]
    rates(optimizers[0], 3, lambda t: set_all(optimizers[0], 0.1))
    set_all(optimizers[0], 0.05)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert [rate(o.param_groups[0]) for o in optimizers] == pytest.approx([1e-3, 1e-3])


def test_a_rate_that_starts_at_zero():
    optimizer = RLSOptimizer(norm_and_layer(), lr=0.0, fallback_lr=2e-3)
    assert rates(optimizer, 1) == [[0.0]]
    set_all(optimizer, 0.1)
    assert rates(optimizer, 1) == [[pytest.approx(2e-3)]]


# -- options of a group ----------------------------------------------------------------------------


@pytest.mark.parametrize("option, instead", [
    ({"betas": (0.9, 0.99)}, "momentum and beta2"), ({"maximize": True}, "a negated loss"),
    ({"nesterov": True}, "momentum"), ({"momentm": 0.5}, "momentum"),
    ({"weight_deacy": 0.1}, "weight_decay"), ({"learning_rate": 0.1}, "lr"),
    ({"fallback_rate": 0.1}, "fallback_lr"), ({"forgeting": 0.9}, "forgetting"),
    ({"decay": 0}, "weight_decay"), ({"inital_scale": 1.0}, "initial_scale"),
])  # fmt: skip
def test_options_that_are_not_ours_are_refused(option, instead):
    model = mlp()
    (name,) = option
    with pytest.raises(ValueError) as caught:
        RLSOptimizer([{"params": model.parameters(), **option}], model=model)
    assert f"group option {name!r} is unknown, there is: {instead}" in str(caught.value)
    optimizer = RLSOptimizer(model[0].parameters(), model=model)
    with pytest.raises(ValueError, match="is unknown, there is"):
        optimizer.add_param_group({"params": model[2].parameters(), **option})
    assert len(optimizer.param_groups) == 1


def test_notes_of_frameworks_and_neutral_options_stay():
    notes = {"name": "all", "lr_scale": 0.5, "lr_mult": 2.0, "layer_id": 3, "initial_lr": 0.1,
             "max_lr": None, "min_lr": 0.0, "is_last_layer": True, "wd_multiplier": 1.0,
             "rho": 0.05, "adaptive": False, "maximize": False, "amsgrad": False, "foreach": None,
             "fused": None, "swa_lr": 0.1, "max_momentum": 0.9}  # fmt: skip
    model = norm_and_layer()
    optimizer = RLSOptimizer([{"params": model.parameters(), **notes}], model=model)
    (group,) = optimizer.param_groups
    rates(optimizer, 1)
    assert {name: group[name] for name in notes} == notes

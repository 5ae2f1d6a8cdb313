"""Each wrong argument: one clear error, and model, optimizer and state as they were."""

import copy
import math

import pytest
import torch
from support.compare import differing, snapshot
from support.training import make, mlp, train
from torch import nn

from rlscuda import RLSOptimizer

NUMBERS = {  # option -> what it must be, and values that it must not be
    "lr": (">= 0 and finite", [-0.1, math.nan, math.inf, "0.1"]),
    "forgetting": ("in (0, 1]", [0.0, -0.5, 1.01, math.nan, "1"]),
    "gain": ("> 0 and finite", [0.0, -1.0, math.nan, math.inf]),
    "momentum": ("in [0, 1)", [-0.1, 1.0, math.nan]),
    "weight_decay": (">= 0 and finite", [-0.1, math.nan, math.inf]),
    "rank": ("an int >= 1 and at most 65536", [0, -1, 2.0, "4"]),
    "interval": ("an int >= 1", [0, -4, 4.0, "4", True]),
    "summary": ("mean | sketch | sample", ["median", 3]),
    "form": ("spectral | adaptive | paper | natural", ["adam", 0, None, ["paper"]]),
    "ridge": ("None or >= 0", [-0.1, math.nan, math.inf, "1"]),
    "shrinkage": ("in [0, 1]", [-0.1, 1.1, math.nan]),
    "drift": ("None or >= 0", [-0.3, math.nan, "none"]),
    "trust_ratio": ("> 0, inf for none", [0.0, -0.1, math.nan, "0.1"]),
    "initial_scale": ("> 0 and finite", [0.0, -1.0, math.inf, math.nan]),
    "beta2": ("in [0, 1)", [-0.1, 1.0, math.nan]),
    "eps": ("> 0 and finite", [0.0, -1e-8, math.inf]),
    "fallback_lr": (">= 0 and finite", [-1e-3, math.nan, math.inf]),
    "max_fan_in": ("an int >= 1", [0, -1, 16.0, "16", True, math.inf]),
    "seed": ("an int", [0.5, "0"]),
    "dtype": ("None, torch.float32 or torch.float64", [torch.bfloat16, "float32", torch.int64]),
}
WRONG = {f"{k}-{v}": ({k: v}, f"{k} must be {expected}, got {v!r}")
         for k, (expected, values) in NUMBERS.items() for v in values}  # fmt: skip
WRONG |= {
    "spectral_gain": ({"gain": 1.5}, "gain must be at most 1 in the spectral form"),
    "spectral_trust": ({"trust_ratio": 0.1}, "trust_ratio must be inf in the spectral form"),
    "adaptive_gain": ({"form": "adaptive", "gain": 1.5}, "gain must be at most 1 in the adaptive"),
    "adaptive_trust": (
        {"form": "adaptive", "trust_ratio": 0.1},
        "trust_ratio must be inf in the adaptive form",
    ),
    "paper_interval": ({"form": "paper", "interval": 4}, "interval must be 1 in the paper form"),
    "natural_interval": ({"form": "natural", "interval": 2}, "interval must be 1 in the natural"),
    "spectral_drift": ({"drift": 1.5}, "drift must be at most 1, or P could turn negative"),
    "paper_drift": ({"form": "paper", "gain": 0.5, "drift": 2.5}, "drift must be at most 2, or P"),
    "lr_tensor": ({"lr": torch.ones(2)}, "Tensor lr must be 1-element, got [2]"),
    "lr_tensor_negative": ({"lr": torch.tensor(-1.0)}, "lr must be >= 0 and finite, got tensor(-1"),
}


class Stateless:
    """What `snapshot` takes in place of an optimizer that does not exist yet."""

    state: dict = {}


def assert_untouched(model, before):
    assert not differing(before, snapshot(model, Stateless))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option(name):
    options, message = WRONG[name]
    model = mlp()
    before = snapshot(model, Stateless)
    for given in ((model,), (model.parameters(),), ([{"params": list(model.parameters())}],)):
        with pytest.raises(ValueError) as caught:
            RLSOptimizer(*given, **options)
        assert message in str(caught.value)
        assert_untouched(model, before)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option_of_a_group(name):
    options, message = WRONG[name]
    model = mlp()
    before = snapshot(model, Stateless)
    groups = [{"params": list(model[0].parameters())},
              {"params": list(model[2].parameters()), **options}]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        RLSOptimizer(groups, model=model)
    assert message in str(caught.value)
    assert_untouched(model, before)


def test_every_option_of_a_group_is_tried():
    kept = {"params", "fallback_decays", "peak_lr"}  # the optimizer's own
    assert RLSOptimizer(mlp()).param_groups[0].keys() - kept == NUMBERS.keys()


@pytest.mark.parametrize("params, options, error, message", [
    (lambda m: m, {"model": nn.Linear(1, 1)}, ValueError, "pass no other as model="),
    (lambda m: m.parameters(), {"model": "mlp"}, TypeError, "model must be a module, got str"),
    (lambda m: m.parameters(), {"model": mlp}, TypeError, "model must be a module, got function"),
    (lambda m: m[0].weight, {}, TypeError, "should be an iterable of Tensors or dicts"),
    (lambda m: [], {}, ValueError, "empty parameter list"),
    (lambda m: nn.ReLU(), {}, ValueError, "empty parameter list"),
    (lambda m: [1.0], {}, TypeError, "can only optimize Tensors"),
    (lambda m: [m[0].weight * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
    (lambda m: None, {}, TypeError, "NoneType"),
    (lambda m: m, {"learning_rate": 0.1}, TypeError, "unexpected keyword argument"),
])  # fmt: skip
def test_wrong_parameters(params, options, error, message):
    model = mlp()
    before = snapshot(model, Stateless)
    with pytest.raises(error) as caught:
        RLSOptimizer(params(model), **options)
    assert message in str(caught.value)
    assert_untouched(model, before)


def test_the_model_may_be_given_twice_if_it_is_the_same():
    model = mlp()
    RLSOptimizer(model, model=model)
    assert len(RLSOptimizer(model.parameters(), model=model).coverage()) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["input", "gradient"])
@pytest.mark.parametrize("form", ["paper", "natural", "adaptive", "spectral"])
def test_what_is_not_finite_moves_no_weight_of_a_wide_layer(form, which, bad):
    """Wide enough for the factored product, whose factors must be finite too."""
    model = nn.Sequential(nn.Linear(60, 70))
    optimizer = make(model, form=form)
    x = torch.randn(2, 60)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    if which == "input":
        x[1, 3] = bad
        model(x).square().sum().backward()
    else:
        (model(x) * torch.full((2, 70), bad)).sum().backward()
    optimizer.step()
    changed = differing(before, snapshot(model, optimizer))
    assert not {"param.0", "param.1", "state.0.P"} & changed
    assert optimizer.health()["0"].refused == 1


@pytest.mark.parametrize("form", ["paper", "natural", "adaptive", "spectral"])
def test_gradient_made_finite_by_hand_is_the_gradient(form):
    """Its factors are not finite still."""
    model = nn.Sequential(nn.Linear(60, 70))
    optimizer = make(model, form=form)
    scale = torch.ones(2, 70)
    scale[1, 5] = math.inf
    (model(torch.randn(2, 60)) * scale).sum().backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert torch.isfinite(p).all() and not torch.equal(p, old)
    assert optimizer.health()["0"].updates == 1


def test_state_of_another_model_changes_nothing():
    other = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    foreign = RLSOptimizer(other)
    other(torch.randn(2, 3)).square().sum().backward()
    foreign.step()
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, 1)
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.param_groups)
    for state in (foreign.state_dict(), torch.optim.SGD(model.parameters()).state_dict(), {}):
        with pytest.raises(ValueError, match="state_dict"):
            optimizer.load_state_dict(state)
    assert not differing(before, snapshot(model, optimizer))
    assert str(optimizer.param_groups) == str(groups)

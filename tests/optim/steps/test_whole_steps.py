"""A step happens as a whole or not at all: refusals, interrupts, gradients of any layout."""

import math
import signal
import warnings

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.interrupts import uninterrupted
from rlscuda.optim import advice
from rlscuda.optim.steps import whole

FORMS = ["paper", "natural", "adaptive", "spectral"]


# -- refusals -------------------------------------------------------------------------------------


def moved_to_another_device(model, optimizer):
    optimizer.state[model[5].weight]["P"] = optimizer.state[model[5].weight]["P"].to("meta")
    return "the weight of '5' is on cpu, its P on meta"


def narrowed(model, optimizer):
    model[5].weight.data = model[5].weight.data[:, :-1].clone()
    model[5].weight.grad = torch.zeros_like(model[5].weight)
    return r"the weight of '5' must be .* with its bias, got \[3, 36\]"


def shortened(model, optimizer):
    model[5].weight.data = model[5].weight.data[:-1].clone()
    model[5].weight.grad = torch.zeros_like(model[5].weight)
    return r"the weight of '5' must be \[3, 37\] with its bias, got \[2, 37\]"


def sparse(model, optimizer):
    model[5].weight.grad = None
    model[5].weight.grad = torch.zeros(3, 36).to_sparse()
    return "the gradient of '5' must be dense, got torch.sparse_coo"


@pytest.mark.parametrize(
    "spoil, seen",
    [(moved_to_another_device, 2), (narrowed, 2), (shortened, 2), (sparse, 0), (sparse, 2)],
)
def test_a_refused_step_changes_nothing(spoil, seen):
    """The layer that cannot move is the last of all: nothing before it may have moved."""
    model = cnn()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, seen)
    optimizer.zero_grad()
    model(batch(model)).sum().backward()
    message = spoil(model, optimizer)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    after = snapshot(model, optimizer)
    on_cpu = {key for key, value in before.items() if not value.is_meta}
    assert before.keys() == after.keys()
    assert not differing(*({key: d[key] for key in on_cpu} for d in (before, after)))
    assert (
        optimizer._registry.stages[model[0].weight].calls == 1
    )  # what is staged can still be used


EDITS = [  # of a group, by hand or by a scheduler
    ("lr", math.nan, "lr must be finite"), ("lr", math.inf, "lr must be finite"),
    ("lr", torch.tensor(math.nan), "lr must be finite"), ("lr", "a", "lr must be finite"),
    ("momentum", 1.5, r"momentum must be in \[0, 1\)"), ("eps", -1, "eps must be > 0"),
    ("weight_decay", math.nan, "weight_decay must be >= 0"), ("gain", 0.0, "gain must be > 0"),
    ("weight_decay", None, "weight_decay must have a value"), ("drift", 1e9, "drift must be"),
    ("fallback_lr", -1.0, "fallback_lr must be >= 0"), ("shrinkage", -3, "shrinkage must be in"),
    ("initial_scale", -1, "initial_scale must be > 0"), ("summary", "foo", "summary must be"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", EDITS)
@pytest.mark.parametrize("form", FORMS)
def test_an_option_out_of_its_range_is_refused_before_anything_moves(form, name, value, message):
    model = cnn()
    optimizer = RLSOptimizer(model, form=form)
    train(model, optimizer, 2)
    before, kept = snapshot(model, optimizer), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert not differing(before, snapshot(model, optimizer))
    optimizer.param_groups[0][name] = kept
    optimizer.step()


@pytest.mark.parametrize("form, other", [("adaptive", "natural"), ("paper", "adaptive")])
def test_another_form_is_refused_once_a_group_has_stepped(form, other):
    model = cnn()
    optimizer = RLSOptimizer(model, form=form)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0].update(form=other, trust_ratio=math.inf, drift=0.0, interval=1)
    with pytest.raises(ValueError, match=f"is not one of form {other!r}"):
        optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def test_a_fallback_that_refuses_leaves_no_new_state():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = RLSOptimizer(model)
    optimizer.state[model[1].weight]["mine"] = 1
    model(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert dict(optimizer.state) == {model[1].weight: {"mine": 1}}


def test_a_step_cut_short_says_so(monkeypatch):
    def fail(*moves):
        raise MemoryError("no room")

    model = cnn()
    optimizer = RLSOptimizer(model)
    model(batch(model)).sum().backward()
    monkeypatch.setattr(whole, "step_layers", fail)
    with pytest.warns(UserWarning, match="step\\(\\) was cut short by MemoryError") as caught:  # noqa: SIM117
        with pytest.raises(MemoryError):
            optimizer.step()
    assert caught[0].filename == __file__
    assert {optimizer.state[m.weight]["step"] for m in (model[0], model[3], model[5])} == {0}


@pytest.mark.parametrize("moves", [True, False])
def test_a_fallback_that_fails_says_whether_it_has_moved_anything(moves):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if moves:
                super().step()
            raise RuntimeError("in the middle")

    model = cnn()
    optimizer = RLSOptimizer(model, fallback=lambda groups: Failing(groups, lr=0.1))
    model(batch(model)).square().sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="in the middle"):
            optimizer.step()
    said = ["step() was cut short by RuntimeError" in str(w.message) for w in caught]
    assert said == [True] * moves
    assert not optimizer.state


# -- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupt_waits_for_the_end_of_the_step(form, monkeypatch):
    model, twin = cnn(), cnn()
    optimizer, other = RLSOptimizer(model, form=form), RLSOptimizer(twin, form=form)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 1)
        o.zero_grad()
        m(batch(m)).square().sum().backward()
    other.step()
    move = whole.step_layers

    def interrupted(*moves):
        signal.raise_signal(signal.SIGINT)
        move(*moves)

    monkeypatch.setattr(whole, "step_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 1, seed=9)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_a_handler_of_the_user_is_left_to_decide():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("now"))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert seen == ["now"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_inside_goes_on_beside_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")
    assert isinstance(caught.value.__context__, ValueError)


# -- layouts --------------------------------------------------------------------------------------


def transposed_weight(layer):
    """As of an import from a framework that keeps [in, out]."""
    layer.weight.data = layer.weight.data.t().contiguous().t()


def transposed_gradient(layer):
    layer.weight.grad = layer.weight.grad.t().contiguous().t()


def expanded_bias_gradient(layer):
    layer.bias.grad = layer.bias.new_ones(()).expand_as(layer.bias)


def strided_bias_gradient(layer):
    layer.bias.grad = torch.stack([layer.bias.grad] * 2, 1)[:, 0]


def strided_bias(layer):
    both = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    layer.bias.data = both[:, -1]


LAYOUTS = {f.__name__: f for f in (transposed_weight, transposed_gradient, expanded_bias_gradient,
                                   strided_bias_gradient, strided_bias)}  # fmt: skip


@pytest.mark.parametrize("rows", [4, 200], ids=["factored", "whole"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_change_nothing(name, form, rows):
    """Of weights, biases and gradients; a small batch takes the factored product."""
    models = [nn.Sequential(nn.Linear(48, 64)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [RLSOptimizer(m, form=form, lr=0.01) for m in models]
    for step in range(3):
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(step)).double()
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            if i and step == 0 and "gradient" not in name:
                LAYOUTS[name](model[0])
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if "expanded" in name:
                expanded_bias_gradient(model[0])
                if not i:
                    model[0].bias.grad = model[0].bias.grad.contiguous()
            elif i and "gradient" in name:
                LAYOUTS[name](model[0])
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


# -- memory ---------------------------------------------------------------------------------------


def test_matrices_that_take_much_of_the_memory_are_announced(monkeypatch):
    monkeypatch.setattr(advice, "_memory_of", lambda device: 4 << 20)
    model = nn.Sequential(nn.Linear(600, 3), nn.Linear(3, 2))
    with pytest.warns(
        UserWarning, match=r"P of the covered layers will take .* for '0'; a smaller"
    ):
        optimizer = RLSOptimizer(model)
    assert not optimizer.state  # nothing is allocated yet
    RLSOptimizer(model, exclude=["0"])
    optimizer = RLSOptimizer(model[1].parameters(), model=model)
    with pytest.warns(UserWarning, match="will take"):
        optimizer.add_param_group({"params": model[0].parameters()})


def test_memory_of_this_machine_is_known():
    assert advice._memory_of(torch.device("cpu")) > 1 << 28
    assert advice._memory_of(torch.device("meta")) is None
    make(mlp())  # which is small: no warning

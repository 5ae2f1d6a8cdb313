"""`nn.RNN`, `nn.GRU` and `nn.LSTM` in an optimizer: names, reasons, states, later layers."""

import copy
import io

import pytest
import torch
from support.compare import differing, snapshot
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer

EXACT = {"form": "natural", "summary": "mean", "rank": 1, "gain": 0.5, "forgetting": 0.9,
         "ridge": 0, "fallback": "sgd"}  # fmt: skip
HIDDEN = "its input stays inside of the module"


def made(kind, **options):
    torch.manual_seed(0)
    return kind(3, 4, batch_first=True, **options).double()


class Classifier(nn.Module):
    def __init__(self, kind=nn.GRU, **options):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(11, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x):
        _, last = self.rnn(self.tokens(x))
        last = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat(tuple(last[-1 - self.rnn.bidirectional :]), 1))


def fit(model, optimizer, steps=3, seed=1):
    """Training steps on random data; the losses."""
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(model, Classifier):
            x = torch.randint(11, (16, 6))
            loss = nn.functional.cross_entropy(model(x), x[:, 0] % 3)
        else:
            y = model(torch.randn(3, 5, 3).double())
            loss = (y if isinstance(y, torch.Tensor) else y[0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", ["spectral", "adaptive", "paper", "natural"])
@pytest.mark.parametrize("kind, options", [
    (nn.RNN, {}), (nn.GRU, {"num_layers": 2}), (nn.LSTM, {"bidirectional": True}),
])  # fmt: skip
def test_losses_go_down(kind, options, form):
    model = Classifier(kind, **options)
    losses = fit(model, RLSOptimizer(model, form=form, fallback_lr=0.05), 150)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("form", ["spectral", "adaptive", "natural"])
def test_state_goes_round(form):
    model = Classifier(nn.LSTM, num_layers=2, bidirectional=True)
    optimizer = RLSOptimizer(model, form=form)
    fit(model, optimizer)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    twin = Classifier(nn.LSTM, num_layers=2, bidirectional=True)
    other = RLSOptimizer(twin, form=form)
    for one, state in zip((twin, other), torch.load(buffer, weights_only=True)):
        one.load_state_dict(state)
    pickled = io.BytesIO()
    torch.save((model, optimizer), pickled)
    pickled.seek(0)
    others = [(twin, other), copy.deepcopy((model, optimizer)),
              torch.load(pickled, weights_only=False)]  # fmt: skip
    fit(model, optimizer, seed=2)
    for m, o in others:
        fit(m, o, seed=2)
        assert not differing(snapshot(model, optimizer), snapshot(m, o))
        assert {h.missing for h in o.health().values()} == {0}


def test_both_directions_share_the_matrix_of_the_input():
    module = made(nn.GRU, bidirectional=True)
    optimizer = RLSOptimizer(module)
    fit(module, optimizer)
    P = {r.name: optimizer.inverse_autocorrelation(r.name) for r in optimizer.coverage()}
    assert P["weight_ih_l0"] is P["weight_ih_l0_reverse"]
    assert P["weight_hh_l0"] is not P["weight_hh_l0_reverse"]
    assert "it shares the P of 'weight_ih_l0'" in optimizer.coverage()[1].why


class Recomputed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = made(kind)

    def forward(self, x):
        return checkpoint(lambda y: self.rnn(input=y)[0], x, use_reentrant=False)


def test_recomputed_segments_count_once():
    model, twin = Recomputed(nn.LSTM), made(nn.LSTM)
    optimizer, other = RLSOptimizer(model, **EXACT), RLSOptimizer(twin, **EXACT)
    fit(model, optimizer), fit(twin, other)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_learns_the_same(when):
    """The compiler leaves recurrent modules to Python, but not what their hooks call."""
    torch.compiler.reset()
    model, twin = Classifier(), Classifier()
    fast = torch.compile(model, backend="eager") if when == "before" else model
    optimizer, other = RLSOptimizer(fast), RLSOptimizer(twin)
    fast = torch.compile(model, backend="eager")
    for step in range(3):
        for m, o in ((fast, optimizer), (twin, other)):
            torch.manual_seed(step)
            o.zero_grad()
            m(torch.randint(11, (16, 6))).square().mean().backward()
            o.step()
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    torch.compiler.reset()


class Stacked(nn.Module):
    """Recurrent modules of several weights between linear layers."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 5), nn.Linear(7, 3)
        self.both_ways = nn.GRU(5, 5, batch_first=True, bidirectional=True)
        self.last = nn.LSTM(10, 7, batch_first=True)

    def forward(self, x):
        return self.above(self.last(self.both_ways(self.below(x))[0])[0])


def test_a_compiled_model_shows_every_input():
    """Of any length, which the compiler would take for another call of the hook's own code."""
    torch.compiler.reset()
    model = Stacked()
    twin = copy.deepcopy(model)
    optimizer, other = RLSOptimizer(model), RLSOptimizer(twin)
    fast = torch.compile(model, backend="eager")
    for step in range(6):
        x = torch.randn(4, 3 + step % 3, 6)
        for forward, one in ((fast, optimizer), (twin, other)):
            one.zero_grad()
            forward(x).square().mean().backward()
            one.step()
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert all(row.missing == 0 for row in optimizer.health().values())
    torch.compiler.reset()


def statuses(optimizer):
    return {r.name: r.why if r.status == "fallback" else r.status for r in optimizer.coverage()}


OTHERS = {"tokens": "no RLS rule for Embedding"}


@pytest.mark.parametrize("options, expected", [
    ({}, {"rnn.weight_ih_l0": "exact", "rnn.weight_hh_l0": "exact", "head": "exact"}),
    ({"exclude": ["rnn"]},
     {"rnn.weight_ih_l0": "excluded", "rnn.weight_hh_l0": "excluded", "head": "exact"}),
    ({"exclude": ["rnn.weight_hh_l0"]},
     {"rnn.weight_ih_l0": "exact", "rnn.weight_hh_l0": "excluded", "head": "exact"}),
    ({"include": ["*.weight_ih_*"]}, {"rnn.weight_ih_l0": "exact",
     "rnn.weight_hh_l0": "not in include", "head": "not in include"}),
    ({"include": lambda m: m.rnn, "exclude": "*_ih_l0"}, {"rnn.weight_ih_l0": "excluded",
     "rnn.weight_hh_l0": "exact", "head": "not in include"}),
], ids=["all", "no module", "no weight", "some weights", "a module but one"])  # fmt: skip
def test_weights_have_names_that_select(options, expected):
    model = Classifier()
    chosen = {k: v(model) if callable(v) else v for k, v in options.items()}
    optimizer = RLSOptimizer(model, **chosen)
    assert statuses(optimizer) == {**OTHERS, **expected}
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, optimizer, 1)
    assert not any(map(torch.equal, before, model.parameters()))
    assert optimizer.health().keys() == {n for n, how in expected.items() if how == "exact"}
    optimizer._registry.search()
    assert statuses(optimizer) == {**OTHERS, **expected}


def test_which_matrix_must_be_said():
    optimizer = RLSOptimizer(Classifier())
    for which in (optimizer._registry.matches[1].module, "rnn"):
        with pytest.raises(ValueError, match="several weights: name one of 'rnn.weight_ih_l0', 'r"):
            optimizer.inverse_autocorrelation(which)
    assert optimizer.inverse_autocorrelation("rnn.weight_hh_l0").shape == (9, 9)
    with pytest.raises(ValueError, match=f"'rnn.weight_ih_l1', which RLS cannot .*: {HIDDEN}"):
        RLSOptimizer(Classifier(num_layers=2), include=["rnn.weight_ih_l1"])


class OwnForward(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


def test_what_is_refused():
    model = nn.Sequential(OwnForward(3, 3), nn.Linear(3, 3))
    assert statuses(RLSOptimizer(model)) == {
        "0": "OwnForward has a forward of its own", "1": "exact"}  # fmt: skip
    model = parametrizations.weight_norm(nn.GRU(3, 3), "weight_hh_l0")
    optimizer = RLSOptimizer(model)
    why = statuses(optimizer)
    assert why["weight_ih_l0"] == "exact"
    assert why["weight_hh_l0"] == "its weight is not a plain parameter (parametrised or masked)"
    assert sum(len(m.place.parameters) for m in optimizer._registry.matches) == 5


def test_frozen_and_foreign_parameters():
    model = made(nn.GRU)
    model.weight_ih_l0.requires_grad_(False)
    model.bias_hh_l0.requires_grad_(False)
    optimizer = RLSOptimizer(model, **EXACT)
    rows = {row.name: row for row in optimizer.coverage()}
    assert rows["weight_ih_l0"].status == "fallback" and "frozen" in rows["weight_ih_l0"].why
    assert (rows["weight_hh_l0"].fan_in, rows["weight_hh_l0"].status) == (4, "exact")
    before = copy.deepcopy(model)
    fit(model, optimizer, 1)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert moved == ["weight_hh_l0", "bias_ih_l0"]


def test_layers_that_come_later():
    model = nn.ModuleList([made(nn.GRU)])
    optimizer = RLSOptimizer(model, **EXACT)
    fit(model[0], optimizer, 1)
    P = optimizer.inverse_autocorrelation("0.weight_hh_l0")
    model.append(made(nn.LSTM))
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert P is optimizer.inverse_autocorrelation("0.weight_hh_l0")
    fit(model[1], optimizer, 1)
    assert optimizer.health()["1.weight_hh_l0"].updates == 1
    indices = [layer.index for layer in optimizer._registry.layers.values()]
    assert len(set(indices)) == len(indices) == 4

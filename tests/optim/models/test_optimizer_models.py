"""Models as people build them: shared and reparametrised weights, odd inputs, other layouts."""

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive", "spectral"]
SUMMARIES = ["mean", "sketch", "sample"]


class Chain(nn.Module):
    """Layers one after another, with tanh in between."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def fit(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return snapshot(model, optimizer)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-9, atol=1e-11, msg=key)


def tied(bias=True):
    """Two modules of one weight, and of one bias or of two."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    if bias:
        second.bias = first.bias
    return Chain(first, second).double()


@pytest.mark.parametrize("form", FORMS)
def test_tied_layers_are_one_layer_called_twice(form):
    model = tied()
    shared = copy.deepcopy(model.layers[0])
    twice = Chain(shared, shared)
    x = torch.randn(6, 4).double()
    optimizer, other = make(model, form=form), make(twice, form=form)
    assert_same(fit(model, optimizer, x), fit(twice, other, x))
    assert optimizer.health().keys() == {"layers.0"}
    assert [row.status for row in optimizer.coverage()] == ["exact", "exact"]
    P = optimizer.inverse_autocorrelation("layers.0")
    assert P is optimizer.inverse_autocorrelation(model.layers[1])


def test_biases_of_their_own_stay_out_of_a_tied_matrix():
    model = tied(bias=False)
    optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, optimizer, torch.randn(6, 4).double())
    assert optimizer.inverse_autocorrelation("layers.1").shape == (4, 4)
    assert not any(map(torch.equal, before, model.parameters()))
    assert "outside P" in optimizer.coverage()[1].why


def test_convolutions_tied_over_other_groups_are_left_to_the_fallback():
    model = nn.ModuleList([nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 4, 3)])
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="no layer of the model is covered"):
        rows = make(model).coverage()
    assert [row.why for row in rows] == [f"its weight is also that of '{k}', in other groups"
                                         for k in (1, 0)]  # fmt: skip


def reparametrised(how):
    layer = nn.Linear(4, 6)
    return {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "mask": lambda m: prune.random_unstructured(m, "weight", 0.5),
    }[how](layer)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "mask"])
def test_reparametrised_layer_is_trained_by_the_fallback(how):
    model = nn.Sequential(reparametrised(how), nn.Tanh(), nn.Linear(6, 3))
    optimizer = RLSOptimizer(model, lr=0.02)
    x, y = torch.randn(32, 4), torch.randn(32, 3) / 4
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(map(torch.equal, before, model.parameters()))
    assert optimizer.health().keys() == {"2"}


@pytest.mark.parametrize("form", FORMS)
def test_mask_put_on_and_taken_off_while_training(form):
    model = mlp()
    optimizer = make(model, form=form)
    optimizer.param_groups[0]["lr"] = 0.03  # no loss of ten steps is 0
    train(model, optimizer, 2)
    P = optimizer.inverse_autocorrelation("0")
    prune.l1_unstructured(model[0], "weight", 12)
    mask = model[0].weight_mask.clone()
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0]
    model(batch(model))
    assert ((model[0].weight == 0) == (mask == 0)).all() and (mask == 0).sum() == 12
    prune.remove(model[0], "weight")
    train(model, optimizer, 2)
    assert (model[0].weight != 0).any() and P is optimizer.inverse_autocorrelation(model[0])
    health = optimizer.health()["0"]
    assert (health.updates, health.missing) == (14, 0)


def test_lazy_layer_is_covered_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), nn.LazyLinear(2))
    early = make(model.parameters())  # torch's own optimizers take what has no shape yet, too
    x = torch.randn(4, 2, 5, 5)
    with torch.no_grad():
        model(x)
    before = snapshot(model, early)
    fit(model, early, x, 1)
    assert {f"param.{i}" for i in range(4)} <= differing(before, snapshot(model, early))
    optimizer = make(model)
    fit(model, optimizer, x)
    assert [row.status for row in optimizer.coverage()] == ["exact", "exact"]
    assert optimizer.health()["2"].updates == 2


def test_multihead_attention_and_transformer_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 2))
    optimizer = RLSOptimizer(model, lr=0.02, fallback_lr=0.01)
    exact = {row.name for row in optimizer.coverage() if row.status == "exact"}
    assert exact == {"0.self_attn", "0.linear1", "0.linear2", "1"}
    x, y = torch.randn(6, 5, 8), torch.randn(6, 5, 2)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not any(map(torch.equal, before, model.parameters()))
    assert {h.updates for h in optimizer.health().values()} == {40}
    trained = model(x)
    model.eval()
    with torch.no_grad():  # the fused inference path of the layer
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    assert {h.missing for h in optimizer.health().values()} == {0}


INPUTS = {  # another shape of the same rows
    "linear_sequence": (lambda: nn.Linear(4, 3), (2, 5, 4), (10, 4)),
    "linear_image": (lambda: nn.Linear(4, 3), (2, 3, 2, 4), (12, 4)),
    "linear_vector": (lambda: nn.Linear(4, 3), (4,), (1, 4)),
    "conv_unbatched": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4), (1, 2, 5, 4)),
    "grouped_unbatched": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 4), (1, 4, 5, 4)),
}


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("case", INPUTS)
def test_shape_of_the_input_is_of_no_consequence(case, summary):
    build, shape, flat = INPUTS[case]
    model = nn.Sequential(build()).double()
    twin = copy.deepcopy(model)
    x = torch.randn(shape).double()
    first = fit(model, make(model, summary), x)
    assert_same(first, fit(twin, make(twin, summary), x.reshape(flat)))


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("build, shape", [
    (lambda: nn.Linear(4, 3), (0, 5, 4)), (lambda: nn.Linear(4, 3), (2, 0, 4)),
    (lambda: nn.Conv2d(2, 3, 3), (0, 2, 5, 5)),
])  # fmt: skip
def test_empty_batch_among_others(build, shape, summary):
    """It adds nothing to the step of another batch."""
    model = nn.Sequential(build()).double()
    twin = copy.deepcopy(model)
    optimizer, other = make(model, summary), make(twin, summary)
    x = torch.randn([n or 3 for n in shape]).double()
    empty = torch.empty(shape).double()
    for m, o, parts in ((model, optimizer, (empty, x, empty)), (twin, other, (x,))):
        for part in parts:
            m(part).square().sum().backward()
        o.step()
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["model", "input", "both", "later"])
def test_channels_last(which, form):
    model, twin = cnn(torch.float64), cnn(torch.float64)
    last = torch.channels_last
    if which in ("model", "both"):
        model = model.to(memory_format=last)
    optimizer, other = make(model, form=form), make(twin, form=form)
    for step in range(3):
        if which == "later" and step == 1:
            model.to(memory_format=last)
        x = batch(twin, seed=step)
        fit(model, optimizer, x.to(memory_format=last) if which in ("input", "both") else x, 1)
        fit(twin, other, x, 1)
    assert_same(snapshot(model, optimizer), snapshot(twin, other))
    assert model[0].weight.is_contiguous(memory_format=last) == (which != "input")


def test_input_by_name():
    model = nn.Linear(4, 3)
    optimizer = make(model)
    model(input=torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert optimizer.health()[""].updates == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first, then, matrix", [
    (torch.float32, torch.bfloat16, torch.float32), (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float64, torch.float64), (torch.float64, torch.float32, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
], ids=str)  # fmt: skip
def test_model_cast_while_training_keeps_what_its_matrix_knows(first, then, matrix, form):
    model = mlp(first)
    optimizer = make(model, form=form, momentum=0.5)
    train(model, optimizer, 2)
    before = optimizer.inverse_autocorrelation("0").clone()
    model.to(then)
    assert torch.equal(optimizer.inverse_autocorrelation("0").to(before.dtype), before)
    train(model, optimizer, 2)
    P = optimizer.inverse_autocorrelation("0")
    assert P.dtype == matrix and not torch.equal(P.to(before.dtype), before)
    assert model[0].weight.dtype == then
    assert optimizer.health()["0"].updates == 4


class Counter(TorchDispatchMode):
    """Counts the operators whose name contains a word."""

    def __init__(self, word):
        super().__init__()
        self.word, self.calls = word, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += self.word in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form, options", [
    ("paper", {"summary": "mean", "rank": 1, "momentum": 0.5, "forgetting": 0.9}),
    ("paper", {"summary": "sample", "rank": 2}),
    ("natural", {"summary": "mean", "rank": 1, "forgetting": 0.9}),
    ("natural", {"summary": "mean", "rank": 3, "weight_decay": 0.1}),
    ("natural", {"summary": "sketch", "rank": 2, "forgetting": 0.99, "momentum": 0.9}),
    ("adaptive", {"summary": "mean", "rank": 1}),
    ("adaptive", {"summary": "sample", "rank": 8}),
])  # fmt: skip
def test_wide_layer_steps_by_its_factors_to_the_same_end(form, options, bias):
    """N << c: (P X^T) delta is G P. A gradient that was there before keeps to G P."""
    torch.manual_seed(0)
    model = Chain(nn.Linear(40, 60, bias=bias), nn.Linear(60, 50, bias=bias)).double()
    twin = copy.deepcopy(model)
    optimizer, other = (RLSOptimizer(m, lr=0.05, form=form, **options) for m in (model, twin))
    for _ in range(4):
        x = torch.randn(2, 2, 40).double()
        used = []
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            if m is twin:
                for p in m.parameters():
                    p.grad = torch.zeros_like(p)
            m(x).square().sum().backward()
            with Counter("factor") as counter:
                o.step()
            used.append(counter.calls)
        assert used[0] > 0 and used[1] == 0
    assert_same(snapshot(model, optimizer), snapshot(twin, other))

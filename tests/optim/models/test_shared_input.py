"""Layers of one input (q, k, v; gate and up) have one P, and step as if each had its own."""

import copy
import io
import math

import pytest
import torch
from support.compare import differing, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer
from rlscuda.optim.staging import Shown
from rlscuda.pruning import RLSPruner, own_matrices

FORMS = {
    "paper": {"form": "paper", "gain": 0.3, "momentum": 0.5},
    "natural": {"form": "natural", "gain": 0.3, "forgetting": 0.95},
    "adaptive": {"form": "adaptive", "rank": 1},
}
NAMES = ("q", "k", "v")


class Three(nn.Module):
    """Three layers of one input, or of what a step makes of it."""

    def __init__(self, size=6, outputs=5, bias=True):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            setattr(self, name, nn.Linear(size, outputs, bias=bias))
        self.head = nn.Linear(outputs, 2)
        self.double()

    def forward(self, x, way="same"):
        if way == "checkpointed":
            return checkpoint(self, x, use_reentrant=False)
        k = x * 2 if way == "apart" else x
        q = self.q(x)
        if way == "twice":
            q = q + self.q(x)
        k = self.k(k)
        v = 0 if way == "unused" else self.v(x if way != "view" else x.view_as(x))
        return self.head(torch.tanh(q + k + v))


def alone(monkeypatch):
    monkeypatch.setattr(Shown, "serves", lambda *_: False)


def fit(model, optimizer, ways, size=6, rows=8, before=lambda model: None):
    torch.manual_seed(1)
    for way in ways:
        optimizer.zero_grad()
        before(model)
        for one in way.split("+"):
            x = torch.randn(rows, size).double()
            if one == "checkpointed":
                x.requires_grad_()
            if one == "evaluated":
                model.eval()
            model(x, one).square().mean().backward()
            model.train()
        optimizer.step()


def shared(model, optimizer):
    """Names by the P they have."""
    held = {}
    for name in NAMES:
        held.setdefault(id(optimizer.inverse_autocorrelation(name)), []).append(name)
    return ["".join(names) for names in held.values()]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-9, atol=1e-11, msg=key)


COURSES = {  # ways of the steps -> who shares in the end
    "same": (["same"] * 3, ["qkv"]),
    "accumulated": (["same+same", "same"], ["qkv"]),
    "checkpointed": (["checkpointed", "same"], ["qkv"]),
    "evaluated": (["evaluated", "same"], ["qkv"]),
    "apart": (["same", "apart", "same"], ["q", "k", "v"]),  # whose inputs do not come in a row
    "apart_within": (["same", "same+apart", "same"], ["q", "k", "v"]),
    "apart_first": (["apart", "same"], ["q", "k", "v"]),
    "unused": (["same", "unused", "same"], ["qk", "v"]),
    "unused_first": (["unused", "same"], ["qk", "v"]),
    "twice": (["same", "twice", "same"], ["q", "kv"]),
    "view": (["same", "view"], ["qk", "v"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("size, outputs, options", [
    (6, 5, {}), (6, 5, {"max_fan_in": 3}), (90, 80, {}), (90, 80, {"max_fan_in": 60}),
])  # fmt: skip
def test_each_steps_as_if_it_had_its_own(course, form, size, outputs, options, monkeypatch):
    """Of the mean, which draws nothing; wide layers of few rows step by their factors."""
    ways, expected = COURSES[course]
    options = FORMS[form] | {"summary": "mean"} | options
    model = Three(size, outputs)
    optimizer = RLSOptimizer(model, lr=0.05, **options)
    fit(model, optimizer, ways, size, 2 if size > 6 else 8)
    assert sorted(shared(model, optimizer)) == sorted(expected)
    twin = Three(size, outputs)
    with monkeypatch.context() as patched:
        alone(patched)
        other = RLSOptimizer(twin, lr=0.05, **options)
        fit(twin, other, ways, size, 2 if size > 6 else 8)
        assert shared(twin, other) == list(NAMES)
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


class Fused(nn.Module):
    def __init__(self, three):
        super().__init__()
        layers = [getattr(three, name) for name in NAMES]
        self.qkv = nn.Linear(layers[0].in_features, 3 * layers[0].out_features).double()
        self.qkv.load_state_dict({
            key: torch.cat([getattr(layer, key).detach() for layer in layers])
            for key in ("weight", "bias")
        })  # fmt: skip
        self.head = copy.deepcopy(three.head)

    def forward(self, x, way="same"):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(torch.tanh(q + k + v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_three_layers_step_as_the_fused_one(form, summary):
    model = Three()
    twin = Fused(model)
    options = FORMS[form] | {"summary": summary, "trust_ratio": math.inf, "rank": 2}
    optimizers = [RLSOptimizer(m, lr=0.05, include=["q", "k", "v", "qkv"][i * 3 : 3 + i],
                               **options) for i, m in enumerate((model, twin))]  # fmt: skip
    for m, o in zip((model, twin), optimizers):
        fit(m, o, ["same", "same+same", "same"])
    P = [o.inverse_autocorrelation(n) for o, n in zip(optimizers, ("v", "qkv"))]
    torch.testing.assert_close(*P, rtol=1e-10, atol=1e-12)
    for key in ("weight", "bias"):
        rows = torch.cat([getattr(getattr(model, name), key) for name in NAMES])
        torch.testing.assert_close(rows, getattr(twin.qkv, key), rtol=1e-9, atol=1e-11)


def test_coverage_counts_the_memory_once():
    model = Three()
    optimizer = RLSOptimizer(model)
    assert [row.bytes for row in optimizer.coverage()] == [392, 392, 392, 288]
    fit(model, optimizer, ["same"])
    rows = optimizer.coverage()
    assert [row.bytes for row in rows] == [392, 0, 0, 288]
    assert rows[2].why == "it shares the P of 'q', which has the same input"
    assert {name: h.updates for name, h in optimizer.health().items()} == dict.fromkeys(
        [*NAMES, "head"], 1)  # fmt: skip


@pytest.mark.parametrize("frozen", ["q", "k"])
def test_frozen_for_a_while(frozen, monkeypatch):
    def run(model, optimizer):
        fit(model, optimizer, ["same"] * 2)
        getattr(model, frozen).requires_grad_(False)
        before = optimizer.inverse_autocorrelation("v").clone()
        optimizer.zero_grad()
        model(torch.ones(4, 6).double()).sum().backward()
        optimizer.step()
        assert not torch.equal(before, optimizer.inverse_autocorrelation("v"))
        getattr(model, frozen).requires_grad_(True)
        fit(model, optimizer, ["same"] * 2)
        return snapshot(model, optimizer)

    ours = run(*make())
    alone(monkeypatch)
    assert_same(ours, run(*make()))


def make(**options):
    model = Three()
    return model, RLSOptimizer(model, summary="mean", rank=1, **options)


def test_found_inf_and_refused_steps():
    model, optimizer = make()
    fit(model, optimizer, ["same"])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(4, 6).double()).sum().backward()
    model.k.weight.grad[0, 0] = math.nan
    optimizer.step()
    after = snapshot(model, optimizer)
    changed = {k for k in differing(before, after) if "health" not in k and "step" not in k}
    assert not changed
    assert optimizer.health()["q"].refused == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_while_training(dtype):
    model, optimizer = make()
    model.to(dtype)
    optimizer = RLSOptimizer(model)
    for _ in range(2):
        model(torch.randn(8, 6).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shared(model, optimizer) == ["qkv"]
    fit(model.double(), optimizer, ["same"] * 2)
    assert optimizer.inverse_autocorrelation("q").dtype == torch.float64
    assert {h.updates for h in optimizer.health().values()} == {4}


def test_saved_loaded_and_copied():
    model, optimizer = make()
    fit(model, optimizer, ["same"] * 2)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    twin, other = make()
    for one, state in zip((twin, other), torch.load(buffer, weights_only=True)):
        one.load_state_dict(state)
    copied, with_it = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other), (copied, with_it)):
        assert shared(m, o) == ["qkv"]
        fit(m, o, ["same", "unused"])
        assert sorted(shared(m, o)) == ["qk", "v"]
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    state = optimizer.state_dict()
    other.load_state_dict(state)
    fit(twin, other, ["same"])  # which moves nothing of the one it was loaded from
    assert torch.equal(state["state"][0]["P"], optimizer.inverse_autocorrelation("q"))


def test_state_with_one_matrix_and_many_counters_is_taken_apart():
    model, optimizer = make()
    fit(model, optimizer, ["same"])
    state = optimizer.state_dict()
    state["state"] = {key: dict(entries) for key, entries in state["state"].items()}
    state["state"][2]["health"] = state["state"][2]["health"].clone()
    optimizer.load_state_dict(state)
    assert sorted(shared(model, optimizer)) == ["k", "qv"]
    fit(model, optimizer, ["same"])


def test_other_options_other_biases_and_other_sizes_keep_their_own():
    model = Three()
    groups = [{"params": model.q.parameters()}, {"params": model.k.parameters(), "rank": 2},
              {"params": [*model.v.parameters(), *model.head.parameters()]}]  # fmt: skip
    optimizer = RLSOptimizer(groups, model=model)
    fit(model, optimizer, ["same"] * 2)
    assert shared(model, optimizer) == list(NAMES)
    model = Three()
    model.k.bias = None
    model.v.bias.requires_grad_(False)
    optimizer = RLSOptimizer(model)
    fit(model, optimizer, ["same"] * 2)
    assert shared(model, optimizer) == ["q", "kv"]  # rows without the bias' column


def test_layer_added_later_has_its_own():
    model = Three()
    late = [*model.v.parameters()]
    optimizer = RLSOptimizer([p for p in model.parameters() if all(p is not q for q in late)],
                             model=model)  # fmt: skip
    fit(model, optimizer, ["same"])
    optimizer.add_param_group({"params": late})
    fit(model, optimizer, ["same"] * 2)
    assert shared(model, optimizer) == ["qk", "v"]


def test_convolutions_of_one_input():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
            self.v = nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model = Blocks()
    optimizer = RLSOptimizer(model)
    for _ in range(2):
        model(torch.randn(4, 2, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shared(model, optimizer) == ["qk", "v"]


@pytest.mark.parametrize("form", FORMS)
def test_own_matrices_are_turned_back_once(form):
    model = Three()
    optimizer = RLSOptimizer(model, **FORMS[form])
    fit(model, optimizer, ["same"] * 3)
    own = own_matrices(optimizer)
    assert own["q"] is own["k"] is own["v"] is not own["head"]


@pytest.mark.parametrize("form", FORMS)
def test_pruned_together(form, monkeypatch):
    def run():
        torch.manual_seed(0)
        first, model = nn.Linear(4, 12).double(), Three(12)
        model = Fed(first, model)
        optimizer = RLSOptimizer(model, summary="mean", **FORMS[form] | {"rank": 1})
        train(model, optimizer)
        pruner = RLSPruner(model, optimizer, torch.randn(3, 4).double(), ratio=0.5,
                           importance="l2")  # fmt: skip
        pruner.step()
        assert model.three.q.in_features == 6
        own = [optimizer.inverse_autocorrelation(f"three.{n}") for n in NAMES]
        assert own[0].shape == (7, 7)
        train(model, optimizer)
        return snapshot(model, optimizer), len({id(P) for P in own})

    ours, one = run()
    alone(monkeypatch)
    theirs, three = run()
    assert (one, three) == (1, 3)
    assert_same(ours, theirs)


class Fed(nn.Module):
    def __init__(self, first, three):
        super().__init__()
        self.first, self.three = first, three

    def forward(self, x):
        return self.three(torch.relu(self.first(x)))


def train(model, optimizer):
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4).double()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("first", [0, 1])
def test_a_mask_of_one_layer_leaves_the_other_s_rows(first):
    """Two layers of one tensor, of which one is called inside of a mask: two matrices."""
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 4)]).double()
    optimizer = RLSOptimizer(layers, summary="mean", rank=1)
    x, mask = torch.randn(4, 5, 3, dtype=torch.float64), torch.rand(4, 5) < 0.5
    mask[0, 0] = not mask[0, 1]
    with optimizer.mask(mask if first == 0 else torch.ones_like(mask)):
        out = layers[0](x).square().mean()
    with optimizer.mask(mask if first == 1 else torch.ones_like(mask)):
        (out + layers[1](x).square().mean()).backward()
    optimizer.step()
    for i, layer in enumerate(layers):
        alone = RLSOptimizer(twin := nn.Linear(3, 2).double(), summary="mean", rank=1)
        with alone.mask(mask if i == first else torch.ones_like(mask)):
            twin(x).square().mean().backward()
        alone.step()
        torch.testing.assert_close(
            optimizer.inverse_autocorrelation(layer), alone.inverse_autocorrelation(twin)
        )

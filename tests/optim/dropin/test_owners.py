"""Made from parameters alone, an optimizer is that of the model which holds them, to the bit."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from optim.dropin.networks import Recurrent
from support.compare import differing, snapshot
from support.training import cnn, mlp
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rlscuda import RLSOptimizer
from rlscuda.optim.kinds import owners


class Vision(nn.Module):
    """A patch embedding, a class token and attention with a residual, as in timm."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(2, 8, 3, 3), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y)[0])[:, 0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Parent(nn.Module):
    """As a LightningModule: the network with what else training needs."""

    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net, nn.MSELoss()

    def forward(self, x):
        return self.net(x)


def build(kind):
    torch.manual_seed(0)
    return kind()


MODELS = {  # what is built, and the shape of an input
    "mlp": (mlp, (8, 4)),
    "cnn": (cnn, (8, 2, 6, 6)),
    "gru": (Recurrent, (8, 6, 4)),
    "vision": (Vision, (8, 2, 6, 6)),
    "tied": (Tied, (8, 4)),
}
DECAYS = [0.1, 0.0]


def split(model):
    """Groups as of the Trainer of transformers: those that decay and those that do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for _, p in named if (p.dim() > 1) == first], "weight_decay": decay}
        for first, decay in zip((True, False), DECAYS)
    ]


GIVEN = {  # how the parameters are given
    "generator": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "filtered": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "groups": split,
    "group": lambda m: [{"params": m.parameters()}],
    "groups_of_generators": lambda m: ({"params": c.parameters()} for c in m.children()
                                       if next(c.parameters(), None) is not None),
}  # fmt: skip


def fit(model, optimizer, shape, steps=4, seed=5):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()


def assert_same(shape, first, second, steps=4, given=None):
    """Two models and their optimizers: the same names, rules and, after steps, the same bits."""
    (model, optimizer), (twin, other) = first, second
    assert list(optimizer.coverage()) == list(other.coverage())
    assert any(row.status == "exact" for row in optimizer.coverage())
    layers = [[(v.name, v.index) for v in o._registry.layers.values()] for o in (optimizer, other)]
    assert layers[0] == layers[1]
    fit(given or model, optimizer, shape, steps)
    fit(twin, other, shape, steps)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert str(optimizer.health()) == str(other.health())


CASES = [*(("cnn", given) for given in GIVEN), *((name, "groups") for name in MODELS),
         ("vision", "generator"), ("tied", "generator")]  # fmt: skip


@pytest.mark.parametrize("name, given", dict.fromkeys(CASES))
def test_it_is_the_optimizer_of_the_model(name, given):
    kind, shape = MODELS[name]
    model, twin = build(kind), build(kind)
    first = RLSOptimizer(GIVEN[given](model), lr=0.03, fallback_lr=2e-3, seed=3)
    of_twin = GIVEN[given](twin) if "group" in given else twin
    second = RLSOptimizer(of_twin, model=twin, lr=0.03, fallback_lr=2e-3, seed=3)
    assert_same(shape, (model, first), (twin, second))


@pytest.mark.parametrize("form", ["adaptive", "paper", "natural"])
def test_every_form(form):
    model, twin = cnn(), cnn()
    options = {"form": form, "summary": "sketch", "rank": 2, "lr": 0.02}
    made = RLSOptimizer(model.parameters(), **options), RLSOptimizer(twin, **options)
    assert_same((8, 2, 6, 6), (model, made[0]), (twin, made[1]))


def test_the_call_of_a_trainer():
    """`optimizer_cls(groups, **kwargs)`, with what such a call carries."""
    model, twin = cnn(), cnn()
    kwargs = {"lr": 0.04, "form": "adaptive"}
    made = RLSOptimizer(split(model), **kwargs), RLSOptimizer(split(twin), model=twin, **kwargs)
    assert [g["lr"] for g in made[0].param_groups] == [0.04, 0.04]
    assert made[0].param_groups[0]["weight_decay"] == 0.1
    assert_same((8, 2, 6, 6), (model, made[0]), (twin, made[1]))


WRAPPERS = {
    "parent": Parent,
    "twice": lambda m: Parent(Parent(m)),
    "data_parallel": nn.DataParallel,
    "average": lambda m: nn.ModuleList([m, AveragedModel(m)]),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "fx": torch.fx.symbolic_trace,
    "exported": lambda m: torch.export.export(m, (torch.randn(8, 4),)).module(),
    "deepcopy": copy.deepcopy,
    "other_order": lambda m: nn.ModuleList(reversed(m)),
    "other_container": lambda m: nn.ModuleList(m),
    "unfinished": lambda m: nn.Module.__new__(nn.Linear),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_and_copies_that_live_do_not_count(name):
    model, twin = mlp(), mlp()
    others = [WRAPPERS[name](model) for _ in range(3)]
    made = RLSOptimizer(model.parameters()), RLSOptimizer(twin)
    layers = made[0]._registry.layers.values()
    assert [layer.module for layer in layers] == [model[0], model[2]]
    assert_same((8, 4), (model, made[0]), (twin, made[1]))
    assert others


def test_a_compiled_model_trains_as_one_that_is_not():
    """What was compiled before the optimizer was made had no hooks, and is dropped."""
    torch.compiler.reset()
    model, twin = mlp(), mlp()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(8, 4))
    made = RLSOptimizer(compiled.parameters()), RLSOptimizer(twin)
    assert_same((8, 4), (model, made[0]), (twin, made[1]), given=compiled)
    torch.compiler.reset()


def test_two_networks_of_one_optimizer():
    """No module holds both: they are named by their place, in the order of their parameters."""
    encoder, decoder = mlp(), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    both = copy.deepcopy(nn.ModuleList([encoder, decoder]))
    for order in (1, -1):
        networks = [encoder, decoder][::order]
        pair = nn.ModuleList(list(both)[::order])
        optimizer = RLSOptimizer(itertools.chain(*(n.parameters() for n in networks)))
        other = RLSOptimizer(pair)
        assert list(optimizer.coverage()) == list(other.coverage())
        backwards = RLSOptimizer([*networks[1].parameters(), *networks[0].parameters()])
        assert [r.fan_in for r in backwards.coverage()] != [r.fan_in for r in other.coverage()]
        for e, d, o in ((encoder, decoder, optimizer), (*list(pair)[::order], other)):
            fit(nn.Sequential(e, d), o, (8, 4))
        assert not differing(snapshot(encoder, optimizer), snapshot(pair[::order][0], other))
        assert not differing(snapshot(decoder, optimizer), snapshot(pair[::order][1], other))


def test_two_networks_in_a_module_are_named_by_it():
    first, second = mlp(), nn.Linear(3, 2)
    parent = nn.ModuleDict({"encoder": first, "decoder": second, "other": nn.Linear(2, 2)})
    chained = itertools.chain(second.parameters(), first.parameters())
    optimizer = RLSOptimizer(chained)
    rows = {row.name: row.status for row in optimizer.coverage()}
    exact = {"encoder.0": "exact", "encoder.2": "exact", "decoder": "exact"}
    assert rows == {**exact, "other": "refused"} and optimizer._registry._model is parent


def test_a_module_that_is_gone_does_not_count():
    """In a circle of references, it is there until somebody collects."""
    model, other = mlp(), nn.Linear(3, 2)
    gone = nn.ModuleDict({"a": model, "b": other})
    gone.itself = [gone]
    del gone
    optimizer = RLSOptimizer([*model.parameters(), *other.parameters()])
    assert [row.name for row in optimizer.coverage()] == ["0.0", "0.2", "1"]


def test_made_twice_over_one_model():
    model, twin = cnn(), cnn()
    RLSOptimizer(model.parameters())
    kept = RLSOptimizer(model.parameters())
    optimizer = RLSOptimizer(model.parameters())
    assert_same((8, 2, 6, 6), (model, optimizer), (twin, RLSOptimizer(twin)))
    assert kept.state_dict()["state"] == {}


@pytest.mark.filterwarnings("ignore:no layer of the model is covered")
def test_a_part_of_a_model_is_its_own():
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(3, 2)})
    optimizer = RLSOptimizer(model["body"].parameters())
    assert [row.name for row in optimizer.coverage()] == ["0", "2"]
    tied = Tied()
    optimizer = RLSOptimizer(tied.first.parameters())  # its weight is used elsewhere, too
    assert [row.name for row in optimizer.coverage()] == ["first", "second"]
    language = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    language["head"].weight = language["words"].weight
    rows = RLSOptimizer(language["head"].parameters()).coverage()
    assert [(row.name, row.status) for row in rows] == [("words", "fallback"), ("head", "fallback")]


def test_include_and_exclude_choose_in_what_is_found():
    model = mlp()
    for options in ({"include": ["0"]}, {"exclude": ["2"]}, {"exclude": model[2]}):
        rows = RLSOptimizer(model.parameters(), **options).coverage()
        assert [row.status for row in rows] == ["exact", "fallback"]
    with pytest.raises(ValueError, match="exclude names 'x', which the model does not have"):
        RLSOptimizer(model.parameters(), exclude=["x"])
    assert not any(m._forward_hooks for m in model)


class Unhashable(nn.Module):
    __hash__ = None  # as of a dataclass

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_odd_objects_among_the_living():
    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError("woken")

    class Meta(type):
        __hash__ = None

    class Odd(metaclass=Meta):
        pass

    living = [Proxy(), Odd(), Unhashable(), nn.Module.__new__(nn.Module)]
    model = mlp()
    assert owners.find(model.parameters()) == (model, [])
    assert living


def test_what_hangs_on_a_module_is_found_though_frozen():
    gc.collect()
    model = mlp()
    gc.freeze()
    try:
        assert owners.find(list(model.parameters())) == (None, [])
        parent = Parent(model)
        found, around = owners.find(list(model.parameters()))
        assert found is model and around == [parent]
    finally:
        gc.unfreeze()


def test_nothing_is_kept_alive_but_with_the_optimizer():
    model = mlp()
    parent, optimizer = Parent(model), RLSOptimizer(model.parameters())
    references = [weakref.ref(parent), weakref.ref(model)]
    del parent
    gc.collect()
    assert references[0]() is None
    twin, other = copy.deepcopy((model, optimizer))
    del model, optimizer
    gc.collect()
    assert references[1]() is None
    fit(twin, other, (8, 4))
    assert other.health()["0"].updates == 4

"""What include, exclude and each kind of module make of a model, and what the optimizer reports."""

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.nn.utils import parametrizations, prune

from rlscuda import RLSOptimizer


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = mlp()
        self.decoder = nn.ModuleDict({"first": nn.Linear(3, 4), "head": nn.Linear(4, 2)})

    def forward(self, x):
        hidden = torch.relu(self.decoder["first"](self.encoder(x)))
        return self.decoder["head"](hidden)


EVERY = {"encoder.0", "encoder.2", "decoder.first", "decoder.head"}
SELECTIONS = [
    ({}, EVERY),
    ({"include": "*"}, EVERY),
    ({"include": ["encoder"]}, {"encoder.0", "encoder.2"}),
    ({"include": lambda m: m.encoder}, {"encoder.0", "encoder.2"}),
    ({"include": lambda m: [m.encoder[0], "*.head"]}, {"encoder.0", "decoder.head"}),
    ({"include": ["decoder.[a-f]*"]}, {"decoder.first"}),
    ({"include": ["encoder.?"], "exclude": ["*.0"]}, {"encoder.2"}),
    ({"include": lambda m: (name for name in ["encoder.2"])}, {"encoder.2"}),
    ({"exclude": ["encoder"]}, {"decoder.first", "decoder.head"}),
    ({"exclude": lambda m: m.decoder}, {"encoder.0", "encoder.2"}),
    ({"exclude": lambda m: [m.encoder[1], m.decoder["head"]]}, EVERY - {"decoder.head"}),
    ({"exclude": []}, EVERY),
]


@pytest.mark.parametrize("number", range(len(SELECTIONS)))
def test_include_and_exclude(number):
    options, expected = SELECTIONS[number]
    model = Nested()
    chosen = {k: v(model) if callable(v) else v for k, v in options.items()}
    optimizer = RLSOptimizer(model, **chosen)
    rows = {row.name: row for row in optimizer.coverage()}
    assert rows.keys() == EVERY
    assert {name for name, row in rows.items() if row.status == "exact"} == expected
    limited = [row.why for row in rows.values() if row.status != "exact"]
    assert set(limited) <= {"excluded", "not in include"}
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))  # the fallback trains the rest
    assert optimizer.health().keys() == expected


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("value, error, message", [
    (["encoder.7"], ValueError, "names 'encoder.7', which the model does not have"),
    (["encoder.0", "x*"], ValueError, "names 'x*', which the model does not have"),
    ([nn.Linear(1, 1)], ValueError, "which the model does not have"),
    ([0], TypeError, "takes names and modules, got int"),
    (0, TypeError, "takes names and modules, got int"),
    ([torch.ones(1)], TypeError, "takes names and modules, got Tensor"),
], ids=str)  # fmt: skip
def test_wrong_selection(option, value, error, message):
    model = Nested()
    with pytest.raises(error) as caught:
        RLSOptimizer(model, **{option: value})
    assert option in str(caught.value) and message in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name, why", [("1", "no RLS rule for BatchNorm2d"),
                                       ("2", "it has no parameters")])  # fmt: skip
def test_included_module_must_be_coverable(name, why):
    with pytest.raises(ValueError, match=f"include names '{name}', which RLS cannot train: {why}"):
        RLSOptimizer(cnn(), include=[name])


def test_selection_needs_a_model():
    for option in ("include", "exclude"):
        with pytest.raises(ValueError, match="pass model="):
            RLSOptimizer([nn.Parameter(torch.ones(2))], **{option: ["0"]})


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.abs(), weight, bias)


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other, self.layer = other, nn.Linear(4, 4, bias=False)
        self.layer.weight = other.weight


class Sharing(nn.Module):
    """Tied by their memory, as two parameters."""

    def __init__(self):
        super().__init__()
        self.other, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer.weight.data = self.other.weight.data


def pruned():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


REASONS = {  # why a module has no P -> the module, its place
    "no RLS rule for Embedding": (lambda: nn.Embedding(3, 4), ""),
    "no RLS rule for ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 2, 3), ""),
    "no RLS rule for ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 3), ""),
    "no RLS rule for Bilinear": (lambda: nn.Bilinear(2, 2, 3), ""),
    "no RLS rule for Own": (Own, ""),
    "no RLS rule for ParametrizationList":
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrizations.weight"),
    "OwnForward has a forward of its own": (lambda: OwnForward(3, 3), ""),
    "OwnConvForward has a forward of its own": (lambda: OwnConvForward(2, 2, 3), ""),
    "MultiheadAttention uses its weight without calling it":
        (lambda: nn.MultiheadAttention(4, 2), "out_proj"),
    "its weight is not a plain parameter (parametrised or masked)": (pruned, ""),
    "its weight has no shape yet: run one batch through a lazy module first":
        (lambda: nn.LazyLinear(3), ""),
    "its weight has no elements": (lambda: nn.Linear(0, 3), ""),
    "its weight is torch.complex64, torch.strided":
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), ""),
    "its weight is also that of 'm.other': no RLS rule for Embedding":
        (lambda: Tied(nn.Embedding(4, 4)), "layer"),
    "its weight is also that of 'm.other': OwnForward has a forward of its own":
        (lambda: Tied(OwnForward(4, 4)), "layer"),
    "its weight lies in the memory of 'm.other.weight', another parameter": (Sharing, "layer"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("why", REASONS)
def test_reason_for_the_fallback(why):
    build, place = REASONS[why]
    model = nn.Module()
    model.m, model.plain = build(), nn.Linear(2, 2)
    optimizer = RLSOptimizer(model)
    name = ".".join(filter(None, ("m", place)))
    (row,) = (row for row in optimizer.coverage() if row.name == name)
    assert (row.status, row.fan_in, row.groups, row.bytes) == ("fallback", 0, 0, 0)
    assert row.why == why
    with pytest.raises(ValueError) as caught:
        optimizer.inverse_autocorrelation(name)
    assert str(caught.value) == f"{name!r} has no inverse autocorrelation matrix: {row.why}"
    with pytest.raises(ValueError, match="which RLS cannot train"):
        RLSOptimizer(model, include=[name])


def test_rows_of_the_table():
    model = cnn()
    model[3].requires_grad_(False)
    model[5].bias.requires_grad_(False)
    optimizer = RLSOptimizer([*model[0].parameters(), *model[3].parameters(), model[5].weight,
                              model[5].bias, nn.Parameter(torch.ones(2))], model=model,
                             dtype=torch.float64)  # fmt: skip
    rows = {row.name: row for row in optimizer.coverage()}
    seen = {name: (r.kind, r.status, r.fan_in, r.groups, r.bytes) for name, r in rows.items()}
    assert seen == {
        "0": ("Conv2d", "exact", 19, 1, 19 * 19 * 8),
        "1": ("BatchNorm2d", "refused", 0, 0, 0),
        "3": ("Conv2d", "refused", 0, 0, 0),
        "5": ("Linear", "exact", 36, 1, 36 * 36 * 8),
        "(parameters)": ("Parameter", "fallback", 0, 0, 0),
    }
    assert (rows["0"].why, rows["1"].why) == ("", "in no parameter group")
    assert rows["3"].why == "frozen"
    assert rows["5"].why == "its bias is frozen, shared or in another group, and so outside P"
    assert rows["(parameters)"].why == "1 parameters of no module of the model"
    model[3].requires_grad_(True)
    assert next(r for r in optimizer.coverage() if r.name == "3").groups == 2
    model[0].weight.requires_grad_(False)  # its bias goes on by the fallback
    (row,) = (r for r in optimizer.coverage() if r.name == "0")
    assert (row.status, row.bytes) == ("fallback", 0) and "its weight is frozen" in row.why


def test_bytes_are_those_of_the_matrices():
    model = cnn()
    optimizer = RLSOptimizer(model)
    for row in optimizer.coverage():
        if row.status == "exact":
            P = optimizer.inverse_autocorrelation(row.name)
            assert row.bytes == P.numel() * P.element_size()


def test_coverage_prints_every_module_and_the_sum():
    text = str(RLSOptimizer(cnn()).coverage())
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "rule", "P", "MiB", "why"]
    assert lines[2].split()[:4] == ["0", "Conv2d", "exact", "19²"]
    assert "no RLS rule for BatchNorm2d" in lines[3]
    assert "2 x 18²" in lines[4]
    assert lines[-1] == "3 exact, 1 fallback; P takes 0.01 MiB"
    assert "(root)" in str(RLSOptimizer(nn.Linear(2, 2)).coverage())


def test_model_without_a_layer_is_warned_of():
    model = nn.Sequential(nn.LayerNorm(3), nn.Embedding(2, 3))
    with pytest.warns(UserWarning, match="no layer of the model is covered"):
        RLSOptimizer(model)
    with pytest.warns(UserWarning, match="no layer of the model is covered"):
        RLSOptimizer(mlp(), include=[])
    with pytest.warns(UserWarning, match="no module that holds the parameters was found"):
        (row,) = RLSOptimizer([nn.Parameter(torch.ones(2))]).coverage()
    assert (row.name, row.status, row.why) == ("(parameters)", "fallback", "no model found")


@pytest.mark.parametrize("how", ["mask", "parametrization"])
@pytest.mark.parametrize("bias", [True, False])
def test_coverage_of_a_weight_reparametrised_later(how, bias):
    model = nn.Sequential(nn.Linear(4, 3, bias=bias))
    optimizer = make(model)
    if how == "mask":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert optimizer.health()["0"].updates == 1
    assert [row.status for row in optimizer.coverage()] == ["exact"]


def test_health_counts_what_happened():
    model = cnn()
    optimizer = make(model, initial_scale=2.0, rank=1)
    assert optimizer.health() == {}
    train(model, optimizer, 2)
    optimizer.step()  # with a gradient, but no new input
    optimizer.zero_grad()
    for name, health in optimizer.health().items():
        P = optimizer.inverse_autocorrelation(name)
        matrices = P.shape[0] if P.dim() == 3 else 1
        assert (health.updates, health.missing) == (2 * matrices, 1)
        assert (health.refused, health.resets, health.symmetry_error) == (0, 0, 0.0)
        assert health.trace == pytest.approx(P.diagonal(dim1=-2, dim2=-1).sum().item())
        assert health.largest_gain > 0
    P[0, 1] += 0.5
    assert optimizer.health()["5"].symmetry_error == pytest.approx(0.5)
    lines = str(optimizer.health()).splitlines()
    assert lines[0].split()[:5] == ["layer", "updates", "refused", "resets", "missing"]
    assert lines[1].split()[:5] == ["0", "2", "0", "0", "1"] and len(lines) == 4


def test_largest_gain_is_that_of_h():
    """h - forgetting = gain * s P s, largest at the first sight of a row."""
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = RLSOptimizer(layer, form="natural", summary="mean", gain=0.5, lr=0.1)
    x = torch.tensor([[1.0, 2.0, 2.0]]).double()
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.health()[""].largest_gain == pytest.approx(4.5)


@pytest.mark.parametrize("wrong", ["0.weight", "7", nn.Linear(4, 6), None])
def test_matrix_of_what_is_no_layer(wrong):
    model = mlp()
    optimizer = make(model)
    with pytest.raises(ValueError, match="is no layer of the optimizer's model"):
        optimizer.inverse_autocorrelation(wrong)


def test_matrix_of_a_layer_in_no_group():
    model = mlp()
    optimizer = make(model[0].parameters(), model=model)
    with pytest.raises(ValueError, match="'2' has no .* matrix: its weight is in no parameter"):
        optimizer.inverse_autocorrelation(model[2])


def test_looking_changes_nothing():
    model, twin = cnn(), cnn()
    optimizer, other = make(model), make(twin)
    for step in range(3):
        for layer in (model[0], "3", model[5]):
            optimizer.inverse_autocorrelation(layer)
        str(optimizer.coverage()), str(optimizer.health()), copy.deepcopy(optimizer)
        assert optimizer.inverse_autocorrelation(model[0]).requires_grad is False
        train(model, optimizer, 1, seed=step)
        train(twin, other, 1, seed=step)
    model(batch(model))
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_reports_as_plain_dicts():
    model = cnn()
    optimizer = make(model)
    train(model, optimizer, 2)
    for report, rows in (
        (optimizer.coverage(), {row.name: row for row in optimizer.coverage()}),
        (optimizer.health(), optimizer.health()),
    ):
        plain, entries = report.as_dict(), vars(next(iter(rows.values())))
        assert type(plain) is dict and len(plain) == len(rows) * len(entries)
        assert {type(value) for value in plain.values()} <= {str, int, float}
        for name, row in rows.items():
            assert {key: plain[f"rls/{name}/{key}"] for key in entries} == vars(row)
    assert optimizer.health().as_dict()["rls/0/updates"] == 2
    assert make(nn.Linear(2, 1)).coverage().as_dict()["rls/(root)/fan_in"] == 3

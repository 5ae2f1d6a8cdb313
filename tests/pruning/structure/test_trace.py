"""The couplings of a model: each channel in exactly one, none of them the model's outputs."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.pruning_models import ZOO, Case, ChannelSoftmax, HardCoded, Shuffle, inputs, lenet
from torch import Tensor, nn
from torch.nn.utils import prune

from rlscuda import RLSOptimizer
from rlscuda.pruning.structure.trace import trace


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_couplings(case: Case):
    structure = trace(case.model(), inputs())
    assert {c.name: c.units for c in structure.couplings} == case.couplings
    assert structure.refused == {}
    assert structure.output_shapes == [(4, 5)]


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_each_channel_once_a_side(case: Case):
    seen: dict[tuple[str, str], list[int]] = {}
    for coupling in trace(case.model(), inputs()).couplings:
        for member in coupling.members:
            assert member.indices.shape[0] == coupling.units
            seen.setdefault((member.name, member.kind), []).extend(
                member.indices.flatten().tolist()
            )
    for channels in seen.values():
        assert len(channels) == len(set(channels))


def members(coupling) -> dict[tuple[str, str], list]:
    return {(m.name, m.kind): m.indices.tolist() for m in coupling.members}


def test_flatten_gives_each_channel_its_features():
    found = members(trace(lenet(), inputs()).coupling("3"))
    assert found == {
        ("3", "out"): [[i] for i in range(6)],
        ("6", "in"): [list(range(4 * i, 4 * i + 4)) for i in range(6)],
    }


def test_concatenation_shifts_the_channels():
    structure = trace(ZOO[4].model(), inputs())
    second = structure.coupling("convs.0")
    assert second.member("convs.1", "in").indices.tolist() == [[4], [5], [6]]
    assert second.member("norms.2", "both").indices.tolist() == [[4], [5], [6]]
    assert structure.coupling("convs.2").member("head", "in").indices.tolist() == [[10], [11], [12]]


def test_groups_give_one_channel_each():
    structure = trace(ZOO[9].model(), inputs())
    # two groups of the norm, four of the convolution after it: one channel of each quarter
    assert structure.coupling("0").member("0", "out").indices.tolist() == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]
    assert structure.coupling("3").member("3", "out").indices.tolist() == [
        [0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]
    ]  # fmt: skip


def test_attention_takes_the_same_place_of_each_head():
    patches = trace(ZOO[6].model(), inputs()).coupling("patches")
    assert patches.member("attention", "both").indices.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert patches.member("position", "both").indices.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_halves_of_a_gate_go_together():
    found = members(trace(ZOO[7].model(), inputs()).coupling("gate"))
    assert found[("gate", "out")] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found[("head", "in")] == [[0], [1], [2], [3]]


def test_shared_weights_are_cut_alike():
    structure = trace(ZOO[8].model(), inputs())
    assert {("first", "in"), ("second", "in")} <= members(structure.coupling("stem")).keys()
    assert {("first", "out"), ("second", "out")} <= members(structure.coupling("first")).keys()
    assert {("shared", "in"), ("shared", "out")} <= members(structure.coupling("stem")).keys()


def test_columns_are_those_of_unfold():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, (2, 3), groups=2), nn.Flatten())
    model.append(nn.Linear(4 * 7 * 6, 2))
    structure = trace(model, inputs())
    member = structure.coupling("0").member("1", "in")
    images = torch.zeros(1, 6, 2, 3)
    for unit, columns in enumerate(member.columns(model[1])):
        marked = images.clone()
        marked[:, member.indices[unit]] = 1
        rows = F.unfold(marked, (2, 3)).view(2, -1)  # of each group
        for row in rows:
            assert row.nonzero().flatten().tolist() == columns.tolist()
    last = structure.coupling("1").member("3", "in")
    assert torch.equal(last.columns(model[3]), last.indices)


def test_columns_of_something_else():
    structure = trace(lenet(), inputs())
    with pytest.raises(ValueError, match="side 'out' of Conv2d '3'"):
        structure.coupling("3").member("3", "out").columns(nn.Conv2d(4, 6, 2))


def test_raw_inputs():
    assert [c.name for c in trace(lenet(), inputs(), include_inputs=True).couplings] == [
        "input 0", "0", "3", "6"
    ]  # fmt: skip
    coupling = trace(lenet(), inputs(), include_inputs=True).coupling("input 0")
    assert members(coupling) == {("0", "in"): [[0], [1], [2]], ("0", "input"): [[0], [1], [2]]}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, left, right):
        return {"y": self.head(torch.cat([self.left(left), self.right(self.norm(right))], 1))}


@pytest.mark.parametrize("named", [True, False])
def test_two_inputs_of_one_width(named):
    x = {"right": torch.randn(3, 4), "left": torch.randn(3, 4)}
    structure = trace(TwoInputs(), x if named else (x["left"], x["right"]), include_inputs=True)
    left, right = (0, 1) if not named else (1, 0)
    assert ("left", "in") in members(structure.coupling(f"input {left}"))
    assert {("right", "in"), ("norm", "both")} <= members(
        structure.coupling(f"input {right}")
    ).keys()


class Pixels(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 255)


@pytest.mark.parametrize(
    ("model", "x"),
    [(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 5, 6)),
     (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6)),
     (nn.Sequential(nn.Conv1d(6, 8, 3), nn.Conv1d(8, 3, 1)), torch.randn(2, 6, 5)),
     (Pixels(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 3, 1)), torch.ones(2, 6, 5, 5).byte())],
    ids=["sequences", "features", "signals", "pixels"],
)  # fmt: skip
def test_inputs_that_cannot_be_followed(model, x):
    structure = trace(model, x)
    assert {c.name: c.units for c in structure.couplings} == {"0": 8} and structure.refused == {}
    structure = trace(model, x, include_inputs=True)
    assert [c.name for c in structure.couplings] == ["0"]
    assert structure.refused == {
        "input of '0'": "only float inputs of 2, 4 or 5 dimensions can be followed"
    }


class AddedToInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 8)

    def forward(self, x):
        return self.head(x + self.body(x))


def test_what_is_added_to_the_input():
    structure = trace(AddedToInput(), inputs())
    assert structure.couplings == [] and "include_inputs" in structure.refused["body"]
    [coupling] = trace(AddedToInput(), inputs(), include_inputs=True).couplings
    assert {("0", "input"), ("body", "out"), ("body", "in"), ("head", "in")} == members(
        coupling
    ).keys()


@pytest.mark.parametrize("ignored", ["3", ["3"], "[3]"])
def test_ignored_keeps_what_it_produces(ignored):
    assert [c.name for c in trace(lenet(), inputs(), ignored=ignored).couplings] == ["0", "6"]


def test_ignored_module():
    model = ZOO[2].model()
    names = [c.name for c in trace(model, inputs(), ignored=[model[4]]).couplings]
    assert names == ["0", "3.conv1", "5.conv1", "5.conv2"]


def test_ignored_unknown():
    with pytest.raises(ValueError, match="ignored names 'nowhere'"):
        trace(lenet(), inputs(), ignored="nowhere")


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_the_model_is_not_touched(case: Case):
    model = case.model().train()
    optimizer = RLSOptimizer(model, fallback="sgd")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model(inputs()).square().mean().backward()
    next(model.parameters()).requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    staged = {w: s.summary for w, s in optimizer._registry.stages.items()}
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    calls.clear()
    with torch.no_grad():
        trace(model, inputs())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for name, p in model.named_parameters():
        assert (name in grads) == (p.grad is not None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(m.training for m in model.modules()) and calls == []
    assert all(s.summary is staged[w] for w, s in optimizer._registry.stages.items())


def test_parametrised_layer_is_refused():
    model = lenet()
    nn.utils.parametrizations.weight_norm(model[3])
    structure = trace(model, inputs())
    assert [c.name for c in structure.couplings] == ["6"]
    assert "parametrised" in structure.refused["0"] and "parametrised" in structure.refused["3"]


def test_depthwise_of_several_inputs_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(4, 2, 8))
    structure = trace(model, inputs())
    assert structure.couplings == []
    assert any("several input channels" in reason for reason in structure.refused.values())


def test_model_that_fails():
    with pytest.raises(ValueError, match="cannot be traced on the example inputs"):
        trace(lenet(), torch.randn(2, 5))


@dataclass
class Output:
    features: Tensor
    label: str = "features"


class Bag:
    """Of a type that nobody can look into."""

    def __init__(self, features):
        self.features = features


class Listing(list):
    """Which pytrees take for a leaf."""


class PutsOut(nn.Module):
    """Two layers, and what becomes of their features and logits."""

    def __init__(self, output):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.output = output

    def forward(self, x):
        x = self.first(x)
        return self.output(x, self.second(x))


@pytest.mark.parametrize(
    "output",
    [lambda f, y: (y, Output(f)), lambda f, y: [Output(y), {"more": Listing([Output(f)])}],
     lambda f, y: UserDict(y=y, f=f)],
)  # fmt: skip
def test_features_that_are_put_out_stay(output):
    structure = trace(PutsOut(output), torch.randn(2, 4))
    assert structure.couplings == [] and sorted(structure.output_shapes) == [(2, 3), (2, 8)]


def test_logits_in_a_dataclass():
    structure = trace(PutsOut(lambda f, y: (Output(y), None, 1.5)), torch.randn(2, 4))
    assert [c.name for c in structure.couplings] == ["first"] and structure.refused == {}


@pytest.mark.parametrize(
    ("output", "message"),
    [(lambda f, y: (y, Bag(f)), "tuples, lists, mappings or dataclasses, got Bag"),
     (lambda f, y: y.argmax(-1), "floating-point tensor, got .'torch.int64'"),
     (lambda f, y: None, "floating-point tensor, got ..$")],
)  # fmt: skip
def test_outputs_that_cannot_be_followed(output, message):
    with pytest.raises(ValueError, match=message):
        trace(PutsOut(output), torch.randn(2, 4))


def test_unknown_coupling():
    with pytest.raises(KeyError, match="no coupling 'x'"):
        trace(lenet(), inputs()).coupling("x")


def test_masked_layer_is_refused():
    model = lenet()
    prune.random_unstructured(model[3], "weight", 0.5)
    model(inputs())  # leaves a computed weight there, which cannot be deep-copied
    structure = trace(model, inputs())
    assert [c.name for c in structure.couplings] == ["6"]
    assert "masked" in structure.refused["0"] and "masked" in structure.refused["3"]


@pytest.mark.parametrize(
    ("model", "coupling", "reason"),
    [(HardCoded(), "first", "-1, 8, 8, 8"), (ChannelSoftmax(), "first", "computes something else")],
)
def test_what_cannot_be_cut_is_refused(model, coupling, reason):
    structure = trace(model, inputs())
    assert coupling in structure.refused and reason in structure.refused[coupling]
    assert all(c.name != coupling for c in structure.couplings)


def test_a_shuffle_is_followed():
    """Channels i and i + 4 lie side by side behind it, and the halves must stay as long."""
    structure = trace(Shuffle(), inputs())
    assert structure.refused == {}
    assert members(structure.coupling("first")) == {
        ("first", "out"): [[0, 4], [1, 5], [2, 6], [3, 7]],
        ("second", "in"): [[0, 1], [2, 3], [4, 5], [6, 7]],
    }


def test_cycle_of_slices_ends():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                x = x + torch.cat([x[:, 1:], x[:, :1]], 1)
            return self.last(x)

    structure = trace(Rolled(), torch.randn(2, 4))
    assert all(coupling.units == 1 for coupling in structure.couplings) or structure.refused

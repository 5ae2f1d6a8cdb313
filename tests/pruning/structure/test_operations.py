"""Rules of operations, each in a small network that needs it: what can go, and the cut itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self._forward(self, x)


def cut(model: nn.Module, x: Tensor) -> Structure:
    """The structure, when the model without half of each coupling has run in both modes."""
    structure = trace(model, x)
    halves = {c.name: range(c.units // 2) for c in structure.couplings}
    pruned = pruned_copy(model, plan(structure, halves), {})
    for training in (False, True):
        assert pruned.train(training)(x).shape == model(x).shape
    return structure


def units(structure: Structure) -> dict[str, int]:
    return {coupling.name: coupling.units for coupling in structure.couplings}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_what_feeds_a_recurrent_module(kind, both):
    model = Net(
        lambda m, x: m.head(m.rnn(m.map(x).flatten(1, 2).transpose(1, 2))[0]),
        map=nn.Conv2d(3, 6, 1), rnn=kind(12, 5, bidirectional=both, batch_first=True),
        head=nn.Linear(5 * (1 + both), 2),
    )  # fmt: skip
    structure = cut(model, torch.randn(2, 3, 2, 7))
    assert units(structure) == {"map": 6}
    reverse = [t for t, axis in structure.couplings[0].places if "reverse" in t]
    assert reverse == (["rnn.weight_ih_l0_reverse"] if both else [])


@pytest.mark.parametrize("norm", [False, True])
def test_features_that_become_maps_go_by_channels(norm):
    layers = [nn.Linear(7, 6 * 4 * 4), nn.Unflatten(1, (6, 4, 4)), nn.Conv2d(6, 3, 3)]
    if norm:
        layers.insert(2, nn.BatchNorm2d(6))
    structure = cut(nn.Sequential(*layers), torch.randn(2, 7))
    assert units(structure) == {"0": 6}
    assert structure.couplings[0].member("0", "out").indices.tolist() == [
        list(range(16 * i, 16 * i + 16)) for i in range(6)
    ]


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_of_pixels_passes_channels(mode):
    model = Net(
        lambda m, x: m.last(F.pad(m.first(x), (0, 1, 1, 2), mode)),
        first=nn.Conv2d(3, 6, 1), last=nn.Conv2d(6, 2, 3),
    )  # fmt: skip
    assert units(cut(model, torch.randn(2, 3, 5, 5))) == {"first": 6}


def test_padding_of_channels_ties_what_is_there_to_its_place():
    model = Net(
        lambda m, x: m.last(F.pad(m.first(x), (0, 0, 0, 0, 1, 2))),
        first=nn.Conv2d(3, 6, 1), last=nn.Conv2d(9, 2, 1),
    )  # fmt: skip
    structure = cut(model, torch.randn(2, 3, 5, 5))
    assert structure.couplings[0].member("last", "in").indices.flatten().tolist() == [*range(1, 7)]


class Standardised(nn.Conv2d):
    """A convolution by a weight of mean 0 and variance 1 over what each output takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        flat = F.batch_norm(flat, None, None, weight=self.gain.flatten(), training=True)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, self.stride, self.padding)


def test_weights_that_are_standardised_are_cut():
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.Flatten())
    model.append(nn.Linear(6 * 16, 5))
    structure = trace(model, torch.randn(2, 3, 8, 8))
    assert {c.name: c.units for c in structure.couplings} == {"0": 8, "2": 6}
    assert structure.refused == {}


def test_several_channels_of_each_group_go_together():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3, groups=8), nn.ReLU(), nn.Conv2d(24, 2, 1)
    ).eval()
    x = torch.randn(32, 3, 9, 9)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            for tensor in (layer.weight, layer.bias):
                tensor[: len(tensor) // 2] = 0
    expected = model(x)
    RLSPruner(model, None, x[:2], ratio=0.5, loader=[x]).step()
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (4, 12, 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


class Rotated(nn.Module):
    """Attention whose queries and keys are turned by halves, as positions turn them."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (torch.cat([a - 2 * b, b + 2 * a], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [False, True])
def test_halves_of_each_head_let_heads_go(heads):
    model = nn.Sequential(nn.Linear(5, 12), Rotated(), nn.Linear(12, 3))
    structure = trace(model, torch.randn(2, 4, 5), heads=heads)
    units = {coupling.name: coupling.units for coupling in structure.couplings}
    assert units == ({"0": 12, "1.q": 3, "1.out": 12} if heads else
                     {"0": 12, "1.q": 2, "1.v": 4, "1.out": 12})  # fmt: skip


class Running(nn.Module):
    """Sums of features along an axis, of channels or of tokens."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.first, self.last = dim, nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.first(x).cumsum(self.dim))


@pytest.mark.parametrize("dim, stays", [(1, False), (-1, True)])
def test_running_sums_keep_the_channels_that_they_add(dim, stays):
    structure = trace(Running(dim), torch.randn(2, 4, 5))
    assert [coupling.name for coupling in structure.couplings] == ([] if stays else ["first"])
    assert ("each has all before it" in structure.refused.get("first", "")) is stays


class Cosine(nn.Module):
    """Attention whose logits are cosines, as those of SwinV2; a literal size where `fixed`."""

    def __init__(self, fixed: bool = False):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 3)
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.fixed:
            q = q / q.norm(dim=-1, keepdim=True).expand(*q.shape[:-1], 4)
        logits = 10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_cosine_attention_loses_dimensions_of_its_heads():
    assert units(cut(Cosine(), torch.randn(2, 5, 6))) == {"qkv": 4}


def test_what_is_expanded_to_a_literal_size_stays():
    structure = trace(Cosine(fixed=True), torch.randn(2, 5, 6))
    assert units(structure) == {} and "qkv" in structure.refused


class Partly(nn.Module):
    """A shortcut that is added to the first channels only, as many as an attribute says."""

    def __init__(self):
        super().__init__()
        self.first, self.wider, self.last = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 7, 1),
            nn.Conv2d(7, 2, 1),
        )
        self.count = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.wider(x)
        return self.last(torch.cat([y[:, : self.count] + x, y[:, self.count :]], 1))


def test_a_number_of_first_channels_follows():
    model = Partly()
    assert units(cut(model, torch.randn(2, 3, 5, 5))) == {"first": 4, "wider": 3}
    RLSPruner(
        model, None, torch.randn(2, 3, 5, 5), ratio=0.5, importance="l1", compensate=False
    ).step()
    assert (model.count, model.last.in_channels) == (2, 4)


def test_a_number_of_tokens_counts_no_channels():
    model = Net(lambda m, x: m.last(m.first(x)[:, 1:]), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    model.unrelated = 4
    RLSPruner(
        model, None, torch.randn(2, 5, 3), ratio=0.5, importance="l1", compensate=False
    ).step()
    assert (model.unrelated, model.last.in_features) == (4, 2)


class Cleared(nn.Module):
    """A layer whose bias counts for its last channels alone, as in SwinV2."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.first.bias.clone()
        bias[: len(bias) // 2].zero_()
        a, b = F.linear(x, self.first.weight, bias).chunk(2, -1)
        return self.last(a * b)


def test_what_is_set_to_zero_keeps_its_channels():
    assert units(cut(Cleared(), torch.randn(5, 3))) == {"first": 4}

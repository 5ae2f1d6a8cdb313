"""Branches that the example inputs do not take are named, and found before anything is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.pruning_models import Attention, inputs
from support.pruning_surgery import changed, everything
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.running.watching import sized_by_values, unreached
from rlscuda.zoo import ImageShape, resnet20

ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


class Routed(nn.Module):
    """Each batch goes to the expert that its mean chooses."""

    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.experts[int(x.mean() > 0)](self.norm(self.first(x)).relu()).relu())


class Sized(nn.Module):
    """Large images take a layer more."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.shrink, self.head = nn.Conv2d(8, 8, 3, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.shrink(x) if x.shape[-1] > 10 else x
        return self.head(self.second(x).mean((2, 3)))


LOW, HIGH = ROWS - 3, ROWS + 3
IMAGES = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 16, 16)
CASES = {
    "routed": (Routed, LOW, HIGH, "experts.1"),
    "normalised": (lambda: Routed(norm=True), LOW, HIGH, "experts.1"),
    "sized": (Sized, *IMAGES, "shrink"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_branch_that_only_the_loader_takes_is_not_cut_through(case):
    make, example, other, name = CASES[case]
    model = make()
    optimizer = RLSOptimizer(model, lr=0.01)
    for batch in (example, other):
        model(batch).square().mean().backward()
        optimizer.step()
    before = everything(model, optimizer)
    pruner = RLSPruner(model, optimizer, example[:2], ratio=0.5, loader=[other, example],
                       importance="l2", compensate=False)  # fmt: skip
    message = "fails on a batch of loader: .*give example_inputs that reach all of the model"
    with pytest.raises(ValueError, match=message) as caught:
        pruner.step()
    assert case == "normalised" or repr(name) in str(caught.value)
    assert changed(before, everything(model, optimizer)) == set()
    for batch in (example, other):
        model(batch)


@pytest.mark.parametrize("case", CASES)
def test_what_the_example_does_not_reach_is_named(case):
    make, example, _, name = CASES[case]
    report = RLSPruner(
        make(), None, example[:2], ratio=0.5, importance="l2", compensate=False
    ).step()
    assert report.refused == {name: "the example inputs never reach it in eval mode"}
    assert report.ratio > 0 and name in str(report)


class Uncalled(nn.Module):
    """Its parameters are used by functions; no module of them is called."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(6, 4), nn.LayerNorm(4), nn.Embedding(3, 4)
        self.rnn, self.spare = nn.LSTM(4, 4), nn.Linear(4, 4)
        self.bare = nn.Parameter(torch.ones(4))
        self.only_asked = nn.Linear(4, 4)

    def forward(self, x):
        y = F.linear(x, self.linear.weight.detach().view(2, 2, 6).flatten(0, 1))
        y = F.layer_norm(y, (4,), self.norm.weight.data) + self.table.weight.T[:, 0] * self.bare
        with torch.no_grad():
            y = y.to(self.only_asked.weight.dtype)
        return y.new_zeros(self.only_asked.weight.shape[0]) + self.rnn(y[None])[0]


def test_parameters_used_without_a_call_are_reached():
    assert list(unreached(Uncalled().eval(), ROWS)) == ["spare", "only_asked"]


@pytest.mark.parametrize(
    ("model", "example"),
    [(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
     (nn.GRU(8, 4, 2, bidirectional=True), torch.randn(5, 2, 8)), (Attention(), inputs()),
     (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), ROWS),
     (resnet20(ImageShape(3, 8, 8), 10), torch.randn(2, 3, 8, 8))],
)  # fmt: skip
def test_nothing_is_named_falsely(model, example):
    state = torch.get_rng_state()
    assert unreached(model.train(), example) == {} and model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("forward", "by_values"),
    [(lambda x: x[x > 0], True), (lambda x: x[(x > 0).any(1)], True), (torch.unique, True),
     (lambda x: x[: int(x.argmax())], True), (lambda x: x[x.argmax(1)], False),
     (lambda x: x.topk(2).values, False), (lambda x: x[1:, [0, 1]], False)],
)  # fmt: skip
def test_sizes_that_follow_from_values(forward, by_values):
    model = nn.Identity()
    model.forward = forward
    assert sized_by_values(model, ROWS) == by_values


class ByValue(nn.Module):
    """What the weights make of the example decides about the branch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.limit = 0.0

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.second(x) if x.double().sum() < self.limit else x)


def test_a_branch_that_the_cut_itself_leads_into_is_found():
    torch.manual_seed(0)
    model = ByValue().eval()
    with torch.no_grad():
        model.first.weight.mul_(
            1e-3
        )  # so that with others, by which couplings are tried, it is far
        model.first.bias.mul_(1e-3)
        model.limit = 0.9 * float(model.first(ROWS[:2]).relu().double().sum())
    pruner = RLSPruner(model, None, ROWS[:2], ratio=0.5, importance="l2", compensate=False)
    with pytest.raises(ValueError, match="the pruned model fails on the example inputs: Runtime"):
        pruner.step()
    assert model.first.out_features == 8


class Endless(torch.utils.data.IterableDataset):
    """Which has no length."""

    def __iter__(self):
        return iter(ROWS)


def test_a_loader_without_a_length():
    model = Routed()
    loader = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(TypeError, match="len"):
        len(loader)
    model.experts[1] = model.experts[0]
    RLSPruner(model, None, ROWS[:2], ratio=0.5, loader=loader).step()
    assert model.first.out_features == 4

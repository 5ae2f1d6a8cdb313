"""Residual branches are found in whatever code they are written, and nothing else is."""

import copy

import pytest
import torch
from support.blocks import CASES, IMAGES, InPlace, copies, resnet
from support.compare import differing
from torch import nn

from rlscuda.pruning import find_blocks
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.running.calls import call, map_tensors, output_tensors


@pytest.mark.parametrize("name", CASES)
def test_branches_are_found(name):
    make, inputs, wanted, refused = CASES[name]
    torch.manual_seed(0)
    model = make()
    before = copies(model)
    blocks = find_blocks(model, inputs)
    assert [block.name for block in blocks.found] == wanted
    assert list(blocks.refused) == refused
    assert not differing(before, copies(model)) and model.training


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2]])
def test_a_model_without_a_branch_is_the_one_whose_branch_gives_zeros(name):
    make, inputs, _, _ = CASES[name]
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
    for block in find_blocks(model, inputs).found:
        silent = copy.deepcopy(model)
        for parameter in silent.get_submodule(block.exit).parameters():
            torch.nn.init.zeros_(parameter)
        without = with_stand_ins(model, block.stand_ins)
        pairs = (output_tensors(call(one, inputs)) for one in (without, silent))
        for got, expected in zip(*pairs, strict=True):
            assert torch.allclose(got, expected, atol=1e-12)


def test_what_a_block_holds():
    block = find_blocks(resnet(), IMAGES).block("block21")
    assert block.modules == [f"block21.{part}" for part in ("conv1", "bn1", "conv2", "bn2")]
    assert block.exit == "block21.bn2" and block.channel == 1
    assert block.shape == (2, 6, 4, 4) and block.enters == (2, 4, 8, 8)
    assert block.parameters == 4 * 6 * 9 + 6 * 6 * 9 + 4 * 6


def test_a_block_that_is_missing_says_what_is_there():
    make, inputs, _, _ = CASES["shared"]
    with pytest.raises(KeyError, match="no block 'inner': no module of its own holds its weights"):
        find_blocks(make(), inputs).block("inner")


def test_a_model_that_fails_says_so():
    with pytest.raises(ValueError, match="cannot be followed on the example inputs"):
        find_blocks(resnet(), torch.zeros(2, 7, 8, 8))


def test_a_removed_branch_still_trains_where_others_write_in_place():
    model = InPlace()
    (block,) = find_blocks(model, IMAGES).found
    without = with_stand_ins(model, block.stand_ins).train()
    without(IMAGES).sum().backward()
    assert without.stem.weight.grad.abs().sum() > 0


def test_hooks_and_random_state_are_left_alone():
    model, calls = resnet(), []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    find_blocks(model, IMAGES)
    assert not calls and torch.equal(state, torch.get_rng_state())


def same(x):
    return x


class Residual(nn.Module):
    """A residual branch; what it is given and what it puts out is changed by functions."""

    def __init__(self, first=same, last=same, end=same):
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.branch = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.first, self.last, self.end = first, last, end

    def forward(self, x):
        x = self.enter(self.first(x))
        return self.end(x + self.last(self.branch(x)))


def of_classes(x):
    return nn.functional.one_hot(x[:, 0].long(), 3).float()


def masked(x):
    return x.index_fill(1, torch.tensor([0]), float("-inf"))


@pytest.mark.parametrize(
    ("first", "end"),
    [(torch.log, same), (of_classes, same), (same, masked)],
    ids=["noise gives NaN", "noise fails", "infinite outputs"],
)
def test_noise_and_infinity_prove_nothing(first, end):
    torch.manual_seed(0)
    inputs = 2 * torch.rand(40, 3) + 0.01
    assert [b.name for b in find_blocks(Residual(first, end=end), inputs).found] == ["branch"]
    refused = find_blocks(Residual(first, torch.sigmoid, end), inputs).refused
    assert "does not put out zeros" in refused["branch"]


def test_a_model_that_fails_with_zeros_is_refused():
    def choosy(x):
        return x if x.any() else x.reshape(-1, 7)

    model = Residual(first=lambda x: 0 * x, end=choosy)
    nn.init.zeros_(model.enter.bias)
    assert "fails with zeros in its place" in find_blocks(model, torch.rand(4, 3)).refused["branch"]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_nested_branches_have_names_of_their_own():
    model = Residual()
    model.branch = Inner()
    blocks = find_blocks(model, torch.rand(4, 3))
    assert [block.name for block in blocks.found] == ["branch.down", "branch"]
    assert blocks.block("branch").modules == ["branch"]


class Cache:
    """As that of transformers, it asks its first layer how long it is."""

    def __init__(self):
        self.seen = {}

    def get_seq_length(self):
        return self.seen.get(0, 0)


class Attention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.map = layer, nn.Linear(6, 6)

    def forward(self, x, cache):
        cache.seen[self.layer] = x.shape[1]
        return self.map(x)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(layer) for layer in range(2))

    def forward(self, x):
        cache = Cache()
        for layer in self.layers:
            x = x + layer(x, cache)
        return {"x": x, "cache": cache}


def test_what_a_cache_counts_by_stays():
    blocks = find_blocks(Decoder(), torch.randn(2, 5, 6))
    assert [block.name for block in blocks.found] == ["layers.1"]
    assert "the cache by which the model counts" in blocks.refused["layers.0"]

"""Residual branches are found in whatever code they are written, and nothing else is."""

import copy

import pytest
import torch
from support.blocks import CASES, IMAGES, InPlace, copies, resnet
from support.compare import differing

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

"""Maps in the place of branches are those of least squares."""

import pytest
import torch
import torch.nn.functional as F
from support.blocks import CASES, IMAGES, PreActivation, resnet
from torch import nn

from rlscuda.pruning import find_blocks
from rlscuda.pruning.blocks.fitting import fit, kernels_of
from rlscuda.pruning.blocks.proving import with_stand_ins


def images(count=16, seed=3):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", ["block11", "block12", "block21"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_map_is_what_lstsq_finds(name, kernel):
    torch.manual_seed(1)
    model = resnet().double().eval()
    block = find_blocks(model, IMAGES.double()).block(name)
    batches = [images(8, 4), images(5, 5)]
    found = fit(model, block, batches, damping=0.0)[kernel]
    seen = {}
    exit_of = model.get_submodule(block.exit)
    entry = model.get_submodule(block.modules[0])
    entry.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    exit_of.register_forward_hook(lambda _, args, output: seen.update(F=output))
    model(torch.cat(batches))
    stride = 2 if name == "block21" else 1
    x = F.unfold(seen["x"].relu(), kernel, padding=kernel // 2, stride=stride)
    x = x.movedim(1, -1).flatten(0, 1)
    x, y = torch.cat([x, x.new_ones(len(x), 1)], 1), seen["F"].movedim(1, -1).flatten(0, 2)
    wanted = torch.linalg.lstsq(x, y).solution
    layer = found.stand_in.map
    assert torch.allclose(layer.weight.flatten(1), wanted[:-1].mT, atol=1e-7)
    assert torch.allclose(layer.bias, wanted[-1], atol=1e-7)
    left = (y - x @ wanted).square().sum() / (y - y.mean(0)).square().sum()
    assert found.explained == pytest.approx(1 - left.item(), abs=1e-8)


class Linear(nn.Module):
    """A branch that is linear, over tokens or pixels."""

    def __init__(self, branch):
        super().__init__()
        self.branch, self.head = branch, nn.Identity()

    def forward(self, x):
        return self.head(x + self.branch(x)).relu()


BRANCHES = {
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6)), (7, 5, 6), 0),
    "1x1": (lambda: nn.Sequential(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 3, 1)), (6, 3, 5, 5), 1),
    "3x3": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), (6, 3, 5, 5), 3),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_linear_branch_loses_nothing(name):
    make, shape, kernel = BRANCHES[name]
    torch.manual_seed(2)
    model = Linear(make()).double()
    x = torch.randn(shape).double()
    (block,) = find_blocks(model, x).found
    assert kernel in kernels_of(block)
    found = fit(model, block, [x, torch.randn(shape).double()], damping=0.0)[kernel]
    assert found.explained == pytest.approx(1, abs=1e-9)
    other = torch.randn(shape).double()
    instead = with_stand_ins(model, {**block.stand_ins, block.exit: found.stand_in})
    assert torch.allclose(instead(other), model(other), atol=1e-8)


def test_a_projected_block_has_a_map_with_its_stride():
    block = find_blocks(PreActivation(), IMAGES).block("conv2")
    found = fit(PreActivation(), block, [images().float()], damping=1e-6)
    assert {kernel: one.stand_in.map.stride for kernel, one in found.items()} == {
        1: (2, 2), 3: (2, 2),
    }  # fmt: skip


def test_an_empty_or_broken_loader_is_refused():
    model = resnet()
    block = find_blocks(model, IMAGES).found[0]
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, block, [], damping=1e-6)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit(model, block, [torch.full((2, 3, 8, 8), torch.nan)], damping=1e-6)


def test_pixels_that_lie_last_have_a_map_of_tokens():
    make, inputs, _, _ = CASES["channels last"]
    (block,) = find_blocks(make(), inputs).found
    assert block.channel == -1 and kernels_of(block) == (0,)


def test_post_norm_attention_has_a_map_of_tokens():
    make, inputs, _, _ = CASES["post-norm"]
    blocks = find_blocks(make(), inputs)
    assert [kernels_of(block) for block in blocks.found] == [(0,), (0,)]

"""Pruned copies along a ladder are what steps would leave; the model stays whole."""

import copy

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("importance", ["saliency", "l1"])
def test_a_copy_is_what_a_step_leaves(importance, compensate):
    model, x = net(), torch.randn(32, 2, 8, 8).double()
    model(x)  # running statistics
    options = {"importance": importance, "compensate": compensate, "loader": [x]}
    before = copy.deepcopy(model.state_dict())
    found = list(RLSPruner(model, None, x[:2], ratio=0.5, **options).copies([0, 0.3, 0.8]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(found[0](x), model.eval()(x))
    for ratio, pruned in zip((0.3, 0.8), found[1:]):
        stepped = net()
        stepped.load_state_dict(before)
        RLSPruner(stepped, None, x[:2], ratio=ratio, **options).step()
        own = stepped.state_dict()
        assert {n: v.shape for n, v in own.items()} == {
            n: v.shape for n, v in pruned.state_dict().items()
        }
        torch.testing.assert_close(pruned(x), stepped.eval()(x), rtol=1e-12, atol=1e-12)


def test_ratios_out_of_range_are_refused():
    model, x = net(), torch.randn(4, 2, 8, 8).double()
    pruner = RLSPruner(model, None, x[:2], ratio=0.5, loader=[x])
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
        next(pruner.copies([1.0]))
